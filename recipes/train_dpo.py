r"""Diffusion-DPO on a text-to-image pipeline, alone or with AGSM in its step.

    python recipes/train_dpo.py --rank 8 --num_tokens 0 --agsm_weight 10000
    accelerate launch recipes/train_dpo.py --config recipes/configs/dpo_sdxl.yaml \
        --data pairs.parquet

`--model` is a Stable Diffusion, SDXL, SD3, Flux.1, FLUX.2, Qwen-Image, Sana or Z-Image pipeline.
`--rank N` trains a LoRA, `--full` all weights, `--num_tokens N` soft tokens as well. `--data` is
the embedded world, or a table with Pick-a-Pic's columns (jpg_0, jpg_1, label_0, caption) or
image_w, image_l, caption. AGSM's captions are `--candidates`.

Under `--output_dir`:
    tokens/, lora/ or pipeline/   what was trained: soft tokens, a LoRA, or all weights
    log.jsonl, options.json       losses, metrics and validation scores; the run's options
    sheets/                       images of the validation prompts
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agsm_loss.integrations.hosts.diffusion_dpo import DiffusionDPO
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
    """Of Diffusion-DPO (arXiv 2311.12908)."""

    beta: float = option(
        5000.0,
        "beta of {title}: scale of the difference to the reference in the loss. Larger: stronger "
        "gradients at first, and a model that stays closer to the reference.",
        above=0,
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
    title="Diffusion-DPO",
    resolve=resolve,
    output_dir="runs/dpo",
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
        step = DiffusionDPO(
            model.denoiser,
            model.scheduler,
            reference=model.reference,
            beta=options.beta,
            agsm=model.agsm_in_step(options.train_batch_size),
        )
        batches = task.pairs(options.train_batch_size, hard)
        fill = precompute(options.precompute, model.pipeline, run.accelerator)
        for index, batch in run.steps(model, batches, step, fill=fill):
            draw = run.draws(index)
            winner, loser = model.pipeline.encode_images(batch.pixels, draw).chunk(2)
            noise = torch.randn(winner.shape, generator=draw).to(winner)
            timesteps = model.timesteps(len(winner), draw)
            image = model.pipeline.image_conditioning(batch.winner)
            text, captions = model.captions(batch)
            with run.accelerator.autocast():
                out = step(
                    winner,
                    loser,
                    text,
                    timesteps,
                    noise,
                    image_conditioning=image,
                    **captions,
                )
            run.backward(out.loss, out.metrics)
        model.save()


if __name__ == "__main__":
    command(main)
