"""What a new user meets: errors of one line with a remedy, before anything is loaded."""

import sys
import time

import pytest
import safetensors.torch
import torch
import yaml
from datasets import Dataset
from diffusers import StableDiffusionPipeline

import diagnose
import generate
import train_agsm
import train_ddpo
import train_dpo
import train_spo
from data.sources import check_source, loading
from lab import train_base
from lab.world.export import captioned, preferences
from model import pipeline
from run import cli
from run.options import did_you_mean


@pytest.fixture
def nothing_loads(monkeypatch):
    """Every model that is loaded is an error."""

    class Loads:
        @staticmethod
        def from_pretrained(*args, **settings):
            raise AssertionError(f"loaded {args}")

    monkeypatch.setattr(pipeline, "DiffusionPipeline", Loads)


def table(folder, caption):
    rows = captioned(3, seed=0).remove_columns("caption").add_column("caption", [caption] * 3)
    rows.to_parquet(folder / "same.parquet")
    return ["--data", str(folder / "same.parquet"), "--model", "org/base", "--output_dir",
            str(folder / "run")]  # fmt: skip


@pytest.mark.parametrize("caption", ["a photo", ["a photo"]])
def test_captions_that_are_all_the_same_are_an_error(caption, tmp_path, nothing_loads):
    flags = [*table(tmp_path, caption), "--candidates", "in_batch:1"]
    with pytest.raises(ValueError, match=r"'a photo' in every row.*--candidates empty"):
        train_agsm.main(flags)
    for more in (["--candidates", "empty"], ["--candidates", "hard:1"], ["--objective=denoising"]):
        with pytest.raises(ValueError, match="loaded"):
            train_agsm.main([*flags, *more])


def test_pairs_whose_captions_are_all_the_same_are_an_error_with_agsm(tmp_path, nothing_loads):
    rows = preferences(3, seed=0).remove_columns("caption").add_column("caption", ["a"] * 3)
    rows.to_parquet(tmp_path / "pairs.parquet")
    flags = ["--data", str(tmp_path / "pairs.parquet"), "--model", "org/base"]
    flags += ["--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="in every row"):
        train_dpo.main([*flags, "--agsm_weight", "1", "--candidates", "in_batch:1"])
    with pytest.raises(ValueError, match="loaded"):
        train_dpo.main(flags)


def test_several_captions_of_one_image_are_not_the_same(tmp_path, nothing_loads):
    with pytest.raises(ValueError, match="loaded"):
        train_agsm.main([*table(tmp_path, ["a photo", "a picture"]), "--candidates", "in_batch:1"])


@pytest.mark.parametrize("recipe", [train_agsm, train_spo, train_ddpo, train_base])
def test_a_folder_with_a_run_is_refused_before_anything_is_loaded(recipe, tmp_path, nothing_loads):
    if recipe is train_ddpo:
        pytest.importorskip("trl")
    (tmp_path / "checkpoints" / "checkpoint_0").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a run; add --resume_from_checkpoint"):
        recipe.main(["--output_dir", str(tmp_path)])


def test_only_the_world_has_a_model_of_its_own(tmp_path, capsys, monkeypatch):
    assert (
        train_agsm.OPTIONS.make().model
        == diagnose.OPTIONS.make().model
        == "recipes/lab/models/flow"
    )
    assert train_spo.OPTIONS.make().model == "recipes/lab/models/epsilon"
    assert generate.OPTIONS.make().model == "recipes/lab/models/flow"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    for module, flags in (
        (train_agsm, ["--data", "photos.parquet"]),
        (diagnose, ["--data", "photos.parquet"]),
        (generate, ["--prompts", str(prompts)]),
    ):
        with pytest.raises(SystemExit):
            module.main(flags)
        assert "Give --model" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["model", "tokens", "lora"])
def test_a_path_to_nothing_is_named_and_no_settings_are_left(
    option, flow_base, tmp_path, nothing_loads
):
    flags = {"model": flow_base, option: tmp_path / "gone", "output_dir": tmp_path / "out"}
    with pytest.raises(FileNotFoundError, match=f"{option}: no such file .*: {tmp_path}/gone"):
        generate.main([f"--{name}={value}" for name, value in flags.items()])
    with pytest.raises(ValueError, match="loaded"):  # a failure of any other kind
        generate.main([f"--{name}={flags[name]}" for name in ("output_dir",)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "is_path"),
    [("./a", True), ("a/b/c", True), ("here/a", True), ("a.parquet", True), ("owner/name", False),
     ("name", False), ("owner/v1.5", False), ("", False)],
)  # fmt: skip
def test_what_can_only_be_a_path(name, is_path, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    if is_path:
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            check_source("model", name)
    else:
        check_source("model", name)


def test_what_the_hub_does_not_have_is_one_line():
    with (
        pytest.raises(ValueError, match=r"^model: expected a folder, or a hub id .*: not found$"),
        loading("model", "owner/name"),
    ):
        raise OSError("not found\nand\nmore")


def test_validation_prompts_that_are_not_there_are_an_error_at_once(tmp_path, nothing_loads):
    flags = ["--validation_prompts", str(tmp_path / "gone.txt")]
    with pytest.raises(FileNotFoundError, match=r"prompts: no file .*gone\.txt"):
        train_agsm.main([*flags, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("debug", [False, True])
def test_errors_of_users_are_one_line_and_tracebacks_are_asked_for(
    debug, tmp_path, capsys, monkeypatch
):
    flags = ["--tokens", str(tmp_path / "gone"), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
    monkeypatch.setenv("AGSM_DEBUG", "1" if debug else "0")

    def main():
        generate.main()

    with pytest.raises(FileNotFoundError if debug else SystemExit):
        cli.command(main)
    lines = capsys.readouterr().err.splitlines()
    assert debug or (len(lines) == 1 and ": error: tokens: no such" in lines[0])
    assert debug or lines[0].endswith("(AGSM_DEBUG=1 shows the traceback)")


@pytest.mark.parametrize(
    "main",
    [
        lambda: safetensors.torch.load(b"not one"),
        lambda: torch.ones(2) @ torch.ones(3),
        lambda: StableDiffusionPipeline.from_pretrained("no/such/folder"),
        lambda: yaml.safe_load("a: b: c"),
    ],
)
def test_errors_of_libraries_are_one_line(main, capsys):
    with pytest.raises(SystemExit):
        cli.command(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert ": error: " in line and line.endswith("(AGSM_DEBUG=1 shows the traceback)")


@pytest.mark.parametrize("kind", [TypeError, KeyError, NotImplementedError, ZeroDivisionError])
def test_bugs_keep_their_traceback(kind):
    def main():
        raise kind

    with pytest.raises(kind):
        cli.command(main)


def test_an_error_of_a_process_that_prepares_batches_is_one_line():
    text = "Caught OSError.\nOriginal Traceback (most recent call last):\n  at\nOSError: no"
    assert cli.one_line(OSError(text)) == "OSError: no"


def test_a_ctrl_c_says_what_is_left(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        cli.command(main, "with the images so far")
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("stopped at once, with the images so far\n")


def test_names_are_guessed_by_spelling_and_by_initials():
    known = ["learning_rate", "max_train_steps", "model"]
    assert did_you_mean("--lr", known, "--") == "; did you mean --learning_rate?"
    assert did_you_mean("max-train-step", known) == "; did you mean max_train_steps?"
    assert did_you_mean("nothing_like_it", known) == ""


def test_an_empty_caption_column_is_no_caption(tmp_path):
    """Rows without a text are left out, and the others may be all the same."""
    from data.task import Task

    Dataset.from_dict({"caption": ["a", None, "a"]}).to_parquet(tmp_path / "t.parquet")
    assert Task(str(tmp_path / "t.parquet")).one_caption() == "a"


def test_a_run_that_validates_nothing_says_so(flow_base, tmp_path, capsys):
    captioned(4, seed=0).to_parquet(tmp_path / "w.parquet")
    flags = ["--model", str(flow_base), "--data", str(tmp_path / "w.parquet")]
    flags += ["--max_train_steps", "1", "--train_batch_size", "2"]
    train_agsm.main([*flags, "--output_dir", str(tmp_path / "run"), "--num_tokens", "1"])
    told = capsys.readouterr().out
    assert "validation none: give --validation_prompts FILE" in told
    assert "data       4 images" in told and "--prompts prompts.txt" in told


def test_a_summary_counts_what_a_step_sees():
    from loop_runs import OPTIONS

    from run.log import steps_line

    chosen = OPTIONS.make(train_batch_size=4, gradient_accumulation_steps=2, max_train_steps=2000)
    told = steps_line(chosen, 500, 3, "rows")
    assert told["steps"] == (
        "501 (resumed) to 2,000, in batches of 24 (4 x 2 micro-steps x 3 processes)"
    )


def test_tensorboard_gets_the_sheets_once(tmp_path):
    from loop_runs import killed_at, options, resumed, run
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "sheets").mkdir()
    for step in (0, 4, 6):  # those that are validated
        Image.new("RGB", (8, 8)).save(tmp_path / "sheets" / f"{step:06d}.png")
    chosen = options(tmp_path, report_to="tensorboard", logging_steps=1, checkpointing_steps=3)
    with pytest.raises(KeyboardInterrupt):
        run(chosen, at=killed_at(5))  # step 4 is logged, and not in the checkpoint
    time.sleep(1.1)  # the files are read in the order of their names, which begin with the second
    run(resumed(chosen))
    events = EventAccumulator(str(tmp_path / "agsm-loss")).Reload()
    assert [one.step for one in events.Images("validation")] == [0, 4, 6]


def test_a_studys_bar_tells_runs_steps_and_what_is_left(tmp_path, monkeypatch, capsys):
    from lab.studies import progress
    from lab.studies.plan import Plan, folder_of

    plan = Plan("org/base", str(tmp_path), {"AGSM": {"max_train_steps": 40}, "b": {}})
    runs = [("base", 0), ("AGSM", 0), ("b", 0)]
    assert progress.steps_of(plan, "base", 0) == (0, 0)
    assert progress.steps_of(plan, "b", 0) == (0, 1000)  # the recipe's default
    folder = folder_of(plan, "AGSM", 0) / "train"
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"step": 10}\n{"step": 20}\n')
    assert progress.steps_of(plan, "AGSM", 0) == (20, 40)
    bar = progress.Progress(plan, runs)
    monkeypatch.setattr(bar, "pause", 0)
    bar.show({("base", 0)}, [("AGSM", 0)])
    assert bar.bar.n == pytest.approx(1.4) and "AGSM 0: step 20 of 40" in capsys.readouterr().err
    bar.bar.close()
