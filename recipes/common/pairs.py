"""Preference pairs for DPO-like recipes, a batch a micro-step: the world's, or any table's.

    open_pairs("world", ...)                 rendered on the fly: the caption's scene, and an edit of it
    open_pairs("pickapic.parquet", ...)      columns jpg_0, jpg_1, label_0, caption (Pick-a-Pic)
                                             or image_w, image_l, caption

Ties (label_0 of 0.5) are dropped, as published; a row with a damaged image is replaced by the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.images import Rows, edited, one_text, open_table, world_edits
from world.captions import caption
from world.export import pair_of_scenes
from world.prompts import scenes
from world.render import render, to_model

if TYPE_CHECKING:
    from common.pipeline import TextToImage


@dataclass(frozen=True)
class PairBatch:
    """winner, loser (B, 3, H, W) in [-1, 1]; `hard[i]`: edited captions of pair i, maybe none."""

    winner: Tensor
    loser: Tensor
    captions: list[str]
    image_ids: list[int]
    hard: list[list[str]]


class WorldPairs(Dataset[PairBatch]):
    """Scenes of a fold's prompts, each beside a scene that is one edit of its caption away."""

    def __init__(
        self, batch_size: int, hard: int, *, seed: int, rank: int = 0, fold: str = "train"
    ) -> None:
        self.batch_size, self.hard = batch_size, hard
        self.seed, self.rank, self.fold = seed, rank, fold

    def __getitem__(self, index: int) -> PairBatch:
        rng = np.random.default_rng([self.seed, index, self.rank, 7])
        drawn = list(islice(scenes(int(rng.integers(2**62)), self.fold), self.batch_size))
        pairs = [pair_of_scenes(spec, scene, rng) for spec, scene in drawn]
        winner, loser = (to_model(np.stack([render(pair[i]) for pair in pairs])) for i in (0, 1))
        hard = [world_edits(spec, self.hard, rng) for spec, _ in drawn]
        ids = [index * self.batch_size + i for i in range(self.batch_size)]
        captions = [caption(spec) for spec, _ in drawn]
        return PairBatch(torch.from_numpy(winner), torch.from_numpy(loser), captions, ids, hard)


class TablePairs(Dataset[PairBatch]):
    """A table in Pick-a-Pic's columns, or with the winner's and the loser's images in two."""

    def __init__(
        self, table: Any, batch_size: int, hard: int, *, text: str = "caption", **rows: Any
    ) -> None:
        from datasets import Image

        names = set(table.column_names)
        if names >= {"jpg_0", "jpg_1", "label_0"}:
            images, labels = ["jpg_0", "jpg_1"], np.asarray(table["label_0"], dtype=float)
            decided = np.flatnonzero((labels == 0) | (labels == 1))
            self.ties = len(labels) - len(decided)
            table = table.select(decided)
            self.first_wins: Any = labels[decided] == 1
        elif names >= {"image_w", "image_l"}:
            images, self.ties, self.first_wins = ["image_w", "image_l"], 0, None
        else:
            raise ValueError(
                "data: expected columns jpg_0, jpg_1 and label_0, or image_w and image_l, got "
                f"{sorted(names)}."
            )
        for name in images:
            if isinstance(table.features[name], Image) and len(table):
                table = table.cast_column(name, Image(decode=False))
        self.rows = Rows(table, images, text, batch_size, **rows)
        self.hard = hard

    def __getitem__(self, index: int) -> PairBatch:
        rng = np.random.default_rng([self.rows.seed, index, self.rows.rank, 8])
        found = self.rows.batch(index)
        ordered = [
            images if self.first_wins is None or self.first_wins[row] else images[::-1]
            for row, images, _ in found
        ]
        captions = [one_text(cell, rng) for _, _, cell in found]
        return PairBatch(
            torch.stack([images[0] for images in ordered]),
            torch.stack([images[1] for images in ordered]),
            captions,
            [row for row, _, _ in found],
            [edited(text, self.hard, rng) for text in captions],
        )


def open_pairs(
    data: str, batch_size: int, hard: int, *, split: str, text: str, size: int, **where: Any
) -> Dataset[PairBatch]:
    """ "world", or what `captioned.open_table` reads; `where`: seed, rank, processes."""
    if data == "world":
        return WorldPairs(batch_size, hard, seed=where["seed"], rank=where["rank"])
    return TablePairs(open_table(data, split), batch_size, hard, text=text, size=size, **where)


@torch.no_grad()
def implicit_accuracy(
    tuned: TextToImage,
    reference: TextToImage,
    number: int,
    *,
    fold: str,
    seed: int,
    low: float = 0.0,
    high: float = 1.0,
    batch_size: int = 64,
) -> float:
    """Share of `number` pairs of the world's fold in which `tuned`, more than `reference`, denoises
    the winner better than the loser (`diffusion_dpo_loss`'s accuracy, arXiv 2311.12908).

    Each pair has one noise and one timestep, between the shares `low` and `high` of the schedule; the
    draws are the seed's. Tokens on `tuned` are worn as they are when sampling.
    """
    from agsm_loss import Bank
    from agsm_loss.integrations.denoisers import PlainDenoiser
    from agsm_loss.integrations.hosts.diffusion_dpo import diffusion_dpo_loss
    from agsm_loss.integrations.noise import add_noise, regression_target

    generator = torch.Generator().manual_seed(seed)
    scheduler, right = reference.pipe.scheduler, 0.0
    for index, first in enumerate(range(0, number, batch_size)):
        size = min(batch_size, number - first)
        batch = WorldPairs(size, 0, seed=seed, fold=fold)[index]
        latents = reference.encode_images(torch.cat([batch.winner, batch.loser]), generator)
        noise = (
            torch.randn(latents[:size].shape, generator=generator).repeat(2, 1, 1, 1).to(latents)
        )
        timesteps = reference.timesteps(size, "uniform", generator, low, high).repeat(2)
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
