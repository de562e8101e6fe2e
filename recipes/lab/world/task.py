"""The embedded world as a recipe's task: `--data world`, and `world:` prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from data.batches import Batch, PairBatch
from data.task import Captions, Task
from lab.world.captions import caption
from lab.world.data import WorldBatches, WorldPairs
from lab.world.prompts import draw_spec, rows
from lab.world.scene import IMAGE_SIDE
from lab.world.score import verdicts
from lab.world.summary import summarize_with_intervals

ON_SHEET = 8
"""Images a category on a validation sheet."""


@dataclass
class World(Task):
    """The world's training scenes; its validation prompts are scored where there are no others.

    per_category: validation prompts of each category.
    corner: as many images are trained on, all of them with everything in the lower left, for
        fine-tuning on something new. `--data world:corner:N`.
    """

    per_category: int = 32
    corner: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any], per_category: int) -> World:
        """With the settings of a `Task`; images have the world's size, whatever is asked for."""
        other, of_corner, number = settings["data"].removeprefix("world").partition(":corner:")
        if other or bool(of_corner) != number.isdecimal():
            raise ValueError(f"data: expected world or world:corner:N, got {settings['data']}.")
        corner = int(number or 0)
        return cls(**{**settings, "size": IMAGE_SIDE}, per_category=per_category, corner=corner)

    def images(self, batch_size: int, hard: int, image: str = "image") -> Dataset[Batch]:
        return WorldBatches(batch_size, hard, self.corner, seed=self.seed, rank=self.rank)

    def pairs(self, batch_size: int, hard: int) -> Dataset[PairBatch]:
        if self.corner:
            raise ValueError(f"data: expected world for preference pairs, got {self.data}.")
        return WorldPairs(batch_size, hard, seed=self.seed, rank=self.rank)

    def captions(self) -> Captions:
        """One for each seed of a scene, 2**31 of them."""
        return Captions(
            2**31, lambda seed: caption(draw_spec(np.random.default_rng(seed), "train"))
        )

    def every_caption(self) -> Iterator[str]:
        """Ten of them: they are all alike, and never end."""
        texts = self.captions()
        return (texts[seed] for seed in range(10))

    def one_caption(self) -> None:
        """There are many."""

    def validation(self) -> list[dict[str, Any]]:
        return super().validation() if self.prompts else rows("validation", self.per_category)

    def shown(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        if self.prompts:
            return super().shown(rows)
        return [i for i in range(len(rows)) if i % self.per_category < ON_SHEET]

    def judge(
        self, images: npt.NDArray[np.uint8], rows: Sequence[Mapping[str, Any]]
    ) -> Sequence[Any] | None:
        return None if self.prompts else verdicts(images, rows, corner=bool(self.corner))

    def summarize(self, verdicts: Sequence[Any]) -> dict[str, Any]:
        return summarize_with_intervals(verdicts)


def read_prompts(source: str) -> list[dict[str, Any]]:
    """The rows of `world:FOLD:PER_CATEGORY`."""
    parts = source.split(":")
    if len(parts) != 3 or not parts[2].isdigit():
        raise ValueError(f"prompts: expected world:FOLD:PER_CATEGORY, got {source!r}")
    return rows(parts[1], int(parts[2]))
