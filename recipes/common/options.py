"""A recipe's options: one frozen dataclass is the YAML file's keys and the command line's flags.

@dataclass(frozen=True)
class Options(TrainingOptions):
    model: str = option("", "pipeline folder or hub id")

options = parse(Options, __doc__)      # defaults, then --config FILE, then the flags
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

Chosen = TypeVar("Chosen")


def option(default: Any, meaning: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with a default, a help text and, for text, the values it may take."""
    return field(default=default, metadata={"help": meaning, "choices": choices})


@dataclass(frozen=True)
class RunOptions:
    """What every recipe that trains has, whoever's loop it runs in."""

    output: str = option("runs/train", "folder for the log, sheets, checkpoints and the result")
    lr: float = option(1e-3, "peak learning rate")
    weight_decay: float = option(1e-4, "AdamW's")
    beta2: float = option(0.999, "AdamW's second beta")
    max_grad_norm: float = option(1.0, "gradients are clipped to it; 0 for no clipping")
    seed: int = option(0, "of weights, data and noise")
    mixed_precision: str = option("no", "of the forward passes", ("no", "bf16", "fp16"))
    compile: bool = option(False, "torch.compile the denoiser")
    threads: int = option(0, "CPU threads; 0 leaves torch's choice")
    resume: bool = option(False, "go on from the last checkpoint under output, if there is one")
    tracker: str = option("", "accelerate's: tensorboard, wandb, trackio, ...; log.jsonl always")


@dataclass(frozen=True)
class TrainingOptions(RunOptions):
    """What every recipe on the shared loop has (`loop.train`)."""

    steps: int = option(1000, "optimizer steps")
    batch_size: int = option(16, "images a process and micro-step")
    accumulate: int = option(1, "micro-steps an optimizer step")
    warmup: int = option(0, "steps to the peak")
    decay: int = option(0, "last steps, over which the rate falls to zero linearly")
    workers: int = option(0, "processes that prepare batches ahead")
    log_every: int = option(50, "steps")
    eval_every: int = option(1000, "steps")
    save_every: int = option(500, "steps")


def parse(kind: type[Chosen], doc: str | None, arguments: list[str] | None = None) -> Chosen:
    """Defaults, then the YAML file, then the command line. Unknown keys are errors.

    Raises:
        ValueError: unknown key, or a value of another type or outside its choices in the file.
        SystemExit: the same on the command line, by argparse.
    """
    options = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]
    parser = argparse.ArgumentParser(
        description=(doc or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, help="YAML file with any of the options below")
    for name, one in options.items():
        flag, shared = "--" + name.replace("_", "-"), {"default": one.default}
        shared["help"] = one.metadata["help"]
        if isinstance(one.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
        else:
            choices = one.metadata["choices"] or None
            parser.add_argument(flag, type=type(one.default), choices=choices, **shared)
    config = parser.parse_known_args(arguments)[0].config
    if config is not None:
        import yaml

        values = yaml.safe_load(config.read_text()) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{config}: expected a table of options, got {values!r}")
        unknown = sorted(set(values) - set(options))
        if unknown:
            raise ValueError(
                f"{config}: unknown keys {unknown}; expected keys among {list(options)}"
            )
        checked = {key: _checked(config, options[key], value) for key, value in values.items()}
        parser.set_defaults(**checked)
    chosen = vars(parser.parse_args(arguments))
    del chosen["config"]
    return kind(**chosen)


def _checked(config: Path, one: Any, value: Any) -> Any:
    """`value` of the file in the option's type; YAML reads 1 as an integer and 1e-3 as a text."""
    expected = type(one.default)
    if expected is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if type(value) is not expected:
        raise ValueError(f"{config}: {one.name}: expected {expected.__name__}, got {value!r}")
    choices = one.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{config}: {one.name}: expected one of {choices}, got {value!r}")
    return value
