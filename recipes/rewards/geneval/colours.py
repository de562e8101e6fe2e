"""The colour of a detected object, by CLIP's zero-shot classification, as in GenEval."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from .rules import COLOURS, Detected

TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
BACKGROUND = "#999"
"""Of an object's picture, where its mask is not."""


class ColourClassifier:
    """name: a CLIP model of transformers with its processor, a folder or a hub id."""

    def __init__(self, name: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModel, AutoProcessor

        self.processor: Any = AutoProcessor.from_pretrained(name)
        self.model: Any = AutoModel.from_pretrained(name).to(device).eval().requires_grad_(False)
        self.device = device
        self.classifier = cache(self._classifier)

    def __call__(self, image: Image.Image, objects: Sequence[Detected], label: str) -> list[str]:
        """The colour of each object; label: their class."""
        crops = [cropped(image, one) for one in objects]
        pictures = self.processor.image_processor(crops, return_tensors="pt").to(self.device)
        with torch.no_grad():
            found = normalize(pooled(self.model.get_image_features(**pictures)), dim=-1)
        return [COLOURS[index] for index in (found @ self.classifier(label).T).argmax(1).tolist()]

    def _classifier(self, label: str) -> Tensor:
        """(colours, features): of each colour the mean over the templates."""
        texts = [template.format(c, label) for c in COLOURS for template in TEMPLATES]
        words = self.processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            found = normalize(pooled(self.model.get_text_features(**words.to(self.device))), dim=-1)
        return normalize(found.unflatten(0, (len(COLOURS), -1)).mean(1), dim=-1)


def pooled(output: Any) -> Tensor:
    """Features of `get_image_features` and `get_text_features`: a tensor before transformers 5."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found


def cropped(image: Image.Image, one: Detected) -> Image.Image:
    """The object's box, of a pixel at least, on grey where its mask is not."""
    if one.mask is not None:
        blank = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, blank, Image.fromarray(one.mask))
    left, top, right, bottom = map(round, one.box)
    left, top = min(max(left, 0), image.width - 1), min(max(top, 0), image.height - 1)
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
