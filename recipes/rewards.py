"""Scores of images against their prompts, for preference models and rewards.

score = load("detector")                        the embedded world's exact detector
score = load("yuvalkirstain/PickScore_v1")      a CLIP-like preference model, by transformers
score(pixels, prompts)                          (N, 3, H, W) in [-1, 1] -> (N,), larger is better
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

Score = Callable[[Tensor, Sequence[str]], Tensor]


def load(name: str, device: torch.device | str = "cpu") -> Score:
    """ "detector", or a folder or hub id of a CLIP model with its processor."""
    return detector if name == "detector" else PreferenceModel(name, device)


def detector(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """1 for a right picture, less 1 for each object too many or too few where it is wrong.

    Prompts must be the world's own.
    """
    from world.detect import detect
    from world.score import judge

    rows = _rows()
    unknown = sorted(set(prompts) - rows.keys())
    if unknown:
        raise ValueError(f"prompts: expected captions of the embedded world, got {unknown[:3]}.")
    images = to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        verdict = judge(detect(image), rows[prompt])
        assert verdict.found is not None
        scores.append(float(verdict.correct) - abs(verdict.found - verdict.expected))
    return torch.tensor(scores)


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] -> 0..255."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class PreferenceModel:
    """PickScore (arXiv 2305.01569), or any CLIP model used like it: its logit of image and prompt."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModel, AutoProcessor

        self.processor: Any = AutoProcessor.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name).to(device).eval().requires_grad_(False)
        self.device = device

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        inputs = self.processor(
            images=list(to_uint8(pixels).cpu()),
            text=list(prompts),
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        return self.model(**inputs).logits_per_image.diagonal().cpu()


@cache
def _rows() -> dict[str, dict[str, Any]]:
    """Every prompt of the world -> its GenEval row."""
    from world.captions import caption, metadata
    from world.prompts import specs
    from world.scene import TAGS

    return {caption(spec): metadata(spec) for tag in TAGS for spec in specs(tag)}
