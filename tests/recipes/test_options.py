"""Options of the recipes: defaults, then the file, then the command line."""

from dataclasses import dataclass

import pytest

from common.options import TrainingOptions, option, parse


@dataclass(frozen=True)
class Options(TrainingOptions):
    kind: str = option("one", "a choice", ("one", "two"))


def parsed(tmp_path, text, *flags):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return parse(Options, "Doc.", ["--config", str(file), *flags])


def test_the_command_line_wins_over_the_file(tmp_path):
    options = parsed(tmp_path, "steps: 7\nlr: 1\ncompile: true\n", "--steps", "9", "--no-compile")
    assert (options.steps, options.lr, options.compile) == (9, 1.0, False)
    assert options.seed == Options().seed


def test_yaml_texts_that_are_numbers_are_numbers(tmp_path):
    assert parsed(tmp_path, "lr: 1e-3").lr == 1e-3  # YAML 1.1 reads a text there


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stepz: 3", "stepz"),
        ("steps: many", "steps"),
        ("steps: true", "steps"),
        ("lr: false", "lr"),
        ("kind: three", "kind"),
        ("resume: 1", "resume"),
        ("- steps", "table"),
    ],
)
def test_a_bad_file_is_named_with_its_key(tmp_path, text, named):
    with pytest.raises(ValueError, match=named):
        parsed(tmp_path, text)


@pytest.mark.parametrize("flags", [["--kind", "three"], ["--stepz", "3"], ["--step", "3"]])
def test_a_bad_flag_stops_the_program(flags, capsys):
    with pytest.raises(SystemExit):
        parse(Options, "Doc.", flags)
    assert flags[0] in capsys.readouterr().err
