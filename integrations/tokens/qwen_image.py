"""Soft tokens in `QwenImageTransformer2DModel`: appended to the text of the first L blocks.

The text's rotary positions count on through its padding, so positions behind it would depend on
how long the batch was padded. The tokens are therefore not rotated. They are never masked.

>>> import torch
>>> from diffusers import QwenImageTransformer2DModel
>>> from agsm_loss import Bank
>>> from agsm_loss.integrations.denoisers import TokenDenoiser
>>> transformer = QwenImageTransformer2DModel(  # yours: pipe.transformer
...     in_channels=16, out_channels=4, num_layers=2, attention_head_dim=12,
...     num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 4),
... )
>>> denoiser = TokenDenoiser(transformer)
>>> denoiser.tokens.tokens.shape  # (banks, L, n, d)
torch.Size([2, 2, 4, 24])
>>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])  # the second text is padded
>>> text = {"prompt_embeds": torch.randn(2, 4, 16), "prompt_embeds_mask": mask}
>>> denoiser(torch.randn(2, 4, 4, 4), torch.tensor([10.0, 900.0]), text, Bank.POSITIVE).shape
torch.Size([2, 4, 4, 4])
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from agsm_loss.integrations.tokens.hooks import (
    Arguments,
    Call,
    JointBackbone,
    Names,
    parameter_names,
    patches,
    unpatched,
)

MASK = "encoder_hidden_states_mask"


class QwenImageBackbone(JointBackbone):
    model_classes = ("QwenImageTransformer2DModel",)
    entry = "txt_in"
    sees_tokens = True

    def width(self, model: Any) -> int:
        return int(model.config.num_attention_heads * model.config.attention_head_dim)

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.transformer_blocks)

    def timesteps(self, model: nn.Module, call: Arguments) -> Any:
        return call["timestep"] * 1000

    def names(self, model: Any) -> Names:
        return Names(optional=("prompt_embeds_mask",))

    def denoise(
        self,
        model: Any,
        timesteps: Tensor,
        noisy: Tensor,
        conditioning: dict[str, Tensor],
        image: dict[str, Tensor],
    ) -> Tensor:
        n, _, height, width = noisy.shape
        out = model(
            patches(noisy),
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_mask=conditioning.get("prompt_embeds_mask"),
            timestep=timesteps / 1000,
            img_shapes=[[(1, height // 2, width // 2)]] * n,
            return_dict=False,
        )
        return unpatched(out[0], noisy)

    def register(self, model: nn.Module, attachment: Any) -> list[RemovableHandle]:
        lengthen = partial(self._lengthen, attachment, parameter_names(model))
        handle = model.register_forward_pre_hook(lengthen, with_kwargs=True)
        return [handle, *super().register(model, attachment)]

    def _lengthen(
        self, attachment: Any, names: Sequence[str], model: nn.Module, args: Any, kwargs: Any
    ) -> Call | None:
        """The model compares the mask with the text, which carries all the tokens by then."""
        call, tokens = Arguments(names, args, kwargs), attachment.pending
        if tokens is None or call[MASK] is None:
            return None
        carried = tokens.shape[1] * tokens.shape[2]
        return call.replaced(**{MASK: _fit_mask(call[MASK], call[MASK].shape[1], carried)})

    def fitted(self, call: Arguments, length: int, num_tokens: int) -> dict[str, Any]:
        image, text = call["image_rotary_emb"]
        unrotated = torch.ones_like(text[:num_tokens])
        changed: dict[str, Any] = {
            "image_rotary_emb": (image, torch.cat([text[:length], unrotated]))
        }
        if call[MASK] is not None:
            changed[MASK] = _fit_mask(call[MASK], length, num_tokens)
        return changed


def _fit_mask(mask: Tensor, length: int, added: int) -> Tensor:
    """(N, length + added) from a mask (N, ≥ length), True (attend) for what is added."""
    return torch.cat([mask[:, :length], mask.new_ones(mask.shape[0], added)], dim=1)
