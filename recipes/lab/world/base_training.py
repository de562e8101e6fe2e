"""What `train_base.py` trains: the model, its batches, its validation and how it is saved."""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from data.image_data import to_model
from data.sheet import sheet
from data.sources import loading
from lab.world.architectures import BASES, NoiseLevels
from lab.world.captions import CAREFUL, CARELESS, caption, corrupt
from lab.world.prompts import rows, scenes
from lab.world.render import render
from lab.world.score import summarize, verdicts
from model.families import family_of
from model.sampling import sample
from run.messages import say_scores, say_validating


def batch(options: Any, step: int, rank: int) -> tuple[torch.Tensor, list[str]]:
    """Images (B, 3, 24, 24) in [-1, 1] and their captions, a function of (seed, step, rank)."""
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
            arguments=family_of(pipe).call(pipe),
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

    def __init__(self, options: Any, rank: int) -> None:
        self.options, self.rank = options, rank

    def __len__(self) -> int:
        return self.options.max_train_steps * self.options.gradient_accumulation_steps

    def __getitem__(self, index: int) -> tuple[torch.Tensor, list[str]]:
        return batch(self.options, index, self.rank)


def save(model: Any, folder: Path) -> None:
    """Saves a half-precision copy as a stock pipeline; the model itself keeps its precision."""
    saved = copy.deepcopy(model).to(torch.float16, memory_format=torch.contiguous_format)
    if not all(bool(value.isfinite().all()) for value in saved.parameters()):
        raise FloatingPointError("weights: expected numbers within float16's range. None is saved.")
    saved.pipeline().to(torch.float16).save_pretrained(folder)
