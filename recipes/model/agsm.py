"""AGSM as a recipe's options ask for it: which captions compete, the regularizer, its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from accelerate import PartialState

from agsm_loss import (
    EMA,
    AdaptiveTemperature,
    AGSMLoss,
    AGSMRegularizer,
    InBatch,
    Mixed,
    Passes,
    Rule,
)
from agsm_loss.schedule import Schedule, as_schedule, linear_warmup
from data.task import Task
from run.options import option


@dataclass(frozen=True)
class AGSMOptions:
    """The loss, and the captions that compete with an image's own."""

    _argument_group_name = "AGSM"
    agsm_guidance_scale: float | None = option(
        None,
        "Guidance scale to train into a LoRA or the weights, which are then sampled without "
        "guidance. 1 is plain denoising. Left out: 3, or the published form where soft tokens "
        "alone are trained.",
        at_least=1,
    )
    candidates: str = option(
        "",
        "Captions that compete with an image's own: empty (no words), in_batch:N (N of other "
        "images), hard:N (N edits of its own), or several of them, as empty,hard:1. Left out: "
        "empty; in_batch:3 for SoftREPA, and where soft tokens alone are trained.",
    )
    temperature: str = option(
        "0.1",
        "Temperature of the weights of several such captions; larger makes them more equal. "
        "entropy:0.7 adapts it, until the weights' entropy is 0.7 of its maximum.",
    )
    pos_scale: float | None = option(
        None,
        "The published form, in place of --agsm_guidance_scale: gamma+, how far the matching "
        "caption's target is moved away from the others. Published: 1.",
        at_least=0,
    )
    neg_scale: float | None = option(
        None,
        "The published form: gamma-, how far the other captions' targets are moved; 0: they are "
        "not trained. Above 0 it trains soft tokens only. Left out: 0.1 where soft tokens alone "
        "are trained, else 0.",
        at_least=0,
    )
    ema_decay: float | None = option(
        None,
        "Decay of the EMA that is the teacher. Left out: none, the model teaches itself; for soft "
        "tokens alone by the run's length, at most 0.9999.",
        at_least=0,
        at_most=1,
    )
    chunk_size: int = option(
        0,
        "Samples per forward pass of AGSM; 0: all at once. Smaller uses less memory and more time.",
        at_least=0,
    )


@dataclass(frozen=True)
class HostOptions:
    """Of AGSM in another method's step."""

    _argument_group_name = "AGSM in the step"
    agsm_weight: float = option(
        0.0, "lambda: weight of AGSM in the loss; 0: {title} alone.", at_least=0
    )
    agsm_warmup_steps: int = option(
        0, "Number of first steps in which lambda rises from 0.", at_least=0
    )


@dataclass(frozen=True)
class Competitors:
    """What `--candidates` says.

    >>> Competitors.read("empty,hard:2")
    Competitors(empty=True, in_batch=0, hard=2)
    """

    empty: bool = False
    in_batch: int = 0
    hard: int = 0

    @staticmethod
    def read(text: str) -> Competitors:
        """ValueError for what is neither empty, in_batch:N nor hard:N."""
        found = Competitors()
        for part in text.split(","):
            name, _, number = part.strip().partition(":")
            if name == "empty" and not number:
                found = replace(found, empty=True)
            elif name in ("in_batch", "hard") and number.isdecimal() and int(number):
                found = replace(found, **{name: int(number)})
            else:
                raise ValueError(
                    "candidates: expected empty, in_batch:N and hard:N, or some of them with "
                    f"commas between, got {text!r}. Take empty for classifier-free guidance."
                )
        return found

    @property
    def rule(self) -> Rule | None:
        """Of the captions besides the empty one."""
        if self.hard:
            return Mixed(self.in_batch, allow_empty=True)
        return InBatch(self.in_batch, allow_empty=True) if self.in_batch else None


def method_of(options: Any) -> str:
    """A host's name, and AGSM's where it is in its step."""
    own = f" with AGSM (lambda {options.agsm_weight:g})" if options.agsm_weight else ""
    return f"{options.of.title}{own}"


_READ: dict[str, set[str]] = {"denoising": set(), "softrepa": {"candidates"}}
"""Objectives of `train_agsm.py` but AGSM, and those of AGSM's options that they read."""


def unread(options: Any) -> set[str]:
    """Names of AGSM's options that this run does nothing with: it is a control without AGSM."""
    names = {one.name for one in fields(AGSMOptions)}
    if hasattr(options, "agsm_weight"):
        names |= {one for one in vars(options) if one.startswith("agsm_")} - {"agsm_weight"}
        return set() if options.agsm_weight else names
    objective = getattr(options, "objective", "")
    return names - _READ[objective] if objective in _READ else set()


def unread_of(options: Any) -> str:
    """Those that were given all the same, with their values and why; "" for none.

    They are not refused: a config with AGSM's options makes the control too, by one flag.
    """
    names, every = unread(options), vars(options)
    if not names:
        return ""
    usual = vars(options.of.make(**{one: every[one] for one in every if one not in names}))
    changed = [one for one in every if every[one] not in (usual[one], None)]
    given = ", ".join(f"{one} {every[one]}" for one in changed)
    why = "agsm_weight 0" if hasattr(options, "agsm_weight") else f"objective {options.objective}"
    return f"{given} (because of --{why})" if given else ""


def resolve_agsm(options: Any, steps: int) -> None:
    """Fills in AGSM's options that were left out, by what is trained and for how many steps."""
    if not options.num_tokens and (options.banks, options.num_layers) != ("dual", None):
        raise ValueError(
            f"banks, num_layers: expected them left out without soft tokens, got {options.banks} "
            f"and {options.num_layers}. Leave them out, or take --num_tokens 4."
        )
    tokens_alone = not (options.rank or options.full)
    given = options.pos_scale, options.neg_scale
    if options.agsm_guidance_scale is None and (given != (None, None) or tokens_alone):
        options.pos_scale = 1.0 if options.pos_scale is None else options.pos_scale
        if options.neg_scale is None:
            options.neg_scale = 0.1 if tokens_alone and options.pos_scale else 0.0
    elif given != (None, None):
        raise ValueError(
            f"agsm_guidance_scale: expected it without pos_scale and neg_scale, got "
            f"{options.agsm_guidance_scale:g} with {given[0]} and {given[1]}: those are the "
            "published form's. Leave out the one or the others."
        )
    else:
        options.neg_scale = 0.0
        if options.agsm_guidance_scale is None:
            options.agsm_guidance_scale = 3.0
    if options.neg_scale and not options.num_tokens:
        raise ValueError(
            f"neg_scale: expected 0 without soft tokens, got {options.neg_scale:g}: it would train "
            "the LoRA or the denoiser towards this image for wrong captions. Leave it out, or take "
            "--num_tokens 4."
        )
    if options.neg_scale and not tokens_alone and options.gradient_checkpointing:
        raise ValueError(
            "neg_scale: expected no --gradient_checkpointing with it and a LoRA or --full. Take "
            "--chunk_size, or leave neg_scale out."
        )
    if not options.candidates:
        published = tokens_alone and options.agsm_guidance_scale is None
        options.candidates = "in_batch:3" if published else "empty"
    Competitors.read(options.candidates)
    _temperature(options.temperature)
    if options.ema_decay is None and (tokens_alone or options.neg_scale):
        options.ema_decay = max(0.9, min(0.9999, 1 - 5 / steps))


def make_agsm(
    options: Any, denoiser: Any, batch_size: int, weight: float | Callable[[int], float]
) -> AGSMRegularizer:
    """AGSM over the denoiser, with lambda = weight, on `batch_size` images a micro-step."""
    competitors = Competitors.read(options.candidates)
    if batch_size < 2 and not (competitors.empty or competitors.hard):
        raise ValueError(
            f"batch_size: expected 2 at least of AGSM's images with --candidates "
            f"{options.candidates}, got {batch_size}: the other captions are the batch's. Take "
            "--candidates empty, or larger batches and fewer of them "
            "(--gradient_accumulation_steps)."
        )
    loss = AGSMLoss(
        guidance_scale=options.agsm_guidance_scale,
        frozen_teacher=options.agsm_guidance_scale is not None and options.ema_decay == 1,
        pos_scale=options.pos_scale,
        neg_scale=options.neg_scale,
        temperature=_temperature(options.temperature),
    )
    return AGSMRegularizer(
        denoiser,
        None if options.ema_decay is None else EMA(denoiser, decay=options.ema_decay),
        loss,
        weight=weight,
        candidates=competitors.rule,
        passes=Passes(options.chunk_size or None),
        seed=options.seed + 100_003 * PartialState().process_index,
    )


def _temperature(text: str) -> Any:
    kind, _, share = text.rpartition(":")
    try:
        if kind == "entropy":
            return AdaptiveTemperature(float(share))
        if not kind and float(share) > 0:
            return float(share)
    except ValueError:
        pass
    raise ValueError(
        f"temperature: expected a number above 0, or entropy:SHARE with a share between 0 and 1, "
        f"got {text!r}."
    )


def agsm_weight(options: Any) -> Schedule:
    """lambda of each optimizer step."""
    schedule = as_schedule(options.agsm_weight)
    steps = options.agsm_warmup_steps
    return linear_warmup(schedule, steps) if steps else schedule


def check_competitors(options: Any, task: Task) -> int:
    """How many edits of its own caption an image needs.

    Raises:
        ValueError: all images have the same caption, and no other ones compete.
    """
    competitors = Competitors.read(options.candidates)
    if not (competitors.empty or competitors.hard):
        caption = task.one_caption()
        if caption is not None:
            raise ValueError(
                f"data: expected captions that differ, got {caption[:60]!r} in every row of "
                f"{task.data}: no caption competes with it, so this would be plain denoising. Take "
                "--candidates empty, or --caption_column for another column."
            )
    return competitors.hard


def summary_of(options: Any) -> str:
    """AGSM's settings in words, as the options say and as they were derived."""
    if options.agsm_guidance_scale is None:
        form = f"gamma+ {options.pos_scale:g}, gamma- {options.neg_scale:g}"
    else:
        form = f"guidance scale {options.agsm_guidance_scale:g}"
    teacher = "itself" if options.ema_decay is None else f"its EMA ({options.ema_decay:g})"
    low = f", above {options.timestep_low:.0%} of the schedule" if options.timestep_low else ""
    return f"{form} against {options.candidates}; teacher: {teacher}{low}"
