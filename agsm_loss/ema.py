"""The EMA model p̂ of AGSM: a shadow of the trainable parameters alone, never of the backbone."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """Exponential moving average of parameters, equal to them at the start.

    Call `update()` after each `optimizer.step()`, and run the model inside `with ema.applied():`
    for the EMA model's predictions. The averaging is `torch.optim.swa_utils`'; what is added is
    that only trainable parameters are kept, and kept in float32 at least (0.9999 is 1 in
    bfloat16).

    >>> import torch
    >>> from agsm_loss import EMA
    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(layer.weight)
    >>> ema = EMA(layer.parameters(), decay=0.9)
    >>> _ = torch.nn.init.zeros_(layer.weight)
    >>> ema.update()
    >>> with ema.applied():
    ...     round(layer.weight.item(), 4)
    0.9
    >>> layer.weight.item()
    0.0

    Args:
        parameters: the student's; those with `requires_grad=False` are left out. Parameters that
            become trainable later are not followed: make the EMA after freezing.
        decay: share of the average kept at each update, in [0, 1]. Published: 0.9999.
        warmup: start from smaller decays, min(decay, (1 + n)/(10 + n)) at update n = 1, 2, …
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, decay: float = 0.9999, warmup: bool = False
    ) -> None:
        if isinstance(parameters, nn.Module):
            raise TypeError("parameters: expected parameters, got a module. Pass .parameters().")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number in [0, 1], got {decay}.")
        self.parameters = [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise ValueError(
                "parameters: none is trainable, so there is nothing to average. Set requires_grad "
                "on the soft tokens or adapters first."
            )
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self.shadow = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for p in self.parameters
        ]
        self._is_applied = False

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters' present values."""
        if self._is_applied:
            raise RuntimeError("EMA.update() inside applied(): leave the context first.")
        self.num_updates += 1
        self._follow_device()
        current = [p.to(s.dtype) for p, s in zip(self.parameters, self.shadow, strict=True)]
        average = get_ema_multi_avg_fn(self.current_decay)
        for dtype in {s.dtype for s in self.shadow}:
            pairs = [(s, c) for s, c in zip(self.shadow, current, strict=True) if s.dtype == dtype]
            average([s for s, _ in pairs], [c for _, c in pairs], self.num_updates)

    @property
    def current_decay(self) -> float:
        """Decay of the latest update."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the averaged values inside, and their own again after.

        Data pointers are exchanged, nothing is copied (but for half-precision parameters), and no
        version counter moves: graphs that were recorded before can still be run backward after.
        Autocast's cast weights are dropped on the way in and out, as it knows them by their
        parameter and would take one model's for the other's. Inside, don't train. A second
        `applied` inside the first is refused.
        """
        if self._is_applied:
            raise RuntimeError("EMA.applied() inside itself: the averaged values are in place.")
        self._follow_device()
        own = [p.data for p in self.parameters]
        self._is_applied = True
        try:
            for parameter, shadow in zip(self.parameters, self.shadow, strict=True):
                parameter.data = shadow.to(parameter.dtype)
            torch.clear_autocast_cache()
            yield
        finally:
            for parameter, data in zip(self.parameters, own, strict=True):
                parameter.data = data
            torch.clear_autocast_cache()
            self._is_applied = False

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "shadow": [s.clone() for s in self.shadow]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the averages; on any mismatch nothing is changed."""
        saved = state["shadow"]
        shapes, expected = [tuple(s.shape) for s in saved], [tuple(s.shape) for s in self.shadow]
        if shapes != expected:
            raise ValueError(
                f"state: expected averages of shapes {expected}, got {shapes}. The EMA was saved "
                "for other trainable parameters."
            )
        self.num_updates = int(state["num_updates"])
        for shadow, value in zip(self.shadow, saved, strict=True):
            shadow.copy_(value)

    def _follow_device(self) -> None:
        """The model may have been moved since."""
        self.shadow = [s.to(p.device) for s, p in zip(self.shadow, self.parameters, strict=True)]
