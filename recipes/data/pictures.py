"""Pixels as bytes and as pictures, and sheets: many pictures in one PNG, with prompts below."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from torch import Tensor


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] -> 0..255."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [-1, 1] -> N pictures."""
    return [Image.fromarray(one) for one in to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()]


class Judged(Protocol):
    """Whether a picture is right, and why not."""

    @property
    def correct(self) -> bool: ...

    @property
    def reason(self) -> str | None: ...


def sheet(
    images: Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8],
    rows: Sequence[Mapping[str, Any]],
    judged: Sequence[Judged] | None,
    path: Path,
    *,
    columns: int = 8,
    side: int = 144,
    titles: Sequence[str] = (),
) -> None:
    """Saves a PNG of N images (H, W, 3), enlarged or reduced to `side` pixels. Under each are its
    verdict, where they were judged, and its prompt. titles: one a column, above them."""
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
        below = top + height + 1
        if judged is not None:
            verdict = judged[index]
            text, colour = (
                ("right", "green") if verdict.correct else (str(verdict.reason)[: side // 6], "red")
            )
            draw.text((left, below), text, fill=colour)
            below += 12
        told = textwrap.wrap(row["prompt"], width=side // 6)[:3]
        draw.multiline_text((left, below), "\n".join(told), fill="black", spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def side_by_side(
    columns: Mapping[str, Sequence[npt.NDArray[np.uint8]]],
    rows: Sequence[Mapping[str, Any]],
    path: Path,
) -> None:
    """Saves a PNG with each prompt's image of every column beside each other, titled.

    A single column is a sheet without a title.
    """
    images = [image for prompt in zip(*columns.values(), strict=True) for image in prompt]
    told = [row for row in rows for _ in columns]
    side = 144 if max(images[0].shape[:2]) <= 144 else 256
    several = len(columns) > 1
    titles = 2 * list(columns) if several else ()
    sheet(np.stack(images), told, None, path, columns=4, side=side, titles=titles)
