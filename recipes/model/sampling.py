"""Prompts -> images through a stock pipeline, each image on a noise of its own.

OptionSet(Options, SamplingOptions)
check_sources(options)                  before anything is loaded
model = load(options)
images = sample(model.pipe, prompts, seeds=range(len(prompts)), ...)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from agsm_loss._random import draws
from data.prompts import rows_of
from data.sources import check_source, found_here
from model.families import guidance, image_side
from model.pipeline import TextToImage, chosen_device
from run.log import say
from run.options import option

SOURCES = ("model", "tokens", "lora")


@dataclass(frozen=True)
class SamplingOptions:
    """What is sampled, and how."""

    model: str = option(
        "",
        "Pipeline to sample: a folder or a hub id. Left out, for the embedded world alone: a model "
        "of it.",
    )
    tokens: str = option("", "Soft tokens to attach: a folder or a hub id.")
    lora: str = option("", "LoRA to load: a folder or a hub id.")
    sampling: Literal["both", "negative_unconditional", "conditional_only", "off"] = option(
        "both",
        "Use of the tokens under guidance: the positive bank in both branches (both), the negative "
        "bank in the unconditional branch (negative_unconditional), no tokens in the unconditional "
        "branch (conditional_only), or no tokens at all (off).",
    )
    num_inference_steps: int = option(20, "Sampling steps of a whole image.", at_least=1)
    guidance_scale: float | None = option(
        None,
        "Classifier-free guidance scale; 1: no guidance. Left out: 1 for a model, LoRA or tokens "
        "trained to need none, else 3.",
        at_least=0,
    )
    seed: int = option(0, "Seed of the noise.", at_least=0)
    batch_size: int = option(
        0, "Images per batch; 0: 64 of the world's size, 4 of any larger.", at_least=0
    )
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "Type of the weights.")
    device: str | None = option(
        None, "Device to sample on; left out: the accelerator where there is one, else cpu."
    )


def check_sources(options: Any) -> None:
    """Looks for what is to be loaded, and chooses a guidance scale that was left out.

    Raises:
        FileNotFoundError: an option names a path, and nothing is there.
        ValueError: an options.json beside it has no scale that can be read.
    """
    for name in SOURCES:
        check_source(name, getattr(options, name))
    if options.guidance_scale is None:
        given = (getattr(options, name) for name in SOURCES)
        options.guidance_scale = default_guidance_scale(given)
        say(f"Guidance scale {options.guidance_scale:g}; choose another by --guidance_scale")


def load(options: Any) -> TextToImage:
    """The pipeline, without tokens and LoRA: see `TextToImage.load_extras`."""
    dtype, device = getattr(torch, options.dtype), chosen_device(options.device)
    return TextToImage.load(options.model, dtype, device)


def sample(pipe: Any, prompts: Sequence[str], **settings: Any) -> npt.NDArray[np.uint8]:
    """One image a prompt, (N, H, W, 3) uint8.

    settings: of `calls`; seeds, num_inference_steps and guidance_scale have no default.
    """
    return np.concatenate(list(calls(pipe, prompts, **settings)))


def calls(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[Any],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> Iterator[npt.NDArray[np.uint8]]:
    """The images (B, H, W, 3) uint8 of one call of the pipeline after the other.

    seeds: image i's noise is `draws(seeds[i])`.
    guidance_scale: of classifier-free guidance, by whichever name the pipeline knows it.
    batch_size: images a call; 0: 64 of up to 128 pixels a side, 4 of any larger.
    arguments: what else the pipeline is called with.

    Raises:
        FloatingPointError: an image is not finite.
    """
    batch_size = batch_size or images_per_call(pipe)
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        with _overflow_seen(pipe, part):
            images = pipe(
                prompt=part,  # by name: FLUX.2's first argument is an image
                num_inference_steps=num_inference_steps,
                **guidance(pipe, guidance_scale, len(part)),
                generator=[draws(seed) for seed in seeds[start : start + batch_size]],
                output_type="np",
                **(arguments or {}),
            ).images
        broken = [text for text, image in zip(part, images, strict=True) if np.isnan(image).any()]
        if broken:
            raise FloatingPointError(
                f"images: expected numbers, got NaN in {len(broken)} of {len(part)} images, first "
                f"of the prompt {broken[0]!r}. The weights are not finite, or float16 is too small "
                "for the model: take bfloat16 or float32."
            )
        yield (images * 255).round().astype("uint8")


@contextmanager
def _overflow_seen(pipe: Any, prompts: Sequence[str]) -> Iterator[None]:
    """FloatingPointError where the VAE gets or gives infinite numbers: pipelines clamp them."""

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if any(isinstance(one, Tensor) and one.isinf().any() for one in (*inputs, output)):
            raise FloatingPointError(
                f"images: expected finite numbers, got infinite ones in a batch of {len(prompts)}, "
                f"first prompt {prompts[0]!r}. The weights are not finite, or float16 is too small "
                "for the model: take bfloat16 or float32."
            )

    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    handle = None if decoder is None else decoder.register_forward_hook(look)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def default_guidance_scale(folders: Iterable[str]) -> float:
    """What they were looked at with in training, by options.json: 1 if one was, else the last.

    1 is where guidance was trained in. 3 where nothing is told.

    folders: of a pipeline, tokens, a LoRA, or files in them, or hub ids, or "". options.json is in
        the folder or the one above.

    Raises:
        ValueError: an options.json that cannot be read, or whose scale is no number.
    """
    scales = []
    for place in map(found_here, filter(None, folders)):
        if place is not None:
            folder = place.resolve() if place.is_dir() else place.resolve().parent
            files = (folder / "options.json", folder.parent / "options.json")
            told = [_scale_in(file) for file in files if file.is_file()]
            scales += [scale for scale in told if scale is not None][:1]
    return 1.0 if 1.0 in scales else scales[-1] if scales else 3.0


def _scale_in(file: Path) -> float | None:
    try:
        told = [row for _, row in rows_of(file) if isinstance(row, dict)]
    except ValueError as error:
        raise ValueError(f"{error} Mend it, or give --guidance_scale.") from error
    scale = told[0].get("validation_guidance_scale") if told else None
    if scale is None:
        return None
    if type(scale) in (int, float) and 0 <= scale < math.inf:
        return float(scale)
    raise ValueError(
        f"{file}: expected a number as validation_guidance_scale, at least 0, got {scale!r}. Mend "
        "it, or give --guidance_scale."
    )


def images_per_call(pipe: Any) -> int:
    """64 of up to 128 pixels a side, 4 of any larger."""
    return 64 if image_side(pipe) <= 128 else 4
