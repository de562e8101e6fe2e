"""Soft tokens in `SanaTransformer2DModel`: appended to the text that the first L blocks attend."""

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
