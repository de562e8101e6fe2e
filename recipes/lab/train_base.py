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

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from run.options import option, parse
from run.settings import LoopOptions, WorldValidationOptions
from run.stop import command

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Options(LoopOptions, WorldValidationOptions):
    """The recipe's own options; the shared ones are in common/settings.py."""

    TITLE = "base model"
    output_dir: str = "runs/base"
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
    max_train_steps: int = 6000
    train_batch_size: int = 64
    lr_warmup_steps: int = 200
    lr_decay_steps: int = 1500
    learning_rate: float = 1e-2
    adam_beta2: float = 0.99
    adam_weight_decay: float = 0.01
    skip_first_validation: bool = True


def main(arguments: list[str] | None = None) -> None:
    """Trains, evaluates, checkpoints and saves."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(Options, __doc__, given)

    import torch
    from diffusers.training_utils import EMAModel

    from agsm_loss import draws
    from lab.world.architectures import LATENT_SCALE
    from lab.world.base_training import Batches, build, evaluate, save
    from lab.world.model_card import write_card
    from lab.world.muon import MuonAdamW
    from model.summary import say_summary, steps_line
    from run.log import lines_of
    from run.loop import Hooks, start, train
    from run.messages import say_saved

    accelerator = start(options)
    bare: Any = build(options)
    bare.to(memory_format=torch.channels_last)  # UNets: a fifth faster on a CPU
    shared: Any = {"betas": (0.9, options.adam_beta2), "weight_decay": options.adam_weight_decay}
    optimizer: torch.optim.Optimizer
    if options.optimizer == "muon":
        optimizer = MuonAdamW(
            bare, lr=options.learning_rate, adamw_lr=options.adamw_learning_rate, **shared
        )
    else:
        optimizer = torch.optim.AdamW(bare.parameters(), lr=options.learning_rate, **shared)
    model, optimizer = accelerator.prepare(bare, optimizer)
    ema = EMAModel(bare.parameters(), decay=options.ema_decay)
    ema.to(accelerator.device)
    if options.compile:
        bare.denoiser.compile(dynamic=False)

    def loss(item: tuple[torch.Tensor, list[str]], index: int) -> tuple[torch.Tensor, dict]:
        images, captions = item
        generator = draws(options.seed, index, accelerator.process_index)
        with accelerator.autocast():
            values = model(images.to(accelerator.device) * LATENT_SCALE, captions, generator)
        return values.mean(), {}

    def validate(step: int) -> dict[str, Any]:
        ema.store(bare.parameters())
        ema.copy_to(bare.parameters())
        bare.eval()
        scores = evaluate(bare, options, step)
        bare.train()
        ema.restore(bare.parameters())
        return scores

    def finish() -> None:
        ema.copy_to(bare.parameters())
        folder = Path(options.output_dir) / "pipeline"
        save(bare, folder)
        write_card(
            folder,
            vars(options),
            [json.loads(line) for line in lines_of(folder.parent / "log.jsonl")],
            shlex.join(["python", "recipes/train_base.py", *given]),
            number,
        )
        say_saved([folder], {"model": str(folder)})

    def begin(done: int) -> None:
        if accelerator.is_main_process:
            rows = "the embedded world's images, rendered"
            say_summary(
                f"A base model ({options.base}) from {options.init_from or 'random weights'}",
                {
                    "device": str(accelerator.device),
                    "trains": f"{number:,} parameters",
                    **steps_line(options, done, accelerator.num_processes, rows),
                    "output": options.output_dir,
                },
            )

    number = sum(parameter.numel() for parameter in bare.parameters())
    train(
        options,
        accelerator,
        model,
        optimizer,
        Batches(options, accelerator.process_index),
        Hooks(
            loss,
            validate,
            finish,
            lambda: ema.step(bare.parameters()),
            (ema,),
            not options.skip_first_validation,
            lambda item: {"captions": item[1]},
            begin=begin,
        ),
    )


if __name__ == "__main__":
    command(main)
