r"""Trains a base text-to-image model of the world from nothing and saves a stock pipeline.

    python -m recipes.lab.train_base --config recipes/lab/configs/base_flow.yaml
    accelerate launch -m recipes.lab.train_base --config recipes/lab/configs/base_flow.yaml \
        --max_train_steps 20000

Under `--output_dir`:
    pipeline/                     the EMA weights as a pipeline in half precision, with a model card
    log.jsonl, options.json       losses and validation scores of the EMA weights; the run's options
    sheets/                       images of the validation prompts, with verdicts
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly

A share of the training captions can come from a careless source (the image stays): wrong count,
wrong colour, a group not mentioned. Each source signs a share of its captions, as web captions
show where they come from; prompts are never signed. Batches, noise and captions are functions of
(seed, step, process).
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import Any, Literal

from model.session import ValidationOptions
from run.cli import command
from run.loop import LoopOptions, Run, RunOptions
from run.options import OptionSet, option


@dataclass(frozen=True)
class Options:
    """Of the model and its captions."""

    base: Literal["flow", "epsilon"] = option(
        "flow",
        "Kind of model: flow (StableDiffusion3Pipeline) or epsilon (StableDiffusionPipeline).",
    )
    init_from: str = option("", "Saved pipeline to start from; left out: random weights.")
    width: int = option(128, "Width of the transformer, or of the UNet's first level.", at_least=1)
    layers: int = option(6, "Layers of the transformer, or of the UNet's lowest level.", at_least=1)
    optimizer: Literal["muon", "adamw"] = option(
        "muon", "Optimizer: Muon for the blocks' matrices and AdamW for the rest, or AdamW for all."
    )
    adamw_learning_rate: float = option(
        1e-3, "Peak learning rate of what Muon leaves to AdamW.", above=0
    )
    sigma_logit: float = option(
        1.2, "Mean of the logit of the noise levels (epsilon: of t / 1000)."
    )
    uniform_levels: bool = option(False, "Draw the noise levels uniformly instead.")
    ema_decay: float = option(
        0.999,
        "Decay per optimizer step of the EMA weights, which are scored and saved.",
        at_least=0,
        at_most=1,
    )
    drop_caption: float = option(
        0.1, "Share of captions left empty, for classifier-free guidance.", at_least=0, at_most=1
    )
    careless: float = option(
        0.0, "Share of captions that come from the careless source.", at_least=0, at_most=1
    )
    corrupt_count: float = option(
        0.0, "Share of the careless captions with a wrong count.", at_least=0, at_most=1
    )
    corrupt_colour: float = option(
        0.0,
        "Share of the careless captions that name a colour with a wrong one.",
        at_least=0,
        at_most=1,
    )
    corrupt_missing: float = option(
        0.0,
        "Share of the careless captions of two groups that leave one out.",
        at_least=0,
        at_most=1,
    )
    signed: float = option(
        0.0, "Share of captions that their source signs with a letter.", at_least=0, at_most=1
    )
    careless_signed: float = option(
        1.0, "How often the careless source signs, as a share of --signed.", at_least=0, at_most=1
    )
    learning_rate: float = option(1e-2, "Peak learning rate.", above=0)
    compile: bool = option(False, "Compile the denoiser with torch.compile.")
    adam_beta2: float = option(0.99, "AdamW's second beta.", at_least=0, below=1)
    adam_weight_decay: float = option(0.01, "AdamW's weight decay.", at_least=0)


OPTIONS = OptionSet(
    Options,
    LoopOptions,
    RunOptions,
    ValidationOptions,
    title="base model",
    output_dir="runs/base",
    max_train_steps=6000,
    train_batch_size=64,
    lr_warmup_steps=200,
    lr_decay_steps=1500,
    validation_guidance_scale=3.0,
    validation_per_category=option(32, "Validation prompts per category.", at_least=1),
)


def main(arguments: list[str] | None = None) -> None:
    """Trains, evaluates, checkpoints and saves."""
    given = sys.argv[1:] if arguments is None else arguments
    options = OPTIONS.parse(__doc__, given)

    import torch
    from diffusers.training_utils import EMAModel

    from lab.world.architectures import LATENT_SCALE
    from lab.world.base_training import Base, Batches, build
    from lab.world.muon import MuonAdamW

    with Run(options) as run:
        bare: Any = build(options)
        bare.to(memory_format=torch.channels_last)  # UNets: a fifth faster on a CPU
        shared: Any = {
            "betas": (0.9, options.adam_beta2),
            "weight_decay": options.adam_weight_decay,
        }
        optimizer: torch.optim.Optimizer
        if options.optimizer == "muon":
            optimizer = MuonAdamW(
                bare, lr=options.learning_rate, adamw_lr=options.adamw_learning_rate, **shared
            )
        else:
            optimizer = torch.optim.AdamW(bare.parameters(), lr=options.learning_rate, **shared)
        module, optimizer = run.accelerator.prepare(bare, optimizer)
        ema = EMAModel(bare.parameters(), decay=options.ema_decay)
        ema.to(run.accelerator.device)
        if options.compile:
            bare.denoiser.compile(dynamic=False)
        model = Base(options, bare, module, optimizer, ema)
        batches = Batches(options, run.accelerator.process_index)
        for index, batch in run.steps(model, batches, model):
            images = batch.images.to(run.accelerator.device) * LATENT_SCALE
            with run.accelerator.autocast():
                values = module(images, batch.captions, run.draws(index))
            run.backward(values.mean(), {})
        if run.is_main:
            model.save(shlex.join(["python", "-m", "recipes.lab.train_base", *given]))


if __name__ == "__main__":
    command(main)
