"""Images -> verdicts by the world's exact detector, and a sheet of both."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from world.detect import detect
from world.score import Verdict, judge


def verdicts(images: npt.NDArray[np.uint8], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """The verdict on each image (N, H, W, 3) against its GenEval row."""
    if len(images) != len(rows):
        raise ValueError(f"expected one row an image, got {len(images)} images, {len(rows)} rows")
    return [judge(detect(image), row) for image, row in zip(images, rows, strict=True)]


def sheet(
    images: npt.NDArray[np.uint8],
    rows: Sequence[Mapping[str, Any]],
    judged: Sequence[Verdict] | None,
    path: Path,
    *,
    columns: int = 8,
    side: int = 144,
    titles: Sequence[str] = (),
) -> None:
    """Saves a PNG of images (N, H, W, 3), enlarged or reduced to `side` pixels, with prompt and,
    where they were judged, verdict under each. titles: one a column, above them."""
    height = width = side
    cell_width, cell_height = width + 8, height + 52
    lines = -(-len(images) // columns)
    headings = [textwrap.wrap(title, width=side // 6) for title in titles]
    top_margin = 4 + 12 * max(map(len, headings)) if headings else 0
    size = (columns * cell_width, lines * cell_height + top_margin)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for column, heading in enumerate(headings):
        draw.multiline_text(
            (column * cell_width + 4, 2), "\n".join(heading), fill="black", spacing=1
        )
    for index, (image, row) in enumerate(zip(images, rows, strict=True)):
        left, top = index % columns * cell_width + 4, index // columns * cell_height + 2
        top += top_margin
        crisp = max(image.shape[:2]) <= side
        filter_ = Image.Resampling.NEAREST if crisp else Image.Resampling.LANCZOS
        page.paste(Image.fromarray(image).resize((width, height), filter_), (left, top))
        told = textwrap.wrap(row["prompt"], width=side // 6)[:3]
        draw.multiline_text((left, top + height + 1), "\n".join(told), fill="black", spacing=1)
        if judged is None:
            continue
        verdict = judged[index]
        text, colour = (
            ("right", "green") if verdict.correct else (str(verdict.reason)[: side // 6], "red")
        )
        draw.text((left, top + height + 37), text, fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
