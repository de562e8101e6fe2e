"""Attach soft tokens (ψ⁺, ψ⁻) to a stock diffusers denoiser, and detach them again.

`TokenDenoiser` does this in one call. Here are its parts, for adapters and for scripts that make
the tokens themselves.

>>> import torch
>>> from diffusers import SD3Transformer2DModel
>>> from agsm_loss import Bank
>>> from agsm_loss.integrations.tokens.attach import attach_soft_tokens, make_soft_tokens
>>> transformer = SD3Transformer2DModel(
...     sample_size=8, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2,
...     attention_head_dim=8, caption_projection_dim=16, joint_attention_dim=16,
...     pooled_projection_dim=12, pos_embed_max_size=8,
... ).requires_grad_(False)
>>> tokens = make_soft_tokens(transformer, num_tokens=4)
>>> attached = attach_soft_tokens(transformer, tokens)
>>> inputs = {
...     "hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 6, 16),
...     "pooled_projections": torch.randn(2, 12), "timestep": torch.tensor([10.0, 900.0]),
... }
>>> with attached.using([Bank.POSITIVE, Bank.NEGATIVE]):  # a bank for each sample
...     transformer(**inputs).sample.shape
torch.Size([2, 4, 8, 8])
>>> attached.detach()

The denoiser's own parameters, state dict and code are left alone. Only its `save_pretrained`, which
a pipeline's calls too, warns once that the tokens are not in the files.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from agsm_loss import Bank, SoftTokens
from agsm_loss.integrations.tokens.flux import FluxBackbone
from agsm_loss.integrations.tokens.flux2 import Flux2Backbone
from agsm_loss.integrations.tokens.hooks import (
    Arguments,
    Backbone,
    Call,
    parameter_names,
    unwrap,
)
from agsm_loss.integrations.tokens.qwen_image import QwenImageBackbone
from agsm_loss.integrations.tokens.sana import SanaBackbone
from agsm_loss.integrations.tokens.sd3 import SD3Backbone
from agsm_loss.integrations.tokens.unet import UNetBackbone
from agsm_loss.integrations.tokens.z_image import ZImageBackbone
from agsm_loss.soft_tokens import Banks

BACKBONES: tuple[Callable[[], Backbone], ...] = (
    UNetBackbone,
    SD3Backbone,
    FluxBackbone,
    Flux2Backbone,
    QwenImageBackbone,
    SanaBackbone,
    ZImageBackbone,
)

BankLike = int | Sequence[int] | Tensor
BankChoice = BankLike | Callable[[int], BankLike]
_ATTRIBUTE = "_agsm_attached"


class AttachedTokens:
    """Soft tokens that are attached to one denoiser; made by `attach_soft_tokens`.

    Attributes:
        model: the denoiser that has the hooks.
        tokens: the `SoftTokens`; they are not among the denoiser's parameters.
        backbone: the `Backbone` of its architecture.
        pending: tokens of the call that is entering the denoiser (N, L, n, d); for backbones.
        is_saved: whether `SavedTokens.of` was asked for them, or a warning was given that the
            denoiser is saved without them.
        text: that call's text (N, S, d), where `bank` is a function: N alone does not say which
            branches of guidance a call holds.
    """

    def __init__(self, model: nn.Module, tokens: SoftTokens, backbone: Backbone) -> None:
        self.model = model
        self.tokens = tokens
        self.backbone = backbone
        self.bank = Bank.POSITIVE
        self.pending: Tensor | None = None
        self.text: Tensor | None = None
        self._off_part: tuple[list[int], list[int], Any] | None = None
        self._names = parameter_names(model)
        # The model-level hooks find this object through the model: torch.compile guards what is
        # read from a module's attributes, but not what a hook holds, and would keep the first bank.
        model.__dict__[_ATTRIBUTE] = self
        self.is_saved = False
        if hasattr(type(model), "save_pretrained"):
            model.__dict__["save_pretrained"] = _warning_save(model)
        self._handles: list[Any] = [
            model.register_forward_pre_hook(_before, with_kwargs=True),
            *backbone.register(model, self),
            model.register_forward_hook(_after),
        ]

    @property
    def bank(self) -> BankChoice:
        """Which tokens the samples of the next calls get; default ψ⁺ for all.

        A `Bank`; one for each sample, as a sequence or an integer tensor (N,); or a function of the
        batch size N to either, called in every forward. Tensors are read when they are set.
        """
        return self._bank

    @bank.setter
    def bank(self, bank: BankChoice) -> None:
        self._banks = [] if callable(bank) else _as_list(bank)
        self._bank = bank

    @contextmanager
    def using(self, bank: BankChoice) -> Iterator[None]:
        """`bank` inside the block, the bank before it again afterwards; blocks may be nested."""
        before = self._bank
        self.bank = bank
        try:
            yield
        finally:
            self.bank = before

    @property
    def is_attached(self) -> bool:
        """Whether the tokens are on the model: True until `detach`."""
        return bool(self._handles)

    def detach(self) -> None:
        """Remove every hook: the denoiser is as it was. A second call does nothing."""
        if not self.is_attached:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for name in (_ATTRIBUTE, "save_pretrained"):
            self.model.__dict__.pop(name, None)

    def take_tokens(self) -> Tensor | None:
        """The entering call's tokens, once; None where it has none."""
        tokens, self.pending = self.pending, None
        return tokens

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Before the denoiser: make the call's tokens, or split off the samples without any."""
        self.pending = self._off_part = None
        call = Arguments(self._names, args, kwargs)
        batch = len(call[self._names[0]])
        banks = self._banks
        if callable(self._bank):
            self.text = call[self.backbone.text]
            banks, self.text = _as_list(self._bank(batch)), None
        if isinstance(banks, list) and len(banks) != batch:
            raise ValueError(
                f"bank: expected one for each of the call's {batch} samples, got {len(banks)}."
            )
        off = banks if isinstance(banks, list) else [banks]
        off = [i for i, bank in enumerate(off) if bank == Bank.OFF]
        if not off:
            self.pending = self._make(call, banks, batch)
            return None
        if not isinstance(banks, list) or len(off) == batch:
            return None
        # Sequences of two lengths can't share a batch: the bare samples have a call of their own.
        on = [i for i in range(batch) if i not in set(off)]
        # Not by `using`: torch 2.11 does not see its property's new value inside a compiled graph.
        before, self._bank, self._banks = (self._bank, self._banks), Bank.OFF, Bank.OFF
        try:
            part_args, part_kwargs = self._rows(call, off, batch)
            bare = self.model(*part_args, **part_kwargs)
        finally:
            self._bank, self._banks = before
        part_args, part_kwargs = self._rows(call, on, batch)
        kept = Arguments(self._names, part_args, part_kwargs)
        self.pending = self._make(kept, [banks[i] for i in on], len(on))
        self._off_part = off, on, bare
        return part_args, part_kwargs

    def _make(self, call: Arguments, banks: list[int] | int, batch: int) -> Tensor:
        """(batch, L, n, d), or (batch, n, d)."""
        timesteps = self.backbone.timesteps(self.model, call)
        bank = torch.tensor(banks) if isinstance(banks, list) else banks
        tokens = self.tokens(timesteps, bank)
        # Two comparisons: inside a compiled graph, `in (1, batch)` was False for equal numbers.
        if tokens.shape[0] != 1 and tokens.shape[0] != batch:
            raise ValueError(
                f"timestep: expected one, or one for each of the {batch} samples, got "
                f"{tokens.shape[0]}."
            )
        return tokens.expand(batch, *tokens.shape[1:])

    def _rows(self, call: Arguments, rows: list[int], batch: int) -> Call:
        """The call for some of its samples."""

        def select(leaf: Any) -> Any:
            batched = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch
            return leaf[rows] if batched else leaf

        def chosen(name: str, value: Any) -> Any:
            if name in self.backbone.listed:
                return [value[i] for i in rows]
            return value if name in self.backbone.unbatched else tree_map(select, value)

        args = tuple(map(chosen, call.names, call.args))
        return args, {name: chosen(name, value) for name, value in call.kwargs.items()}

    def after(self, output: Any) -> Any:
        """Behind the denoiser: put the samples together again."""
        part, self._off_part = self._off_part, None
        if part is None:
            return None
        off, on, bare = part
        order = torch.tensor(off + on).argsort()
        if isinstance(output[0], list):
            rows = [*bare[0], *output[0]]
            merged: Any = [rows[i] for i in order.tolist()]
        else:
            merged = torch.cat([bare[0], output[0]])[order.to(output[0].device)]
        return (merged,) if isinstance(output, tuple) else type(output)(sample=merged)


def _warning_save(model: Any) -> MethodType:
    """The model's `save_pretrained`, with its signature, and a warning before it."""

    @wraps(type(model).save_pretrained)
    def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
        attached: AttachedTokens | None = getattr(model, _ATTRIBUTE, None)
        if attached is not None and not attached.is_saved:
            attached.is_saved = True
            warnings.warn(
                f"save_pretrained: the soft tokens attached to this {type(model).__name__} are not "
                "in its files. Save them too: SavedTokens.of(attached).save_pretrained(folder).",
                stacklevel=2,
            )
        return type(model).save_pretrained(model, *args, **kwargs)

    return MethodType(save_pretrained, model)


def _before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    attached: AttachedTokens = getattr(model, _ATTRIBUTE)
    return attached.before(args, kwargs)


def _after(model: nn.Module, args: Any, output: Any) -> Any:
    attached: AttachedTokens = getattr(model, _ATTRIBUTE)
    return attached.after(output)


def attach_soft_tokens(
    model: nn.Module,
    tokens: SoftTokens,
    *,
    blocks: Sequence[str] | None = None,
    backbone: Backbone | None = None,
) -> AttachedTokens:
    """Attach soft tokens to a denoiser. Its calls use ψ⁺ until another bank is chosen.

    Args:
        model: a `UNet2DConditionModel`, or an `SD3Transformer2DModel`, `FluxTransformer2DModel`,
            `Flux2Transformer2DModel`, `QwenImageTransformer2DModel`, `SanaTransformer2DModel` or
            `ZImageTransformer2DModel`, also inside torch.compile, DDP or PEFT wrappers. Attach
            before the first compiled call.
        tokens: `make_soft_tokens(model)`, or loaded ones.
        blocks: for a UNet, which of "down", "mid" and "up" get them; default down and mid.
        backbone: an adapter of your own for another architecture.

    Raises:
        TypeError: no adapter for the model.
        ValueError: tokens of another width or number of layers than the model has.
        RuntimeError: the model has soft tokens already.
    """
    model = unwrap(model)
    if backbone is None:
        backbone = backbone_of(model, blocks)
    elif blocks is not None:
        raise ValueError(
            f"blocks: expected None with a backbone of your own, got {blocks!r}. The backbone says "
            "where the tokens go."
        )
    if hasattr(model, _ATTRIBUTE):
        raise RuntimeError(
            f"this {type(model).__name__} has soft tokens attached already. Call detach() on them "
            "first, or use them: TokenDenoiser(model, tokens=attached)."
        )
    check_fit(model, tokens, backbone)
    return AttachedTokens(model, tokens, backbone)


def check_fit(model: nn.Module, tokens: SoftTokens, backbone: Backbone) -> None:
    """ValueError that says which number of the tokens differs from the model's."""
    name, width = type(model).__name__, backbone.width(model)
    if tokens.dim != width:
        raise ValueError(
            f"tokens: expected dim={width}, the text width of this {name}, got dim={tokens.dim}. "
            "They were made for another model."
        )
    if backbone.one_set():
        if tokens.num_layers is not None:
            raise ValueError(
                f"tokens: expected num_layers=None, since one set serves all blocks of a {name}, "
                f"got num_layers={tokens.num_layers}."
            )
        return
    number = len(backbone.blocks(model))
    if tokens.num_layers is None or tokens.num_layers > number:
        raise ValueError(
            f"tokens: expected num_layers in 1..{number}, the blocks of this {name}, got "
            f"num_layers={tokens.num_layers}."
        )


def backbone_of(model: nn.Module, blocks: Sequence[str] | None = None) -> Backbone:
    """The adapter for a model; `blocks` as in `attach_soft_tokens`."""
    classes = {c.__name__ for c in type(model).__mro__}
    for make in BACKBONES:
        if classes & set(make().model_classes):
            if make is UNetBackbone:
                return UNetBackbone() if blocks is None else UNetBackbone(blocks)
            if blocks is not None:
                raise ValueError(
                    f"blocks: expected None for {type(model).__name__}, got {blocks!r}. Its layers "
                    "are the first L blocks; choose L with num_layers."
                )
            return make()
    supported = ", ".join(name for make in BACKBONES for name in make().model_classes)
    raise TypeError(
        f"model: no soft tokens for {type(model).__name__}. Supported: {supported}. For another "
        "architecture subclass agsm_loss.integrations.tokens.hooks.Backbone and pass an "
        "instance to attach_soft_tokens(backbone=...)."
    )


def _as_list(bank: BankLike) -> list[int] | int:
    """Python numbers, so that a call neither waits for a device nor breaks a compiled graph."""
    if isinstance(bank, Tensor):
        if bank.is_floating_point() or bank.ndim > 1:
            raise ValueError(
                f"bank: expected an integer tensor () or (N,), got {bank.dtype} "
                f"{tuple(bank.shape)}."
            )
        bank = bank.tolist()
    values = [bank] if isinstance(bank, int) else list(bank)
    known = {int(b) for b in Bank}
    if any(int(value) not in known for value in values):
        raise ValueError(f"bank: expected values of agsm_loss.Bank ({sorted(known)}), got {bank}.")
    return int(values[0]) if isinstance(bank, int) else [int(value) for value in values]


def make_soft_tokens(
    model: nn.Module,
    *,
    num_tokens: int = 4,
    num_layers: int | None = None,
    banks: Banks = "dual",
    time_buckets: int | None = 100,
    std: float = 0.02,
    init: Tensor | None = None,
    backbone: Backbone | None = None,
) -> SoftTokens:
    """`SoftTokens` of the size that a denoiser needs; arguments as there.

    They are drawn on the CPU, in float32, and moved to the model's device. `num_layers` is L, how
    many of the first blocks have tokens of their own: 5 by default (or all blocks, where there are
    fewer), -1 for all. For a UNet it is None, since one set serves all blocks. A UNet's tokens
    start, as published, from the start-of-text (BOS) vector of the empty prompt:
    `init=bos_embedding(embeds)`, where `embeds` is what the text encoder makes of "".
    """
    model = unwrap(model)
    backbone = backbone_of(model) if backbone is None else backbone
    if backbone.one_set():
        if num_layers is not None:
            raise ValueError(
                f"num_layers: expected None, since one set serves all blocks of a "
                f"{type(model).__name__}, got {num_layers}."
            )
    else:
        number = len(backbone.blocks(model))
        if num_layers is None:
            num_layers = min(5, number)
        elif num_layers == -1:
            num_layers = number
        if not 1 <= num_layers <= number:
            raise ValueError(
                f"num_layers: expected -1 or 1..{number}, the blocks of this "
                f"{type(model).__name__}, got {num_layers}."
            )
    tokens = SoftTokens(
        backbone.width(model),
        num_tokens=num_tokens,
        num_layers=num_layers,
        banks=banks,
        time_buckets=time_buckets,
        std=std,
        init=None if init is None else init.cpu(),
    )
    return move_to(tokens, model)


def move_to(tokens: SoftTokens, model: nn.Module) -> SoftTokens:
    """Move the tokens to the model's device. They stay where the model is offloaded ("meta")."""
    device = next(model.parameters()).device
    return tokens if device.type == "meta" else tokens.to(device)
