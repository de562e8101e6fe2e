"""Detector, colours and rules together: pictures -> verdicts, or rewards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.pictures import to_images
from rewards.models import CLIP

from .colours import ColourClassifier
from .detectors import load as load_detector
from .rules import Detected, Judgement, judge, row_of

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
"""Of the size of GenEval's own."""

Kept = Mapping[str, Sequence[Detected]]


class Evaluator:
    """GenEval's rules on a detector and a CLIP model of transformers.

    Args:
        detector, clip: folders or hub ids. GenEval's CLIP is the default's.
        device: of both.
    """

    def __init__(
        self, detector: str = DETECTOR, clip: str = CLIP, device: torch.device | str = "cpu"
    ) -> None:
        self.detector = load_detector(detector, device)
        self.colours = ColourClassifier(clip, device)

    def __call__(
        self, images: Sequence[Image.Image], rows: Sequence[Mapping[str, Any]]
    ) -> list[tuple[Judgement, Kept]]:
        """The verdict on each RGB image against its GenEval row, and the objects that it is of.

        Raises:
            ValueError: a class that the detector does not know.
        """
        self.detector.check(rows)
        judged: list[tuple[Judgement, Kept]] = []
        for image, row, found in zip(images, rows, self.detector(images, rows), strict=True):
            kept = self.detector.rules.keep(found, row["tag"])
            judged.append((judge(kept, row, partial(self.colours, image)), kept))
        return judged


class Credit:
    """An `Evaluator`'s credit as a reward of GenEval's prompts."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        judged = self.evaluator(to_images(pixels), [row_of(prompt) for prompt in prompts])
        return torch.tensor([judgement.credit for judgement, _ in judged])

    def check(self, prompt: str) -> None:
        """ValueError where it is none of GenEval's, or of a class that the detector lacks."""
        self.evaluator.detector.check([row_of(prompt)])


def load(device: torch.device | str = "cpu") -> Credit:
    """The reward `geneval`."""
    return Credit(Evaluator(device=device))


def result(file: Path, row: Mapping[str, Any], judgement: Judgement, kept: Kept) -> dict[str, Any]:
    """A line of `results.jsonl`, with the columns of GenEval's evaluator."""
    boxes = {
        label: [[*map(float, one.box), one.score] for one in group] for label, group in kept.items()
    }
    return {
        "filename": str(file),
        "tag": row["tag"],
        "prompt": row["prompt"],
        "correct": judgement.correct,
        "reason": judgement.reason,
        "metadata": json.dumps(row),
        "details": json.dumps(boxes),
    }
