"""What reward-driven hosts sample, and the advantages that its rewards become.

Images of each prompt are sampled as a group, without gradient. `sample_latents` takes the
scheduler's own solver; `sample_sde` one that draws noise, so that its steps have likelihoods, for
flow matching.

>>> import torch
>>> from diffusers import DDIMScheduler
>>> from agsm_loss.integrations.hosts.rollouts import group_advantages, sample_latents
>>> def denoise(x, timesteps):  # yours, with the prompts' embeddings in it
...     return 0.5 * x
>>> latents = sample_latents(denoise, DDIMScheduler(), torch.randn(4, 4, 8, 8), num_steps=5)
>>> latents.shape
torch.Size([4, 4, 8, 8])
>>> rewards = latents.mean((1, 2, 3))  # yours, of two prompts' images
>>> group_advantages(rewards, group=2).shape
torch.Size([4])
"""

import inspect
from collections.abc import Callable
from itertools import pairwise
from math import pi, sin
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from agsm_loss.integrations.denoisers import no_grad_pass
from agsm_loss.integrations.hosts.base import mean_log_prob
from agsm_loss.integrations.noise import prediction_type


def group_advantages(
    rewards: Float[Tensor, " B"], group: int, *, global_std: bool = False
) -> Float[Tensor, " B"]:
    """(r − mean)/(std + 1e-6) of each reward r, within its group (GRPO, arXiv 2402.03300).

    >>> rewards = torch.tensor([1.0, 3.0, 10.0, 10.0])
    >>> group_advantages(rewards, group=2)
    tensor([-1.0000,  1.0000,  0.0000,  0.0000])
    >>> group_advantages(rewards, group=2, global_std=True)
    tensor([-0.2462,  0.2462,  0.0000,  0.0000])

    Args:
        rewards: one an image (B,), larger is better.
        group: images of one prompt, in consecutive rows; 2 at least.
        global_std: the standard deviation is that of all B rewards, as in DiffusionNFT's
            released code. A group whose rewards hardly differ then counts for little.

    Raises:
        ValueError: groups of fewer than 2, or rewards that are not whole groups.
    """
    if group < 2 or rewards.ndim != 1 or len(rewards) % group:
        raise ValueError(
            f"expected groups of 2 at least and rewards (B,) in whole groups, got {group} and "
            f"{tuple(rewards.shape)}."
        )
    grouped = rewards.float().reshape(-1, group)
    over = grouped.reshape(1, -1) if global_std else grouped
    spread = over.std(1, unbiased=False, keepdim=True)
    return ((grouped - grouped.mean(1, keepdim=True)) / (spread + 1e-6)).flatten()


@no_grad_pass()
def sample_latents(
    denoise: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Float[Tensor, "B *D"],
    *,
    num_steps: int = 10,
    mu: float | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B *D"]:
    """Clean latents x_0 (B, *D), in float32 at least, by the scheduler's own solver.

    Args:
        denoise: x (B, *D) and timesteps (B,) to the prediction (B, *D).
        scheduler: any diffusers scheduler. Its `set_timesteps` is called.
        noise: N(0, 1), (B, *D).
        num_steps: calls of `denoise`, for a solver that calls it once a step; 1 at least.
        mu: as in `sample_sde`.
        generator: CPU generator of the draws of a solver that draws; default: torch's own.

    Raises:
        ValueError: mu for a scheduler with a fixed shift.
    """
    _set_timesteps(scheduler, num_steps, noise, mu)
    known = inspect.signature(scheduler.step).parameters
    draw = {"generator": generator} if "generator" in known else {}
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        pred = denoise(scale(x, t), t.to(x.device).expand(len(x)))
        x = scheduler.step(pred.to(x), t, x, **draw).prev_sample
    return x


SDEType = Literal["sde", "cps"]


class Steps(NamedTuple):
    """How a rollout steps from one noise level to the next: by a Gaussian around a mean.

    >>> x, v = torch.ones(1, 4), torch.full((1, 4), 0.5)
    >>> mean, std = Steps("cps", 0.8).gaussian(v, x, torch.tensor([0.8]), torch.tensor([0.6]))
    >>> Steps("cps", 0.8).log_prob(mean + 0.1, mean, std)  # -0.1²
    tensor([-0.0100])

    Attributes:
        sde_type: `sde`, Flow-GRPO's (`sde_gaussian`), or `cps`, Flow-CPS's (`cps_gaussian`), whose
            images are clean after few steps too.
        noise_level: a > 0 of `sde_gaussian`; η of `cps_gaussian`, in 0..1.
    """

    sde_type: SDEType = "sde"
    noise_level: float = 0.7

    def check(self) -> None:
        """ValueError for another type, or a noise level outside its range."""
        most = {"sde": float("inf"), "cps": 1.0}.get(self.sde_type)
        if most is None:
            raise ValueError(f"sde_type: expected sde or cps, got {self.sde_type!r}.")
        if not 0 < self.noise_level <= most:
            raise ValueError(
                f"noise_level: expected above 0{' and at most 1' if most == 1 else ''} for "
                f"{self.sde_type}, got {self.noise_level}."
            )

    def gaussian(
        self, pred: Tensor, x: Tensor, sigma: Tensor, following: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean (N, *D) and standard deviation (N, 1, …) of the next state; arguments as there."""
        step = cps_gaussian if self.sde_type == "cps" else sde_gaussian
        return step(pred, x, sigma, following, self.noise_level)

    def log_prob(self, following: Tensor, mean: Tensor, std: Tensor) -> Float[Tensor, " N"]:
        """Of the next states (N, *D), averaged over an image's dimensions.

        For `cps` it is −(x' − mean)², without the constants and the 1/(2·std²), as in its paper and
        in Flow-GRPO's code: every step then weighs the same.
        """
        if self.sde_type == "cps":
            return -(following.to(mean) - mean).square().flatten(1).mean(1)
        return mean_log_prob(following, mean, std)


class Trajectory(NamedTuple):
    """A rollout of B images over T steps.

    Attributes:
        states: x at each noise level, (T + 1, B, *D); the last is x_0.
        sigmas: σ of each level, (T + 1,), from 1 to 0.
        log_probs: of each step under the model that sampled (`Steps.log_prob`), (T, B); nan for the
            last step, which has no noise.
        steps: how it was sampled.
    """

    states: Float[Tensor, "T1 B *D"]
    sigmas: Float[Tensor, " T1"]
    log_probs: Float[Tensor, "T B"]
    steps: Steps

    @property
    def last(self) -> Tensor:
        """x_0 (B, *D)."""
        return self.states[-1]


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
    shape = (-1,) + (1,) * (x.ndim - 1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    sigma, following = sigma.to(x).reshape(shape), following.to(x).reshape(shape)
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
    shape = (-1,) + (1,) * (x.ndim - 1)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    sigma, following = sigma.to(x).reshape(shape), following.to(x).reshape(shape)
    anew = noise_level * pi / 2
    kept = max(0.0, 1 - sin(anew) ** 2) ** 0.5
    x_0, noise = x - sigma * pred, x + (1 - sigma) * pred
    return (1 - following) * x_0 + kept * following * noise, sin(anew) * following


@no_grad_pass()
def sample_sde(
    denoise: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Float[Tensor, "B *D"],
    *,
    num_steps: int = 10,
    sde_type: SDEType = "sde",
    noise_level: float = 0.7,
    mu: float | None = None,
    generator: torch.Generator | None = None,
) -> Trajectory:
    """A rollout whose steps have likelihoods. Its last step is Euler's, without noise.

    Args:
        denoise: x (B, *D) and timesteps (B,) in 0..1000 to the prediction v (B, *D).
        scheduler: a flow-matching scheduler, for its σ. Its `set_timesteps` is called.
        noise: x at σ = 1, (B, *D).
        num_steps: T ≥ 2; published: 10 in training.
        sde_type, noise_level: of `Steps`; published: 0.7 for `sde`, 0.8 for `cps`.
        mu: the shift, for a scheduler with dynamic shifting. Default: that of Flux's pipeline, by
            the number of 2×2 patches of the latents.
        generator: CPU generator of all draws; default: torch's own.

    Raises:
        ValueError: another kind of scheduler, fewer than two steps, another type, a noise level
            outside its range, or mu for a scheduler with a fixed shift.
    """
    if prediction_type(scheduler) != "flow" or num_steps < 2:
        raise ValueError(
            "expected a flow-matching scheduler and 2 steps at least, got "
            f"{type(scheduler).__name__} and {num_steps}."
        )
    steps = Steps(sde_type, noise_level)
    steps.check()
    _set_timesteps(scheduler, num_steps, noise, mu)
    sigmas = scheduler.sigmas.to(noise.device)
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    states, log_probs = [x], []
    for sigma, following in pairwise(sigmas):
        here, there = sigma.expand(len(x)), following.expand(len(x))
        pred = denoise(x, here * scheduler.config.num_train_timesteps)
        last = following == 0
        mean, std = (Steps("sde", 0.0) if last else steps).gaussian(pred, x, here, there)
        x = mean + std * torch.randn(x.shape, generator=generator).to(x)
        states.append(x)
        log_probs.append(
            torch.full((len(x),), torch.nan).to(x) if last else steps.log_prob(x, mean, std)
        )
    return Trajectory(torch.stack(states), sigmas, torch.stack(log_probs), steps)


def _set_timesteps(scheduler: Any, number: int, noise: Tensor, mu: float | None) -> None:
    config = scheduler.config
    if not config.get("use_dynamic_shifting", False):
        if mu is not None:
            raise ValueError("mu: the scheduler's shift is fixed (use_dynamic_shifting is False).")
        scheduler.set_timesteps(number)
        return
    if mu is None:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        patches = (noise.shape[-2] // 2) * (noise.shape[-1] // 2)
        mu = calculate_shift(patches, *(config[name] for name in names))
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / number, number).tolist(), mu=mu)
