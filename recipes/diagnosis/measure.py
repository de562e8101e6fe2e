"""The errors of a frozen model on captioned images, by noise level.

    measured = measure(model, task.images(16, EDITS), batches=16, seed=0)

The schedule is cut into ten equal parts, the noise levels. Every image is noised once in each of
them and denoised under its own caption, two edits of it, two captions of its batch and the empty
one, all on the same noise. Before training the EMA is the student, so this model makes the weights
and the guidance Δ = p_own − Σ w_k p_k of AGSM's first step. Both follow from the inner products of
the residuals p_k − τ, which are what is kept.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import trange

from agsm_loss import Bank, Mixed, caption_pool
from agsm_loss._random import draws
from agsm_loss.integrations.denoisers import PlainDenoiser
from agsm_loss.integrations.noise import add_noise, prediction_type, regression_target
from data.batches import Batch
from model.pipeline import TextToImage

EDITS = OTHERS = 2  # captions of each of these kinds an image
KINDS = {"edited": (1, 2), "in_batch": (3, 4), "empty": (5,)}
"""Columns of each kind of competitor; column 0 is the image's own caption."""
EMPTY = 5
COLUMNS = 6


@dataclass(frozen=True)
class Measured:
    """I images at L noise levels under K captions."""

    gram: Tensor
    """(I, L, K, K): mean over elements of (p_j − τ)(p_k − τ), in float64; errors are its
    diagonal."""
    power: Tensor
    """(I, L): mean square of the prediction under the own caption."""
    mask: Tensor
    """(I, K): False where an image has no such caption."""
    captions: list[list[str]] = field(default_factory=list)
    """The K captions of each image; "" where there is none."""
    image_ids: list[int] = field(default_factory=list)
    pass_seconds: float = 0.0
    """Median time of a forward pass over one batch."""
    batch_size: int = 0
    trainable: int = 0
    """Number of the denoiser's weights."""
    peak_bytes: int = 0
    """Most memory that was taken on the GPU; 0 on a CPU."""

    @property
    def errors(self) -> Tensor:
        """(I, L, K): mean squared errors."""
        return self.gram.diagonal(dim1=-2, dim2=-1)


@torch.no_grad()
def measure(
    model: TextToImage, images: Dataset[Batch], *, batches: int, seed: int, levels: int = 10
) -> Measured:
    """Runs the model on the first batches of `images`, which have up to `EDITS` edited captions.

    The draws are a function of (seed, batch). One forward pass a caption, noise level and batch.
    """
    rule = Mixed(OTHERS, allow_empty=True, null=True)
    grams, powers, masks, captions, ids, seconds = [], [], [], [], [], []
    batch_size = 0
    for index in trange(batches, unit="batch", disable=None):
        batch, generator = images[index], draws(seed, index)
        batch_size = len(batch.captions)
        drawn = rule(
            batch.captions,
            hard_negatives=batch.hard,
            image_ids=batch.image_ids,
            generator=generator,
        )
        places, mask = _in_columns(drawn.index), _in_columns(drawn.mask)
        mask &= (places != places[:, :1]) | (torch.arange(COLUMNS) == 0)
        pool = [str(text) for text in caption_pool(batch.captions, batch.hard, null=True)]
        noisings = _noisings(model, batch, levels, generator)
        found = [_residuals(model, *noised, pool, places, mask) for noised in noisings]
        grams.append(torch.stack([gram for gram, _, _ in found], dim=1))
        powers.append(torch.stack([power for _, power, _ in found], dim=1))
        seconds += [one for _, _, passes in found for one in passes]
        masks.append(mask)
        ids += batch.image_ids
        captions += [
            [pool[place] if shown else "" for place, shown in zip(row, kept, strict=True)]
            for row, kept in zip(places.tolist(), mask.tolist(), strict=True)
        ]
    on_gpu = model.device.type == "cuda"
    return Measured(
        torch.cat(grams),
        torch.cat(powers),
        torch.cat(masks),
        captions,
        ids,
        float(np.median(seconds)),
        batch_size,
        sum(one.numel() for one in model.denoiser.parameters()),
        torch.cuda.max_memory_allocated(model.device) if on_gpu else 0,
    )


def _in_columns(drawn: Tensor) -> Tensor:
    """(B, K') of the rule in `KINDS`' columns: a batch may have fewer edits, or none."""
    missing = COLUMNS - drawn.shape[1]
    own = drawn[:, :1].expand(-1, missing)
    edits = drawn.shape[1] - OTHERS - 1  # with the own caption before them
    return torch.cat([drawn[:, :edits], own, drawn[:, edits:]], dim=1)


def _noisings(
    model: TextToImage, batch: Batch, levels: int, generator: torch.Generator
) -> list[Any]:
    """(noisy, timesteps, target, image conditioning) at each level, t uniform inside it."""
    latents = model.encode_images(batch.pixels, generator)
    scheduler, image = model.pipe.scheduler, model.image_conditioning(batch.pixels)
    steps, found = scheduler.config.num_train_timesteps, []
    for level in range(levels):
        share = torch.rand(len(latents), generator=generator)
        timesteps = ((level + share) / levels * steps).to(model.device)
        if prediction_type(scheduler) != "flow":
            timesteps = timesteps.long().clamp(max=steps - 1)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = add_noise(scheduler, latents, noise, timesteps)
        target = regression_target(scheduler, latents, noise, timesteps)
        found.append((noisy, timesteps, target, image))
    return found


def _residuals(
    model: TextToImage,
    noisy: Tensor,
    timesteps: Tensor,
    target: Tensor,
    image: dict[str, Tensor],
    pool: Sequence[str],
    places: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor, list[float]]:
    """(B, K, K) inner products, (B,) mean square of the own prediction, seconds of each pass."""
    denoiser, residuals, seconds = PlainDenoiser(model.denoiser), [], []
    for place, shown in zip(places.T.tolist(), mask.T, strict=True):
        if not shown.any():
            residuals.append(torch.zeros_like(residuals[0]))
            continue
        text = model.encode_prompts([pool[row] for row in place])
        start = time.perf_counter()
        pred = denoiser(noisy, timesteps, text, Bank.OFF, **image)
        residuals.append((pred.float() - target).flatten(1).double().cpu())  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    rest = torch.stack(residuals, dim=1)
    own = rest[:, 0] + target.flatten(1).double().cpu()
    gram = torch.einsum("bkd,bld->bkl", rest, rest) / rest.shape[-1]
    return gram, own.square().mean(1), seconds
