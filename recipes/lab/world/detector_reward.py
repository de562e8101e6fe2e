"""The world's exact detector as a reward: alignment, with nothing to over-optimise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from data.pictures import to_uint8
from lab.world.detect import detect
from lab.world.prompts import row_by_prompt
from lab.world.score import judge


def detector(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 for a right picture, less 1 for each object too many or too few where it is wrong.

    Prompts must be the world's own.
    """
    rows = [row_of(prompt) for prompt in prompts]
    images = to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()
    scores = []
    for image, row in zip(images, rows, strict=True):
        verdict = judge(detect(image), row)
        assert verdict.found is not None
        scores.append(float(verdict.correct) - abs(verdict.found - verdict.expected))
    return torch.tensor(scores)


def row_of(prompt: str) -> dict[str, Any]:
    """The prompt's GenEval row; ValueError where it is not one of the world's."""
    if prompt not in row_by_prompt():
        raise ValueError(
            f"detector: expected captions of the embedded world, got {prompt[:80]!r}. Take "
            "another --reward for other prompts."
        )
    return row_by_prompt()[prompt]


detector.check = row_of  # type: ignore[attr-defined]
