"""Scores of images against their prompts, for preference models and rewards.

score = load("jpeg_incompressibility")         DDPO's (arXiv 2305.13301), or ..._compressibility
score = load("redness")                        an easy one to over-optimise
score = load("pickscore")        a model: clipscore, hpsv2, vqascore, imagereward, ocr, geneval
score = load("runs/clip")                      a CLIP-like preference model, by transformers
score = load("Qwen/Qwen3-VL-2B-Instruct")      VQAScore by this model
score = load("my_rewards:sharpness")           your own function
score = load("pickscore:0.5,jpeg_compressibility")        several, with weights
score(pixels, prompts)                         (N, 3, H, W) in [-1, 1] -> (N,), larger is better
score.check(prompts)                           ValueError where it cannot judge one
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.pictures import to_images
from data.sources import check_source, load_object, loading
from rewards import models, vqascore
from rewards.models import PreferenceModel
from rewards.vqascore import VQAScore

Score = Callable[[Tensor, Sequence[str]], Tensor]
"""May have a `check(prompt)` too, which raises ValueError where it cannot judge that prompt."""


def load(name: str, device: torch.device | str = "cpu") -> Reward:
    """A reward by name, or a sum of some.

    name: of `REWARDS`; a folder or a hub id of a CLIP model with its processor, or of a model
        that reads images and whose processor has a chat template (VQAScore); or
        `package.module:function`, a callable like these. For a sum, names with commas between;
        `:WEIGHT` after a name, above 0, multiplies it.

    Raises:
        ValueError: none of these, or one of them twice.
        ImportError: a package that the reward needs is missing.
    """
    parts = _parts(name)
    return Reward({one: (weight, _one(one, device)) for one, weight in parts.items()})


class Reward:
    """The sum of rewards times their weights; they run in their own precision, in autocast too.

    parts: name -> weight and score.
    """

    def __init__(self, parts: Mapping[str, tuple[float, Score]]) -> None:
        self.parts = parts

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.total(self.scores(pixels, prompts))

    def scores(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each part's, without its weight: name -> (N,) float32 on the CPU.

        Raises:
            FloatingPointError: the images, or a score of them, are not finite.
            ValueError: a part returns anything but (N,).
        """
        if not pixels.isfinite().all():
            raise FloatingPointError(
                f"images: expected finite numbers, got others for {_told(prompts)}. The model or "
                "its VAE has overflowed: take --mixed_precision bf16 or no, or go back to an "
                "earlier checkpoint."
            )
        found = {}
        with torch.autocast(pixels.device.type, enabled=False):
            for name, (_, score) in self.parts.items():
                values = torch.as_tensor(score(pixels, prompts)).detach().float().cpu()
                if values.shape != (len(prompts),):
                    raise ValueError(
                        f"reward: expected ({len(prompts)},) of {name}, one an image, got "
                        f"{tuple(values.shape)}."
                    )
                if not values.isfinite().all():
                    bad = [prompt for prompt, x in zip(prompts, values, strict=True)
                           if not x.isfinite()]  # fmt: skip
                    raise FloatingPointError(
                        f"reward: expected finite numbers of {name}, got others for {_told(bad)}. "
                        "Nothing can be learned from them: look at the reward and its images."
                    )
                found[name] = values
        return found

    def total(self, scores: Mapping[str, Tensor]) -> Tensor:
        """(N,), from what `scores` returns."""
        weighted = (weight * scores[name] for name, (weight, _) in self.parts.items())
        return sum(weighted, torch.zeros(()))

    def check(self, prompts: Iterable[str]) -> None:
        """ValueError on prompts that a part cannot judge."""
        checks = [getattr(score, "check", None) for _, score in self.parts.values()]
        judges = [judge for judge in checks if judge is not None]
        for prompt in prompts if judges else ():
            for judge in judges:
                judge(prompt)


def _told(prompts: Sequence[str]) -> list[str]:
    return [prompt[:80] for prompt in prompts[:3]]


def _parts(name: str) -> dict[str, float]:
    """Each reward's weight by its name."""
    found: dict[str, float] = {}
    for one, weight in (_weighted(part.strip()) for part in name.split(",")):
        if one in found:
            raise ValueError(
                f"reward: expected each one once, got {one!r} twice in {name!r}. Give it once, "
                f"with the sum of its weights, {one}:{found[one] + weight:g}."
            )
        found[one] = weight
    return found


def _weighted(part: str) -> tuple[str, float]:
    """ "pickscore:0.5" -> its name and weight."""
    name, colon, text = part.rpartition(":")
    try:
        weight = float(text) if colon else 1.0
    except ValueError:  # a name that has a colon
        return part, 1.0
    if not 0 < weight < math.inf:
        raise ValueError(
            f"reward: expected a weight above 0, got {part!r}. Larger rewards are better; some "
            "have their opposite, as jpeg_compressibility and jpeg_incompressibility."
        )
    return (name if colon else part), weight


def check(name: str) -> None:
    """`load`'s errors of names and paths, with nothing loaded."""
    for part in _parts(name):
        if part in REWARDS:
            continue
        if ":" in part:
            if not callable(found := load_object("reward", part)):
                raise ValueError(
                    f"reward: expected package.module:function, got {part!r}, which is "
                    f"{found!r:.80}. Name a function of pixels and prompts."
                )
        elif not part or ("/" not in part and not Path(part).is_dir()):
            raise ValueError(
                f"reward: expected some of {', '.join(REWARDS)}, package.module:function, or a "
                f"CLIP or chat model as a folder or a hub id such as {models.PICKSCORE}; got "
                f"{part!r}."
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
        from transformers import AutoProcessor

        chats = getattr(AutoProcessor.from_pretrained(name), "chat_template", None)
        return VQAScore(name, device) if chats else PreferenceModel(name, device)


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
    "vqascore": lambda device: VQAScore(vqascore.VQA, device),
    "imagereward": lambda device: models.ImageReward(device),
    "ocr": lambda device: models.OCR(),
    "geneval": lambda device: load_object("reward", "rewards.geneval.evaluator:load")(device),
}
"""Name -> what makes the reward, with its model on a device. `detector` is the embedded world's."""
