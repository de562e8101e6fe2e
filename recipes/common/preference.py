"""What `train_dpo.py` and `train_inpo.py` share: pairs in, a host's step with AGSM in it, LoRA out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from common.options import option
from common.trained import Student, StudentOptions, competitors, hard_per_image

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from agsm_loss.integrations.hosts.step import StepOutput
    from common.pairs import PairBatch
    from common.task import Task


@dataclass(frozen=True)
class PreferenceOptions(StudentOptions):
    """Options of the recipes on preference pairs."""

    output: str = option("runs/preference", "folder for what is trained, log, sheets, checkpoints")
    beta: float = option(5000.0, "beta of the preference objective")
    loss_type: str = option("sigmoid", "of the preference objective", ("sigmoid", "hinge", "ipo"))
    agsm_weight: float = option(0.0, "lambda: so much AGSM beside the host's loss; 0: the host")
    agsm_warmup: int = option(0, "steps over which lambda rises from 0")


class Pairs(NamedTuple):
    """One batch for a host's step: latents, the captions' conditioning, the host's draws and AGSM's."""

    winner: Tensor
    loser: Tensor
    text: dict[str, Tensor]
    draw: torch.Generator
    own: torch.Generator


# (step, student, pairs, **AGSM's and the images' keywords) -> the step's output
Run = Callable[..., "StepOutput"]


def run_preference(
    options: PreferenceOptions,
    open_task: Callable[[PreferenceOptions, Any], Task],
    make_step: Callable[[Student, Any, Any], Any],
    run: Run,
) -> None:
    """Trains on preference pairs.

    open_task: options, accelerator -> what is trained and validated on.
    make_step: student, AGSM regularizer or None, the host's settings -> the step.
    run: calls the step on a batch; see `Run`.
    """
    import torch

    from agsm_loss import draws
    from agsm_loss.schedule import as_schedule, linear_warmup
    from common.loop import start

    accelerator = start(options)
    task = open_task(options, accelerator)
    student = Student.build(options, accelerator, task)
    agsm = None
    if options.agsm_weight:
        schedule = as_schedule(options.agsm_weight)
        if options.agsm_warmup:
            schedule = linear_warmup(schedule, options.agsm_warmup)
        agsm = student.agsm(options.batch_size, schedule)
    step = make_step(student, agsm, {"beta": options.beta, "loss_type": options.loss_type})
    hard = hard_per_image(options) if agsm is not None else 0
    batches = task.pairs(options.batch_size, hard)

    def loss(batch: PairBatch, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = draws(options.seed, index, accelerator.process_index)
        model = student.model
        both = model.encode_images(torch.cat([batch.winner, batch.loser]), generator)
        winner, loser = both.chunk(2)
        extra: dict[str, Any] = {}
        pool = batch.captions
        # AGSM's own draws: the host's stay what they are without it.
        own = draws(options.seed, index, accelerator.process_index, "candidates")
        if agsm is not None:
            pool, extra["captions"] = competitors(batch, options.num_negatives - hard, own)
        image = model.image_conditioning(batch.winner)
        conditioning = model.encode_prompts(pool)
        with accelerator.autocast():
            pairs = Pairs(winner, loser, conditioning, generator, own)
            out = run(step, student, pairs, image_conditioning=image, **extra)
        return out.loss, out.metrics

    student.train(accelerator, batches, loss, step)
