"""Images in GenEval's folder layout, and the results that its evaluator writes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from world.score import Verdict


def read_images(folder: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    """Every image of a folder in GenEval's layout and its row."""
    files, rows = [], []
    for metadata in sorted(folder.glob("*/metadata.jsonl")):
        row = json.loads(metadata.read_text())
        found = sorted((metadata.parent / "samples").glob("*.png"))
        files += found
        rows += [row] * len(found)
    if not files:
        raise FileNotFoundError(
            f"{folder}: no images. Expected NNNNN/metadata.jsonl and NNNNN/samples/*.png, as "
            "recipes/generate.py writes them."
        )
    return files, rows


def pixels(file: Path) -> npt.NDArray[np.uint8]:
    """An image file as (H, W, 3)."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def read_results(results: Path, files: Sequence[Path], folder: Path) -> list[Verdict]:
    """GenEval's verdicts, in the order of `files`; its evaluator doesn't tell how many it found."""
    by_name: dict[str, dict[str, Any]] = {}
    for line in results.read_text().splitlines():
        row = json.loads(line)
        by_name["/".join(Path(row["filename"]).parts[-3:])] = row
    judged = []
    for file in files:
        name = "/".join(file.parts[-3:])
        if name not in by_name:
            raise ValueError(f"{results}: no result for {name} of {folder}")
        row = by_name[name]
        metadata = row.get("metadata", {"include": []})
        if isinstance(metadata, str):  # as GenEval's evaluator writes it
            metadata = json.loads(metadata)
        expected = sum(one["count"] for one in metadata["include"])
        reason = None if row["correct"] else str(row.get("reason") or "wrong")
        judged.append(Verdict(row["tag"], bool(row["correct"]), reason, expected, None))
    return judged
