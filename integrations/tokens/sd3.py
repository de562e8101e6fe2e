"""Soft tokens in `SD3Transformer2DModel` (SD3, SD3.5): appended to the text of the first L blocks.

Published (arXiv 2605.30038): L = 5. The tokens go in after `context_embedder`, so their width d is
`caption_projection_dim`. The text has neither a mask nor rotary ids here.

>>> import torch
>>> from diffusers import SD3Transformer2DModel
>>> from agsm_loss import Bank
>>> from agsm_loss.integrations.denoisers import TokenDenoiser
>>> transformer = SD3Transformer2DModel(  # yours: pipe.transformer
...     sample_size=8, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
...     attention_head_dim=8, caption_projection_dim=16, joint_attention_dim=16,
...     pooled_projection_dim=12, pos_embed_max_size=8,
... )
>>> denoiser = TokenDenoiser(transformer, num_layers=2)
>>> denoiser.tokens.tokens.shape  # (banks, L, n, d)
torch.Size([2, 2, 4, 16])
>>> text = {"prompt_embeds": torch.randn(2, 6, 16), "pooled_prompt_embeds": torch.randn(2, 12)}
>>> denoiser(torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), text, Bank.POSITIVE).shape
torch.Size([2, 4, 8, 8])
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from agsm_loss.integrations.tokens.hooks import (
    Arguments,
    JointBackbone,
    Names,
    parameter_names,
)


class SD3Backbone(JointBackbone):
    model_classes = ("SD3Transformer2DModel",)
    entry = "context_embedder"

    def width(self, model: Any) -> int:
        return int(model.config.caption_projection_dim)

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.transformer_blocks)

    def names(self, model: Any) -> Names:
        return Names(("prompt_embeds", "pooled_prompt_embeds"))

    def register(self, model: nn.Module, attachment: Any) -> list[RemovableHandle]:
        check = partial(self._check, attachment, parameter_names(model))
        handle = model.register_forward_pre_hook(check, with_kwargs=True)
        return [handle, *super().register(model, attachment)]

    def _check(self, attachment: Any, names: Sequence[str], model: Any, args: Any, kw: Any) -> None:
        skipped, layers = Arguments(names, args, kw)["skip_layers"], attachment.tokens.num_layers
        if attachment.pending is not None and any(layer < layers for layer in skipped or ()):
            raise ValueError(
                f"skip_layers: expected none of the first {layers} blocks, which have soft "
                f"tokens, got {list(skipped)}. Skip later ones, or use tokens of fewer layers."
            )

    def denoise(
        self,
        model: Any,
        timesteps: Tensor,
        noisy: Tensor,
        conditioning: dict[str, Tensor],
        image: dict[str, Tensor],
    ) -> Tensor:
        out = model(
            noisy,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            timestep=timesteps,
            return_dict=False,
        )
        return out[0]
