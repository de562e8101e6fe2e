"""How soft tokens get into a stock diffusers denoiser: by hooks that keep no state of a call.

Gradient checkpointing runs a block, and with it the block's hooks, a second time in the backward
pass. By then the "current" bank or timestep may be another call's, and a hook that reads it gives
wrong gradients without any error. So the tokens travel in the data. A hook before the denoiser
makes all the tokens of a call, (N, L, n, d), and the text stream (the tensor of text that goes from
block to block) *carries* them behind the text:

>>> import torch
>>> from agsm_loss.integrations.tokens.hooks import carries, carry, uncarry
>>> text, tokens = torch.randn(2, 6, 16), torch.randn(2, 3, 4, 16)  # (N, S, d), (N, L, n, d)
>>> stream = carry(text, tokens)
>>> stream.shape  # (N, S + L·n, d, 1)
torch.Size([2, 18, 16, 1])
>>> carries(stream), carries(text)
(True, False)
>>> torch.equal(uncarry(stream, layers=3, num_tokens=4)[0], text)
True

The extra axis marks a stream that carries tokens, so a block's hook needs no flag: it reads the
shape. Before block l, the hook gives the block [text, T_l] and keeps the rest; after it, it drops
T_l's outputs and puts the rest behind the text again. All of it is tensor arithmetic on a block's
own arguments, so every replay, and torch.compile, sees the same.

Hooks are methods and partial functions, never closures: a copy of the model then has hooks of its
own, with its own tokens, and can be pickled.

To support another architecture, subclass `Backbone` and pass an instance as
`attach_soft_tokens(model, tokens, backbone=...)`.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Call = tuple[tuple[Any, ...], dict[str, Any]]


def carry(text: Tensor, tokens: Tensor) -> Tensor:
    """Text (N, S, d) with tokens (N, L, n, d) behind it, as a stream (N, S + L·n, d, 1)."""
    tokens = tokens.flatten(1, 2).to(text)
    return torch.cat([text, tokens], dim=1).unsqueeze(-1)


def carries(stream: Any) -> bool:
    """Whether a text stream has tokens behind the text."""
    return isinstance(stream, Tensor) and stream.ndim == 4


def uncarry(stream: Tensor, layers: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Text (N, S, d) and the `layers`·n tokens behind it, (N, layers·n, d)."""
    stream = stream.squeeze(-1)
    length = stream.shape[1] - layers * num_tokens
    return stream[:, :length], stream[:, length:]


class Arguments:
    """A call's arguments by name, whether they came by position or by keyword.

    diffusers passes a block's arguments by keyword, and by position under checkpointing.
    """

    def __init__(self, names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.names = names
        self.args = args
        self.kwargs = kwargs

    def __getitem__(self, name: str) -> Any:
        """Its value, or None where it was not given."""
        position = self.names.index(name)
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    def replaced(self, **changes: Any) -> Call:
        """The call with some values changed, each given the way it came."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, value in changes.items():
            position = self.names.index(name)
            if position < len(args):
                args[position] = value
            else:
                kwargs[name] = value
        return tuple(args), kwargs


def unwrap(model: Any) -> Any:
    """The denoiser inside torch.compile, DDP and PEFT wrappers."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of `forward`, as the class defines it (wrappers hide it)."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


class Names(NamedTuple):
    """What a denoiser is conditioned on, by the names that `TokenDenoiser` documents.

    required, optional: keys of the conditioning, which belongs to the caption. image: keys of what
    belongs to the image, all of them required.
    """

    required: tuple[str, ...] = ("prompt_embeds",)
    optional: tuple[str, ...] = ()
    image: tuple[str, ...] = ()


class Backbone(ABC):
    """What the hooks have to know of one architecture (a class of denoisers)."""

    model_classes: ClassVar[tuple[str, ...]]
    """Names of the diffusers classes it serves."""
    text: ClassVar[str] = "encoder_hidden_states"
    """Name of the text stream among the denoiser's and its blocks' arguments."""
    unbatched: ClassVar[tuple[str, ...]] = ()
    """The denoiser's tensor arguments without a batch axis."""
    listed: ClassVar[tuple[str, ...]] = ()
    """Those that are lists of one tensor a sample."""

    @abstractmethod
    def width(self, model: nn.Module) -> int:
        """d of the text stream where the tokens go in."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks that read the text stream, in order; layer l's tokens go into block l."""

    def timesteps(self, model: nn.Module, call: Arguments) -> Any:
        """The call's timesteps in 0..1000: a number, or a tensor () or (N,)."""
        return call["timestep"]

    @abstractmethod
    def denoise(
        self,
        model: Any,
        timesteps: Tensor,
        noisy: Tensor,
        conditioning: dict[str, Tensor],
        image: dict[str, Tensor],
    ) -> Tensor:
        """Call the denoiser as its stock pipeline does: (N, C, H, W) to a prediction of that shape.

        `timesteps` (N,) in 0..1000; the rest as in `TokenDenoiser`'s forward.
        """

    def names(self, model: nn.Module) -> Names | None:
        """What `denoise` reads, to refuse the rest; None to take anything."""
        return None

    def one_set(self) -> bool:
        """Whether all blocks use one set of tokens, instead of one set for each block."""
        return False

    @abstractmethod
    def register(self, model: nn.Module, attachment: Any) -> list[RemovableHandle]:
        """Hooks that put `attachment.take_tokens()` into the stream and each block's into it."""


class JointBackbone(Backbone):
    """Transformers whose blocks take the text stream and return it: SD3, Flux, Qwen-Image."""

    entry: ClassVar[str]
    """Name of the submodule whose output is the text stream; it must not be checkpointed."""
    sees_tokens: ClassVar[bool] = False
    """Whether the model counts carried tokens as text before its blocks do (ids, masks)."""

    def fitted(self, call: Arguments, length: int, num_tokens: int) -> dict[str, Any]:
        """Those of a block's other arguments that depend on the text's length (rotary rows, masks).

        They come for whatever the model counted as text and are returned for `length` text rows
        with `num_tokens` soft tokens behind them; never changed in place, blocks share them.
        """
        return {}

    def register(self, model: nn.Module, attachment: Any) -> list[RemovableHandle]:
        handles = [getattr(model, self.entry).register_forward_hook(partial(_enter, attachment))]
        blocks, tokens = self.blocks(model), attachment.tokens
        for layer, block in enumerate(blocks[: tokens.num_layers]):
            hook = _JointBlockHook(self, block, tokens.num_layers - layer, tokens.num_tokens)
            handles.append(block.register_forward_pre_hook(hook.before, with_kwargs=True))
            handles.append(block.register_forward_hook(hook.after))
        for block in blocks[tokens.num_layers :] if self.sees_tokens else ():
            trim = partial(self._trim, parameter_names(block))
            handles.append(block.register_forward_pre_hook(trim, with_kwargs=True))
        return handles

    def _trim(self, names: Sequence[str], block: nn.Module, args: Any, kwargs: Any) -> Call:
        call = Arguments(names, args, kwargs)
        return call.replaced(**self.fitted(call, call[self.text].shape[1], 0))


def _enter(attachment: Any, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """Behind the entry of the text stream: the call's tokens join it."""
    tokens = attachment.take_tokens()
    return None if tokens is None else carry(output, tokens)


class _JointBlockHook:
    """Gives a block its layer's tokens; the stream carries those of `layers` layers before it."""

    def __init__(self, backbone: JointBackbone, block: nn.Module, layers: int, n: int) -> None:
        self.backbone = backbone
        self.names = parameter_names(block)
        self.layers = layers
        self.num_tokens = n
        # Set and used within one call of the block, so a replay sets it anew.
        self.rest: Tensor | None = None

    def before(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call | None:
        call = Arguments(self.names, args, kwargs)
        stream = call[self.backbone.text]
        self.rest = None
        if not carries(stream):
            return None
        text, tokens = uncarry(stream, self.layers, self.num_tokens)
        own, self.rest = tokens[:, : self.num_tokens], tokens[:, self.num_tokens :]
        fitted = self.backbone.fitted(call, text.shape[1], self.num_tokens)
        return call.replaced(**{self.backbone.text: torch.cat([text, own], dim=1)}, **fitted)

    def after(self, block: nn.Module, args: Any, output: Any) -> Any:
        rest, self.rest = self.rest, None
        if rest is None or output[0] is None:  # SD3's last block returns no text
            return None
        text = output[0][:, : -self.num_tokens]
        if self.layers > 1:
            text = carry(text, rest.unflatten(1, (self.layers - 1, self.num_tokens)))
        return (text, *output[1:])


class CrossBackbone(Backbone):
    """Transformers whose blocks all read the same text stream and return the image: Sana."""

    entry: ClassVar[str]
    mask: ClassVar[str] = "encoder_attention_mask"
    """Name of the text's attention bias (N, 1, S), 0 where it may be attended."""

    def register(self, model: nn.Module, attachment: Any) -> list[RemovableHandle]:
        handles = [getattr(model, self.entry).register_forward_hook(partial(_enter, attachment))]
        tokens = attachment.tokens
        for layer, block in enumerate(self.blocks(model)):
            of = parameter_names(block), layer, tokens.num_layers, tokens.num_tokens
            before = partial(self._before, *of)
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        return handles

    def _before(
        self,
        names: Sequence[str],
        layer: int,
        num_layers: int,
        n: int,
        block: nn.Module,
        args: Any,
        kwargs: Any,
    ) -> Call | None:
        """What block `layer` gets: the text, and its own n tokens where it has some."""
        call = Arguments(names, args, kwargs)
        stream = call[self.text]
        if not carries(stream):
            return None
        text, carried = uncarry(stream, num_layers, n)
        own = carried[:, layer * n : (layer + 1) * n]
        mask = extended_bias(call[self.mask], own.shape[1])
        return call.replaced(**{self.text: torch.cat([text, own], dim=1), self.mask: mask})


def patches(latents: Tensor) -> Tensor:
    """Latents (N, C, H, W) as the rows (N, H/2·W/2, 4C) that Flux and Qwen-Image take."""
    return rearrange(latents, "n c (h p) (w q) -> n (h w) (c p q)", p=2, q=2)


def unpatched(rows: Tensor, latents: Tensor) -> Tensor:
    """The inverse, for predictions of the shape of `latents`."""
    return rearrange(rows, "n (h w) (c p q) -> n c (h p) (w q)", p=2, q=2, h=latents.shape[2] // 2)


def extended_bias(bias: Tensor | None, added: int, position: int | None = None) -> Tensor | None:
    """An attention bias (N, 1, S) with zeros (attend) for `added` tokens, at the end by default."""
    if bias is None or added == 0:
        return bias
    position = bias.shape[-1] if position is None else position
    zeros = bias.new_zeros(*bias.shape[:-1], added)
    return torch.cat([bias[..., :position], zeros, bias[..., position:]], dim=-1)
