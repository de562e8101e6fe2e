"""What differs from one family of pipelines to the next: its call, its guidance, its latents.

    images = pipe(prompt=prompts, **call_of(pipe), **guidance(pipe, 4.0, len(prompts))).images

    row = encode_image(vae, image)                     # mean, and std where the VAE has one
    latents = scale_latents(vae, row["mean"][None])    # as the denoiser takes them
    pixels = decode_latents(vae, latents)              # (B, 3, H, W), around [-1, 1]

The VAE runs in its own precision, in autocast too: some overflow in half precision.

Known: AutoencoderKL, AutoencoderTiny, AutoencoderDC (Sana), AutoencoderKLQwenImage, whose images
are videos of one frame, and AutoencoderKLFlux2: the denoiser's latents are 2x2 patches of its own,
four times the channels, scaled by the statistics of a batch norm. How captions are encoded:
`agsm_loss.integrations.prompts`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

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


def hold_in_float32(vae: Any) -> None:
    """The VAE in float32 in a pipeline in half precision, whose latents it then has to cast."""
    vae.to(torch.float32).decode = partial(_decode_cast, vae)


def _decode_cast(vae: Any, latents: Tensor, *args: Any, **settings: Any) -> Any:
    with torch.autocast(vae.device.type, enabled=False):
        return type(vae).decode(vae, latents.to(vae.dtype), *args, **settings)


def encode_image(vae: Any, image: Tensor) -> dict[str, Tensor]:
    """ "mean" and, where the VAE has one, "std" of an image's unscaled latents (C, h, w)."""
    image = image.to(vae.device, vae.dtype)
    with torch.autocast(vae.device.type, enabled=False):
        out = vae.encode(image[None, :, None] if _is_of_videos(vae) else image[None])
    for name in ("latents", "latent"):  # AutoencoderTiny's and AutoencoderDC's
        if hasattr(out, name):
            return {"mean": getattr(out, name)[0]}
    spread = out.latent_dist
    found = {"mean": spread.mean[0], "std": spread.std[0]}
    return {name: one[:, 0] if _is_of_videos(vae) else one for name, one in found.items()}


def scale_latents(vae: Any, latents: Tensor) -> Tensor:
    """Unscaled latents (B, C, h, w) -> the denoiser's, in float32."""
    shift, scale = _shift_and_scale(vae, latents)
    if hasattr(vae, "bn"):
        latents = rearrange(latents, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
    return (latents.float() - shift) * scale


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """The denoiser's latents (B, C, h, w) -> (B, 3, H, W) around [-1, 1], in float32."""
    shift, scale = _shift_and_scale(vae, latents)
    plain = (latents / scale + shift).to(vae.dtype)
    if hasattr(vae, "bn"):
        plain = rearrange(plain, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)
    with torch.autocast(vae.device.type, enabled=False):
        if _is_of_videos(vae):
            return vae.decode(plain[:, :, None]).sample[:, :, 0].float()
        return vae.decode(plain).sample.float()


def _is_of_videos(vae: Any) -> bool:
    return hasattr(vae.config, "temperal_downsample")


def _shift_and_scale(vae: Any, like: Tensor) -> tuple[Any, Any]:
    """What is taken off, then multiplied by: one number, or one a channel (C, 1, 1)."""
    if hasattr(vae, "bn"):  # FLUX.2
        mean, variance = (one[:, None, None] for one in (vae.bn.running_mean, vae.bn.running_var))
        return mean.to(like.device), (variance.to(like.device) + vae.bn.eps).rsqrt()

    def channels(name: str) -> Tensor | None:
        values = getattr(vae.config, name, None)
        return None if values is None else torch.tensor(values, device=like.device)[:, None, None]

    shift, std = channels("latents_mean"), channels("latents_std")
    scale = getattr(vae.config, "scaling_factor", 1.0)
    if shift is None:
        shift = getattr(vae.config, "shift_factor", None) or 0.0
    return shift, scale if std is None else scale / std
