"""Images in GenEval's folder layout, and the results that its evaluator writes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm.auto import tqdm

from data.pictures import image_files, read_picture
from data.prompts import read_prompts, rows_of
from lab.world.scene import IMAGE_SIDE, SHAPES
from lab.world.score import Verdict
from rewards.geneval.evaluator import Evaluator, result
from rewards.geneval.rules import reason_kind

AT_ONCE = 32
"""Images in memory."""


def read_images(folder: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    """Every image of a folder in GenEval's layout and its row; hidden files are left out.

    Raises:
        FileNotFoundError, ValueError: no images; an image, or a row's prompt, that cannot be read.
    """
    files, rows = [], []
    for metadata in sorted(folder.glob("*/metadata.jsonl")):
        row = read_prompts(str(metadata))[0]
        found = image_files(metadata.parent / "samples")
        files += found
        rows += [row] * len(found)
    if not files:
        raise FileNotFoundError(
            f"{folder}: no images. Expected NNNNN/metadata.jsonl and NNNNN/samples/*.png, as "
            "recipes/generate.py writes them."
        )
    for file in tqdm(files, desc="reading", leave=False):  # before minutes of scoring
        read_picture(file)
    return files, rows


def pixels(file: Path) -> npt.NDArray[np.uint8]:
    """An image file as (H, W, 3)."""
    return np.asarray(read_picture(file))


def world_pixels(files: Sequence[Path]) -> npt.NDArray[np.uint8]:
    """Image files of the world as (N, 24, 24, 3).

    Raises:
        ValueError: an image has another size.
    """
    images = [pixels(file) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != (IMAGE_SIDE, IMAGE_SIDE, 3):
            raise ValueError(
                f"{file}: expected {IMAGE_SIDE} pixels a side, as the world's detector does, got "
                f"{image.shape[1]} x {image.shape[0]}. Give --detector for other images."
            )
    return np.stack(images)


def of_world(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the world's detector can judge all rows' images."""
    asked = {one["class"] for row in rows for one in row.get("include") or []}
    return asked <= set(SHAPES) and all("tag" in row and "include" in row for row in rows)


def judge_folder(
    evaluator: Evaluator, files: Sequence[Path], rows: Sequence[Mapping[str, Any]], results: Path
) -> list[Verdict]:
    """The verdicts, after writing a line of `results` for each image, as GenEval's evaluator does.

    Raises:
        ValueError: rows that are not GenEval's, or a class that the detector does not know.
    """
    missing = sorted(key for key in ("tag", "include") if any(key not in row for row in rows))
    if missing:
        raise ValueError(
            f"{files[0].parents[2]}: expected GenEval's rows in metadata.jsonl, some have no "
            f"{' and no '.join(missing)}. Sample GenEval's evaluation_metadata.jsonl."
        )
    lines = []
    for start in tqdm(range(0, len(files), AT_ONCE), desc="detecting", leave=False):
        part = range(start, min(start + AT_ONCE, len(files)))
        images = [Image.fromarray(pixels(files[i])) for i in part]
        judged = evaluator(images, [rows[i] for i in part])
        lines += [result(files[i], rows[i], *one) for i, one in zip(part, judged, strict=True)]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [_verdict(line) for line in lines]


def read_results(results: Path, files: Sequence[Path], folder: Path) -> list[Verdict]:
    """The verdicts of a `results.jsonl`, GenEval's or ours, in the order of `files`."""
    by_name: dict[str, dict[str, Any]] = {}
    for where, row in rows_of(results):
        if not isinstance(row, dict) or not {"filename", "tag", "correct"} <= set(row):
            raise ValueError(
                f"{where}: expected filename, tag, correct and reason, as GenEval's "
                f"evaluate_images.py writes them, got {row!r}."
            )
        by_name["/".join(Path(row["filename"]).parts[-3:])] = row
    judged = []
    for file in files:
        name = "/".join(file.parts[-3:])
        if name not in by_name:
            raise ValueError(f"{results}: no result for {name} of {folder}")
        judged.append(_verdict(by_name[name]))
    return judged


def _verdict(row: Mapping[str, Any]) -> Verdict:
    """Of a line; how many objects were found is in its details, where it has them."""
    metadata = _table(row.get("metadata", {}))
    wanted = metadata.get("include", [])
    found = None
    if "details" in row:
        details = _table(row["details"])
        found = sum(len(details.get(name, [])) for name in {one["class"] for one in wanted})
    reason = None if row["correct"] else reason_kind(str(row.get("reason") or "")) or "wrong"
    expected = sum(one["count"] for one in wanted)
    return Verdict(row["tag"], bool(row["correct"]), reason, expected, found)


def _table(value: Any) -> dict[str, Any]:
    """A mapping, or the text of one, as GenEval's evaluator writes it."""
    found: dict[str, Any] = json.loads(value) if isinstance(value, str) else value
    return found
