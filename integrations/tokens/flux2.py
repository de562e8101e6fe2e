"""Soft tokens in `Flux2Transformer2DModel` (FLUX.2 dev, klein): its double-stream blocks alone.

Latents are those of the stock pipeline before it packs them, (N, C, H, W) of 2x2 patches that the
VAE's batch norm has scaled. The tokens have no rotary position. The single-stream blocks get none:
there text and image are one sequence.

>>> import torch
>>> from diffusers import Flux2Transformer2DModel
>>> from agsm_loss import Bank
>>> from agsm_loss.integrations.denoisers import TokenDenoiser
>>> transformer = Flux2Transformer2DModel(  # yours: pipe.transformer
...     in_channels=8, num_layers=2, num_single_layers=1, attention_head_dim=16,
...     num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 4, 4),
... )
>>> denoiser = TokenDenoiser(transformer)
>>> denoiser.tokens.tokens.shape  # (banks, L, n, d)
torch.Size([2, 2, 4, 32])
>>> text = {"prompt_embeds": torch.randn(2, 6, 12)}
>>> noisy, timesteps, scale = torch.randn(2, 8, 4, 4), torch.tensor([10.0, 900.0]), torch.ones(2)
>>> denoiser(noisy, timesteps, text, Bank.POSITIVE, guidance=4.0 * scale).shape
torch.Size([2, 8, 4, 4])
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from agsm_loss.integrations.tokens.flux import FluxBackbone
from agsm_loss.integrations.tokens.hooks import Names


class Flux2Backbone(FluxBackbone):
    model_classes = ("Flux2Transformer2DModel",)

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.transformer_blocks)

    def names(self, model: Any) -> Names:
        return Names(image=super().names(model).image)

    def denoise(
        self,
        model: Any,
        timesteps: Tensor,
        noisy: Tensor,
        conditioning: dict[str, Tensor],
        image: dict[str, Tensor],
    ) -> Tensor:
        text = conditioning["prompt_embeds"]
        count = partial(torch.arange, device=noisy.device)
        height, width = map(count, noisy.shape[2:])
        out = model(
            noisy.flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            timestep=timesteps / 1000,
            img_ids=torch.cartesian_prod(count(1), height, width, count(1)),
            txt_ids=torch.cartesian_prod(count(1), count(1), count(1), count(text.shape[1])),
            guidance=image.get("guidance"),
            return_dict=False,
        )
        return out[0].transpose(1, 2).reshape(noisy.shape)
