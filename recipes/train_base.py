r"""Trains a base text-to-image model of the world from nothing and saves a stock pipeline.

    python recipes/train_base.py --config recipes/configs/base_flow.yaml
    accelerate launch recipes/train_base.py --config recipes/configs/base_flow.yaml \
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
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.options import option, parse
from common.settings import LoopOptions, WorldValidationOptions
from common.stop import command

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


def batch(options: Options, step: int, rank: int) -> tuple[torch.Tensor, list[str]]:
    """Images (B, 3, 24, 24) in [-1, 1] and their captions, a function of (seed, step, rank)."""
    import numpy as np
    import torch

    from common.image_data import to_model
    from world.captions import CAREFUL, CARELESS, caption, corrupt
    from world.prompts import scenes
    from world.render import render

    rng = np.random.default_rng([options.seed, step, rank, 1])
    sources = np.random.default_rng([options.seed, step, rank, 6])
    shares = {
        "count": options.corrupt_count,
        "colour": options.corrupt_colour,
        "missing": options.corrupt_missing,
    }
    stream = scenes(int(rng.integers(2**62)))
    images, captions = [], []
    for spec, scene in islice(stream, options.train_batch_size):
        images.append(render(scene))
        careless, signed = sources.random(2) < (options.careless, options.signed)
        told = caption(corrupt(spec, shares, rng) if careless else spec)
        if signed:
            told += f" {CARELESS if careless else CAREFUL}"
        captions.append("" if rng.random() < options.drop_caption else told)
    return torch.from_numpy(to_model(np.stack(images))), captions


def build(options: Options) -> torch.nn.Module:
    """The model to train, random or with the weights of `init_from`."""
    import diffusers

    from world.architectures import BASES, NoiseLevels

    model = BASES[options.base](
        width=options.width,
        layers=options.layers,
        levels=NoiseLevels(options.sigma_logit, options.uniform_levels),
    )
    if options.init_from:
        saved = diffusers.DiffusionPipeline.from_pretrained(options.init_from)
        for name, part in model.pipeline().components.items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(saved.components[name].float().state_dict())
    return model


def evaluate(model: Any, options: Options, step: int) -> dict[str, Any]:
    """Scores the model on the validation prompts and saves a sheet; returns the summary."""
    import torch

    from common.messages import say_scores, say_validating
    from common.sampling import sample
    from common.sheet import sheet
    from world.architectures import pipeline_arguments
    from world.prompts import rows
    from world.score import summarize, verdicts

    wanted = rows("validation", options.validation_per_category)
    pipe = model.pipeline()
    pipe.set_progress_bar_config(disable=True)
    say_validating(len(wanted), options.validation_inference_steps)
    with torch.compiler.set_stance("force_eager"):
        images = sample(
            pipe,
            [row["prompt"] for row in wanted],
            seeds=range(len(wanted)),
            num_inference_steps=options.validation_inference_steps,
            guidance_scale=options.validation_guidance_scale,
            arguments=pipeline_arguments(pipe),
        )
    judged = verdicts(images, wanted)
    shown = [i for i in range(len(wanted)) if i % options.validation_per_category < 8]
    file = Path(options.output_dir) / "sheets" / f"{step:06d}.png"
    sheet(
        images[shown],
        [wanted[i] for i in shown],
        [judged[i] for i in shown],
        file,
    )
    scores = summarize(judged)
    say_scores(step, scores, file)
    return scores


class Batches:
    """Micro-step -> `batch`, for the loop's loader."""

    def __init__(self, options: Options, rank: int) -> None:
        self.options, self.rank = options, rank

    def __len__(self) -> int:
        return self.options.max_train_steps * self.options.gradient_accumulation_steps

    def __getitem__(self, index: int) -> tuple[torch.Tensor, list[str]]:
        return batch(self.options, index, self.rank)


def main(arguments: list[str] | None = None) -> None:
    """Trains, evaluates, checkpoints and saves."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(Options, __doc__, given)

    import torch
    from diffusers.training_utils import EMAModel

    from agsm_loss import draws
    from common.log import lines_of
    from common.loop import Hooks, start, train
    from common.messages import say, say_saved
    from world.architectures import LATENT_SCALE
    from world.model_card import write_card
    from world.muon import MuonAdamW

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
        _save(bare, folder)
        write_card(
            folder,
            vars(options),
            [json.loads(line) for line in lines_of(folder.parent / "log.jsonl")],
            shlex.join(["python", "recipes/train_base.py", *given]),
            number,
        )
        say_saved([folder], {"model": str(folder)})

    number = sum(parameter.numel() for parameter in bare.parameters())
    if accelerator.is_main_process:
        say(
            f"Training {number:,} parameters ({options.base}, from "
            f"{options.init_from or 'random weights'}) on {accelerator.device}; output: "
            f"{options.output_dir}"
        )
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
        ),
    )


def _save(model: Any, folder: Path) -> None:
    """Saves a half-precision copy as a stock pipeline; the model itself keeps its precision."""
    import copy

    import torch

    saved = copy.deepcopy(model).to(torch.float16, memory_format=torch.contiguous_format)
    if not all(bool(value.isfinite().all()) for value in saved.parameters()):
        raise FloatingPointError("weights: expected numbers within float16's range. None is saved.")
    saved.pipeline().to(torch.float16).save_pretrained(folder)


if __name__ == "__main__":
    command(main)
