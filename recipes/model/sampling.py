"""Prompts -> images through a stock pipeline, each image on a noise of its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agsm_loss._random import draws
from agsm_loss.integrations.tokens.pipelines import denoiser_of
from model.families import guidance


def sample(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[Any],
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> npt.NDArray[np.uint8]:
    """One image a prompt, (N, H, W, 3) uint8. Image i's noise is `draws(seeds[i])`.

    guidance_scale: of classifier-free guidance, by whichever name the pipeline knows it.
    batch_size: images a call of the pipeline; 0: 64 of up to 128 pixels a side, 4 of any larger.
    arguments: what else the pipeline is called with.
    """
    return np.concatenate(
        list(
            calls(
                pipe,
                prompts,
                seeds,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                batch_size=batch_size,
                arguments=arguments,
            )
        )
    )


def calls(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[Any],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int = 0,
    arguments: Mapping[str, Any] | None = None,
) -> Iterator[npt.NDArray[np.uint8]]:
    """The images of one call of the pipeline after the other.

    Raises:
        FloatingPointError: an image is not finite.
    """
    batch_size = batch_size or images_per_call(pipe)
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        images = pipe(
            part,
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


def default_guidance_scale(folders: Iterable[str]) -> float:
    """1 where one of them was trained to need no guidance, as its options.json tells; else 3.

    folders: of tokens, a LoRA or a pipeline, or hub ids, or "". options.json is in or above each.
    """
    for folder in filter(None, folders):
        for file in (Path(folder) / "options.json", Path(folder).parent / "options.json"):
            told = json.loads(file.read_text()) if file.is_file() else {}
            if isinstance(told, dict) and (told.get("agsm_guidance_scale") or 0) > 1:
                return 1.0
    return 3.0


def image_side(pipe: Any) -> int:
    """Pixels along a side of the images that a pipeline makes unless it is given another size."""
    size = getattr(pipe, "default_sample_size", None) or denoiser_of(pipe).config.sample_size
    return int(np.max(size) * pipe.vae_scale_factor)


def images_per_call(pipe: Any) -> int:
    """64 of up to 128 pixels a side, 4 of any larger."""
    return 64 if image_side(pipe) <= 128 else 4
