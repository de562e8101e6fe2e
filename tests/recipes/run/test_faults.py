"""What goes wrong in a run: numbers, disks, options, a second run, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.checkpointing import load_custom_state
from filelock import FileLock
from loop_runs import Counter, entries, killed_at, options, resumed, run, same

from run import checkpoints, log
from run.stop import Stop


class BrokenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sum() * 0

    @staticmethod
    def backward(ctx, gradient):
        return torch.full((4, 1), float("nan"))


def broken_at(*numbers):
    """A finite loss, whose gradient is not finite in micro-steps of these numbers."""

    def loss(batch, index, model):
        out = model(batch.pixels)
        return out.square().mean() + (BrokenGradient.apply(out) if index in numbers else 0)

    return loss


def saved(folder):
    return sorted(one.name for one in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_reaches_no_weight(clip, tmp_path):
    seen = []
    chosen = options(tmp_path, max_grad_norm=clip, gradient_accumulation_steps=2)
    with pytest.raises(FloatingPointError) as error:
        run(
            chosen,
            loss=broken_at(10),
            after=lambda step, _, model, __: seen.append((step, model)),
        )
    step, model = seen[-1]  # micro-steps 10 and 11 are those of step 6
    assert step == 5 and all(bool(p.isfinite().all()) for p in model.parameters())
    told = str(error.value)
    assert "gradient's norm" in told and "step 6" in told and "checkpoint_4." in told
    assert "[10, 110]" in told and "caption 11" in told and "\n" not in told
    assert saved(tmp_path) == ["checkpoint_2", "checkpoint_4"]
    after, _ = run(resumed(chosen))  # on mended data
    whole, _ = run(options(tmp_path / "whole", max_grad_norm=clip, gradient_accumulation_steps=2))
    assert same(after, whole)


def breaks_weights(counter, model, optimizer):
    model.layer.weight.data[0, 0] = float("inf")


def breaks_optimizer(counter, model, optimizer):
    optimizer.state[model.layer.weight]["exp_avg_sq"][0, 0] = float("inf")


def breaks_averages(counter, model, optimizer):
    counter.average[0] = float("nan")


@pytest.mark.parametrize("breaks", [breaks_weights, breaks_optimizer, breaks_averages])
def test_what_is_not_finite_is_never_saved_nor_gone_on_from(breaks, tmp_path, monkeypatch):
    name = breaks.__name__.removeprefix("breaks_")

    def after(step, *parts):
        if step == 6:
            breaks(*parts)

    chosen = options(tmp_path)
    with pytest.raises(FloatingPointError, match=rf"step 6, .* 1 of {name}\..*checkpoint_4\."):
        run(chosen, after=after)
    assert saved(tmp_path) == ["checkpoint_2", "checkpoint_4"]
    with monkeypatch.context() as unchecked:
        unchecked.setattr(checkpoints, "_broken", lambda part: 0)
        run(resumed(chosen), after=after)
    with pytest.raises(ValueError, match=r"checkpoint_6: expected finite numbers.*Remove the fold"):
        run(resumed(chosen, max_train_steps=8))


def test_a_step_that_fp16s_scaler_skips_is_no_fault(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    chosen = options(tmp_path, lr_warmup_steps=6, logging_steps=1)
    _, counted = run(chosen, loss=broken_at(2, 3), scaler=scaler)
    assert counted.steps == 4 and scaler.get_scale() == 4
    rates = [1000 * line["lr"] for line in entries(tmp_path)[1:]]  # of the steps themselves
    assert rates == pytest.approx([1 / 6, 2 / 6, 3 / 6, 3 / 6, 3 / 6, 4 / 6])
    assert all(line["grad_norm"] < 100 for line in entries(tmp_path)[1:] if "grad_norm" in line)
    tiny = torch.amp.GradScaler("cpu", init_scale=2.0**-21)
    with pytest.raises(FloatingPointError, match="gradient's norm"):
        run(options(tmp_path / "stuck"), loss=broken_at(2), scaler=tiny)


class Malicious:
    """Makes a file where it is unpickled."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return Path.touch, (self.made,)


@pytest.mark.parametrize("file", ["others.bin", "optimizer.bin", "random_states_0.pkl"])
def test_a_checkpoint_of_a_stranger_runs_no_code(file, tmp_path):
    chosen, folder = cut_run(tmp_path), tmp_path / "checkpoints" / "checkpoint_4"
    torch.save(Malicious(tmp_path / "made"), folder / file)
    marker = json.loads((folder / "complete").read_text())
    marker["sha256"][file] = checkpoints.digest_of(folder / file)
    (folder / "complete").write_text(json.dumps(marker))
    with pytest.raises(ValueError, match=r"checkpoint_4: expected numbers alone, got getattr"):
        run(resumed(chosen))
    assert not (tmp_path / "made").exists()


def test_what_accelerate_loads_for_trl_is_data_too(tmp_path):
    torch.save(Malicious(tmp_path / "made"), tmp_path / "custom_checkpoint_0.pkl")
    with pytest.raises(ValueError, match="numbers alone"), checkpoints.data_only(tmp_path):
        load_custom_state(Counter(), str(tmp_path))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("damage", [
    lambda: b"\xb3".decode(), lambda: {}["state"], lambda: torch.zeros(2).view(3)
])  # fmt: skip
def test_a_damaged_pickle_is_one_line_whatever_it_raises(damage, tmp_path):
    told = r"got what cannot be loaded \(.*Remove the folder"
    with pytest.raises(ValueError, match=told), checkpoints.data_only(tmp_path):
        damage()
    with pytest.raises(ValueError, match=r"^ours$"), checkpoints.data_only(tmp_path):
        raise ValueError("ours")


def test_data_and_model_are_those_that_the_run_began_with(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(options(tmp_path), at=killed_at(5), data="rows", model="weights")
    chosen = resumed(options(tmp_path))
    with pytest.raises(ValueError, match=r"data: expected that .*: other rows.*--output_dir"):
        run(chosen, data="more rows", model="weights")
    with pytest.raises(ValueError, match=r"model: expected that .*: its weights differ"):
        run(chosen, data="rows", model="others")
    run(chosen, data="rows", model="weights")


def test_a_fingerprint_is_of_contents():
    one, other = torch.arange(40.0).reshape(4, 10), torch.arange(40.0).reshape(4, 10)
    known = checkpoints.fingerprint_of({"a": one}, {"shift": 3.0})
    assert checkpoints.fingerprint_of({"a": other}, {"shift": 3.0}) == known
    assert checkpoints.fingerprint_of({"a": other}, {"shift": 1.0}) != known
    assert checkpoints.fingerprint_of({"a": other.reshape(10, 4)}, {"shift": 3.0}) != known
    assert checkpoints.fingerprint_of({"a": other + 1e-3}, {"shift": 3.0}) != known


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
def test_a_fingerprint_changes_with_any_number(dtype):
    one = torch.arange(101).remainder(2).to(dtype)
    known = checkpoints.fingerprint_of({"a": one})
    assert checkpoints.fingerprint_of({"a": torch.cat([one[:1], one])[1:]}) == known  # a view
    for place in (1, 50, 100):
        other = one.clone()
        other[place] = 1 - float(one[place])
        assert checkpoints.fingerprint_of({"a": other}) != known


def test_a_run_that_has_done_more_than_is_asked_for_says_so(tmp_path, capsys):
    run(options(tmp_path))
    with pytest.raises(ValueError, match=r"max_train_steps: expected at least 6, .* got 3"):
        run(resumed(options(tmp_path), max_train_steps=3))
    run(resumed(options(tmp_path)))  # what was killed before it saved its result
    assert "steps      all 6 are done" in capsys.readouterr().out


def test_a_longer_run_tells_that_its_rate_rises_again(tmp_path, caplog):
    few = {"lr_decay_steps": 3, "logging_steps": 1}
    run(options(tmp_path, **few))
    assert not caplog.text
    run(resumed(options(tmp_path, **few), max_train_steps=9))
    assert "next step's learning rate is 0.001, and was to be 0." in caplog.text
    rates = [1000 * line["lr"] for line in entries(tmp_path)[1:]]
    falls = [1, 2 / 3, 1 / 3]
    assert rates == pytest.approx([1, 1, 1, *falls, *falls])


def test_a_log_that_was_shortened_is_noticed(tmp_path, caplog):
    chosen = cut_run(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    run(resumed(chosen))
    assert "log.jsonl: expected the 3 lines that it had, got 0" in caplog.text


def test_where_no_checkpoint_was_written_to_its_end_they_are_kept_and_told_of(tmp_path, caplog):
    chosen = cut_run(tmp_path)
    for number in (2, 4):
        (tmp_path / "checkpoints" / f"checkpoint_{number}" / "complete").unlink()
    run(resumed(chosen))
    assert "checkpoint_4 has no file complete" in caplog.text and "anew, at step 1" in caplog.text
    assert {"damaged_checkpoint_2", "damaged_checkpoint_4"} < set(saved(tmp_path))


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(step, *_):
        def write(*_):
            raise OSError(28, "No space left on device")

        if step == 6:
            monkeypatch.setattr(checkpoints, "save_file", write)

    whole = tmp_path / "whole"
    with pytest.raises(OSError, match=r"checkpoint_6: could not be .* No space.*checkpoint_4\."):
        run(options(whole), after=full)
    assert saved(whole) == ["checkpoint_4"]
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"log.jsonl: could not be written: No space .* Make room"):
        log.append_line(tmp_path / "log" / "log.jsonl", {"step": 1})


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_an_occupied_output_folder_is_named(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir: expected a folder .*file is a file.*--out"):
        run(options(tmp_path / name))


def cut_run(folder, **changes):
    chosen = options(folder, **changes)
    with pytest.raises(KeyboardInterrupt):
        run(chosen, at=killed_at(5))
    return chosen


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"max_grad_norm": 0.5},
        {"train_batch_size": 2, "lr_warmup_steps": 3},
        {"lr_warmup_steps": 2},
    ],
)
def test_options_of_another_run_are_refused_and_listed(changed, tmp_path):
    chosen = cut_run(tmp_path)
    recorded = (tmp_path / "options.json").read_text()
    with pytest.raises(ValueError) as error:
        run(resumed(chosen, **changed))
    for name, value in changed.items():
        assert f"{name} {getattr(chosen, name)} -> {value}" in str(error.value)
    assert (tmp_path / "options.json").read_text() == recorded
    run(resumed(chosen))


def test_options_that_leave_the_run_as_it_is_may_change(tmp_path, caplog):
    chosen = cut_run(tmp_path)
    more = resumed(chosen, max_train_steps=8, logging_steps=1, validation_steps=3)
    run(more)
    assert "max_train_steps 6 -> 8" in caplog.text and "resume" not in caplog.messages[0]
    assert json.loads((tmp_path / "options.json").read_text())["max_train_steps"] == 8
    assert entries(tmp_path)[-1]["step"] == 8


def test_options_that_may_change_are_options(recipes):
    known = set()
    for file in recipes.glob("train_*.py"):
        module = __import__(file.stem)
        known |= set(module.OPTIONS.defaults)
    assert known >= checkpoints.MAY_CHANGE


def test_the_options_of_another_recipe_are_refused(tmp_path):
    chosen = cut_run(tmp_path)
    stored = json.loads((tmp_path / "options.json").read_text())
    (tmp_path / "options.json").write_text(json.dumps({**stored, "beta": 5.0}))
    with pytest.raises(ValueError, match=r"beta 5.0 -> none"):
        run(resumed(chosen))
    (tmp_path / "options.json").write_text("{")
    with pytest.raises(ValueError, match=r"options.json: .*Remove the file"):
        run(resumed(chosen))


@pytest.mark.parametrize("rest", ['{"step": 5, "lo', '{"step": 5}', "\0\0\0", '"a'])
def test_a_cut_line_of_the_log_stops_nobody(rest, tmp_path):
    whole, _ = run(options(tmp_path / "whole"))
    chosen = cut_run(tmp_path / "cut")
    with (tmp_path / "cut" / "log.jsonl").open("a") as file:
        file.write(rest)
    after, _ = run(resumed(chosen))
    assert same(whole, after) and entries(tmp_path / "cut") == entries(tmp_path / "whole")


def test_a_run_that_had_no_checkpoint_yet_starts_its_log_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(options(tmp_path), at=killed_at(1))
    run(resumed(options(tmp_path)))
    assert [line["step"] for line in entries(tmp_path)] == [0, 2, 4, 6]


def test_a_resumed_logs_first_line_is_the_mean_of_all_its_steps(tmp_path):
    run(options(tmp_path / "whole", logging_steps=5))
    chosen = cut_run(tmp_path / "cut", logging_steps=5)
    run(resumed(chosen))
    assert entries(tmp_path / "cut") == entries(tmp_path / "whole")
    assert entries(tmp_path / "cut")[2]["index"] == 2.0


@pytest.mark.parametrize("file", ["optimizer.bin", "trainable.safetensors", "complete"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(file, damage, tmp_path, caplog):
    if (file, damage) == ("complete", "gone"):
        pytest.skip("that is an unfinished one, which test_loop has")
    whole, _ = run(options(tmp_path / "whole"))
    chosen = cut_run(tmp_path / "cut")
    hurt(tmp_path / "cut" / "checkpoints" / "checkpoint_4" / file, damage)
    after, _ = run(resumed(chosen))
    assert same(whole, after) and entries(tmp_path / "cut") == entries(tmp_path / "whole")
    assert f"checkpoint_4/{file} is" in caplog.text and "damaged_checkpoint_4" in caplog.text
    assert saved(tmp_path / "cut") == ["checkpoint_4", "checkpoint_6", "damaged_checkpoint_4"]


@pytest.mark.parametrize("wrong", ["[" * 200_000, {"step": float("inf")}, {"step": -4},
                                   {"step": 2}, {"sha256": {}}, {"sha256": [1]}])  # fmt: skip
def test_a_marker_that_is_not_of_its_checkpoint_is_damage(wrong, tmp_path, caplog):
    chosen = cut_run(tmp_path)
    marker = tmp_path / "checkpoints" / "checkpoint_4" / "complete"
    whole = json.loads(marker.read_text())
    marker.write_text(wrong if isinstance(wrong, str) else json.dumps(whole | wrong))
    run(resumed(chosen))
    assert "checkpoint_4/complete is damaged" in caplog.text
    (tmp_path / "options.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="expected the run's options"):
        run(resumed(chosen))


def hurt(file, how):
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        at = len(content) // 2
        file.write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])


def test_where_no_checkpoint_is_whole_nothing_is_trained(tmp_path):
    chosen = cut_run(tmp_path)
    for number in (2, 4):
        hurt(tmp_path / "checkpoints" / f"checkpoint_{number}" / "optimizer.bin", "cut")
    with pytest.raises(ValueError, match=r"checkpoint_4/optimizer.bin.*checkpoint_2/optimizer.bin"):
        run(resumed(chosen))
    assert saved(tmp_path) == ["damaged_checkpoint_2", "damaged_checkpoint_4"]


def test_foreign_folders_among_the_checkpoints_stay(tmp_path):
    foreign = ["backup", "checkpoint_", "checkpoint_4_old", "checkpoint_old", "old_1"]
    for name in foreign:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    chosen = cut_run(tmp_path)
    run(resumed(chosen))
    assert saved(tmp_path) == sorted([*foreign, "checkpoint_4", "checkpoint_6"])


def test_a_second_run_on_the_folder_is_refused_until_the_first_is_dead(tmp_path):
    code = (
        "import sys, time; from filelock import FileLock\n"
        f"lock = FileLock({str(tmp_path / '.lock')!r}); lock.acquire(); print('held', flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline().strip() == b"held"
        with pytest.raises(ValueError, match="another run is writing there"):
            run(options(tmp_path))
        assert not (tmp_path / "options.json").exists()
        other.kill()
    run(options(tmp_path))


def test_the_folder_is_held_while_a_run_lasts(tmp_path):
    def at(index):
        with pytest.raises(Exception, match="lock"):
            FileLock(tmp_path / ".lock", is_singleton=False).acquire(blocking=False)

    run(options(tmp_path, max_train_steps=1), at=at)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(number, code, tmp_path, capsys):
    whole, _ = run(options(tmp_path / "whole", logging_steps=5))

    def at(index):
        if index == 2:  # both: a launcher sends a second one
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)

    chosen = options(tmp_path / "cut", logging_steps=5)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        run(chosen, at=at)
    assert ended.value.code == code and signal.getsignal(number) is before
    told = capsys.readouterr().out.strip()
    told = told.splitlines()[-1]  # after what is trained
    assert told.startswith("Stopped after step 3, ") and "checkpoint_3" in told
    assert f"--output_dir={tmp_path / 'cut'}" in told
    assert told.endswith("--resume_from_checkpoint latest")
    after, _ = run(resumed(chosen))
    assert same(whole, after) and entries(tmp_path / "cut") == entries(tmp_path / "whole")


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path):
    _, counted = run(
        options(tmp_path), at=lambda index: index == 5 and os.kill(os.getpid(), signal.SIGTERM)
    )
    assert counted.steps == 6


def test_a_second_ctrl_c_does_not_wait(monkeypatch):
    with Stop("").watching() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)  # at once: a launcher's copy
        stop.since -= 2
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_tensorboard_has_each_point_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = options(tmp_path, report_to="tensorboard", logging_steps=1, checkpointing_steps=3)
    with pytest.raises(KeyboardInterrupt):
        run(chosen, at=killed_at(5))  # steps 4 and 5 are logged, and not in the checkpoint
    run(resumed(chosen))
    events = EventAccumulator(str(tmp_path / "agsm-loss")).Reload()
    assert [one.step for one in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", ["others.bin", "optimizer.bin", "trainable.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04" + bytes(60), b"\x80\x02N."], ids=["empty", "cut", "pickle"]
)
def test_what_cannot_be_loaded_is_one_line(name, content, tmp_path):
    """Although its checksum is right: somebody has written both."""
    chosen, folder = cut_run(tmp_path), tmp_path / "checkpoints" / "checkpoint_4"
    (folder / name).write_bytes(content)
    marker = json.loads((folder / "complete").read_text())
    marker["sha256"][name] = checkpoints.digest_of(folder / name)
    (folder / "complete").write_text(json.dumps(marker))
    with pytest.raises(ValueError, match=r"checkpoint_4: expected .*, got ") as error:
        run(resumed(chosen))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["options.json", "log.jsonl", "checkpoints"])
def test_an_output_folder_with_other_things_of_these_names_is_named(name, tmp_path):
    (tmp_path / name).write_text("") if name == "checkpoints" else (tmp_path / name).mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"output_dir: expected .*{name} there is a (file|fold)"):
        run(options(tmp_path))
    assert sorted(tmp_path.iterdir()) == before


def test_a_read_only_output_folder_is_named_and_left_as_it_is(tmp_path, monkeypatch):
    """Found before anything is loaded, or when it turns out; root may write everywhere."""
    chosen = cut_run(tmp_path)
    files = {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()}
    with monkeypatch.context() as before, pytest.raises(ValueError, match=r"is read-only. Choose"):
        before.setattr(os, "access", lambda *_: False)
        run(resumed(chosen))

    def refuses(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(FileLock, "acquire", lambda *_, **__: refuses())
    with pytest.raises(ValueError, match=r"output_dir: expected .*Permission denied.*Choose"):
        run(resumed(chosen))
    assert {one: one.read_bytes() for one in files} == files
