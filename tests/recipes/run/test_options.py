"""Options of the recipes: defaults, then the file, then the command line; limits; --help."""

import importlib
import json
import re
from dataclasses import dataclass
from typing import Literal

import pytest

import train_agsm
import train_dpo
import train_nft
from data.task import DataOptions, PromptFileOptions
from model.agsm import AGSMOptions, unread_of
from model.session import ValidationOptions
from model.trained import ModelOptions, TimestepOptions, resolve
from run.checkpoints import check_output
from run.loop import LoopOptions, RunOptions
from run.options import FIRST, OptionSet, flags, option


@dataclass(frozen=True)
class Own:
    kind: Literal["one", "two"] = option("one", "Kind of it.")
    strength: float = option(0.5, "Strength of it.", above=0, at_most=1)


OPTIONS = OptionSet(
    Own,
    ModelOptions,
    DataOptions,
    AGSMOptions,
    TimestepOptions,
    LoopOptions,
    RunOptions,
    ValidationOptions,
    PromptFileOptions,
    title="Its-own",
    resolve=resolve,
    output_dir="runs/shared",
    learning_rate=3e-4,
    train_batch_size=option(8, "Pairs of {title}.", at_least=2),
)


def parsed(tmp_path, text, *arguments):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return OPTIONS.parse("Doc.", ["--config", str(file), *arguments])


def refused(capsys, *arguments):
    """The one line that is printed before the program ends."""
    with pytest.raises(SystemExit) as stopped:
        OPTIONS.parse("Doc.", list(arguments))
    assert stopped.value.code == 2
    line, end = capsys.readouterr().err.split("\n")
    assert not end and ": error: " in line and line.endswith("(see --help)")
    return line


def test_a_set_may_have_other_defaults_and_sentences():
    options = OPTIONS.parse(None, [])
    assert options == OPTIONS.make() and vars(options) == vars(OPTIONS.make())
    assert (options.learning_rate, options.output_dir) == (3e-4, "runs/shared")
    assert (options.train_batch_size, OPTIONS.help_of("train_batch_size")) == (
        8,
        "Pairs of Its-own.",
    )
    assert LoopOptions().train_batch_size == 16 and OPTIONS.defaults["max_train_steps"] == 1000


def test_unknown_options_of_a_set_are_refused():
    with pytest.raises(TypeError, match=r"changes: .*strengths"):
        OptionSet(Own, strengths=1.0)
    with pytest.raises(TypeError, match=r"expected some of .*strength.*, got .'strengths'"):
        OPTIONS.make(strengths=1.0)


def test_the_command_line_wins_over_the_file(tmp_path):
    text = "max_train_steps: 7\nlearning_rate: 1\ncompile: true\nfull: true\n"
    options = parsed(tmp_path, text, "--max-train-steps", "9", "--compile", "false")
    assert (options.max_train_steps, options.learning_rate) == (9, 1.0)
    assert (options.compile, options.full) == (False, True)
    assert options.seed == OPTIONS.defaults["seed"]


def test_a_file_may_have_the_sections_as_tables(tmp_path):
    text = "model:\n  model: there\n  rank: 4\nkind: two\ntraining:\n  logging_steps: 9\n"
    options = parsed(tmp_path, text)
    assert (options.model, options.rank, options.kind) == ("there", 4, "two")
    assert options.logging_steps == 9


def test_values_of_a_file_are_read_as_the_command_lines(tmp_path):
    options = parsed(tmp_path, "learning_rate: 1e-3\nmixed_precision: no\nreport_to: 2020-01-01\n")
    assert options.learning_rate == 1e-3  # YAML 1.1 reads a text there,
    assert options.mixed_precision == "no"  # and false there
    assert options.report_to == "2020-01-01"


def test_underscores_and_dashes_are_the_same():
    one = OPTIONS.parse(None, ["--max_train_steps", "3", "--full"])
    assert one == OPTIONS.parse(None, ["--max-train-steps", "3", "--full"])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_train_step: 3", "unknown option --max_train_step; did you mean --max_train_steps?"),
        ("lr: 0.1", "unknown option --lr; did you mean --learning_rate?"),
        ("max_train_steps: many", "max_train_steps"),
        ("max_train_steps: true", "max_train_steps"),
        ("learning_rate: false", "learning_rate"),
        ("neg_scale: null", "neg_scale"),
        ("kind: three", "kind"),
        ("resume_from_checkpoint: 1", "resume_from_checkpoint"),
        ("full: maybe", "full"),
        ("seed: [1, 2]", "seed: expected one value"),
        ("seed: {a: 1}", "seed: expected one value"),
        ("training: {seed: {a: 1}}", "seed: expected one value"),
        ("- max_train_steps", "expected a table"),
        ("a: b: c", "mapping values"),
        ("config: other.yaml", "expected no further file"),
    ],
)
def test_a_bad_file_is_named_with_its_key(tmp_path, text, named, capsys):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    line = refused(capsys, "--config", str(file))
    assert str(file) in line and named in line


def test_a_file_that_is_not_there_is_named(capsys):
    assert "there/is/none.yaml" in refused(capsys, "--config", "there/is/none.yaml")


@pytest.mark.parametrize(
    "arguments", [["--kind", "three"], ["--stepz", "3"], ["--max_train", "3"], ["stray"]]
)
def test_a_bad_flag_stops_the_program(arguments, capsys):
    assert arguments[0] in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--max-grad-norm", "-1", "at least 0, got -1.0. Norm to which"),
        ("--lr-warmup-steps", "-5", "at least 0, got -5."),
        ("--gradient-accumulation-steps", "0", "at least 1, got 0."),
        ("--checkpointing-steps", "0", "at least 1"),
        ("--validation-steps", "0", "at least 1"),
        ("--logging-steps", "0", "at least 1"),
        ("--max-train-steps", "0", "at least 1"),
        ("--learning-rate", "0", "above 0"),
        ("--learning-rate", "nan", "above 0"),
        ("--timestep-low", "1.5", "below 1"),
        ("--train-batch-size", "1", "at least 2, got 1. Pairs of Its-own."),
        ("--strength", "2", "at most 1"),
    ],
)
def test_numbers_have_limits(flag, value, expected, capsys, tmp_path):
    name = flag.lstrip("-").replace("-", "_")
    assert f"{name}: expected {expected}" in refused(capsys, flag, value)
    file = tmp_path / "c.yaml"
    file.write_text(f"{name}: {value}\n")
    assert f"{name}: expected {expected}" in refused(capsys, "--config", str(file))
    with pytest.raises(ValueError, match=f"{name}: expected"):
        OPTIONS.make(**{name: float(value)})


def test_help_has_what_is_most_used_first_then_sections_with_defaults(capsys):
    with pytest.raises(SystemExit):
        OPTIONS.parse("Trains it.\n\n    python it.py\n    python it.py --full\n", ["--help"])
    text = capsys.readouterr().out
    titles = re.findall(r"^([\w -]+):$", text, re.MULTILINE)
    sections = ["model", "data", "AGSM", "timesteps", "training", "run", "validation"]
    assert titles == ["most used", "options", "Its-own", *sections]
    assert "Trains it.\n\n    python it.py\n    python it.py --full\n" in text
    first, rest = text.split("\noptions:\n")
    used = re.findall(r"^  --(\w+)", first, re.MULTILINE)
    assert used == [name for name in FIRST if name in OPTIONS.defaults] and len(used) <= 10
    assert "--learning_rate FLOAT" in first and "(default: 0.0003)" in first
    own = rest.split("\nmodel:\n")[0]
    assert re.findall(r"--(\w+)", own) == ["help", "config", "kind", "strength"]
    assert "--kind {one,two}" in own and "(default: 0.5)" in own
    assert "Optimizer steps to run." in first and "--learning-rate" not in text


COMMANDS = ("train_agsm", "train_dpo", "train_inpo", "train_spo", "train_flow_grpo", "train_nft",
            "train_ddpo", "generate", "score_images", "diagnose", "edit", "memory",
            "lab.train_base")  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_flags_that_there_are_and_each_once(name, capsys):
    if name == "train_ddpo":
        pytest.importorskip("trl")
    with pytest.raises(SystemExit):
        importlib.import_module(name).main(["--help"])
    text = capsys.readouterr().out
    own = re.findall(r"^  (?:-h, )?--(\w+)", text, re.MULTILINE)
    assert len(own) == len(set(own)) and (
        f"python recipes/{name}.py" in text or f"python -m recipes.{name}" in text
    )
    assert set(re.findall(r"--(\w+)", text)) <= {*own, "help"}
    assert "{title}" not in text


def test_every_help_text_is_a_sentence(capsys):
    with pytest.raises(SystemExit):
        OPTIONS.parse("", ["--help"])
    body = re.split(r"^[\w -]+:$", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    entries = [one for group in body for one in re.split(r"\n  --", group)[1:]]
    assert len(entries) > 40
    for entry in entries:
        said = " ".join(entry.split()).removesuffix(")").split(" (default:")[0]
        assert said.endswith("."), said


def test_flags_say_what_a_table_says():
    table = {"max_train_steps": 3, "full": True, "learning_rate": 1e-5, "model": "-x"}
    options = OPTIONS.parse(None, flags(table))
    assert {name: getattr(options, name) for name in table} == table


DERIVED = ("rank", "learning_rate", "agsm_guidance_scale", "pos_scale", "neg_scale", "candidates",
           "ema_decay", "validation_guidance_scale")  # fmt: skip


@pytest.mark.parametrize(
    ("given", "derived"),
    [
        ({}, (16, 1e-4, 3.0, None, 0.0, "empty", None, 1.0)),
        ({"full": True}, (0, 1e-5, 3.0, None, 0.0, "empty", None, 1.0)),
        ({"num_tokens": 4}, (0, 1e-3, None, 1.0, 0.1, "in_batch:3", 0.995, 3.0)),
        ({"num_tokens": 4, "rank": 8}, (8, 1e-4, 3.0, None, 0.0, "empty", None, 1.0)),
        (
            {"num_tokens": 4, "agsm_guidance_scale": 2.0, "max_train_steps": 20},
            (0, 1e-3, 2.0, None, 0.0, "empty", 0.9, 1.0),
        ),
        ({"agsm_guidance_scale": 1.0}, (16, 1e-4, 1.0, None, 0.0, "empty", None, 3.0)),
        ({"pos_scale": 2.0}, (16, 1e-4, None, 2.0, 0.0, "empty", None, 3.0)),
        (
            {"num_tokens": 4, "full": True, "neg_scale": 0.5},
            (0, 1e-5, None, 1.0, 0.5, "empty", 0.995, 3.0),
        ),
        ({"objective": "denoising"}, (16, 1e-4, 1.0, None, 0.0, "empty", None, 3.0)),
        (
            {"objective": "softrepa", "num_tokens": 4, "rank": 8},
            (8, 1e-4, 3.0, None, 0.0, "in_batch:3", None, 3.0),
        ),
    ],
)
def test_what_is_left_out_goes_by_what_is_trained(given, derived):
    made = train_agsm.OPTIONS.make(**given)
    assert tuple(getattr(made, name) for name in DERIVED) == derived


def test_a_longer_run_goes_on_with_the_decay_of_its_length(tmp_path):
    (tmp_path / "checkpoints" / "checkpoint_1").mkdir(parents=True)
    given = {"num_tokens": 4, "output_dir": str(tmp_path), "resume_from_checkpoint": "latest"}
    (tmp_path / "options.json").write_text(json.dumps(vars(train_agsm.OPTIONS.make(**given))))
    check_output(train_agsm.OPTIONS.make(**given, max_train_steps=2000))
    with pytest.raises(ValueError, match="learning_rate"):
        check_output(train_agsm.OPTIONS.make(**given, rank=4))


@pytest.mark.parametrize(
    ("began", "goes_on"), [(0.5, 1.0), (1.0, 0.5), (None, 1.0), (None, 0.5), (0.5, None)]
)
def test_a_resumed_run_keeps_the_kind_of_its_teacher(began, goes_on, tmp_path):
    """A frozen one (decay 1) has another target, tau + (s - 1) delta."""
    (tmp_path / "checkpoints" / "checkpoint_1").mkdir(parents=True)
    given = {"output_dir": str(tmp_path), "resume_from_checkpoint": "latest"}
    stored = vars(train_agsm.OPTIONS.make(**given, ema_decay=began))
    (tmp_path / "options.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=f"ema_decay {began} -> {goes_on}"):
        check_output(train_agsm.OPTIONS.make(**given, ema_decay=goes_on))
    kept = {0.5: 0.9, 1.0: 1, None: None}[began]
    check_output(train_agsm.OPTIONS.make(**given, ema_decay=kept))


def test_a_host_without_agsm_is_sampled_with_guidance():
    assert train_dpo.OPTIONS.make().validation_guidance_scale == 3
    assert train_dpo.OPTIONS.make(agsm_weight=1.0).validation_guidance_scale == 1


GIVEN = {"temperature": "2", "pos_scale": 1.0, "ema_decay": 0.9}


@pytest.mark.parametrize(
    ("recipe", "given", "told"),
    [
        (train_agsm, {}, ""),
        (train_agsm, {**GIVEN, "candidates": "in_batch:3"}, ""),
        (train_agsm, {"objective": "denoising"}, ""),
        (train_agsm, {"objective": "denoising", "agsm_guidance_scale": 1.0}, ""),
        (
            train_agsm,
            {"objective": "denoising", "agsm_guidance_scale": 5.0, "candidates": "in_batch:3"},
            "agsm_guidance_scale 5.0, candidates in_batch:3 (because of --objective denoising)",
        ),
        (train_agsm, {"objective": "softrepa", "candidates": "hard:1"}, ""),
        (
            train_agsm,
            {"objective": "softrepa", "candidates": "hard:1", "chunk_size": 2, "temperature": "5"},
            "temperature 5, chunk_size 2 (because of --objective softrepa)",
        ),
        (train_dpo, {}, ""),
        (train_dpo, {**GIVEN, "agsm_weight": 1.0, "agsm_warmup_steps": 3}, ""),
        (
            train_dpo,
            GIVEN,
            "temperature 2, pos_scale 1.0, ema_decay 0.9 (because of --agsm_weight 0)",
        ),
        (train_dpo, {"agsm_warmup_steps": 3}, "agsm_warmup_steps 3 (because of --agsm_weight 0)"),
        (train_nft, {"agsm_images": "best"}, "agsm_images best (because of --agsm_weight 0)"),
    ],
    ids=str,
)
def test_agsms_options_are_told_where_nothing_reads_them(recipe, given, told):
    assert unread_of(recipe.OPTIONS.make(**given)) == told


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"full": True, "rank": 2}, "got both"),
        ({"rank": 0}, "nothing to train"),
        ({"banks": "shared"}, "banks, num_layers: expected them left out without soft tokens"),
        ({"rank": 8, "num_layers": 3}, "num_layers: .* got dual and 3.*take --num_tokens 4"),
        ({"agsm_guidance_scale": 2.0, "pos_scale": 1.0}, "expected it without pos_scale"),
        ({"neg_scale": 0.1}, "neg_scale: expected 0 without soft tokens, got 0.1"),
        (
            {"num_tokens": 2, "rank": 2, "neg_scale": 0.1, "gradient_checkpointing": True},
            "neg_scale: expected no --gradient_checkpointing",
        ),
        *(
            ({"candidates": text}, f"candidates: expected empty, in_batch:N .*got '{text}'")
            for text in ("in_batch", "hard:0", "empty:1", "mixed", "empty,", "in_batch:-1")
        ),
        *(
            ({"temperature": text}, f"temperature: expected a number above 0.*got '{text}'")
            for text in ("0", "entropy", "entropy:2", "share:0.5", "nan", "entropy:x", "hot")
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_together_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        OPTIONS.make(**given)


@dataclass(frozen=True)
class Paths:
    model: str = option("", "A folder.")
    images: list[str] = option([], "Folders.")


def test_a_tilde_is_the_home_folder_in_every_option(monkeypatch):
    """The shell leaves --model=~/m as it is, and knows nothing of YAML."""
    monkeypatch.setenv("HOME", "/home/me")
    made = OptionSet(Paths).make(model="~/m", images=["~/a", "a~b"])
    assert (made.model, made.images) == ("/home/me/m", ["/home/me/a", "a~b"])
