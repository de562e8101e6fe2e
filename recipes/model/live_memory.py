"""Bytes that a model's passes hold at once, found without weights, data or a GPU (device "meta").

with torch.device("meta"), AsOnCuda(torch.bfloat16), LivePeak(model.parameters()) as live:
    model(torch.randn(8, 4, 64, 64)).sum().backward()
live.peak
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint


class LivePeak(TorchDispatchMode):
    """Counts the storages that operations make and that are alive, each once.

    known: tensors that are not counted, such as weights.
    peak: the most bytes that were alive at a time.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = list(known)
        self._alive = {one.untyped_storage()._cdata for one in self._known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.live -= size


class _Attention(torch.autograd.Function):
    """Attention that never holds its matrix: what flash and memory-efficient kernels save."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        logsumexp = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


_LOW = (F.linear, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm, torch.addmm)
_FLOAT = (F.layer_norm, F.group_norm, torch.group_norm, F.softmax, torch.softmax)


class AsOnCuda(TorchFunctionMode):
    """Memory-efficient attention, and autocast's rule for cuda where a dtype is given.

    The rule: products take tensors in `dtype`, norms in float32. A weight is cast once a pass.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        self._casts: dict[tuple[int, torch.dtype], Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            given = dict(zip(names, args, strict=False)) | kwargs
            return _Attention.apply(*(self._cast(given[name], self.dtype) for name in names))
        to = self.dtype if func in _LOW else torch.float32 if func in _FLOAT else None
        if self.dtype is not None and to is not None:
            args = [self._cast(one, to) for one in args]
            kwargs = {name: self._cast(one, to) for name, one in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype | None) -> Any:
        if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        key = id(value), dtype
        if key not in self._casts:
            self._casts[key] = value.to(dtype)
        return self._casts[key]


def checkpointing(dtype: torch.dtype | None) -> Callable[..., Any]:
    """What `enable_gradient_checkpointing` takes, with `AsOnCuda` in the recomputed passes too."""
    return partial(
        checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), AsOnCuda(dtype))
    )


def passes(module: nn.Module, inputs: Any, dtype: torch.dtype | None, gradient: bool) -> int:
    """The most bytes that a forward pass holds, with its backward pass where there is a gradient.

    Weights and the gradients that are kept are not counted.

    module: an `agsm_loss.Denoiser`. inputs: noisy, timesteps, conditioning, image conditioning.
    dtype: of autocast; None without it.
    """
    noisy, timesteps, conditioning, image = inputs
    bank = torch.zeros(len(noisy), dtype=torch.long)
    hooks = [
        one.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for one in module.parameters()
        if one.requires_grad
    ]
    known = [*module.parameters(), *module.buffers()]
    with torch.set_grad_enabled(gradient), AsOnCuda(dtype), LivePeak(known) as live:
        out = module(noisy, timesteps, conditioning, bank, **image)
        if gradient:
            out.float().square().mean().backward()
    for hook in hooks:
        hook.remove()
    return live.peak
