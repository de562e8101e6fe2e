"""Soft tokens in `SanaTransformer2DModel`: appended to the text that the first L blocks attend to.

>>> import torch
>>> from diffusers import SanaTransformer2DModel
>>> from agsm_loss import Bank
>>> from agsm_loss.integrations.denoisers import TokenDenoiser
>>> transformer = SanaTransformer2DModel(  # yours: pipe.transformer
...     in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8,
...     num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16,
...     caption_channels=16, sample_size=4,
... )
>>> denoiser = TokenDenoiser(transformer)
>>> denoiser.tokens.tokens.shape  # (banks, L, n, d)
torch.Size([2, 2, 4, 16])
>>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])  # the second text is padded
>>> text = {"prompt_embeds": torch.randn(2, 4, 16), "prompt_attention_mask": mask}
>>> denoiser(torch.randn(2, 4, 4, 4), torch.tensor([10.0, 900.0]), text, Bank.POSITIVE).shape
torch.Size([2, 4, 4, 4])
"""

from typing import Any

from torch import Tensor, nn

from agsm_loss.integrations.tokens.hooks import Arguments, CrossBackbone, Names, unwrap


class SanaBackbone(CrossBackbone):
    model_classes = ("SanaTransformer2DModel",)
    entry = "caption_norm"

    def width(self, model: Any) -> int:
        return int(model.config.num_attention_heads * model.config.attention_head_dim)

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.transformer_blocks)

    def timesteps(self, model: Any, call: Arguments) -> Any:
        return call["timestep"] / model.config.timestep_scale

    def names(self, model: Any) -> Names:
        return Names(optional=("prompt_attention_mask",))

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
            encoder_attention_mask=conditioning.get("prompt_attention_mask"),
            timestep=timesteps * unwrap(model).config.timestep_scale,
            return_dict=False,
        )
        return out[0]
