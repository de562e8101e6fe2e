"""Flow-GRPO (arXiv 2505.05470) for flow-matching models, alone or with AGSM as a term.

Reward-driven training: images of each prompt are sampled as a group, and steps of their rollouts
become likelier where their reward is above the group's mean. A flow's sampler is an ODE and has no
likelihoods; one that draws noise (`rollouts.sample_sde`) has.

>>> import torch
>>> from diffusers import FlowMatchEulerDiscreteScheduler
>>> from torch import nn
>>> from agsm_loss import AGSMLoss, AGSMRegularizer, Bank
>>> from agsm_loss.integrations.hosts.base import AGSMBatch
>>> from agsm_loss.integrations.hosts.flow_grpo import FlowGRPO
>>> from agsm_loss.integrations.hosts.rollouts import group_advantages, sample_sde
>>> layer = nn.Linear(4 + 3, 4)
>>> def denoiser(noisy, timesteps, text, bank):  # yours: TokenDenoiser or PlainDenoiser
...     return layer(torch.cat([noisy, text], dim=1))
>>> agsm = AGSMRegularizer(denoiser, loss=AGSMLoss(guidance_scale=3))
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
...     torch.randn(2, 3), ["a dog", "a cat"], null=torch.zeros(1, 3),  # the empty caption
... )
>>> loss, metrics = step(trajectory, advantages, text, agsm_batch=images)
>>> loss.backward()  # then optimizer.step() and
>>> step.update_ema()
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from agsm_loss import AGSMRegularizer, Bank, Denoiser, StepOutput
from agsm_loss.integrations.denoisers import no_grad_pass
from agsm_loss.integrations.hosts.base import AGSMBatch, Host, bank_of
from agsm_loss.integrations.hosts.rollouts import Trajectory


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
        clip: of `clipped_policy_loss`.
        reference: as in `DiffusionDPO`; required where `kl_weight` is not 0.
        reference_bank: the reference's tokens: none, or ψ⁺ where the model began with its tokens.
        kl_weight: weight of the steps' KL divergence to the reference (`Dynamics.kl`). Published:
            0.04 and 0.01 for the SDE, 0 for Flow-CPS; 0: the reference is not run.
        agsm: the regularizer on the same denoiser; its `weight` is λ. None, or λ = 0: Flow-GRPO
            alone, bit for bit.
        autocast: returns a context for the forward passes, e.g. `accelerator.autocast`.

    Raises:
        ValueError: kl_weight below 0, or not 0 without a reference.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Any,
        *,
        clip: float = 1e-4,
        reference: Callable[[], AbstractContextManager[Any]] | None = None,
        reference_bank: Bank = Bank.OFF,
        kl_weight: float = 0.0,
        agsm: AGSMRegularizer | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(denoiser, scheduler, agsm)
        if kl_weight < 0 or (kl_weight and reference is None):
            raise ValueError(
                "expected kl_weight of 0 at least, and a reference where it is not 0, got "
                f"{kl_weight} and {reference}."
            )
        self.clip = clip
        self.reference = reference
        self.reference_bank = reference_bank
        self.kl_weight = kl_weight
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
            steps: which of the T steps (n,), in 0..T-2; default: all of these. Each is a call of
                the denoiser.
            image_conditioning: what belongs to the image (Flux's guidance): tensors with B rows.
            agsm_batch: images for AGSM; required with `agsm`.

        Returns:
            The loss, a scalar, and metrics: grpo/loss, grpo/approx_kl (half the mean squared
            change of the log-probability since sampling), kl (to the reference, unweighted; where
            it is run); agsm/... of the regularizer.

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
        levels = self.scheduler.config.num_train_timesteps
        image = dict(image_conditioning or {})

        def predicted(bank: Bank) -> Tensor:
            """A step a call, as it was sampled: in half precision the batch's size has a say."""
            parts = [
                self.denoiser(
                    trajectory.states[step],
                    trajectory.sigmas[step].expand(batch) * levels,
                    conditioning,
                    bank_of(bank, batch),
                    **image,
                )
                for step in steps.tolist()
            ]
            return torch.cat(parts).to(x)

        with self.autocast():
            pred = predicted(Bank.POSITIVE)
        dynamics = trajectory.dynamics
        mean, std = dynamics.gaussian(pred, x, sigma, below)
        log_prob = dynamics.log_prob(following, mean, std)
        old = trajectory.log_probs[at, rows]
        loss = clipped_policy_loss(log_prob, old, advantages.to(log_prob)[rows], self.clip)
        gap = (log_prob - old).detach()
        metrics = {"grpo/loss": loss.detach(), "grpo/approx_kl": 0.5 * gap.square().mean()}
        if self.reference is not None and self.kl_weight:
            with no_grad_pass(), self.reference(), self.autocast():
                ref = predicted(self.reference_bank)
            ref_mean, _ = dynamics.gaussian(ref, x, sigma, below)
            kl = dynamics.kl(mean, ref_mean, std)
            loss = loss + self.kl_weight * kl
            metrics["kl"] = kl.detach()
        with self.autocast():
            return self._with_agsm(StepOutput(loss, metrics), agsm_batch)
