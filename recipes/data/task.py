"""What a recipe trains and validates on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from data.batches import (
    PAIR_COLUMNS,
    Batch,
    PairBatch,
    TableBatches,
    TablePairs,
    leave_out,
    one_text,
)
from data.prompts import read_prompts, texts_of
from data.sources import is_world, world
from data.tables import check_columns, fingerprint, open_table
from run.options import option


@dataclass(frozen=True)
class DataOptions:
    """What is trained on."""

    _argument_group_name = "data"
    data: str = option(
        "world",
        "Captioned images to train on: world (the embedded one, rendered), a parquet, jsonl, json, "
        "csv, tsv or webdataset tar file, a pattern of several, a folder of images, or a hub id.",
    )
    split: str = option("train", "Split of the data set to train on (not for --data world).")
    caption_column: str = option("caption", "Column of the captions (not for --data world).")
    resolution: int | None = option(
        None,
        "Side in pixels to which images are resized and cropped; left out: the model's own (not "
        "for --data world).",
        at_least=1,
    )


PAIRS = option(
    "world",
    "Preference pairs to train on: world (the embedded one, rendered), or a table as a file, a "
    "folder or a hub id, with the columns jpg_0, jpg_1, label_0 and caption (Pick-a-Pic's), or "
    "image_w (the preferred one), image_l and caption.",
)
"""`data` of `DataOptions`, where two images a row are trained on."""


@dataclass(frozen=True)
class ImageOptions:
    """Data of one image per row (preference pairs have two)."""

    image_column: str = option("image", "Column of the images (not for --data world).")


@dataclass(frozen=True)
class PromptFileOptions:
    """Prompts to look at during a run."""

    _argument_group_name = "validation"

    validation_prompts: str = option(
        "",
        "File of validation prompts, one per line or GenEval's jsonl; with --data world in place "
        "of the world's.",
    )


@dataclass(frozen=True)
class Captions:
    """`number` captions, each made when asked for: `captions[0]` to `captions[number - 1]`.

    table: that they are of, if any.
    """

    number: int
    make: Callable[[int], str]
    table: Any = None

    @cached_property
    def fingerprint(self) -> str:
        """`tables.fingerprint` of the captions; "" where they are of no table."""
        return "" if self.table is None else fingerprint(self.table)

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < self.number:
            raise IndexError(f"expected a number in 0..{self.number - 1}, got {row}.")
        return self.make(row)


@dataclass
class Task:
    """A table of captioned images or preference pairs, and prompts to look at.

    data, split: of `open_table`. text: the column of the captions. size: pixels a side; 0 until
    the model's own is known. prompts: a file of validation prompts, or "" for none; their images
    are shown, not scored.
    """

    data: str
    split: str = "train"
    text: str = "caption"
    size: int = 0
    seed: int = 0
    rank: int = 0
    processes: int = 1
    prompts: str = ""

    def __post_init__(self) -> None:
        if self.prompts:
            read_prompts(self.prompts)  # an error before anything is loaded

    def images(self, batch_size: int, hard: int, image: str = "image") -> Dataset[Batch]:
        """Captioned images, a batch a micro-step, with up to `hard` edited captions each."""
        table = open_table(self.data, self.split, columns=[image], text=self.text)
        return TableBatches(table, batch_size, hard, image=image, text=self.text, **self._rows())

    def pairs(self, batch_size: int, hard: int) -> Dataset[PairBatch]:
        """Preference pairs, a batch a micro-step, with up to `hard` edited captions each."""
        table = open_table(self.data, self.split, columns=PAIR_COLUMNS, text=self.text)
        return TablePairs(table, batch_size, hard, text=self.text, **self._rows())

    def _texts(self) -> Any:
        """The table of the captions alone, with no images read."""
        table = open_table(self.data, self.split, columns=(), text=self.text)
        check_columns(table, (), self.text)
        return table.select_columns([self.text])

    def captions(self) -> Captions:
        """The data's captions; of a row with several, always the same one.

        A row without a text is replaced by the next one; the log tells of them, as of images.
        """
        table = self._texts()
        column = table[self.text]
        unreadable: set[int] = set()

        def caption(row: int) -> str:
            for place in range(row, row + len(column)):
                try:
                    texts = texts_of(column[place % len(column)])
                    return one_text(texts, np.random.default_rng(row))
                except ValueError as error:
                    leave_out(unreadable, place % len(column), error, len(column))
            raise ValueError(f"data: none of the {len(column)} rows of {self.data} has a text.")

        return Captions(len(column), caption, table)

    def every_caption(self) -> Iterator[str]:
        """All of the data's captions, of each row all of them."""
        for cell in self._texts()[self.text]:
            with suppress(ValueError):
                yield from texts_of(cell)

    def one_caption(self) -> str | None:
        """The caption that all rows have; None where there are several, or none."""
        found: set[str] = set()
        for text in self.every_caption():
            found.add(text)
            if len(found) > 1:
                return None
        return next(iter(found), None)

    def validation(self) -> list[dict[str, Any]]:
        """A row with a prompt each; none where nothing is validated."""
        return read_prompts(self.prompts) if self.prompts else []

    def shown(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        """The rows whose images go on the sheet."""
        return list(range(len(rows)))

    def judge(
        self, images: npt.NDArray[np.uint8], rows: Sequence[Mapping[str, Any]]
    ) -> Sequence[Any] | None:
        """A verdict on each image; None where nobody can judge them."""
        return None

    def summarize(self, verdicts: Sequence[Any]) -> dict[str, Any]:
        """Scores of the verdicts, for the log."""
        raise NotImplementedError

    def _rows(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "size": self.size,
            "rank": self.rank,
            "processes": self.processes,
        }


def open_task(options: Any, processes: Any) -> Task:
    """What `--data` and `--validation_prompts` name.

    processes: has `process_index` and `num_processes`.
    """
    settings: dict[str, Any] = {
        "data": options.data,
        "split": options.split,
        "text": options.caption_column,
        "size": options.resolution or 0,
        "seed": options.seed,
        "rank": processes.process_index,
        "processes": processes.num_processes,
        # Of a command that samples nothing there are none.
        "prompts": getattr(options, "validation_prompts", ""),
    }
    if is_world(options.data):
        made: Task = world("task").World.of(
            settings, getattr(options, "validation_per_category", 1)
        )
        return made
    return Task(**settings)
