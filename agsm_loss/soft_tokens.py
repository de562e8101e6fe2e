"""Dual soft tokens ψ⁺/ψ⁻: the trainable text-side tokens of AGSM (arXiv 2605.30038, §"dual soft
tokens"), after SoftREPA's single bank (arXiv 2503.08250).

Bank 0 is ψ⁺, used by matching captions and at inference; bank 1 is ψ⁻, used by the others while
training. A token is its bank's vector plus a time token, an embedding of the timestep's bucket
that both banks share. What a backbone does with them is `agsm_loss.integrations`' business.
"""

from enum import IntEnum
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from agsm_loss import _checks

Banks = Literal["dual", "shared", "positive_only"]


class Bank(IntEnum):
    """Which tokens a sample uses."""

    OFF = -1
    """None at all; known to the backbones' hooks, not to `SoftTokens`."""
    POSITIVE = 0
    NEGATIVE = 1


class SoftTokens(nn.Module):
    """ψ⁺ and ψ⁻ of one backbone.

    >>> import torch
    >>> from agsm_loss import Bank, SoftTokens
    >>> tokens = SoftTokens(64, num_tokens=4, num_layers=5)
    >>> tokens(torch.tensor([0, 999]), torch.tensor([Bank.POSITIVE, Bank.NEGATIVE])).shape
    torch.Size([2, 5, 4, 64])

    Args:
        dim: d, width of the text stream at the place of insertion.
        num_tokens: n, tokens a layer; published: 4.
        num_layers: L, layers with tokens of their own (SD3: 5); None for one set that all
            insertion points share (SD1.5, SDXL).
        banks: "dual" (the method), or one of its ablations: "shared", one bank for both roles;
            "positive_only", ψ⁻ stays at its initial values.
        time_buckets: number of time tokens; published: 100. None for none.
        num_train_timesteps: timesteps 0..N−1 are split evenly over the buckets; published: 1000.
        std: standard deviation of the normal initialisation; published: 0.02.
        init: initial values of the base tokens instead, copied: any shape that broadcasts to
            (2, L, n, d), or (2, n, d) without layers. UNets start from the BOS embedding (d,) of
            the empty prompt.

    Attributes:
        tokens: base tokens, a parameter (banks, L, n, d), or (banks, n, d) without layers; `banks`
            is 2 for "dual", else 1.
        time_tokens: `nn.Embedding(time_buckets, L·d)`, or None.
        frozen: ψ⁻ of "positive_only", a parameter without gradient; else None.
    """

    frozen: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        *,
        num_tokens: int = 4,
        num_layers: int | None = None,
        banks: Banks = "dual",
        time_buckets: int | None = 100,
        num_train_timesteps: int = 1000,
        std: float = 0.02,
        init: Tensor | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "num_tokens": num_tokens, "num_train_timesteps": num_train_timesteps}
        sizes |= {"num_layers": 1 if num_layers is None else num_layers}
        sizes |= {"time_buckets": 1 if time_buckets is None else time_buckets}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}.")
        if banks not in ("dual", "shared", "positive_only"):
            raise ValueError(f'banks: expected "dual", "shared" or "positive_only", got {banks!r}.')
        _checks.check_scale("std", std)
        self.dim = dim
        self.num_tokens = num_tokens
        self.num_layers = num_layers
        self.banks = banks
        self.num_train_timesteps = num_train_timesteps

        layers = () if num_layers is None else (num_layers,)
        shape = (2, *layers, num_tokens, dim)
        values = torch.randn(shape) * std if init is None else _broadcast_init(init, shape)
        self.tokens = nn.Parameter(values.clone() if banks == "dual" else values[:1].clone())
        # Not a buffer: DDP would exchange it in every forward, and wait where ranks make fewer.
        frozen = nn.Parameter(values[1:].clone(), requires_grad=False)
        self.register_parameter("frozen", frozen if banks == "positive_only" else None)
        self.time_tokens = None
        if time_buckets is not None:
            self.time_tokens = nn.Embedding(time_buckets, sizes["num_layers"] * dim)
            nn.init.normal_(self.time_tokens.weight, std=std)

    def forward(
        self, timesteps: Tensor | float | int | None, bank: Tensor | int = Bank.POSITIVE
    ) -> Float[Tensor, "B *L n d"]:
        """Tokens of each sample: (B, L, n, d), or (B, n, d) without layers.

        B is the number of timesteps or of banks; 1 where both are scalars.

        Args:
            timesteps: in 0..num_train_timesteps, (B,) or a scalar, of any dtype; rounded down to
                its bucket, and to the first or last one outside the range. It may be None where
                there are no time tokens.
            bank: `Bank.POSITIVE` or `Bank.NEGATIVE`, or an integer tensor (B,) of them.

        Raises:
            ValueError: a bank other than 0 and 1, no timesteps where there are time tokens, or
                batch sizes that differ.
        """
        index = torch.as_tensor(bank)
        if index.dtype == torch.bool or index.is_floating_point():
            raise TypeError(f"bank: expected integers, got {index.dtype}.")
        if not torch.compiler.is_compiling() and bool(((index < 0) | (index > 1)).any()):
            raise ValueError(
                f"bank: expected 0 (ψ⁺) or 1 (ψ⁻), got values from {int(index.min())} to "
                f"{int(index.max())}."
            )
        rows = 1 if timesteps is None else torch.as_tensor(timesteps).numel()
        if index.ndim > 1 or (index.numel() != rows and 1 not in (index.numel(), rows)):
            raise ValueError(
                f"bank: expected a scalar or as many as there are timesteps, got "
                f"{tuple(index.shape)} for timesteps {tuple(torch.as_tensor(timesteps).shape)}."
            )
        tokens = self._table()[index.to(self.tokens.device).reshape(-1)]
        if self.time_tokens is not None:
            return tokens + self._time_tokens(timesteps)
        return tokens.expand(rows, *tokens.shape[1:]) if len(tokens) == 1 else tokens

    def bucket(self, timesteps: Tensor | float | int) -> Tensor:
        """Row of the time tokens for each timestep, (B,) int64; the input is left as it is."""
        if self.time_tokens is None:
            raise ValueError("bucket: these soft tokens have no time tokens.")
        number = self.time_tokens.num_embeddings
        timesteps = torch.as_tensor(timesteps, device=self.tokens.device).reshape(-1)
        scaled = timesteps.double() * number / self.num_train_timesteps
        return scaled.floor().clamp(0, number - 1).long()

    def _time_tokens(self, timesteps: Tensor | float | int | None) -> Tensor:
        """(B, L, 1, d), or (B, 1, d) without layers."""
        if timesteps is None:
            raise ValueError("timesteps: expected a tensor (B,), since there are time tokens.")
        assert self.time_tokens is not None
        rows = self.time_tokens(self.bucket(timesteps))
        if self.num_layers is None:
            return rearrange(rows, "b d -> b 1 d")
        return rearrange(rows, "b (l d) -> b l 1 d", l=self.num_layers)

    def _table(self) -> Tensor:
        """(2, …): what ψ⁺ and ψ⁻ are under the chosen `banks`."""
        if self.banks == "dual":
            return self.tokens
        if self.frozen is not None:
            return torch.cat([self.tokens, self.frozen])
        return self.tokens.expand(2, *self.tokens.shape[1:])

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_tokens={self.num_tokens}, num_layers={self.num_layers}, "
            f"banks={self.banks!r}, num_train_timesteps={self.num_train_timesteps}"
        )


def _broadcast_init(init: Tensor, shape: tuple[int, ...]) -> Tensor:
    _checks.check_floating(init=init)
    try:
        return init.detach().float().expand(shape)
    except RuntimeError:
        raise ValueError(
            f"init: expected a shape that broadcasts to {shape}, got {tuple(init.shape)}."
        ) from None
