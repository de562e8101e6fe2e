"""What can be measured of a tuned model without sampling."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from agsm_loss import Bank
from agsm_loss.integrations.denoisers import PlainDenoiser
from agsm_loss.integrations.hosts.diffusion_dpo import diffusion_dpo_loss
from agsm_loss.integrations.noise import add_noise, clean_and_noise, regression_target
from diagnosis.measure import held
from lab.world.captions import caption
from lab.world.data import WorldPairs, pixels_of
from lab.world.prompts import scenes
from lab.world.scene import GRID, Scene
from model.pipeline import TextToImage


@torch.no_grad()
def implicit_accuracy(
    tuned: TextToImage,
    reference: TextToImage,
    number: int,
    *,
    seed: int,
    low: float = 0.0,
    batch_size: int = 64,
) -> float:
    """Share of `number` held-out pairs of the world in which `tuned`, more than `reference`,
    denoises the winner better than the loser (`diffusion_dpo_loss`'s accuracy, arXiv 2311.12908).

    Each pair has one noise and one timestep, from the share `low` of the schedule on; the draws are
    the seed's. `tuned` uses its tokens as it does when sampling.
    """
    generator = torch.Generator().manual_seed(seed)
    scheduler, right = reference.pipe.scheduler, 0.0
    for index, first in enumerate(range(0, number, batch_size)):
        size = min(batch_size, number - first)
        batch = WorldPairs(size, 0, seed=seed, fold="heldout")[index]
        latents = reference.encode_images(torch.cat([batch.winner, batch.loser]), generator)
        noise = (
            torch.randn(latents[:size].shape, generator=generator).repeat(2, 1, 1, 1).to(latents)
        )
        timesteps = reference.timesteps(size, "uniform", generator, low).repeat(2)
        target = regression_target(scheduler, latents, noise, timesteps)
        inputs = (
            add_noise(scheduler, latents, noise, timesteps),
            timesteps,
            reference.encode_prompts(batch.captions * 2),
            Bank.POSITIVE,
        )
        preds = [PlainDenoiser(model.denoiser)(*inputs) for model in (tuned, reference)]
        right += size * diffusion_dpo_loss(*preds, target).accuracy.item()
    return right / number


def noised(
    model: TextToImage, scenes: Sequence[Scene], generator: torch.Generator, low: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The scenes' latents (N, C, h, w), the same noised, and their timesteps (N,).

    low: timesteps are drawn from this share of the schedule on.
    """
    latents = model.encode_images(pixels_of(scenes), generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    timesteps = model.timesteps(len(latents), "uniform", generator, low)
    return latents, add_noise(model.pipe.scheduler, latents, noise, timesteps), timesteps


@torch.no_grad()
def held_scale(
    model: TextToImage,
    number: int,
    *,
    seed: int,
    low: float = 0.0,
    side: int = GRID,
    batch_size: int = 64,
) -> float:
    """The guidance scale that a model's predictions hold (`diagnosis.measure.Numbers.held`).

    Over `number` held-out images, each at one noise level from the share `low` of the schedule on.

    side: of the images' scenes (`scenes`).
    """
    generator = torch.Generator().manual_seed(seed)
    denoiser, scheduler = PlainDenoiser(model.denoiser), model.pipe.scheduler
    stream, along, length = scenes(seed, "heldout", side), 0.0, 0.0
    for first in range(0, number, batch_size):
        drawn = list(islice(stream, min(batch_size, number - first)))
        latents, noisy, timesteps = noised(model, [scene for _, scene in drawn], generator, low)
        captions = [caption(spec) for spec, _ in drawn]
        own, without = (
            clean_and_noise(
                scheduler,
                noisy,
                denoiser(noisy, timesteps, model.encode_prompts(texts), Bank.POSITIVE),
                timesteps,
            )[0]
            for texts in (captions, [""] * len(drawn))
        )
        along += float(((own - without) * (latents - own)).sum())
        length += float((own - without).square().sum())
    return held(along, length)
