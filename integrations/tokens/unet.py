"""Soft tokens in `UNet2DConditionModel` (SD1.5, SD2, SDXL): one set for all blocks.

They go right after the text's first vector (that of BOS, the start-of-text token). Published
(arXiv 2605.30038): in the down and mid blocks, not in the up blocks, and they start from the BOS
vector of the empty prompt, which `bos_embedding` takes out of its embeddings.

>>> import torch
>>> from diffusers import UNet2DConditionModel
>>> from agsm_loss.integrations.denoisers import TokenDenoiser
>>> from agsm_loss.integrations.tokens.unet import bos_embedding
>>> unet = UNet2DConditionModel(  # yours: pipe.unet
...     sample_size=8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
...     cross_attention_dim=16, attention_head_dim=4,
...     down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
... )
>>> embeds = torch.randn(1, 77, 16)  # yours: the text encoder's embeddings of ""
>>> denoiser = TokenDenoiser(unet, init=bos_embedding(embeds), blocks=("down", "mid"))
>>> bool((denoiser.tokens.tokens == embeds[0, 0]).all())
True

The hooks are on the outer blocks, which get the text by keyword.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from agsm_loss.integrations.tokens.hooks import (
    Arguments,
    Backbone,
    Call,
    Names,
    carries,
    carry,
    extended_bias,
    parameter_names,
    uncarry,
    unwrap,
)

PLACES = ("down", "mid", "up")


class UNetBackbone(Backbone):
    """`places`: which of "down", "mid" and "up" get the tokens."""

    model_classes = ("UNet2DConditionModel",)

    def __init__(self, places: Sequence[str] = ("down", "mid")) -> None:
        chosen = set() if isinstance(places, str) else set(places)
        if not chosen or not chosen <= set(PLACES):
            raise ValueError(f"blocks: expected some of {PLACES}, got {places!r}.")
        self.places = tuple(p for p in PLACES if p in chosen)

    def width(self, model: nn.Module) -> int:
        config: Any = model.config
        width = config.cross_attention_dim
        if not isinstance(width, int):
            if len(set(width)) > 1:
                raise ValueError(
                    f"cross_attention_dim: expected one width for all blocks, got {width}. One set "
                    "of tokens serves them all."
                )
            width = width[0]
        return int(width)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [block for _, block in self._placed(model)]

    def one_set(self) -> bool:
        return True

    def names(self, model: Any) -> Names:
        if _added(model):
            return Names(("prompt_embeds", "pooled_prompt_embeds"), image=("add_time_ids",))
        return Names()

    def denoise(
        self,
        model: Any,
        timesteps: Tensor,
        noisy: Tensor,
        conditioning: dict[str, Tensor],
        image: dict[str, Tensor],
    ) -> Tensor:
        added = None
        if _added(model):
            added = {
                "text_embeds": conditioning["pooled_prompt_embeds"],
                "time_ids": image["add_time_ids"],
            }
        text = conditioning["prompt_embeds"]
        out = model(noisy, timesteps, text, added_cond_kwargs=added, return_dict=False)
        return out[0]

    def register(self, model: nn.Module, attachment: Any) -> list[RemovableHandle]:
        enter = partial(self._enter, attachment, parameter_names(model))
        handles = [model.register_forward_pre_hook(enter, with_kwargs=True)]
        for place, block in self._placed(model):
            before = partial(self._before, place in self.places, attachment.tokens.num_tokens)
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        return handles

    def _enter(
        self, attachment: Any, names: Sequence[str], model: nn.Module, args: Any, kwargs: Any
    ) -> Call | None:
        call, tokens = Arguments(names, args, kwargs), attachment.take_tokens()
        if tokens is None:
            return None
        return call.replaced(**{self.text: carry(call[self.text], tokens.unsqueeze(1))})

    def _before(
        self, chosen: bool, n: int, block: nn.Module, args: Any, kwargs: Any
    ) -> Call | None:
        """What a block gets: the text, with its n tokens in it where the block is chosen."""
        stream, rest = kwargs.get(self.text), []
        if isinstance(stream, tuple):  # an IP-Adapter adds image embeddings behind the text
            stream, *rest = stream
        if not carries(stream):
            return None
        text, tokens = uncarry(stream, 1, n)
        changed = dict(kwargs)
        if chosen:
            text = torch.cat([text[:, :1], tokens, text[:, 1:]], dim=1)
            bias = extended_bias(kwargs.get("encoder_attention_mask"), n, position=1)
            changed["encoder_attention_mask"] = bias
        changed[self.text] = (text, *rest) if rest else text
        return args, changed

    def _placed(self, model: Any) -> list[tuple[str, nn.Module]]:
        blocks = [("down", block) for block in model.down_blocks]
        if model.mid_block is not None:
            blocks.append(("mid", model.mid_block))
        blocks += [("up", block) for block in model.up_blocks]
        # Blocks without cross-attention are not given the text; the mid block always is.
        return [(p, b) for p, b in blocks if p == "mid" or getattr(b, "has_cross_attention", False)]


def _added(model: Any) -> bool:
    """Whether the UNet takes SDXL's pooled text and time ids."""
    return bool(unwrap(model).config.addition_embed_type == "text_time")


def bos_embedding(prompt_embeds: Tensor) -> Tensor:
    """The embedding (d,) of the start-of-text token (BOS), to give as `init` to a UNet's tokens.

    Args:
        prompt_embeds: the embeddings (1, S, d) of the empty prompt, `pipe.encode_prompt(prompt="",
            device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)[0]`.
    """
    return prompt_embeds[0, 0].detach()
