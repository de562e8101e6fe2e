"""Images -> verdicts by the world's exact detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from world.detect import detect
from world.score import Verdict, judge


def verdicts(images: npt.NDArray[np.uint8], rows: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """The verdict on each image (N, H, W, 3) against its GenEval row."""
    if len(images) != len(rows):
        raise ValueError(f"expected one row an image, got {len(images)} images, {len(rows)} rows")
    return [judge(detect(image), row) for image, row in zip(images, rows, strict=True)]
