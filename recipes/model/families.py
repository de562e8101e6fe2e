"""How a pipeline is called for images of its own size, and for guidance of a scale.

    images = pipe(prompt=prompts, **call_of(pipe), **guidance(pipe, 4.0, len(prompts))).images

How captions are encoded: `agsm_loss.integrations.prompts`. Latents: `model.latents`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from agsm_loss.integrations.prompts import Flux2, QwenImage, Sana, ZImage, family_of
from agsm_loss.integrations.tokens.pipelines import denoiser_of

SILENT_WORDS = 3
"""Vocabulary of a T5 that says nothing: padding, the end, and what is unknown."""


def call_of(pipe: Any) -> dict[str, Any]:
    """What `pipe` is called with besides the prompts.

    Sana's own default is 1024 pixels a side, whatever the model was made for. Of a T5 that says
    nothing one token is enough, in place of 256 that cost time.
    """
    if isinstance(family_of(pipe), Sana):
        side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        return {"height": side, "width": side, "use_resolution_binning": False}
    third = getattr(pipe, "text_encoder_3", None)
    if third is None or third.config.vocab_size != SILENT_WORDS:
        return {}
    name = "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3"
    for pipeline in (name, f"{name}_img2img"):
        logging.getLogger(pipeline).addFilter(_not_of_one_token)
    return {"max_sequence_length": 1}


def _not_of_one_token(record: logging.LogRecord) -> bool:
    """Leaves out the warning that a silent T5's tokens were cut off."""
    return "`max_sequence_length` is set to  1 tokens" not in record.getMessage()


def guidance(pipe: Any, scale: float, prompts: int | None = None) -> dict[str, Any]:
    """What a pipeline, or its img2img variant, is called with for guidance of this scale.

    Flux.1-dev and FLUX.2-dev take the scale as an input of the model. Qwen-Image and Flux.1-schnell
    have no such input, and are guided by a second pass that has a name of its own:
    `true_cfg_scale`. Z-Image's pipeline counts from 0, no guidance: its number is one less.

    prompts: how many a call has, in a list; None: one prompt, as a string.
    """
    if type(pipe).__name__.startswith("ZImage"):
        return {"guidance_scale": max(scale - 1.0, 0.0)}
    by_name = "true_cfg_scale" in inspect.signature(pipe.__call__).parameters
    if not by_name or denoiser_of(pipe).config.guidance_embeds:
        return {"guidance_scale": scale}
    if scale <= 1:
        return {"true_cfg_scale": 1.0}
    empty = QwenImage.EMPTY if type(pipe).__name__.startswith("QwenImage") else ""
    away = empty if prompts is None else [empty] * prompts
    return {"true_cfg_scale": scale, "negative_prompt": away}


def levels_of(pipe: Any, latents: Sequence[int], steps: int) -> dict[str, Any]:
    """What a rollout is called with, so that its noise levels are those of `pipe(...)`.

    latents: the shape of an image's, (C, h, w).
    """
    family, dynamic = family_of(pipe), pipe.scheduler.config.get("use_dynamic_shifting")
    if not isinstance(family, (Flux2, ZImage)):
        return {}
    if not dynamic:
        return {"sigmas": np.linspace(1, 1 / steps, steps).tolist()}
    if isinstance(family, ZImage):
        return {}
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return {"mu": compute_empirical_mu(latents[-2] * latents[-1], steps)}


def image_side(pipe: Any) -> int:
    """Pixels along a side of the images that a pipeline makes unless it is given another size."""
    size = getattr(pipe, "default_sample_size", None) or denoiser_of(pipe).config.get("sample_size")
    return int(np.max(size) * pipe.vae_scale_factor) if size else 1024  # Z-Image's pipeline
