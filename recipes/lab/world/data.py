"""The world as training data, rendered on the fly: captioned images and preference pairs.

Item i is a function of (seed, i, process), as in `data.batches`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data.batches import Batch, PairBatch, to_model
from lab.world.captions import caption, hard_negatives
from lab.world.prompts import corner_scenes, pair_of_scenes, scenes
from lab.world.render import render
from lab.world.scene import Scene, Spec


def pixels_of(scenes: Iterable[Scene]) -> torch.Tensor:
    """(N, 3, 24, 24) in [-1, 1], as models take them."""
    return torch.from_numpy(to_model(np.stack([render(scene) for scene in scenes])))


class _Rendered(Dataset[Any]):
    """Scenes of a fold's prompts; random edits of their captions are the hard negatives."""

    of = "images"

    def __init__(
        self, batch_size: int, hard: int, *, seed: int, rank: int = 0, fold: str = "train"
    ) -> None:
        self.batch_size, self.hard = batch_size, hard
        self.seed, self.rank, self.fold = seed, rank, fold

    def about(self) -> str:
        """For a run's summary."""
        return f"the embedded world's {self.of}, rendered"

    def _texts(
        self, index: int, specs: Sequence[Spec], rng: np.random.Generator
    ) -> tuple[list[str], list[int], list[list[str]]]:
        """Captions, numbers and hard negatives of item `index`."""
        captions = [caption(spec) for spec in specs]
        ids = [index * self.batch_size + i for i in range(self.batch_size)]
        return captions, ids, [world_edits(spec, self.hard, rng) for spec in specs]


class WorldBatches(_Rendered):
    """Scenes with their own captions.

    corner: how many images there are, all of them in the lower left (`corner_scenes`); 0: no end
    of them, anywhere.
    """

    def __init__(self, batch_size: int, hard: int, corner: int = 0, **settings: Any) -> None:
        super().__init__(batch_size, hard, **settings)
        self.corner = corner

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng([self.seed, index, self.rank, 3])
        seed = int(rng.integers(2**62))
        stream = corner_scenes(seed, self.corner) if self.corner else scenes(seed, self.fold)
        specs, drawn = zip(*islice(stream, self.batch_size), strict=True)
        return Batch(pixels_of(drawn), *self._texts(index, specs, rng))


class WorldPairs(_Rendered):
    """Scenes, each with a scene that is one edit of its caption away."""

    of = "pairs"

    def __getitem__(self, index: int) -> PairBatch:
        rng = np.random.default_rng([self.seed, index, self.rank, 7])
        drawn = list(islice(scenes(int(rng.integers(2**62)), self.fold), self.batch_size))
        right, wrong = zip(*(pair_of_scenes(*one, rng) for one in drawn), strict=True)
        texts = self._texts(index, [spec for spec, _ in drawn], rng)
        return PairBatch(pixels_of(right), pixels_of(wrong), *texts)


def world_edits(spec: Spec, number: int, rng: np.random.Generator) -> list[str]:
    """Up to `number` of a spec's hard negatives as captions, drawn without replacement."""
    edits = [caption(edit) for edit in hard_negatives(spec)]
    return [edits[i] for i in rng.permutation(len(edits))[:number]]
