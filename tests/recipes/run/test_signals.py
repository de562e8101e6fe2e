"""Real processes that are asked to end, or whose parent is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fresh
import pytest
import yaml
from filelock import FileLock, Timeout

import train_agsm
from lab.studies.plan import folder_of, read_plan
from lab.studies.run import begin
from run.stop import PIPED

pytestmark = pytest.mark.slow
FEW = {"train_batch_size": 2, "num_tokens": 1, "validation_per_category": 1,
       "validation_inference_steps": 1, "validation_steps": 10**7, "logging_steps": 1,
       "checkpointing_steps": 10**6, "max_train_steps": 10**6}  # fmt: skip


def started(function, *arguments, **settings):
    return fresh.Started(function, *arguments, OMP_NUM_THREADS="1", COLUMNS="80", **settings)


def wait_for(condition, process=None, seconds=120):
    until = time.time() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.time() < until
        time.sleep(0.05)


def lines(folder):
    file = folder / "log.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def checkpoint(folder, step):
    return folder / "checkpoints" / f"checkpoint_{step}"


def free(folder):
    """Nobody trains there any more: the lock ends with its process."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    lock.release()
    return True


def test_ctrl_c_at_a_recipe_with_workers(flow_base, recipes, tmp_path):
    flags = {**FEW, "model": flow_base, "output_dir": tmp_path, "dataloader_num_workers": 1}
    command = [recipes / "train_agsm.py", *(f"--{name}={value}" for name, value in flags.items())]
    run = started(fresh.script, *command, leads=True)
    wait_for(lambda: lines(tmp_path) >= 3, run)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    told, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in errors and "SIGINT" in errors
    last = told.strip().splitlines()[-1]
    assert last.startswith("Stopped after step") and str(recipes.name) in last
    assert last.endswith("--resume_from_checkpoint latest")
    done = lines(tmp_path)
    marker = json.loads((checkpoint(tmp_path, done) / "complete").read_text())
    assert marker["step"] == marker["lines"] == done

    with pytest.raises(ValueError, match="holds a run"):
        train_agsm.main(command[1:])


def test_a_study_ends_with_its_runs_and_they_with_it(flow_base, recipes, tmp_path):
    plan = {"model": str(flow_base), "output_dir": str(tmp_path / "out"), "seeds": [0, 1],
            "common": {**FEW}, "methods": {"AGSM": {}}}  # fmt: skip
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(plan))
    read = read_plan(file)
    for seed in (0, 1):
        (begin(read, "base", seed) / "result.json").write_text("{}")
    folder = folder_of(read, "AGSM", 0) / "train"

    study = started(fresh.script, recipes / "study.py", "--config", file, "--jobs", 1)
    wait_for(lambda: lines(folder) >= 3, study)
    study.send_signal(signal.SIGINT)
    told, errors = study.communicate(timeout=60)
    assert study.returncode == 130 and "Traceback" not in errors
    assert "Stopped with 2 runs to do" in told
    done = lines(folder)
    assert free(folder) and (checkpoint(folder, done) / "complete").exists()
    assert not folder_of(read, "AGSM", 1).exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_processes_end_together_where_one_is_asked_to(flow_base, recipes, tmp_path, monkeypatch):
    flags = {**FEW, "model": flow_base, "output_dir": tmp_path}
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, recipes / "train_agsm.py"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run = started(fresh.module, *command)
    wait_for(lambda: lines(tmp_path) >= 3, run)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    told, errors = run.communicate(timeout=60)
    assert "exitcode  : 143" in errors or "exitcode: 143" in errors, errors
    assert told.count("Stopped after step") == 1 and "accelerate launch " in told
    saved = checkpoint(tmp_path, lines(tmp_path))
    assert (saved / "random_states_1.pkl").exists()
    assert json.loads((saved / "complete").read_text())["step"] == lines(tmp_path)


def test_a_run_ends_when_the_study_that_started_it_is_killed(recipes):
    """Its standard input is the study's pipe, which ends with the study."""
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from run.stop import end_with_parent\n"
        "end_with_parent(); print('watches', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, recipes],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, PIPED: "1"},
    ) as run:
        assert run.stdout.readline().strip() == b"watches" and run.poll() is None
        run.stdin.close()
        assert run.wait(timeout=30) == -signal.SIGTERM
