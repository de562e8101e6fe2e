"""Soft tokens in `ZImageTransformer2DModel` (Z-Image and Turbo): in the first L of its main layers.

Each layer sees one sequence of image, caption and padding. The tokens go in at its end, without
rotary position, never masked. On their way from the model's call to the layers they travel behind
the timestep's embedding, which every layer gets.

The model counts time from noise to image and predicts x_0 − ε; here both are turned round, as its
pipeline does: timesteps are those of the noise schedule, and the prediction is ε − x_0.

>>> import torch
>>> from diffusers import ZImageTransformer2DModel
>>> from agsm_loss import Bank
>>> from agsm_loss.integrations.denoisers import TokenDenoiser
>>> transformer = ZImageTransformer2DModel(  # yours: pipe.transformer
...     in_channels=4, dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
...     cap_feat_dim=16, axes_dims=[4, 4, 4], axes_lens=[64, 16, 16],
... )
>>> denoiser = TokenDenoiser(transformer)
>>> denoiser.tokens.tokens.shape  # (banks, L, n, d)
torch.Size([2, 2, 4, 24])
>>> mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])  # the second text is shorter
>>> text = {"prompt_embeds": torch.randn(2, 4, 16), "prompt_embeds_mask": mask}
>>> denoiser(torch.randn(2, 4, 4, 4), torch.tensor([10.0, 900.0]), text, Bank.POSITIVE).shape
torch.Size([2, 4, 4, 4])
"""

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
    parameter_names,
)


class ZImageBackbone(Backbone):
    model_classes = ("ZImageTransformer2DModel",)
    text = "cap_feats"
    listed = ("x", "cap_feats")

    def width(self, model: Any) -> int:
        return int(model.config.dim)

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.layers)

    def timesteps(self, model: nn.Module, call: Arguments) -> Any:
        return 1000 - call["t"] * 1000

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
        texts, mask = list(conditioning["prompt_embeds"]), conditioning.get("prompt_embeds_mask")
        if mask is not None:
            texts = [text[kept] for text, kept in zip(texts, mask.bool(), strict=True)]
        images = list(noisy.unsqueeze(2))  # videos of one frame
        out = model(images, (1000 - timesteps) / 1000, texts, return_dict=False)
        return -torch.stack(out[0]).squeeze(2)

    def register(self, model: Any, attachment: Any) -> list[RemovableHandle]:
        tokens = attachment.tokens
        handles = [model.t_embedder.register_forward_hook(partial(_enter, attachment))]
        readers = [*model.noise_refiner, *model.layers, *model.all_final_layer.values()]
        first = len(model.noise_refiner)
        for i, reader in enumerate(readers):
            own = i - first if first <= i < first + tokens.num_layers else None
            hook = _Reader(reader, model.t_embedder, own, tokens.num_layers, tokens.num_tokens)
            handles.append(reader.register_forward_pre_hook(hook.before, with_kwargs=True))
            handles.append(reader.register_forward_hook(hook.after))
        return handles


def _enter(attachment: Any, module: nn.Module, args: Any, time: Tensor) -> Tensor | None:
    """The call's tokens behind the timesteps' embedding: (N, e + L·n·d)."""
    tokens = attachment.take_tokens()
    if tokens is None:
        return None
    return torch.cat([time.expand(len(tokens), -1), tokens.flatten(1).to(time)], dim=1)


class _Reader:
    """A layer that gets the timesteps' embedding: its own tokens go in, the others are left out."""

    def __init__(
        self, reader: nn.Module, embedder: Any, own: int | None, layers: int, n: int
    ) -> None:
        self.names = parameter_names(reader)
        self.time = "c" if "c" in self.names else "adaln_input"
        self.width = int(embedder.mlp[-1].out_features)
        self.own = own
        self.sizes = layers, n
        # Set and used within one call of the layer, so a replay sets it anew.
        self.added = 0

    def before(self, reader: nn.Module, args: Any, kwargs: Any) -> Call | None:
        call = Arguments(self.names, args, kwargs)
        time, self.added = call[self.time], 0
        if time is None or time.shape[1] == self.width:
            return None
        time, carried = time[:, : self.width], time[:, self.width :]
        if self.own is None:
            return call.replaced(**{self.time: time})
        tokens = carried.unflatten(1, (*self.sizes, -1))[:, self.own]
        self.added = tokens.shape[1]
        rope, mask = call["freqs_cis"], call["attn_mask"]
        changed = {
            "x": torch.cat([call["x"], tokens], dim=1),
            "freqs_cis": torch.cat([rope, torch.ones_like(rope[:, : self.added])], dim=1),
            self.time: time,
        }
        if mask is not None:
            changed["attn_mask"] = torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1)
        return call.replaced(**changed)

    def after(self, reader: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        added, self.added = self.added, 0
        return output[:, :-added] if added else None
