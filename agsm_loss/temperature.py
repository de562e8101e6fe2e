"""A temperature for the Plackett–Luce weights that follows the scale of the errors.

With T far above the gaps between the candidates' errors the weights stay at chance (1/K) and the
ranking does nothing; far below, they are one-hot and the guidance vanishes where the matching
caption leads. The published T = 0.1 suits one model's errors. `AdaptiveTemperature` finds the T at
which the mean entropy of a batch's weights is a chosen share of the largest possible, and keeps
a running mean of log T.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

_GRID = 10 ** torch.linspace(-4, 4, 161, dtype=torch.float64)
"""Trial temperatures in units of the widest gap of a row: e^0.115 ≈ 1.12 apart."""


class AdaptiveTemperature(nn.Module):
    """T at which the Plackett–Luce weights have a chosen mean entropy, averaged over steps.

    Use it when `positive_weight` stays at `chance_weight` (T too high) or `weight_entropy` at 0
    (T too low): small models, latents of unusual scale, narrow ranges of timesteps.

    >>> import torch
    >>> from agsm_loss import AdaptiveTemperature
    >>> temperature = AdaptiveTemperature(entropy=0.7)
    >>> errors = 1e-3 * torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 4.0]])
    >>> weights = (-errors / temperature(errors)).softmax(-1)
    >>> round((-(weights * weights.log()).sum(-1).mean() / torch.tensor(3.0).log()).item(), 2)
    0.7

    Args:
        entropy: aim for the mean entropy of the weights, as a share of log(number of candidates);
            between 0 (one-hot) and 1 (chance), both excluded.
        momentum: share of the running log T that is kept at each update, in [0, 1).

    In training mode each call updates the estimate from its own batch first; in evaluation mode it
    is only read. The estimate is a buffer, so it is saved with the state dict (as a copy), and it
    stays in float32 in a module in half precision. Under `torch.distributed` the batch is that of
    all ranks together, so every rank must call it.
    Rows with fewer than two candidates, with equal errors or with one that is not finite say
    nothing and are left out.
    """

    log_temperature: Tensor
    updates: Tensor

    def __init__(self, entropy: float = 0.7, *, momentum: float = 0.99) -> None:
        super().__init__()
        if not 0 < entropy < 1:
            raise ValueError(f"entropy: expected a share strictly between 0 and 1, got {entropy}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {momentum}.")
        self.entropy = entropy
        self.momentum = momentum
        self.register_buffer("log_temperature", torch.tensor(math.log(0.1)))
        self.register_buffer("updates", torch.tensor(0))

    @torch.no_grad()
    def forward(
        self, errors: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"] | None = None
    ) -> Float[Tensor, ""]:
        """T for errors A(t)·e_j (B, K); 0.1 as long as no batch has had two different errors."""
        if self.training:
            log_t, rows = self._estimate(errors, mask)
            seen = (rows > 0).to(self.log_temperature.device)
            # Corrected for the start: the first estimate counts fully, then a running mean.
            step = torch.clamp(1 / (self.updates + 1.0), min=1 - self.momentum)
            moved = torch.lerp(self.log_temperature, log_t.to(self.log_temperature), step)
            self.log_temperature.copy_(torch.where(seen, moved, self.log_temperature))
            self.updates.add_(seen)
        return self.log_temperature.exp().to(errors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdaptiveTemperature":
        """Moves it, and keeps its type: half precision would round the small steps away."""
        before = self.log_temperature
        super()._apply(fn, recurse)
        if self.log_temperature.dtype != before.dtype:
            self.log_temperature = before.to(self.log_temperature.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("log_temperature", "updates"):  # the next call changes them in place
            destination[prefix + name] = destination[prefix + name].clone()

    def _estimate(self, errors: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """log T at which the mean entropy of the informative rows is met, and their number.

        Both of all ranks together.
        """
        errors = errors.double()
        valid = (
            torch.ones_like(errors, dtype=torch.bool) if mask is None else mask.to(errors.device)
        )
        # A prediction that overflowed says nothing of its row's captions.
        finite = errors.masked_fill(~valid, 0).isfinite().all(1)
        errors = errors.where(finite.unsqueeze(1), 0)
        best = errors.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
        gaps = (errors - best).masked_fill(~valid, 0)
        informative = gaps.amax(1) > 0
        sums = torch.stack([informative.sum(), (gaps.amax(1) * informative).sum()])
        rows, widest = _over_ranks(sums)
        widest = widest / rows.clamp(min=1)
        # (G, B, K) of trial temperatures: the entropy grows with T, so the crossing is one place.
        trial = _GRID.to(errors.device).reshape(-1, 1, 1) * widest.clamp(min=1e-300)
        weights = (-gaps / trial).masked_fill(~valid, -torch.inf).softmax(-1)
        entropy = -torch.xlogy(weights, weights).sum(-1) / valid.sum(1).clamp(min=2).log()
        mean = _over_ranks((entropy * informative).sum(1)) / rows.clamp(min=1)
        above = (mean < self.entropy).sum().clamp(1, len(_GRID) - 1).reshape(1)
        low, high = mean[above - 1], mean[above]
        share = ((self.entropy - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        logs = trial.flatten().log()
        return torch.lerp(logs[above - 1], logs[above], share).squeeze(0), rows

    def extra_repr(self) -> str:
        return f"entropy={self.entropy}, momentum={self.momentum}"


def _over_ranks(sums: Tensor) -> Tensor:
    """Sums of this rank, added up over all ranks."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums
