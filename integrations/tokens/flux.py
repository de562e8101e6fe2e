"""Soft tokens in `FluxTransformer2DModel` (Flux.1): the double-stream blocks, then the single ones.

All of Flux.1's text has rotary position 0 (no rotation), and so have the tokens.

>>> import torch
>>> from diffusers import FluxTransformer2DModel
>>> from agsm_loss import Bank
>>> from agsm_loss.integrations.denoisers import TokenDenoiser
>>> transformer = FluxTransformer2DModel(  # yours: pipe.transformer
...     patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=12,
...     num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=12,
...     axes_dims_rope=(4, 4, 4), guidance_embeds=True,
... )
>>> denoiser = TokenDenoiser(transformer, num_layers=-1)  # all blocks
>>> denoiser.tokens.tokens.shape  # (banks, L, n, d)
torch.Size([2, 3, 4, 24])
>>> text = {"prompt_embeds": torch.randn(2, 6, 16), "pooled_prompt_embeds": torch.randn(2, 12)}
>>> noisy, timesteps, scale = torch.randn(2, 1, 4, 4), torch.tensor([10.0, 900.0]), torch.ones(2)
>>> denoiser(noisy, timesteps, text, Bank.POSITIVE, guidance=3.5 * scale).shape
torch.Size([2, 1, 4, 4])
"""

from typing import Any

import torch
from torch import Tensor, nn

from agsm_loss.integrations.tokens.hooks import (
    Arguments,
    JointBackbone,
    Names,
    patches,
    unpatched,
    unwrap,
)


class FluxBackbone(JointBackbone):
    model_classes = ("FluxTransformer2DModel",)
    entry = "context_embedder"
    unbatched = ("img_ids", "txt_ids")

    def width(self, model: Any) -> int:
        return int(model.config.num_attention_heads * model.config.attention_head_dim)

    def blocks(self, model: Any) -> list[nn.Module]:
        return [*model.transformer_blocks, *model.single_transformer_blocks]

    def timesteps(self, model: nn.Module, call: Arguments) -> Any:
        return call["timestep"] * 1000

    def names(self, model: Any) -> Names:
        image = ("guidance",) if unwrap(model).config.guidance_embeds else ()
        return Names(("prompt_embeds", "pooled_prompt_embeds"), image=image)

    def denoise(
        self,
        model: Any,
        timesteps: Tensor,
        noisy: Tensor,
        conditioning: dict[str, Tensor],
        image: dict[str, Tensor],
    ) -> Tensor:
        text = conditioning["prompt_embeds"]
        height, width = (torch.arange(n // 2, device=noisy.device) for n in noisy.shape[2:])
        out = model(
            patches(noisy),
            encoder_hidden_states=text,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            timestep=timesteps / 1000,
            img_ids=torch.cartesian_prod(height.new_zeros(1), height, width).to(noisy),
            txt_ids=text.new_zeros(text.shape[1], 3),
            guidance=image["guidance"] if unwrap(model).config.guidance_embeds else None,
            return_dict=False,
        )
        return unpatched(out[0], noisy)

    def fitted(self, call: Arguments, length: int, num_tokens: int) -> dict[str, Any]:
        def insert(rows: Tensor, value: float) -> Tensor:
            new = rows.new_full((num_tokens, *rows.shape[1:]), value)
            return torch.cat([rows[:length], new, rows[length:]])

        cos, sin = call["image_rotary_emb"]
        return {"image_rotary_emb": (insert(cos, 1.0), insert(sin, 0.0))}
