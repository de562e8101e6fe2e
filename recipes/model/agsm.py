"""AGSM as a recipe's options ask for it: which captions compete, the regularizer, its weight."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

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
from run.settings import AGSMOptions, HostOptions, PipelineOptions, hard_per_image

LOGGER = logging.getLogger(__name__)


def make_agsm(
    options: PipelineOptions,
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
    assert options.neg_scale is not None  # `PipelineOptions` has chosen it
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
        passes=Passes(options.chunk_size or None, options.negatives_per_step or None),
    )


def _negatives_train(
    options: PipelineOptions, parameters: list[torch.nn.Parameter], has_tokens: bool
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


def agsm_weight(options: HostOptions) -> Schedule:
    """lambda of each optimizer step."""
    schedule = as_schedule(options.agsm_weight)
    steps = options.agsm_warmup_steps
    return linear_warmup(schedule, steps) if steps else schedule


def check_competitors(options: AGSMOptions, task: Task) -> None:
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
    options: AGSMOptions, batch: Any, generator: torch.Generator
) -> tuple[list[str], Candidates]:
    """The captions that a batch's images are shown, and who competes for each.

    batch: `image_data.Batch` or `pair_data.PairBatch`, with its edited captions.
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
