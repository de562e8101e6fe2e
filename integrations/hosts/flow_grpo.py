"""Flow-GRPO (arXiv 2505.05470): reward-driven training of flow-matching models, alone or with AGSM.

    trajectory = sample_sde(denoise, scheduler, noise, num_steps=10)     # no gradient
    advantages = group_advantages(reward(trajectory.last), group)
    loss, metrics = step(trajectory, advantages, conditioning, agsm_batch=agsm_batch)
    loss.backward(); optimizer.step(); step.update_ema()

A flow's sampler is an ODE and has no likelihoods; the SDE with the same marginals has. AGSM needs
of such a loop what `trl_ddpo` names: the loss, a call after the optimizer's step, and clean images.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map

from agsm_loss import AGSMRegularizer, Bank, Denoiser, StepOutput
from agsm_loss.integrations.denoisers import no_grad_pass
from agsm_loss.integrations.hosts.step import (
    AGSMBatch,
    Host,
    agsm_on,
    bank_of,
    mean_log_prob,
)
from agsm_loss.integrations.noise import prediction_type


class Trajectory(NamedTuple):
    """A rollout of B images over T steps.

    Attributes:
        states: x at each noise level, (T + 1, B, *D); the last is x_0.
        sigmas: σ of each, (T + 1,), from 1 to 0.
        log_probs: of each step under the model that sampled (T, B); nan for the last step.
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

    Args:
        pred: v = ε − x_0.
        sigma, following: σ and the smaller σ' of the next state.
        noise_level: a; published: 0.7.
        largest: σ in s is held below it, since s has no bound at σ = 1.

    Both are float32 at least: bfloat16 would round the step and its log-probability away.
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
    """A rollout of the SDE; its last step is Euler's, so that the picture is without noise.

    Args:
        denoise: x (B, *D), timesteps (B,) -> v.
        scheduler: a flow-matching scheduler, for its σ's.
        mu: the shift of a scheduler with dynamic shifting; by default as in Flux's pipeline, by the
            number of 2x2 patches.
        generator: CPU generator of all draws.

    Raises:
        ValueError: another scheduler, fewer than two steps, a noise level not above 0, or mu for a
            fixed shift.
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
    """Rewards of each `group` images of one prompt, in consecutive rows, standardised (GRPO)."""
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
    """PPO's: the mean of max(−A·r, −A·clip(r, 1 − clip, 1 + clip)), r = p/p_old."""
    ratio = (log_prob - old).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()


class FlowGRPO(Host):
    """A trajectory and its advantages -> loss and metrics.

    Args:
        denoiser, agsm: as of `DiffusionDPO`.
        scheduler: the flow-matching scheduler.
        noise_level: of the rollout.
        clip: of the likelihood ratios.
        autocast: around the forward passes.
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
        super().__init__(agsm)
        self.denoiser = denoiser
        self.scheduler = scheduler
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
        """The loss over these steps of the trajectory, by default all but the last.

        conditioning, image_conditioning: a row an image. agsm_batch: what AGSM trains on; needed
        where `agsm` was given.
        """
        if (agsm_batch is None) != (self.agsm is None):
            raise ValueError("agsm_batch: expected it with agsm, and only then.")
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
        text = tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, conditioning)
        image = {name: value[rows] for name, value in (image_conditioning or {}).items()}
        times = sigma * self.scheduler.config.num_train_timesteps
        with self.autocast():
            pred = self.denoiser(x, times, text, bank_of(Bank.POSITIVE, len(x)), **image)
        mean, std = sde_gaussian(pred.to(x), x, sigma, below, self.noise_level)
        log_prob, old = mean_log_prob(following, mean, std), trajectory.log_probs[at, rows]
        loss = clipped_policy_loss(log_prob, old, advantages.to(log_prob)[rows], self.clip)
        gap = (log_prob - old).detach()
        metrics = {"grpo/loss": loss.detach(), "grpo/approx_kl": 0.5 * gap.square().mean()}
        if self.agsm is not None and agsm_batch is not None:
            with self.autocast():
                term = agsm_on(agsm_batch, self.agsm, self.scheduler)
            loss, metrics = loss + term.loss, metrics | term.metrics
        return StepOutput(loss, metrics)
