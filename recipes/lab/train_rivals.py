"""Trains by what other projects do, on the same batches as `train_agsm.py`: controls of studies.

    python -m recipes.lab.train_rivals --objective target --rank 16 --agsm_guidance_scale 3

v is the prediction under the image's caption, u the detached one under no words, tau the target,
s the guidance scale:
    target        |v - (u + s (tau - u))|^2: ai-toolkit's do_guidance_loss, musubi-tuner's PR 1045
    prediction    |(v + (s - 1) u) / s - tau|^2: GFT (arXiv 2501.15420), DiffSynth-Studio's PR 1650
    drift         |v - tau|^2 + w |v - v0|^2, v0 the untrained model's: SimpleTuner's h3_drift
    contrastive   |v - tau|^2 - w |v - tau'|^2, tau' another image's: arXiv 2506.05350, its lambda
    tdpo          Diffusion-DPO between the image's caption and an edit of it (arXiv 2509.25771),
                  w its beta; with --candidates hard:1
    levels        AGSM with a temperature per noise level, w times the standard deviation of the
                  errors' gaps there
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agsm_loss import Bank
from agsm_loss.functional import denoising_error
from data.task import DataOptions, ImageOptions, PromptFileOptions, open_task
from model.agsm import AGSMOptions, check_competitors
from model.precompute import PrecomputeOptions, precompute
from model.session import Session, ValidationOptions
from model.trained import ModelOptions, TimestepOptions, resolve
from run.cli import command
from run.loop import LoopOptions, Run, RunOptions
from run.options import OptionSet, option
from train_agsm import Inputs, Objective, Result, prepare


@dataclass(frozen=True)
class Options:
    """The objective."""

    objective: Literal["target", "prediction", "drift", "contrastive", "tdpo", "levels"] = option(
        "target", "Loss to minimize."
    )
    rival_weight: float = option(1.0, "w of drift, contrastive, tdpo and levels.", at_least=0)


OPTIONS = OptionSet(
    Options,
    ModelOptions,
    DataOptions,
    ImageOptions,
    PrecomputeOptions,
    AGSMOptions,
    TimestepOptions,
    LoopOptions,
    RunOptions,
    ValidationOptions,
    PromptFileOptions,
    title="objective",
    resolve=resolve,
    output_dir="runs/rivals",
)


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = OPTIONS.parse(__doc__, arguments)
    with Run(options) as run:
        task = open_task(options, run.accelerator)
        model = Session(options, run.accelerator, task, method=options.objective)
        model.prepare(run.accelerator)
        objective = Rival(options, model)
        others = options.objective in ("tdpo", "levels")
        hard = check_competitors(options, task) if others else 0
        batches = task.images(options.train_batch_size, hard, options.image_column)
        fill = precompute(options.precompute, model.pipeline, run.accelerator)
        for index, batch in run.steps(model, batches, objective, fill=fill):
            inputs = prepare(options, model, batch, run.draws(index))
            with run.accelerator.autocast():
                loss, metrics = objective(inputs)
            run.backward(loss, metrics)
        model.save()


class Rival(Objective):
    """The loss that `--objective` names, over a model's denoiser."""

    def __init__(self, options: Any, model: Session) -> None:
        self.name, self.weight = options.objective, options.rival_weight
        self.scale, self.model = options.agsm_guidance_scale, model
        self.temperature = LevelTemperature(self.weight)
        if self.name == "levels":
            self.agsm = model.agsm(options.train_batch_size)
            self.agsm.loss.temperature = self.temperature

    def __call__(self, inputs: Inputs) -> Result:
        target, loss = inputs.target, getattr(self, self.name)
        return loss(inputs, self.predict(inputs, inputs.conditioning), target).mean(), {}

    def target(self, inputs: Inputs, pred: Tensor, target: Tensor) -> Tensor:
        null = self.null(inputs)
        return error(pred, null + self.scale * (target - null))

    def prediction(self, inputs: Inputs, pred: Tensor, target: Tensor) -> Tensor:
        return error((pred + (self.scale - 1) * self.null(inputs)) / self.scale, target)

    def drift(self, inputs: Inputs, pred: Tensor, target: Tensor) -> Tensor:
        return error(pred, target) + self.weight * error(pred, self.untrained(inputs, slice(None)))

    def contrastive(self, inputs: Inputs, pred: Tensor, target: Tensor) -> Tensor:
        return error(pred, target) - self.weight * error(pred, target.roll(1, 0))

    def tdpo(self, inputs: Inputs, pred: Tensor, target: Tensor) -> Tensor:
        batch = len(target)
        edited = slice(batch, 2 * batch)
        if any(len(one) != 1 for one in inputs.captions["hard_negatives"] or [()]):
            raise ValueError("tdpo: expected --candidates hard:1, and an edit of every caption.")
        wrong = self.predict(inputs, {k: v[edited] for k, v in inputs.conditioning.items()})
        own = error(pred, target) - error(self.untrained(inputs, slice(batch)), target)
        other = error(wrong, target) - error(self.untrained(inputs, edited), target)
        return -F.logsigmoid(self.weight * (other - own))

    def levels(self, inputs: Inputs, pred: Tensor, target: Tensor) -> Tensor:
        steps = self.model.scheduler.config.num_train_timesteps
        self.temperature.levels = (inputs.timesteps * 8 / steps).long().clamp(max=7)
        given = inputs.noisy, inputs.timesteps, target, inputs.conditioning
        loss: Tensor = self.agsm(*given, pred=pred, **inputs.captions).loss
        return loss

    def predict(
        self, inputs: Inputs, text: dict[str, Tensor], bank: Bank = Bank.POSITIVE
    ) -> Tensor:
        """(B, *D): each image under its row of `text`, which may have more rows."""
        batch = len(inputs.noisy)
        text = {name: value[:batch] for name, value in text.items()}
        banks = torch.full((batch,), int(bank))
        pred: Tensor = self.model.denoiser(
            inputs.noisy, inputs.timesteps, text, banks, **inputs.image
        )
        return pred

    @torch.no_grad()
    def null(self, inputs: Inputs) -> Tensor:
        """u."""
        rows = len(inputs.noisy)
        null = inputs.captions["null"]
        return self.predict(inputs, {k: v.expand(rows, *v.shape[1:]) for k, v in null.items()})

    @torch.no_grad()
    def untrained(self, inputs: Inputs, rows: slice) -> Tensor:
        """v0, under these rows of the conditioning."""
        with self.model.reference():
            text = {name: value[rows] for name, value in inputs.conditioning.items()}
            return self.predict(inputs, text, Bank.OFF)

    def state_dict(self) -> dict[str, Any]:
        return self.temperature.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.temperature.load_state_dict(state)


class LevelTemperature(nn.Module):
    """T of each image: `scale` times the standard deviation that the gaps between its caption's
    error and the others' have at its noise level, by running means over eight levels."""

    sums: Tensor

    def __init__(self, scale: float, momentum: float = 0.98) -> None:
        super().__init__()
        self.scale, self.momentum, self.levels = scale, momentum, torch.zeros(0, dtype=torch.long)
        self.register_buffer("sums", torch.zeros(3, 8))  # number, sum, sum of squares

    @torch.no_grad()
    def forward(self, errors: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B,) for errors (B, K), the own caption's first; `levels` (B,) were set before."""
        levels = self.levels.to(errors.device)
        gaps = (errors[:, 1:] - errors[:, :1]).to(self.sums)
        valid = torch.ones_like(gaps) if mask is None else mask[:, 1:].to(gaps)
        seen = torch.stack([valid, gaps * valid, gaps.square() * valid]).sum(2)
        self.sums.mul_(self.momentum).index_add_(1, levels, seen)
        number, total, squares = self.sums
        spread = (squares / number - (total / number).square()).clamp(min=1e-12).sqrt()
        return self.scale * spread[levels].to(errors)


def error(pred: Tensor, target: Tensor) -> Tensor:
    """(B,): the mean square of each image."""
    return denoising_error(pred.unsqueeze(1), target).squeeze(1)


if __name__ == "__main__":
    command(main)
