"""Soft tokens in `SD3Transformer2DModel` (SD3, SD3.5): appended to the text of the first L blocks.

Published (arXiv 2605.30038): L = 5. The text has neither mask nor rotary ids here, and the tokens
live behind `context_embedder`, so d is `caption_projection_dim`.
"""

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
        names, worn = parameter_names(model), attachment.tokens.num_layers

        def check(model: nn.Module, args: Any, kwargs: Any) -> None:
            skipped = Arguments(names, args, kwargs)["skip_layers"] or ()
            if attachment.pending is not None and any(layer < worn for layer in skipped):
                raise ValueError(
                    f"skip_layers: expected none of the first {worn} blocks, which wear soft tokens, got "
                    f"{list(skipped)}. Skip later ones, or use tokens of fewer layers."
                )

        handle = model.register_forward_pre_hook(check, with_kwargs=True)
        return [handle, *super().register(model, attachment)]

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
