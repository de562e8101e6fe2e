"""What `train_dpo.py` and `train_inpo.py` share: pairs in, a step with AGSM in it, LoRA out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agsm_loss import StepOutput, draws
from data.pair_data import PairBatch
from data.task import Task
from model.agsm import agsm_weight, check_competitors, competitors
from model.precompute import precompute
from model.trained_pipeline import TrainedPipeline
from run.loop import start
from run.settings import PreferenceOptions, hard_per_image


class Pairs(NamedTuple):
    """One batch: latents, the captions' conditioning, the generators of the host and of AGSM."""

    winner: Tensor
    loser: Tensor
    text: dict[str, Tensor]
    draw: torch.Generator
    own: torch.Generator


# (step, trained pipeline, pairs, **AGSM's and the images' keywords) -> the step's output
Run = Callable[..., StepOutput]


def run_preference(
    options: PreferenceOptions,
    open_task: Callable[[PreferenceOptions, Any], Task],
    make_step: Callable[[TrainedPipeline, Any, Any], Any],
    run: Run,
) -> None:
    """Trains on preference pairs.

    open_task: options, accelerator -> what is trained and validated on.
    make_step: trained pipeline, AGSM regularizer or None, the host's settings -> the step.
    run: calls the step on a batch; see `Run`.
    """
    accelerator = start(options, sharding=True)
    task = open_task(options, accelerator)
    if options.agsm_weight:
        check_competitors(options, task)
    trained = TrainedPipeline.build(options, accelerator, task)
    agsm = None
    if options.agsm_weight:
        agsm = trained.agsm(options.train_batch_size, agsm_weight(options))
    step = make_step(trained, agsm, {"beta": options.beta})
    hard = hard_per_image(options) if agsm is not None else 0
    batches = task.pairs(options.train_batch_size, hard)

    def loss(batch: PairBatch, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = draws(options.seed, index, accelerator.process_index)
        model = trained.model
        winner, loser = model.encode_images(batch.pixels, generator).chunk(2)
        extra: dict[str, Any] = {}
        pool = batch.captions
        # AGSM's own draws: the host's stay what they are without it.
        own = draws(options.seed, index, accelerator.process_index, "candidates")
        if agsm is not None:
            pool, extra["captions"] = competitors(options, batch, own)
        image = model.image_conditioning(batch.winner)
        conditioning = model.encode_prompts(pool)
        with accelerator.autocast():
            pairs = Pairs(winner, loser, conditioning, generator, own)
            out = run(step, trained, pairs, image_conditioning=image, **extra)
        return out.loss, out.metrics

    fill = precompute(options.precompute, trained.model, accelerator)
    trained.train(accelerator, batches, loss, step, fill)
