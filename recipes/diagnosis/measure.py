"""The errors of a frozen model on captioned images, by noise level.

    measured = measure(model, task.images(16, EDITS), batches=16, seed=0)

The schedule is cut into ten equal parts, the noise levels. Every image is noised once in each of
them and denoised under its own caption, two edits of it, two captions of its batch and the empty
one, all on the same noise. What is kept are the errors of these predictions p against the training
target τ, and how the caption changes the clean image x that a prediction stands for: the guidance
x_own − x_empty, which AGSM and a guided sampler amplify.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import trange

from agsm_loss import Bank, Mixed, caption_pool
from agsm_loss._random import draws
from agsm_loss.candidates import with_null
from agsm_loss.integrations.denoisers import PlainDenoiser
from agsm_loss.integrations.noise import (
    add_noise,
    clean_and_noise,
    prediction_type,
    regression_target,
)
from data.batches import Batch
from model.pipeline import TextToImage

EDITS = OTHERS = 2  # captions of each of these kinds an image
KINDS = {"empty": (5,), "in_batch": (3, 4), "edited": (1, 2)}
"""Columns of each kind of competitor; column 0 is the image's own caption."""
EMPTY = 5


@dataclass(frozen=True)
class Measured:
    """I images at L noise levels under K captions. Every mean is over a prediction's elements."""

    errors: Tensor
    """(I, L, K): mean of (p − τ)²; anything where an image has no such caption."""
    guidance: Tensor
    """(I, L): mean of (x_own − x_empty)²."""
    along: Tensor
    """(I, L): mean of (x_own − x_empty)(x_0 − x_own); x_0 is the image."""
    away: Tensor
    """(I, L): mean of (x_0 − x_own)²."""
    power: Tensor
    """(I, L): mean of x_own²."""
    mask: Tensor
    """(I, K): False where an image has no such caption."""
    captions: list[list[str]]
    """The K captions of each image."""
    image_ids: list[int]


@torch.no_grad()
def measure(
    model: TextToImage, images: Dataset[Batch], *, batches: int, seed: int, levels: int = 10
) -> Measured:
    """Runs the model on the first batches of `images`, which have up to `EDITS` edited captions.

    The draws are a function of (seed, batch). One forward pass a caption, noise level and batch.
    """
    denoiser = PlainDenoiser(model.denoiser)
    found, masks, captions, ids = [], [], [], []
    for index in trange(batches, unit="batch", disable=None):
        batch, generator = images[index], draws(seed, index)
        own = batch.captions
        # An image's own caption fills the columns of its missing edits: it does not compete.
        edits = [[*few, *[text] * EDITS][:EDITS] for few, text in zip(batch.hard, own, strict=True)]
        drawn = with_null(
            Mixed(OTHERS, allow_empty=True)(
                own, hard_negatives=edits, image_ids=batch.image_ids, generator=generator
            ),
            [text == "" for text in own],
        )
        pool = [*map(str, caption_pool(own, edits)), *[""] * len(own)]
        texts = [[pool[row] for row in rows] for rows in drawn.index.tolist()]
        image = model.image_conditioning(batch.pixels)
        by_level = []
        for noisy, timesteps, target in _noisings(model, batch, levels, generator):
            preds: list[Tensor] = []
            for column, shown in zip(zip(*texts, strict=True), drawn.mask.T, strict=True):
                if not shown.any():  # no image has this caption
                    preds.append(preds[0])
                    continue
                text = model.encode_prompts(column)
                pred = denoiser(noisy, timesteps, text, Bank.OFF, **image)
                preds.append(pred.float())
            errors = [(pred - target).square().flatten(1).mean(1) for pred in preds]
            clean = [
                clean_and_noise(model.pipe.scheduler, noisy, one, timesteps)[0]
                for one in (target, preds[0], preds[EMPTY])
            ]
            by_level.append([torch.stack(errors, dim=1).cpu(), *_moments(*clean)])
        found.append([torch.stack(kind, dim=1) for kind in zip(*by_level, strict=True)])
        masks.append(drawn.mask)
        captions += texts
        ids += batch.image_ids
    errors, guidance, along, away, power = (
        torch.cat(kind).double() for kind in zip(*found, strict=True)
    )
    return Measured(errors, guidance, along, away, power, torch.cat(masks), captions, ids)


def _noisings(
    model: TextToImage, batch: Batch, levels: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(noisy, timesteps, target) at each level, t uniform inside it."""
    latents, scheduler = model.encode_images(batch.pixels, generator), model.pipe.scheduler
    steps = scheduler.config.num_train_timesteps
    for level in range(levels):
        share = torch.rand(len(latents), generator=generator)
        timesteps = ((level + share) / levels * steps).to(model.device)
        if prediction_type(scheduler) != "flow":
            timesteps = timesteps.long().clamp(max=steps - 1)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = add_noise(scheduler, latents, noise, timesteps)
        yield noisy, timesteps, regression_target(scheduler, latents, noise, timesteps)


def _moments(image: Tensor, own: Tensor, empty: Tensor) -> list[Tensor]:
    """guidance, along, away and power (B,) of `Measured`; all are clean images (B, *D)."""
    guidance, rest = own - empty, image - own
    kept = (guidance.square(), guidance * rest, rest.square(), own.square())
    return [one.flatten(1).mean(1).cpu() for one in kept]
