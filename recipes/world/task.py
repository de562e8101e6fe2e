"""The embedded world as a recipe's task: `--data world`, `world:` prompts, and its own reward.

task = open_task(options, accelerator)      the world, or the table that --data names
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from common.image_data import Batch
from common.pair_data import PairBatch
from common.sampling import read_prompts as read_file
from common.task import Captions, Task
from world.architectures import pipeline_arguments
from world.captions import caption
from world.data import WorldBatches, WorldPairs
from world.detector_reward import detector
from world.prompts import draw_spec, rows
from world.scene import IMAGE_SIDE
from world.score import verdicts
from world.summary import summarize_with_intervals

ON_SHEET = 8
"""Images a category on a validation sheet."""


@dataclass(frozen=True)
class World(Task):
    """The world's training scenes; its validation prompts are scored where there are no others.

    per_category: validation prompts of each category.
    """

    per_category: int = 32

    def images(self, batch_size: int, hard: int, image: str = "image") -> Dataset[Batch]:
        return WorldBatches(batch_size, hard, seed=self.seed, rank=self.rank)

    def pairs(self, batch_size: int, hard: int) -> Dataset[PairBatch]:
        return WorldPairs(batch_size, hard, seed=self.seed, rank=self.rank)

    def captions(self) -> Captions:
        """One for each seed of a scene, 2**31 of them."""
        return Captions(
            2**31, lambda seed: caption(draw_spec(np.random.default_rng(seed), "train"))
        )

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
        return None if self.prompts else verdicts(images, rows)

    def summarize(self, verdicts: Sequence[Any]) -> dict[str, Any]:
        return summarize_with_intervals(verdicts)


def open_task(options: Any, processes: Any) -> Task:
    """The task of a recipe's options. processes: has `process_index` and `num_processes`."""
    settings: dict[str, Any] = {
        "data": options.data,
        "split": options.split,
        "text": options.caption_column,
        "size": options.resolution,
        "seed": options.seed,
        "rank": processes.process_index,
        "processes": processes.num_processes,
        "prompts": options.validation_prompts,
        "rewards": {"detector": detector},
        "pipeline_arguments": pipeline_arguments,
    }
    if options.data == "world":
        settings["size"] = IMAGE_SIDE
        return World(**settings, per_category=options.validation_per_category)
    return Task(**settings)


def read_prompts(source: str) -> list[dict[str, Any]]:
    """`world:FOLD:PER_CATEGORY`, or a file as of `common.sampling.read_prompts`."""
    if not source.startswith("world:"):
        return read_file(source)
    parts = source.split(":")
    if len(parts) != 3 or not parts[2].isdigit():
        raise ValueError(f"prompts: expected world:FOLD:PER_CATEGORY, got {source!r}")
    return rows(parts[1], int(parts[2]))
