"""Pixels in [-1, 1] as bytes and as pictures."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] -> 0..255."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [-1, 1] -> N pictures."""
    return [Image.fromarray(one) for one in to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()]
