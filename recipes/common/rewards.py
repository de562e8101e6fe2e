"""Scores of images against their prompts, for preference models and rewards.

score = load("jpeg_incompressibility")         DDPO's (arXiv 2305.13301), or ..._compressibility
score = load("redness")                        an easy one to over-optimise
score = load("pickscore")                      a model: clipscore, hpsv2, imagereward, ocr, geneval
score = load("runs/clip")                      a CLIP-like preference model, by transformers
score = load("pickscore:0.5,jpeg_compressibility")        several, with weights
score(pixels, prompts)                         (N, 3, H, W) in [-1, 1] -> (N,), larger is better
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common import reward_models
from common.compositional.evaluator import Evaluator
from common.pictures import to_images
from common.reward_models import PreferenceModel
from common.sources import check_source, loading

Score = Callable[[Tensor, Sequence[str]], Tensor]


def load(
    name: str, device: torch.device | str = "cpu", more: Mapping[str, Score] | None = None
) -> Score:
    """A reward by name, a folder or hub id of a CLIP model with its processor, or a sum of some.

    name: for a sum, names with commas between; `:WEIGHT` after a name multiplies it.
    more: further rewards by name (the embedded world's detector, say).

    Raises:
        ValueError: neither a known name nor a folder nor a hub id.
        ImportError: a package that the reward needs is missing.
    """
    parts = [_weighted(part.strip()) for part in name.split(",")]
    if len(parts) == 1 and parts[0][1] == 1:
        return _one(parts[0][0], device, more or {})
    return WeightedSum({one: (weight, _one(one, device, more or {})) for one, weight in parts})


class WeightedSum:
    """The sum of several rewards times their weights. last: each one's scores at the last call."""

    def __init__(self, parts: Mapping[str, tuple[float, Score]]) -> None:
        self.parts = parts
        self.last: dict[str, Tensor] = {}

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        self.last = {
            name: score(pixels, prompts).float().cpu() for name, (_, score) in self.parts.items()
        }
        return sum(
            (weight * self.last[name] for name, (weight, _) in self.parts.items()),
            torch.zeros(len(prompts)),
        )


def _weighted(part: str) -> tuple[str, float]:
    """ "pickscore:0.5" -> its name and weight."""
    name, colon, weight = part.rpartition(":")
    try:
        return (name, float(weight)) if colon else (part, 1.0)
    except ValueError:  # a name that has a colon
        return part, 1.0


WITHOUT_PROMPT = ("jpeg_compressibility", "jpeg_incompressibility", "redness")
"""The functions below: rewards of a picture alone, which can be asked of any picture."""
MODELS: dict[str, Callable[[torch.device | str], Score]] = {
    "pickscore": lambda device: PreferenceModel(reward_models.PICKSCORE, device),
    "clipscore": lambda device: reward_models.CLIPScore(reward_models.CLIP, device),
    "hpsv2": lambda device: reward_models.HPSv2(device),
    "imagereward": lambda device: reward_models.ImageReward(device),
    "ocr": lambda device: reward_models.OCR(),
    "geneval": lambda device: Evaluator(device=device).reward,
}
"""Name -> what loads the model onto a device."""


def check(name: str, more: Mapping[str, Score] | None = None) -> None:
    """`load`'s errors of names and paths, with nothing loaded."""
    for part, _ in (_weighted(one.strip()) for one in name.split(",")):
        known = [*WITHOUT_PROMPT, *(more or {}), *MODELS]
        if part in known:
            continue
        if not part or ("/" not in part and not Path(part).is_dir()):
            raise ValueError(
                f"reward: expected some of {', '.join(known)}, or a CLIP model as a folder or a "
                f"hub id such as {reward_models.PICKSCORE}; got {part!r}."
            )
        check_source("reward", part)


def _one(name: str, device: torch.device | str, more: Mapping[str, Score]) -> Score:
    check(name, more)
    known = {**{one: globals()[one] for one in WITHOUT_PROMPT}, **more}
    if name in known:
        return known[name]
    if name in MODELS:
        return MODELS[name](device)
    with loading("reward", name):
        return PreferenceModel(name, device)


def jpeg_incompressibility(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """Kilobytes of each picture as a JPEG of quality 95, as in DDPO."""
    sizes = []
    for image in to_images(pixels):
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)


def jpeg_compressibility(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """The negative of it."""
    return -jpeg_incompressibility(pixels, prompts)


def redness(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of red less the mean of green and blue, in [-1, 1]; the prompts have no say."""
    red, green, blue = ((pixels.float().clamp(-1, 1) + 1) / 2).mean((2, 3)).unbind(1)
    return (red - (green + blue) / 2).cpu()
