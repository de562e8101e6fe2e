"""Flow-GRPO (arXiv 2505.05470) for flow-matching models, alone or with AGSM as a term.

Reward-driven training: images of each prompt are sampled as a group, and steps of their rollouts
become likelier where their reward is above the group's mean. A flow's sampler is an ODE and has no
likelihoods; the SDE with the same marginals has.

>>> import torch
>>> from diffusers import FlowMatchEulerDiscreteScheduler
>>> from torch import nn
>>> from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, Bank
>>> from agsm_loss.integrations.hosts.flow_grpo import FlowGRPO, group_advantages, sample_sde
>>> from agsm_loss.integrations.hosts.base import AGSMBatch
>>> layer = nn.Linear(4 + 3, 4)
>>> def denoiser(noisy, timesteps, text, bank):  # yours: TokenDenoiser or PlainDenoiser
...     return layer(torch.cat([noisy, text], dim=1))
>>> agsm = AGSMRegularizer(denoiser, EMA(layer.parameters()), AGSMLoss(neg_scale=0))
>>> scheduler = FlowMatchEulerDiscreteScheduler()
>>> step = FlowGRPO(denoiser, scheduler, agsm=agsm)

A rollout of two images of one prompt, without gradient; the reward is yours:

>>> text = torch.randn(1, 3).expand(2, 3)
>>> trajectory = sample_sde(
...     lambda x, t: denoiser(x, t, text, Bank.POSITIVE), scheduler, torch.randn(2, 4), num_steps=4
... )
>>> advantages = group_advantages(trajectory.last.mean(1), group=2)

A step on it, with captioned images for AGSM:

>>> images = AGSMBatch(
...     torch.randn(2, 4), torch.tensor([100.0, 900.0]), torch.randn(2, 4),
...     torch.randn(2, 3), ["a dog", "a cat"],
... )
>>> loss, metrics = step(trajectory, advantages, text, agsm_batch=images)
>>> loss.backward()  # then optimizer.step() and
>>> step.update_ema()
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from agsm_loss import AGSMRegularizer, Bank, Denoiser, StepOutput
from agsm_loss.integrations.denoisers import no_grad_pass
from agsm_loss.integrations.hosts.base import (
    AGSMBatch,
    Host,
    bank_of,
    mean_log_prob,
    take_rows,
)
from agsm_loss.integrations.noise import prediction_type


class Trajectory(NamedTuple):
    """A rollout of B images over T steps.

    Attributes:
        states: x at each noise level, (T + 1, B, *D); the last is x_0.
        sigmas: σ of each level, (T + 1,), from 1 to 0.
        log_probs: of each step under the model that sampled, (T, B), averaged over an image's
            dimensions (`mean_log_prob`); nan for the last step, which has no noise.
    """

    states: Float[Tensor, "T1 B *D"]
    sigmas: Float[Tensor, " T1"]
    log_probs: Float[Tensor, "T B"]

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


@no_grad_pass()
def sample_sde(
    denoise: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Float[Tensor, "B *D"],
    *,
    num_steps: int = 10,
    noise_level: float = 0.7,
    mu: float | None = None,
    generator: torch.Generator | None = None,
) -> Trajectory:
    """A rollout of the SDE. Its last step is Euler's, so that the images are without noise.

    Args:
        denoise: x (B, *D) and timesteps (B,) in 0..1000 to the prediction v (B, *D).
        scheduler: a flow-matching scheduler, for its σ. Its `set_timesteps` is called.
        noise: x at σ = 1, (B, *D).
        num_steps: T ≥ 2; published: 10 in training.
        noise_level: a > 0 of `sde_gaussian`.
        mu: the shift, for a scheduler with dynamic shifting. Default: that of Flux's pipeline, by
            the number of 2×2 patches of the latents.
        generator: CPU generator of all draws; default: torch's own.

    Raises:
        ValueError: another kind of scheduler, fewer than two steps, a noise level not above 0, or
            mu for a scheduler with a fixed shift.
    """
    if prediction_type(scheduler) != "flow" or num_steps < 2 or not noise_level > 0:
        raise ValueError(
            "expected a flow-matching scheduler, 2 steps at least and noise_level > 0, got "
            f"{type(scheduler).__name__}, {num_steps} and {noise_level}."
        )
    _set_timesteps(scheduler, num_steps, noise, mu)
    sigmas = scheduler.sigmas.to(noise.device)
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    states, log_probs = [x], []
    for sigma, following in pairwise(sigmas):
        here, there = sigma.expand(len(x)), following.expand(len(x))
        pred = denoise(x, here * scheduler.config.num_train_timesteps)
        last = following == 0
        mean, std = sde_gaussian(pred, x, here, there, 0.0 if last else noise_level)
        x = mean + std * torch.randn(x.shape, generator=generator).to(x)
        states.append(x)
        log_probs.append(
            torch.full((len(x),), torch.nan).to(x) if last else mean_log_prob(x, mean, std)
        )
    return Trajectory(torch.stack(states), sigmas, torch.stack(log_probs))


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


def group_advantages(rewards: Float[Tensor, " B"], group: int) -> Float[Tensor, " B"]:
    """(r − mean)/(std + 1e-6) of each reward r, within its group (GRPO, arXiv 2402.03300).

    >>> group_advantages(torch.tensor([1.0, 3.0, 10.0, 10.0]), group=2)
    tensor([-1.0000,  1.0000,  0.0000,  0.0000])

    Args:
        rewards: one an image (B,), larger is better.
        group: images of one prompt, in consecutive rows; 2 at least.

    Raises:
        ValueError: groups of fewer than 2, or rewards that are not whole groups.
    """
    if group < 2 or rewards.ndim != 1 or len(rewards) % group:
        raise ValueError(
            f"expected groups of 2 at least and rewards (B,) in whole groups, got {group} and "
            f"{tuple(rewards.shape)}."
        )
    grouped = rewards.float().reshape(-1, group)
    spread = grouped.std(1, unbiased=False, keepdim=True)
    return ((grouped - grouped.mean(1, keepdim=True)) / (spread + 1e-6)).flatten()


def clipped_policy_loss(
    log_prob: Float[Tensor, " N"], old: Float[Tensor, " N"], advantages: Tensor, clip: float
) -> Float[Tensor, ""]:
    """PPO's loss (arXiv 1707.06347, eq. 7): the mean of max(−A·r, −A·clip(r, 1 − clip, 1 + clip)).

    >>> log_prob = torch.tensor([0.0, 0.5], requires_grad=True)
    >>> clipped_policy_loss(log_prob, torch.zeros(2), torch.ones(2), clip=0.1).backward()
    >>> log_prob.grad  # the second ratio is clipped
    tensor([-0.5000,  0.0000])

    Args:
        log_prob: log p of each step under the model (N,).
        old: log p under the model that sampled (N,); r = p/p_old.
        advantages: A of each step's image (N,).
        clip: a ratio above 1 + clip (A > 0) or below 1 − clip (A < 0) has no gradient.
    """
    ratio = (log_prob - old).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()


class FlowGRPO(Host):
    """Flow-GRPO's training step: a trajectory and its advantages to loss and metrics.

    Args:
        denoiser: the model in training, e.g. `TokenDenoiser`. Its predictions use ψ⁺.
        scheduler: the rollout's.
        noise_level: a of the rollout.
        clip: of `clipped_policy_loss`.
        agsm: the regularizer on the same denoiser; its `weight` is λ. None, or λ = 0: Flow-GRPO
            alone, bit for bit.
        autocast: returns a context for the forward passes, e.g. `accelerator.autocast`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Any,
        *,
        noise_level: float = 0.7,
        clip: float = 1e-4,
        agsm: AGSMRegularizer | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(denoiser, scheduler, agsm)
        self.noise_level = noise_level
        self.clip = clip
        self.autocast = autocast

    def __call__(
        self,
        trajectory: Trajectory,
        advantages: Float[Tensor, " B"],
        conditioning: Any,
        steps: Int[Tensor, " n"] | None = None,
        *,
        image_conditioning: Mapping[str, Tensor] | None = None,
        agsm_batch: AGSMBatch | None = None,
    ) -> StepOutput:
        """One step on some steps of a trajectory of B images.

        Args:
            trajectory: of `sample_sde`.
            advantages: of each image (B,) (`group_advantages`).
            conditioning: the encoded prompts: a tensor, or dicts, lists and tuples of tensors, with
                a row an image.
            steps: which of the T steps (n,), in 0..T-2; default: all of these.
            image_conditioning: what belongs to the image (Flux's guidance): tensors with B rows.
            agsm_batch: images for AGSM; required with `agsm`.

        Returns:
            The loss, a scalar, and metrics: grpo/loss, grpo/approx_kl (half the mean squared
            change of the log-probability since sampling); agsm/... of the regularizer.

        Raises:
            ValueError: a step outside 0..T-2, AGSM without images, or images without AGSM.
        """
        self._check_batch(agsm_batch)
        number, batch = len(trajectory.log_probs), len(advantages)
        steps = torch.arange(number - 1) if steps is None else steps.cpu()
        if not len(steps) or int(steps.min()) < 0 or int(steps.max()) >= number - 1:
            raise ValueError(
                f"steps: expected some of 0..{number - 2}, got {steps.tolist()}. The last step of "
                "a trajectory has no noise and no likelihood."
            )
        rows = torch.arange(batch).repeat(len(steps))
        at = steps.repeat_interleave(batch)
        x, following = trajectory.states[at, rows], trajectory.states[at + 1, rows]
        sigma, below = trajectory.sigmas[at], trajectory.sigmas[at + 1]
        text, image = take_rows(conditioning, rows), take_rows(dict(image_conditioning or {}), rows)
        times = sigma * self.scheduler.config.num_train_timesteps
        with self.autocast():
            pred = self.denoiser(x, times, text, bank_of(Bank.POSITIVE, len(x)), **image)
        mean, std = sde_gaussian(pred.to(x), x, sigma, below, self.noise_level)
        log_prob, old = mean_log_prob(following, mean, std), trajectory.log_probs[at, rows]
        loss = clipped_policy_loss(log_prob, old, advantages.to(log_prob)[rows], self.clip)
        gap = (log_prob - old).detach()
        metrics = {"grpo/loss": loss.detach(), "grpo/approx_kl": 0.5 * gap.square().mean()}
        with self.autocast():
            return self._with_agsm(StepOutput(loss, metrics), agsm_batch)
