"""Images to latents and back, by a pipeline's VAE: (3, H, W) in [-1, 1] to scaled (C, h, w).

    row = encode_image(vae, image)                     # mean, and std where the VAE has one
    latents = scale_latents(vae, row["mean"][None])    # as the denoiser takes them
    pixels = decode_latents(vae, latents)

The VAE runs in its own precision, in autocast too: some overflow in half precision.

Known: AutoencoderKL, AutoencoderTiny, AutoencoderDC (Sana), AutoencoderKLQwenImage, whose images
are videos of one frame, and AutoencoderKLFlux2: the denoiser's latents are 2x2 patches of its own,
four times the channels, scaled by the statistics of a batch norm.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor


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
