"""What `train_base.py` trains: the model, its batches, its validation and how it is saved."""

from __future__ import annotations

import copy
import json
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline

from data.pictures import sheet
from data.sources import loading
from lab.world.architectures import BASES, NoiseLevels
from lab.world.captions import CAREFUL, CARELESS, caption, corrupt
from lab.world.data import pixels_of
from lab.world.model_card import write_card
from lab.world.prompts import rows, scenes
from lab.world.score import summarize, verdicts
from model.families import call_of
from model.sampling import sample
from run.log import lines_of, say_saved, say_scores, say_validating


class Batch(NamedTuple):
    """Images (B, 3, 24, 24) in [-1, 1] and their captions."""

    images: torch.Tensor
    captions: list[str]


def batch(options: Any, step: int, rank: int) -> Batch:
    """Images (B, 3, 24, 24) in [-1, 1] and their captions, a function of (seed, step, rank)."""
    rng = np.random.default_rng([options.seed, step, rank, 1])
    sources = np.random.default_rng([options.seed, step, rank, 6])
    shares = {
        "count": options.corrupt_count,
        "colour": options.corrupt_colour,
        "missing": options.corrupt_missing,
    }
    stream = scenes(int(rng.integers(2**62)))
    drawn, captions = list(islice(stream, options.train_batch_size)), []
    for spec, _ in drawn:
        source, signs = sources.random(2)
        careless = source < options.careless
        told = caption(corrupt(spec, shares, rng) if careless else spec)
        if signs < options.signed * (options.careless_signed if careless else 1):
            told += f" {CARELESS if careless else CAREFUL}"
        captions.append("" if rng.random() < options.drop_caption else told)
    return Batch(pixels_of(scene for _, scene in drawn), captions)


def build(options: Any) -> torch.nn.Module:
    """The model to train, random or with the weights of `init_from`."""
    model = BASES[options.base](
        width=options.width,
        layers=options.layers,
        levels=NoiseLevels(options.sigma_logit, options.uniform_levels),
    )
    if options.init_from:
        with loading("init_from", options.init_from):
            saved = DiffusionPipeline.from_pretrained(options.init_from)
        for name, part in model.pipeline().components.items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(saved.components[name].float().state_dict())
    return model


def evaluate(model: Any, options: Any, step: int) -> dict[str, Any]:
    """Scores the model on the validation prompts and saves a sheet; returns the summary."""
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
            arguments=call_of(pipe),
        )
    judged = verdicts(images, wanted)
    shown = [i for i in range(len(wanted)) if i % options.validation_per_category < 8]
    file = Path(options.output_dir) / "sheets" / f"{step:06d}.png"
    sheet(images[shown], [wanted[i] for i in shown], [judged[i] for i in shown], file)
    scores = summarize(judged)
    say_scores(step, scores, file)
    return scores


class Batches:
    """Micro-step -> `batch`, for the loop's loader."""

    def __init__(self, options: Any, rank: int) -> None:
        self.options, self.rank = options, rank

    def __len__(self) -> int:
        return self.options.max_train_steps * self.options.gradient_accumulation_steps

    def about(self) -> str:
        """For a run's summary."""
        return "the embedded world's images, rendered"

    def __getitem__(self, index: int) -> Batch:
        return batch(self.options, index, self.rank)


class Base:
    """A base model in training, with the EMA whose weights are validated and saved.

    bare, module: as accelerate has not wrapped it, and as it has.
    """

    def __init__(self, options: Any, bare: Any, module: Any, optimizer: Any, ema: Any) -> None:
        self.options, self.bare, self.module = options, bare, module
        self.optimizer, self.ema = optimizer, ema

    def summary(self) -> tuple[str, dict[str, str]]:
        """What is printed before the first step."""
        start = self.options.init_from or "random weights"
        return f"A base model ({self.options.base}) from {start}", {
            "device": str(next(self.bare.parameters()).device),
            "trains": f"{self._number:,} parameters",
        }

    def validate(self, step: int) -> dict[str, Any]:
        """The EMA weights' scores."""
        self.ema.store(self.bare.parameters())
        self.ema.copy_to(self.bare.parameters())
        self.bare.eval()
        scores = evaluate(self.bare, self.options, step)
        self.bare.train()
        self.ema.restore(self.bare.parameters())
        return scores

    def update_ema(self) -> None:
        self.ema.step(self.bare.parameters())

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.ema.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ema.load_state_dict(state)

    def save(self, command: str) -> None:
        """The EMA weights as a pipeline, with its card. command: that made it."""
        self.ema.copy_to(self.bare.parameters())
        folder = Path(self.options.output_dir) / "pipeline"
        save(self.bare, folder)
        log = [json.loads(line) for line in lines_of(folder.parent / "log.jsonl")]
        write_card(folder, vars(self.options), log, command, self._number)
        say_saved([folder], {"model": str(folder)})

    @property
    def _number(self) -> int:
        return sum(parameter.numel() for parameter in self.bare.parameters())


def save(model: Any, folder: Path) -> None:
    """Saves a half-precision copy as a stock pipeline; the model itself keeps its precision."""
    saved = copy.deepcopy(model).to(torch.float16, memory_format=torch.contiguous_format)
    if not all(bool(value.isfinite().all()) for value in saved.parameters()):
        raise FloatingPointError("weights: expected numbers within float16's range. None is saved.")
    saved.pipeline().to(torch.float16).save_pretrained(folder)
