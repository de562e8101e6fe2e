"""Scores of images against their prompts, for preference models and rewards.

score = load("jpeg_incompressibility")         DDPO's (arXiv 2305.13301), or ..._compressibility
score = load("redness")                        an easy one to over-optimise
score = load("yuvalkirstain/PickScore_v1")     a CLIP-like preference model, by transformers
score(pixels, prompts)                         (N, 3, H, W) in [-1, 1] -> (N,), larger is better
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

Score = Callable[[Tensor, Sequence[str]], Tensor]


def load(
    name: str, device: torch.device | str = "cpu", more: Mapping[str, Score] | None = None
) -> Score:
    """A reward by name, or a folder or hub id of a CLIP model with its processor.

    more: further rewards by name (the embedded world's detector, say).
    """
    known: dict[str, Score] = {
        "jpeg_compressibility": jpeg_compressibility,
        "jpeg_incompressibility": jpeg_incompressibility,
        "redness": redness,
        **(more or {}),
    }
    return known[name] if name in known else PreferenceModel(name, device)


def jpeg_incompressibility(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """Kilobytes of each picture as a JPEG of quality 95, as in DDPO."""
    sizes = []
    for image in to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)


def jpeg_compressibility(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """The negative of it."""
    return -jpeg_incompressibility(pixels, prompts)


def redness(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of red less the mean of green and blue, in [-1, 1]; the prompts have no say."""
    red, green, blue = ((pixels.float().clamp(-1, 1) + 1) / 2).mean((2, 3)).unbind(1)
    return (red - (green + blue) / 2).cpu()


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] -> 0..255."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [-1, 1] -> N pictures."""
    return [Image.fromarray(one) for one in to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()]


class PreferenceModel:
    """PickScore (arXiv 2305.01569), or any CLIP model like it: its logit of image and prompt."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModel, AutoProcessor  # slow, and it warns of torchvision

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
