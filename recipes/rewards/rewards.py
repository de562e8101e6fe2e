"""Scores of images against their prompts, for preference models and rewards.

score = load("jpeg_incompressibility")         DDPO's (arXiv 2305.13301), or ..._compressibility
score = load("redness")                        an easy one to over-optimise
score = load("pickscore")                      a model: clipscore, hpsv2, imagereward, ocr, geneval
score = load("runs/clip")                      a CLIP-like preference model, by transformers
score = load("my_rewards:sharpness")           your own function
score = load("pickscore:0.5,jpeg_compressibility")        several, with weights
score(pixels, prompts)                         (N, 3, H, W) in [-1, 1] -> (N,), larger is better
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.pictures import to_images
from data.sources import check_source, load_object, loading
from rewards import models
from rewards.models import PreferenceModel

Score = Callable[[Tensor, Sequence[str]], Tensor]


def load(name: str, device: torch.device | str = "cpu") -> Score:
    """A reward by name, or a sum of some.

    name: of `REWARDS`; a folder or a hub id of a CLIP model with its processor; or
        `package.module:function`, a callable like these. For a sum, names with commas between;
        `:WEIGHT` after a name multiplies it.

    Raises:
        ValueError: none of these.
        ImportError: a package that the reward needs is missing.
    """
    parts = [_weighted(part.strip()) for part in name.split(",")]
    if len(parts) == 1 and parts[0][1] == 1:
        return _one(parts[0][0], device)
    return WeightedSum({one: (weight, _one(one, device)) for one, weight in parts})


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


def check(name: str) -> None:
    """`load`'s errors of names and paths, with nothing loaded."""
    for part, _ in (_weighted(one.strip()) for one in name.split(",")):
        if part in REWARDS:
            continue
        if ":" in part:
            load_object("reward", part)
        elif not part or ("/" not in part and not Path(part).is_dir()):
            raise ValueError(
                f"reward: expected some of {', '.join(REWARDS)}, package.module:function, or a "
                f"CLIP model as a folder or a hub id such as {models.PICKSCORE}; got {part!r}."
            )
        else:
            check_source("reward", part)


def _one(name: str, device: torch.device | str) -> Score:
    check(name)
    if name in REWARDS:
        return REWARDS[name](device)
    if ":" in name:
        found: Score = load_object("reward", name)
        return found
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


REWARDS: dict[str, Callable[[torch.device | str], Score]] = {
    "detector": lambda device: load_object("reward", "lab.world.detector_reward:detector"),
    "jpeg_compressibility": lambda device: jpeg_compressibility,
    "jpeg_incompressibility": lambda device: jpeg_incompressibility,
    "redness": lambda device: redness,
    "pickscore": lambda device: PreferenceModel(models.PICKSCORE, device),
    "clipscore": lambda device: models.CLIPScore(models.CLIP, device),
    "hpsv2": lambda device: models.HPSv2(device),
    "imagereward": lambda device: models.ImageReward(device),
    "ocr": lambda device: models.OCR(),
    "geneval": lambda device: load_object("reward", "rewards.geneval.evaluator:load")(device),
}
"""Name -> what makes the reward, with its model on a device. `detector` is the embedded world's."""
