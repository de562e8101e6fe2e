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
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from agsm_loss.integrations.denoisers import no_grad_pass
from agsm_loss.integrations.hosts.dynamics import Dynamics, SDEType, sde_gaussian
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
            released code; give it those of all processes. A group whose rewards hardly differ then
            counts for little.

    Equal rewards have advantage 0 exactly.

    Raises:
        ValueError: groups of fewer than 2, rewards that are not whole groups, or not finite.
    """
    if group < 2 or rewards.ndim != 1 or len(rewards) % group:
        raise ValueError(
            f"expected groups of 2 at least and rewards (B,) in whole groups, got {group} and "
            f"{tuple(rewards.shape)}."
        )
    if not rewards.isfinite().all():
        raise ValueError(
            f"rewards: expected finite numbers, got {rewards[~rewards.isfinite()].tolist()[:3]}. "
            "Look at the reward and its images."
        )
    # Differences to one of them first: the mean of equal numbers is off by a rounding error, which
    # a standard deviation of rounding errors would blow up to 1.
    rewards = rewards.double()
    grouped = rewards.reshape(-1, group)
    within = grouped - grouped[:, :1]
    over = (rewards - rewards[:1])[None] if global_std else within
    spread = over.std(1, unbiased=False, keepdim=True)
    found = ((within - within.mean(1, keepdim=True)) / (spread + 1e-6)).flatten().float()
    if not found.isfinite().all():
        raise ValueError(
            f"rewards: expected numbers whose differences are finite, got {rewards.min():.3g} to "
            f"{rewards.max():.3g}. Scale the reward down."
        )
    return found


@no_grad_pass()
def sample_latents(
    denoise: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Float[Tensor, "B *D"],
    *,
    num_steps: int = 10,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B *D"]:
    """Clean latents x_0 (B, *D), in float32 at least, by the scheduler's own solver.

    Args:
        denoise: x (B, *D) and timesteps (B,) to the prediction (B, *D).
        scheduler: any diffusers scheduler. Its `set_timesteps` is called.
        noise: N(0, 1), (B, *D).
        num_steps: calls of `denoise`, for a solver that calls it once a step; 1 at least.
        mu, sigmas: as in `sample_sde`.
        generator: CPU generator of the draws of a solver that draws; default: torch's own.

    Raises:
        ValueError: mu for a scheduler with a fixed shift.
    """
    _set_timesteps(scheduler, num_steps, noise, mu, sigmas)
    known = inspect.signature(scheduler.step).parameters
    draw = {"generator": generator} if "generator" in known else {}
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        pred = denoise(scale(x, t), t.to(x.device).expand(len(x)))
        x = scheduler.step(pred.to(x), t, x, **draw).prev_sample
    return x


class Trajectory(NamedTuple):
    """A rollout of B images over T steps.

    Attributes:
        states: x at each noise level, (T + 1, B, *D); the last is x_0.
        sigmas: σ of each level, (T + 1,), from 1 to 0.
        log_probs: of each step under the model that sampled (`Dynamics.log_prob`), (T, B); nan for
            the last step, which has no noise.
        dynamics: how it was sampled.
    """

    states: Float[Tensor, "T1 B *D"]
    sigmas: Float[Tensor, " T1"]
    log_probs: Float[Tensor, "T B"]
    dynamics: Dynamics

    @property
    def last(self) -> Tensor:
        """x_0 (B, *D)."""
        return self.states[-1]


@no_grad_pass()
def sample_sde(
    denoise: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Float[Tensor, "B *D"],
    *,
    num_steps: int = 10,
    sde_type: SDEType = "sde",
    noise_level: float | None = None,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
) -> Trajectory:
    """A rollout whose steps have likelihoods. Its last step is Euler's, without noise.

    Args:
        denoise: x (B, *D) and timesteps (B,) in 0..1000 to the prediction v (B, *D).
        scheduler: a flow-matching scheduler, for its σ. Its `set_timesteps` is called.
        noise: x at σ = 1, (B, *D).
        num_steps: T ≥ 2; published: 10 in training.
        sde_type, noise_level: as in `Dynamics.of`.
        mu: the shift, for a scheduler with dynamic shifting. Default: that of Flux's pipeline, by
            the number of 2×2 patches of the latents.
        sigmas: σ of the `num_steps` steps before that shift. Default: the scheduler's own, or
            evenly from 1 to 1/T where its shift is dynamic.
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
    dynamics = Dynamics.of(sde_type, noise_level)
    _set_timesteps(scheduler, num_steps, noise, mu, sigmas)
    levels = scheduler.sigmas.to(noise.device)
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    states, log_probs = [x], []
    for sigma, following in pairwise(levels):
        here, there = sigma.expand(len(x)), following.expand(len(x))
        pred = denoise(x, here * scheduler.config.num_train_timesteps)
        last = following == 0
        if last:
            mean, std = sde_gaussian(pred, x, here, there, noise_level=0.0)
        else:
            mean, std = dynamics.gaussian(pred, x, here, there)
        x = mean + std * torch.randn(x.shape, generator=generator).to(x)
        states.append(x)
        log_probs.append(
            torch.full((len(x),), torch.nan).to(x) if last else dynamics.log_prob(x, mean, std)
        )
    return Trajectory(torch.stack(states), levels, torch.stack(log_probs), dynamics)


def _set_timesteps(
    scheduler: Any, number: int, noise: Tensor, mu: float | None, sigmas: Sequence[float] | None
) -> None:
    config = scheduler.config
    if not config.get("use_dynamic_shifting", False):
        if mu is not None:
            raise ValueError("mu: the scheduler's shift is fixed (use_dynamic_shifting is False).")
        scheduler.set_timesteps(number, **({} if sigmas is None else {"sigmas": sigmas}))
        return
    if mu is None:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        patches = (noise.shape[-2] // 2) * (noise.shape[-1] // 2)
        mu = calculate_shift(patches, *(config[name] for name in names))
    if sigmas is None:
        sigmas = torch.linspace(1, 1 / number, number).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
