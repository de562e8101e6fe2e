r"""InPO (Diffusion-DPO at inverted noise) on a pipeline, alone or with AGSM in its step.

    python recipes/train_inpo.py --rank 8 --num_tokens 0 --agsm_weight 1000
    accelerate launch recipes/train_inpo.py --config recipes/configs/inpo_sdxl.yaml \
        --data pairs.parquet

`--model` is an eps- or v-prediction pipeline: Stable Diffusion or SDXL. `--rank N` trains a LoRA,
`--full` all weights, `--num_tokens N` soft tokens as well. `--data` is the embedded world, or a
table with Pick-a-Pic's columns (jpg_0, jpg_1, label_0, caption) or image_w, image_l, caption. AGSM
trains on the winners at Gaussian noise; at InPO's inverted noise (`--agsm_noise inverted`) it did
harm.

Under `--output_dir`:
    tokens/, lora/ or pipeline/   what was trained: soft tokens, a LoRA, or all weights
    log.jsonl, options.json       losses, metrics and validation scores; the run's options
    sheets/                       images of the validation prompts
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from agsm_loss.integrations.hosts.base import AGSMBatch
from agsm_loss.integrations.hosts.inpo import InPO
from data.task import PAIRS, DataOptions, PromptFileOptions, open_task
from model.agsm import AGSMOptions, HostOptions, check_competitors
from model.precompute import PrecomputeOptions, precompute
from model.session import Session, ValidationOptions
from model.trained import ModelOptions, TimestepOptions, resolve
from run.cli import command
from run.loop import LoopOptions, Run, RunOptions
from run.options import OptionSet, option


@dataclass(frozen=True)
class Options:
    """Of InPO (arXiv 2503.18454)."""

    beta: float = option(
        5000.0,
        "beta of {title}: scale of the difference to the reference in the loss. Larger: stronger "
        "gradients at first, and a model that stays closer to the reference.",
        above=0,
    )
    inversion_steps: int = option(
        10, "Timesteps, spread over the schedule, that the inversion visits.", at_least=1
    )
    eta: float = option(0.1, "Noise of the inversion's steps, in units of DDIM's.", at_least=0)
    agsm_noise: Literal["gaussian", "inverted"] = option(
        "gaussian",
        "Noise of the winners in AGSM: Gaussian, at timesteps of its own, or InPO's inverted "
        "noise, whose prediction is reused (less time; it did harm in our study).",
    )


OPTIONS = OptionSet(
    Options,
    HostOptions,
    ModelOptions,
    DataOptions,
    PrecomputeOptions,
    AGSMOptions,
    TimestepOptions,
    LoopOptions,
    RunOptions,
    ValidationOptions,
    PromptFileOptions,
    title="InPO",
    resolve=partial(resolve, of_world="recipes/lab/models/epsilon"),
    output_dir="runs/inpo",
    data=PAIRS,
    train_batch_size=option(16, "Pairs per process and micro-step.", at_least=1),
)


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = OPTIONS.parse(__doc__, arguments)

    with Run(options, sharding=True) as run:
        task = open_task(options, run.accelerator)
        hard = check_competitors(options, task) if options.agsm_weight else 0
        model = Session(options, run.accelerator, task).prepare(run.accelerator)
        agsm = model.agsm_in_step(options.train_batch_size)
        step = InPO(
            model.denoiser,
            model.scheduler,
            reference=model.reference,
            num_steps=options.inversion_steps,
            eta=options.eta,
            beta=options.beta,
            agsm=agsm,
        )
        batches = task.pairs(options.train_batch_size, hard)
        fill = precompute(options.precompute, model.pipeline, run.accelerator)
        for index, batch in run.steps(model, batches, step, fill=fill):
            draw = run.draws(index)
            winner, loser = model.pipeline.encode_images(batch.pixels, draw).chunk(2)
            image = model.pipeline.image_conditioning(batch.winner)
            text, in_agsm = model.captions(batch)
            if agsm is not None and options.agsm_noise == "gaussian":
                # By draws of its own: the host's are what they are without AGSM.
                own = run.draws(index, "agsm")
                times = model.timesteps(len(winner), own)
                noise = torch.randn(winner.shape, generator=own).to(winner)
                in_agsm = {
                    "agsm_batch": AGSMBatch(
                        winner, times, noise, text, image_conditioning=image, **in_agsm
                    )
                }
            step.generator = draw
            timestep = int(model.timesteps(1, draw)[0])  # one for the batch, as published
            with run.accelerator.autocast():
                out = step(winner, loser, text, timestep, image_conditioning=image, **in_agsm)
            run.backward(out.loss, out.metrics)
        model.save()


if __name__ == "__main__":
    command(main)
