"""How a stochastic rollout of a flow-matching model steps from one noise level to the next.

A flow's own sampler is an ODE, whose steps have no likelihoods. These draw noise: Flow-GRPO's SDE
(arXiv 2505.05470) and Flow-CPS (arXiv 2509.05952).

>>> import torch
>>> from agsm_loss.integrations.hosts.dynamics import Dynamics
>>> x, v = torch.ones(1, 4), torch.full((1, 4), 0.5)  # a state, and the model's prediction there
>>> cps = Dynamics.of("cps")
>>> mean, std = cps.gaussian(v, x, torch.tensor([0.8]), torch.tensor([0.6]))
>>> cps.log_prob(mean + 0.1, mean, std)  # of the next state; -0.1²
tensor([-0.0100])
"""

from math import cos, pi, sin
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from agsm_loss.integrations.hosts.base import mean_log_prob

SDEType = Literal["sde", "cps"]


class Dynamics(NamedTuple):
    """Which dynamics: the next state is a draw from a Gaussian.

    Attributes:
        sde_type: `sde`, Flow-GRPO's (`sde_gaussian`), or `cps`, Flow-CPS's (`cps_gaussian`), whose
            images are clean after few steps too.
        noise_level: a > 0 of `sde_gaussian`; η of `cps_gaussian`, above 0 and at most 1.
    """

    sde_type: SDEType
    noise_level: float

    @classmethod
    def of(cls, sde_type: SDEType = "sde", noise_level: float | None = None) -> "Dynamics":
        """Checked. noise_level: default: the published one, 0.7 for `sde` and 0.8 for `cps`.

        Raises:
            ValueError: another type, or a noise level outside its range.
        """
        published = {"sde": 0.7, "cps": 0.8}
        if sde_type not in published:
            raise ValueError(f"sde_type: expected sde or cps, got {sde_type!r}.")
        noise_level = published[sde_type] if noise_level is None else noise_level
        if not 0 < noise_level <= (1 if sde_type == "cps" else float("inf")):
            raise ValueError(
                f"noise_level: expected above 0{' and at most 1' if sde_type == 'cps' else ''} for "
                f"{sde_type}, got {noise_level}."
            )
        return cls(sde_type, noise_level)

    def gaussian(
        self, pred: Tensor, x: Tensor, sigma: Tensor, following: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean (N, *D) and standard deviation (N, 1, …) of the next state (`sde_gaussian`)."""
        step = cps_gaussian if self.sde_type == "cps" else sde_gaussian
        return step(pred, x, sigma, following, self.noise_level)

    def log_prob(self, following: Tensor, mean: Tensor, std: Tensor) -> Float[Tensor, " N"]:
        """Of the next states (N, *D), averaged over an image's dimensions.

        For `cps` it is −(x' − mean)², without the constants and the 1/(2·std²), as in its paper and
        in Flow-GRPO's code. The steps with little noise, towards the end, then count for little.
        """
        if self.sde_type == "cps":
            return -(following.to(mean) - mean).square().flatten(1).mean(1)
        return mean_log_prob(following, mean, std)

    def kl(self, mean: Tensor, ref: Tensor, std: Tensor) -> Float[Tensor, ""]:
        """KL divergence of steps to a reference's with mean `ref`, averaged over all dimensions.

        For `cps` times 2·std², in the units of `log_prob`: its last std is near 0.
        """
        gap = (mean - ref) if self.sde_type == "cps" else (mean - ref) / std / 2**0.5
        return gap.square().mean()


def sde_gaussian(
    pred: Float[Tensor, "N *D"],
    x: Float[Tensor, "N *D"],
    sigma: Float[Tensor, " N"],
    following: Float[Tensor, " N"],
    noise_level: float = 0.7,
    largest: float = 0.96,
) -> tuple[Tensor, Tensor]:
    """Mean (N, *D) and standard deviation (N, 1, …) of the next state.

    arXiv 2505.05470, eq. 9 and 12. With s = a√(σ/(1 − σ)) and d = σ' − σ < 0 the mean is
    x + (v + s²/(2σ)·(x + (1 − σ)v))d, and the standard deviation s√−d. At a = 0 it is Euler's step.

    >>> x, v = torch.ones(1, 4), torch.full((1, 4), 0.5)
    >>> sde_gaussian(v, x, torch.tensor([0.8]), torch.tensor([0.6]), noise_level=0.0)
    (tensor([[0.9000, 0.9000, 0.9000, 0.9000]]), tensor([[0.]]))
    >>> mean, std = sde_gaussian(v, x, torch.tensor([0.8]), torch.tensor([0.6]))
    >>> std  # 0.7 √(0.8/0.2) √0.2
    tensor([[0.6261]])

    Args:
        pred: v = ε − x_0 at x, (N, *D).
        x: states (N, *D).
        sigma, following: σ and the smaller σ' of the next state, (N,) each, in 0..1.
        noise_level: a ≥ 0; published: 0.7.
        largest: an upper bound of the σ in s, since s goes to infinity at σ = 1.

    Computed in float32 at least: bfloat16 would round the step and its log-probability away.
    """
    x, sigma, following = _wide(x, sigma, following)
    spread = noise_level * (sigma / (1 - sigma.clamp(max=largest))).sqrt()
    step = following - sigma
    drift = pred + spread**2 / (2 * sigma) * (x + (1 - sigma) * pred)
    return x + drift * step, spread * (-step).sqrt()


def cps_gaussian(
    pred: Float[Tensor, "N *D"],
    x: Float[Tensor, "N *D"],
    sigma: Float[Tensor, " N"],
    following: Float[Tensor, " N"],
    noise_level: float = 0.8,
) -> tuple[Tensor, Tensor]:
    """Mean (N, *D) and standard deviation (N, 1, …) of the next state in Flow-CPS.

    Coefficients-preserving sampling (arXiv 2509.05952): as in DDIM, a part of the noise of level σ'
    is drawn anew. With x_0 = x − σv, ε = x + (1 − σ)v and s = σ' sin(ηπ/2) the mean is
    (1 − σ')x_0 + √(σ'² − s²)ε, and the standard deviation s, so that the state has the noise σ' and
    no more; an `sde_gaussian` step of finite size has more. At η = 0 it is Euler's step.

    >>> x, v = torch.ones(1, 4), torch.full((1, 4), 0.5)
    >>> cps_gaussian(v, x, torch.tensor([0.8]), torch.tensor([0.6]), noise_level=0.0)
    (tensor([[0.9000, 0.9000, 0.9000, 0.9000]]), tensor([[0.]]))
    >>> cps_gaussian(v, x, torch.tensor([0.8]), torch.tensor([0.6]), noise_level=1.0)
    (tensor([[0.2400, 0.2400, 0.2400, 0.2400]]), tensor([[0.6000]]))

    Args:
        pred, x, sigma, following: as in `sde_gaussian`.
        noise_level: η in 0..1, the part that is drawn anew; 0.8 in Flow-GRPO's code.

    Computed in float32 at least.
    """
    x, sigma, following = _wide(x, sigma, following)
    angle = noise_level * pi / 2
    x_0, noise = x - sigma * pred, x + (1 - sigma) * pred
    return (1 - following) * x_0 + cos(angle) * following * noise, sin(angle) * following


def _wide(x: Tensor, *levels: Tensor) -> tuple[Tensor, ...]:
    """x in float32 at least, and each level (N,) beside it, as (N, 1, …)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x, *(one.to(x).reshape(-1, *[1] * (x.ndim - 1)) for one in levels)
