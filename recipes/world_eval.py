"""Prompts -> a pipeline's images -> verdicts, and a sheet of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw

from world.detect import detect
from world.score import Verdict, judge
from world_models import pipeline_arguments


def sample(
    pipe: Any, prompts: Sequence[str], *, seed: int, steps: int, cfg: float, batch_size: int = 256
) -> npt.NDArray[np.uint8]:
    """One image a prompt, (N, H, W, 3) uint8. Image i has its own generator, seeded seed + i, so
    that it does not depend on the batch size or on the other prompts."""
    images: list[npt.NDArray[np.uint8]] = []
    for start in range(0, len(prompts), batch_size):
        chunk = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))]
        result = pipe(
            chunk,
            num_inference_steps=steps,
            guidance_scale=cfg,
            generator=generators,
            output_type="np",
            **pipeline_arguments(pipe),
        ).images
        images.append((result * 255).round().astype(np.uint8))
    return np.concatenate(images)


def verdicts(images: npt.NDArray[np.uint8], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """The verdict on each image (N, H, W, 3) against its GenEval row."""
    if len(images) != len(rows):
        raise ValueError(f"expected one row an image, got {len(images)} images, {len(rows)} rows")
    return [judge(detect(image), row) for image, row in zip(images, rows, strict=True)]


def sheet(
    images: npt.NDArray[np.uint8],
    rows: Sequence[Mapping[str, Any]],
    judged: Sequence[Verdict],
    path: Path,
    *,
    columns: int = 8,
    zoom: int = 6,
) -> None:
    """Saves a PNG of images (N, H, W, 3) with prompt and verdict under each."""
    height, width = images.shape[1] * zoom, images.shape[2] * zoom
    cell_width, cell_height = width + 8, height + 40
    lines = -(-len(images) // columns)
    page = Image.new("RGB", (columns * cell_width, lines * cell_height), "white")
    draw = ImageDraw.Draw(page)
    for index, (image, row, verdict) in enumerate(zip(images, rows, judged, strict=True)):
        left, top = index % columns * cell_width + 4, index // columns * cell_height + 2
        page.paste(
            Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, top)
        )
        words, half = row["prompt"].split(), (len(row["prompt"].split()) + 1) // 2
        cut = half if len(row["prompt"]) > 22 else len(words)
        draw.text((left, top + height + 1), " ".join(words[:cut]), fill="black")
        draw.text((left, top + height + 12), " ".join(words[cut:]), fill="black")
        text, colour = ("right", "green") if verdict.correct else (str(verdict.reason), "red")
        draw.text((left, top + height + 24), text, fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
