"""AGSM as a recipe's options ask for it: which captions compete, the regularizer, its weight."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from agsm_loss import (
    EMA,
    AdaptiveTemperature,
    AGSMLoss,
    AGSMRegularizer,
    Candidates,
    InBatch,
    Mixed,
    Passes,
    caption_pool,
)
from agsm_loss.schedule import Schedule, as_schedule, linear_warmup
from data.task import Task
from run.options import option

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class AGSMOptions:
    """The loss. A negative is a caption that does not match the image."""

    _argument_group_name = "AGSM"
    pos_scale: float = option(
        1.0,
        "gamma+: how far the matching caption's target is moved away from the others; 0 with "
        "--neg_scale 0 is plain denoising.",
        at_least=0,
    )
    neg_scale: float | None = option(
        None,
        "gamma-: how far the negatives' targets are moved; 0: negatives are not trained. Left out: "
        "0.1 where soft tokens alone are trained, 0 with a LoRA or --full.",
        at_least=0,
    )
    negative_gradient: Literal["tokens", "all"] = option(
        "tokens",
        "What the negatives' gradient reaches where there is a LoRA or --full: the soft tokens "
        "alone, or all that is trained.",
    )
    temperature: float = option(
        0.1,
        "Temperature of the captions' weights; larger makes them more equal. Not used with "
        "--target_entropy.",
        above=0,
    )
    target_entropy: float = option(
        0.0,
        "Adapt the temperature so that the weights' entropy is this share of its maximum (0.7 in "
        "our studies); 0: use --temperature.",
        at_least=0,
        below=1,
    )
    ema_decay: float = option(
        0.9999,
        "Decay of the EMA per optimizer step (0.98 in our short runs).",
        at_least=0,
        at_most=1,
    )
    candidates: Literal["in_batch", "hard", "mixed"] = option(
        "in_batch",
        "Where negatives (captions that do not match the image) come from: the batch's other "
        "captions (in_batch), edits of the image's own caption (hard), or both (mixed: half are "
        "edits, rounded up).",
    )
    num_negatives: int = option(
        3, "Negatives per image; 0: the empty caption alone, with --null_caption.", at_least=0
    )
    null_caption: bool = option(
        False,
        "The empty caption competes too, besides --num_negatives: what classifier-free guidance "
        "does in the sampler is trained in.",
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


def method(options: Any) -> str:
    """A host's name, and AGSM's where it is in its step."""
    own = f" with AGSM (lambda {options.agsm_weight:g})" if options.agsm_weight else ""
    return f"{options.of.title}{own}"


def hard_per_image(options: Any) -> int:
    """How many of an image's negatives are edits of its own caption."""
    number: int = options.num_negatives
    return {"in_batch": 0, "hard": number, "mixed": -(-number // 2)}[options.candidates]


def make_agsm(
    options: Any,
    denoiser: Any,
    batch_size: int,
    weight: float | Callable[[int], float],
    parameters: list[torch.nn.Parameter],
    has_tokens: bool,
) -> AGSMRegularizer:
    """AGSM over the denoiser, with lambda = weight, on `batch_size` images a micro-step.

    parameters: what is trained. has_tokens: whether soft tokens are among them.
    """
    if batch_size < 2 and options.candidates == "in_batch" and not options.null_caption:
        raise ValueError(
            f"batch_size: expected 2 at least of AGSM's images, got {batch_size}: with "
            "--candidates in_batch the other captions are the batch's, and there would be "
            "none. Take larger batches and fewer of them (--gradient_accumulation_steps), "
            "--candidates hard or mixed, or --null_caption."
        )
    temperature: Any = options.temperature
    if options.target_entropy:
        temperature = AdaptiveTemperature(options.target_entropy)
    loss = AGSMLoss(
        pos_scale=options.pos_scale, neg_scale=options.neg_scale, temperature=temperature
    )
    return AGSMRegularizer(
        denoiser,
        EMA(denoiser, decay=options.ema_decay),
        loss,
        weight=weight,
        candidates=InBatch(options.num_negatives, allow_empty=True, null=options.null_caption),
        negatives_train=_negatives_train(options, parameters, has_tokens),
        passes=Passes(options.chunk_size or None),
    )


def _negatives_train(
    options: Any, parameters: list[torch.nn.Parameter], has_tokens: bool
) -> list[torch.nn.Parameter] | None:
    """What the negatives' gradient reaches; None for the soft tokens."""
    neg_scale = options.neg_scale
    if not neg_scale or not (options.rank or options.full):
        return None
    if options.negative_gradient == "all":
        LOGGER.warning(
            "neg_scale: %g trains weights that all captions share towards this image for wrong "
            "captions too; take --neg_scale 0, or soft tokens and --negative_gradient tokens.",
            neg_scale,
        )
        return parameters
    if not has_tokens:
        raise ValueError(
            f"neg_scale: expected 0 without soft tokens, got {neg_scale:g}: it would train the "
            "LoRA or the denoiser towards this image for wrong captions. Take --num_tokens 4, "
            "or --negative_gradient all to do so."
        )
    if options.gradient_checkpointing:
        raise ValueError(
            "negative_gradient: tokens: expected no --gradient_checkpointing with --neg_scale "
            "above 0 and a LoRA or --full. Take --chunk_size, --neg_scale 0, or "
            "--negative_gradient all."
        )
    return None


def agsm_weight(options: Any) -> Schedule:
    """lambda of each optimizer step."""
    schedule = as_schedule(options.agsm_weight)
    steps = options.agsm_warmup_steps
    return linear_warmup(schedule, steps) if steps else schedule


def check_competitors(options: Any, task: Task) -> None:
    """ValueError where all images have the same caption, and no other ones compete."""
    if options.candidates != "in_batch" or options.null_caption:
        return
    caption = task.one_caption()
    if caption is not None:
        raise ValueError(
            f"data: expected captions that differ, got {caption[:60]!r} in every row of "
            f"{task.data}: no caption competes with it, so this would be plain denoising. Take "
            "--candidates hard, --null_caption, or --caption_column for another column."
        )


def competitors(
    options: Any, batch: Any, generator: torch.Generator
) -> tuple[list[str], Candidates]:
    """The captions that a batch's images are shown, and who competes for each.

    batch: `data.batches.Batch` or `PairBatch`, with its edited captions.
    """
    in_batch = options.num_negatives - hard_per_image(options)
    candidates = Mixed(in_batch, allow_empty=True, null=options.null_caption)(
        batch.captions,
        hard_negatives=batch.hard,
        image_ids=batch.image_ids,
        generator=generator,
    )
    pool = caption_pool(batch.captions, batch.hard, null=options.null_caption)
    return [str(text) for text in pool], candidates
