"""Captioned images and preference pairs of any data set, a batch a micro-step.

    table = open_table("photos.parquet", "train")    of data.tables
    batches = TableBatches(table, 16, hard=0, seed=0, size=512)
    pairs = TablePairs(open_table("pickapic.parquet", "train"), 16, hard=0, seed=0, size=512)

Item i is a function of (seed, i, process): a resumed run sees what it would have seen. Hard
negatives, where asked for, are captions one edit away from the image's own
(`data.prompts.edited`). A row with a damaged image is replaced by the next.

Pairs have the columns jpg_0, jpg_1, label_0, caption (Pick-a-Pic), or image_w, image_l, caption.
Ties (label_0 of 0.5) are dropped, as published, and so are pairs without a label.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from data.pictures import read_picture
from data.prompts import edited, texts_of
from data.tables import as_images, check_columns, fingerprint

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """pixels (B, 3, H, W) in [-1, 1]; `hard[i]`: edited captions of image i, maybe none."""

    pixels: Tensor
    captions: list[str]
    image_ids: list[int]
    hard: list[list[str]]


def to_model(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1], the range pipelines work in."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images: expected (B, H, W, 3), got {images.shape}")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / 127.5 - 1.0


@dataclass(frozen=True)
class Item:
    """A row of a batch: its number, its images (3, H, W), and its texts.

    image_id: the number of the batch's first row with the same image files; its own where the
    images are not files.
    """

    row: int
    image_id: int
    images: list[Tensor]
    texts: list[str]


class Rows:
    """A table's rows in an order that the seed gives, with their images read and fitted.

    A row with an image that cannot be read, or without a text, is replaced by the next one, and
    counted in `unreadable`; the log tells of the 1st, 10th, 100th… Images are read by
    `data.pictures`, resized to cover `size` pixels a side, and cropped in the middle.
    """

    def __init__(
        self,
        table: Any,
        images: Sequence[str],
        text: str,
        batch_size: int,
        *,
        seed: int,
        size: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        check_columns(table, images, text)
        if len(table) == 0:
            raise ValueError("data: expected at least one row, got none.")
        # Other columns may be heavy, or damaged.
        self.table = as_images(table, images).select_columns([*images, text])
        self.images, self.text = tuple(images), text
        self.batch_size, self.seed, self.size = batch_size, seed, size
        self.rank, self.processes = rank, processes
        self.unreadable: set[int] = set()
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    def batch(self, index: int) -> list[Item]:
        """The rows of batch `index`."""
        start = (index * self.processes + self.rank) * self.batch_size
        first: dict[Any, int] = {}
        found = []
        for place in range(self.batch_size):
            item, cells = self._readable(self._row(start + place))
            files = tuple(_file(cells[name]) for name in self.images)
            if None not in files:
                item = replace(item, image_id=first.setdefault(files, item.row))
            found.append(item)
        return found

    def _readable(self, row: int) -> tuple[Item, Mapping[str, Any]]:
        """The row, or the next one that can be read, and its cells."""
        for _ in range(len(self.table)):
            if row not in self.unreadable:
                cells = self.table[row]
                try:
                    texts = texts_of(cells[self.text])
                    images = [self._load(cells[name]) for name in self.images]
                    return Item(row, row, images, texts), cells
                except ValueError as error:
                    leave_out(self.unreadable, row, error, len(self.table))
            row = (row + 1) % len(self.table)
        raise ValueError(
            f"data: none of the {len(self.table)} rows can be read; the log tells of the first."
        )

    def _row(self, place: int) -> int:
        """Every row once an epoch, in an order that the seed and the epoch give."""
        epoch, inside = divmod(place, len(self.table))
        if epoch not in self._orders:
            order = np.random.default_rng([self.seed, epoch, 5]).permutation(len(self.table))
            # A batch may lie in two epochs, and a table of millions takes seconds to shuffle.
            self._orders = {n: kept for n, kept in self._orders.items() if n == epoch - 1}
            self._orders[epoch] = order
        return int(self._orders[epoch][inside])

    def _load(self, cell: Any) -> Tensor:
        """ValueError if damaged."""
        return torch.from_numpy(to_model(read_image(cell, self.size)[None]))[0]


def leave_out(unreadable: set[int], row: int, error: Exception, rows: int) -> None:
    """Counts a row that the next one stands for; the log tells of the 1st, 10th, 100th..."""
    if row in unreadable:
        return
    unreadable.add(row)
    number = len(unreadable)
    if number == 10 ** (len(str(number)) - 1):
        LOGGER.warning(
            "data: row %d cannot be read (%s); the next one stands for it. So far %d of %d "
            "rows.", row, error, number, rows,
        )  # fmt: skip


def _file(cell: Any) -> str | None:
    """The path of an image that is a file; None for bytes, whose name may be anything."""
    if isinstance(cell, Mapping):
        cell = None if cell["bytes"] else cell["path"]
    return os.path.abspath(cell) if isinstance(cell, str) else None


def read_image(cell: Any, size: int) -> npt.NDArray[np.uint8]:
    """(size, size, 3) from a path, bytes, or a cell of `datasets.Image(decode=False)`.

    Read by `data.pictures`, resized to cover the size, and cropped in the middle.

    Raises:
        ValueError: it cannot be read.
    """
    if isinstance(cell, Mapping):
        cell = cell["bytes"] or cell["path"]
    if not cell:
        raise ValueError("expected an image, got none")
    return np.asarray(ImageOps.fit(read_picture(cell), (size, size)))


class TableBatches(Dataset[Batch]):
    """A table with an image column and a caption column (a text, or several: one is drawn)."""

    def __init__(
        self,
        table: Any,
        batch_size: int,
        hard: int,
        *,
        image: str = "image",
        text: str = "caption",
        **rows: Any,
    ) -> None:
        self.rows = Rows(table, [image], text, batch_size, **rows)
        self.hard = hard

    @cached_property
    def fingerprint(self) -> str:
        """`tables.fingerprint` of what is trained on."""
        return fingerprint(self.rows.table)

    def about(self) -> str:
        """For a run's summary."""
        return f"{len(self.rows.table):,} images"

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng([self.rows.seed, index, self.rows.rank, 4])
        found = self.rows.batch(index)
        captions = [one_text(item.texts, rng) for item in found]
        return Batch(
            torch.stack([item.images[0] for item in found]),
            captions,
            [item.image_id for item in found],
            [edited(text, self.hard, rng) for text in captions],
        )


def one_text(texts: Sequence[str], rng: np.random.Generator) -> str:
    """One of a caption's texts (`texts_of`)."""
    return texts[int(rng.integers(len(texts)))]


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
            images, labels = ["jpg_0", "jpg_1"], _labels(table["label_0"])
            decided = np.flatnonzero((labels == 0) | (labels == 1))
            self.ties = int((labels == 0.5).sum())
            self.unlabelled = len(labels) - len(decided) - self.ties
            if len(labels) > len(decided) == 0:
                raise ValueError(
                    f"data: expected pairs with a winner, label_0 of 1 or 0, got {self.ties} ties "
                    f"and {self.unlabelled} without a label: all of the {len(labels)} rows. Take "
                    "other data."
                )
            table = table.select(decided)
            self.first_wins: Any = labels[decided] == 1
        elif names >= {"image_w", "image_l"}:
            images, self.first_wins = ["image_w", "image_l"], None
            self.ties = self.unlabelled = 0
        else:
            raise ValueError(
                "data: expected columns jpg_0, jpg_1 and label_0, or image_w and image_l, got "
                f"{sorted(names)}."
            )
        self.rows = Rows(table, images, text, batch_size, **rows)
        self.hard = hard

    @cached_property
    def fingerprint(self) -> str:
        """`tables.fingerprint` of what is trained on, and of who won."""
        return fingerprint(self.rows.table, self.first_wins)

    def about(self) -> str:
        """For a run's summary."""
        return (
            f"{len(self.rows.table):,} pairs"
            + f", {self.ties:,} ties left out" * bool(self.ties)
            + f", {self.unlabelled:,} without a label left out" * bool(self.unlabelled)
        )

    def __getitem__(self, index: int) -> PairBatch:
        rng = np.random.default_rng([self.rows.seed, index, self.rows.rank, 8])
        found = self.rows.batch(index)
        ordered = [
            one.images if self.first_wins is None or self.first_wins[one.row] else one.images[::-1]
            for one in found
        ]
        captions = [one_text(one.texts, rng) for one in found]
        return PairBatch(
            torch.stack([images[0] for images in ordered]),
            torch.stack([images[1] for images in ordered]),
            captions,
            [one.row for one in found],
            [edited(text, self.hard, rng) for text in captions],
        )


def _labels(column: Any) -> npt.NDArray[np.float64]:
    """NaN where there is none."""
    found = np.full(len(column), math.nan)
    for row, value in enumerate(column[:]):
        with suppress(TypeError, ValueError, OverflowError):
            label = math.nan if value in (None, "", b"") else float(value)
            if math.isnan(label) or label in (0, 0.5, 1):
                found[row] = label
                continue
        raise ValueError(
            f"data: row {row}: expected numbers in label_0, 1 where jpg_0 won, 0 where jpg_1 did "
            f"and 0.5 for a tie, got {str(value)[:80]!r}. Write these into it."
        )
    return found
