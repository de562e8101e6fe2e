"""Preference pairs of any table for DPO-like recipes, a batch a micro-step.

    TablePairs(open_table("pickapic.parquet", "train"), 16, hard=0, seed=0, size=512)

Columns: jpg_0, jpg_1, label_0, caption (Pick-a-Pic), or image_w, image_l, caption.
Ties (label_0 of 0.5) are dropped, as published; a row with a damaged image is replaced by the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.hard_negatives import edited
from data.image_data import Rows, one_text

PAIR_COLUMNS = ("jpg_0", "jpg_1", "label_0", "image_w", "image_l")


@dataclass(frozen=True)
class PairBatch:
    """winner, loser (B, 3, H, W) in [-1, 1]; `hard[i]`: edited captions of pair i, maybe none."""

    winner: Tensor
    loser: Tensor
    captions: list[str]
    image_ids: list[int]
    hard: list[list[str]]

    @property
    def pixels(self) -> Tensor:
        """(2 B, 3, H, W): the winners, then the losers."""
        return torch.cat([self.winner, self.loser])


class TablePairs(Dataset[PairBatch]):
    """A table in Pick-a-Pic's columns, or with the winner's and the loser's images in two."""

    def __init__(
        self, table: Any, batch_size: int, hard: int, *, text: str = "caption", **rows: Any
    ) -> None:
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
            if isinstance(table.features[name], datasets.Image) and len(table):
                table = table.cast_column(name, datasets.Image(decode=False))
        self.rows = Rows(table, images, text, batch_size, **rows)
        self.hard = hard

    def about(self) -> str:
        """For a run's summary."""
        return f"{len(self.rows.table):,} pairs" + (
            f", {self.ties:,} ties left out" * bool(self.ties)
        )

    def __getitem__(self, index: int) -> PairBatch:
        rng = np.random.default_rng([self.rows.seed, index, self.rows.rank, 8])
        found = self.rows.batch(index)
        ordered = [
            one.images if self.first_wins is None or self.first_wins[one.row] else one.images[::-1]
            for one in found
        ]
        captions = [one_text(one.text, rng) for one in found]
        return PairBatch(
            torch.stack([images[0] for images in ordered]),
            torch.stack([images[1] for images in ordered]),
            captions,
            [one.row for one in found],
            [edited(text, self.hard, rng) for text in captions],
        )
