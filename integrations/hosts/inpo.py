"""InPO (arXiv 2503.18454): Diffusion-DPO at noise found by DDIM inversion, alone or with AGSM.

The model in training inverts each image to x_t, without gradient. The noise that x_t then implies
is the regression target. For ε- and v-prediction.

AGSM gets images at Gaussian noise (`agsm_batch`), or the winners at their inverted noise:

>>> import torch
>>> from diffusers import DDPMScheduler
>>> from torch import nn
>>> from agsm_loss import EMA, AGSMLoss, AGSMRegularizer
>>> from agsm_loss.integrations.hosts.inpo import InPO
>>> from agsm_loss.integrations.hosts.base import AGSMBatch
>>> layer = nn.Linear(4 + 3, 4)
>>> def denoiser(noisy, timesteps, text, bank):  # yours: TokenDenoiser or PlainDenoiser
...     return layer(torch.cat([noisy, text], dim=1))
>>> start = EMA(layer.parameters(), decay=1.0)
>>> agsm = AGSMRegularizer(denoiser, loss=AGSMLoss(guidance_scale=3), weight=1000.0)
>>> step = InPO(denoiser, DDPMScheduler(), reference=start.applied, agsm=agsm)
>>> winner, loser, noise = torch.randn(3, 2, 4)
>>> text = torch.randn(2, 3)
>>> captions, empty = ["a dog", "a cat"], torch.zeros(1, 3)  # the empty caption, encoded
>>> images = AGSMBatch(winner, torch.tensor([10, 900]), noise, text, captions, null=empty)
>>> loss, metrics = step(winner, loser, text, 601, agsm_batch=images)
>>> loss.backward()  # then optimizer.step() and
>>> step.update_ema()

The authors' script takes the last of its ten levels below t for x_t, so that at small t almost no
noise is implied. Here one more step goes from that level to t itself.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from agsm_loss import Bank, Candidates, StepOutput
from agsm_loss.integrations.denoisers import no_grad_pass
from agsm_loss.integrations.hosts.base import AGSMBatch, bank_of, first_rows_twice
from agsm_loss.integrations.hosts.diffusion_dpo import DiffusionDPO
from agsm_loss.integrations.noise import (
    clean_and_noise,
    ddim_sigma,
    noise_levels,
    prediction_type,
    regression_target,
)


def ddim_invert(
    denoise: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    x_0: Float[Tensor, "N *D"],
    timestep: int,
    *,
    num_steps: int = 10,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "N *D"]:
    """x_t of every image by DDIM (arXiv 2010.02502, eq. 12) run backwards.

    It goes from the clean image over the levels 0, T/num_steps, 2T/num_steps, … below t, to t,
    where T is the schedule's length. From level s to s' > s the predicted x_0 and ε are kept:
    x_s' = √ᾱ' x_0 + √(1 − ᾱ') ε.

    >>> from diffusers import DDPMScheduler
    >>> from agsm_loss.integrations.noise import add_noise
    >>> x_0, always = torch.randn(2, 4), torch.randn(2, 4)
    >>> x_t = ddim_invert(lambda x, t: always, DDPMScheduler(), x_0, 250)
    >>> expected = add_noise(DDPMScheduler(), x_0, always, torch.tensor([250, 250]))
    >>> torch.allclose(x_t, expected, atol=1e-5)
    True

    Args:
        denoise: x (N, *D) and timesteps (N,) to the model's prediction (N, *D). The timestep is s',
            as in diffusers' `DDIMInverseScheduler`.
        scheduler: a DDPM-like scheduler, for ᾱ and the prediction type.
        x_0: clean latents (N, *D).
        timestep: t, a training timestep.
        num_steps: levels of the whole schedule; published: 10.
        eta: η ≥ 0. After each step noise of η times DDIM's σ is added; published: 0.1.
        generator: CPU generator of that noise; default: torch's own.

    Raises:
        ValueError: x_0-prediction or a flow, t outside the schedule, num_steps outside 1..T.
    """
    total = int(scheduler.config.num_train_timesteps)
    kind = prediction_type(scheduler)
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"scheduler: expected epsilon or v_prediction, got {kind}: a flow has no DDIM, and "
            "x_0-prediction says nothing of the noise in a clean image. Use DiffusionDPO."
        )
    if not 0 <= timestep < total or not 1 <= num_steps <= total:
        raise ValueError(
            f"expected timestep in 0..{total - 1} and num_steps in 1..{total}, got {timestep} and "
            f"{num_steps}."
        )
    levels = [*range(0, timestep, total // num_steps), timestep]
    x, before = x_0, None
    with no_grad_pass():
        for level in levels:
            times = torch.full((len(x),), level, device=x.device)
            # The model gets the next level's timestep; x is still at the level before.
            pred = denoise(x, times)
            clean, noise = clean_and_noise(scheduler, x, pred, before)
            alpha, sigma = noise_levels(scheduler, times, x)
            x = alpha * clean + sigma * noise
            if eta and before is not None:
                drawn = torch.randn(x.shape, generator=generator).to(x)
                x = x + eta * ddim_sigma(scheduler, times, before, x) * drawn
            before = times
    return x


def implied_noise(
    scheduler: Any, x_0: Float[Tensor, "N *D"], x_t: Float[Tensor, "N *D"], timesteps: Tensor
) -> Float[Tensor, "N *D"]:
    """The ε with which x_0 becomes x_t: (x_t − √ᾱ x_0)/√(1 − ᾱ).

    >>> from diffusers import DDPMScheduler
    >>> from agsm_loss.integrations.noise import add_noise
    >>> x_0, noise, timesteps = torch.randn(2, 4), torch.randn(2, 4), torch.tensor([100, 900])
    >>> x_t = add_noise(DDPMScheduler(), x_0, noise, timesteps)
    >>> found = implied_noise(DDPMScheduler(), x_0, x_t, timesteps)
    >>> torch.allclose(found, noise, atol=1e-5)
    True

    Args:
        scheduler: for ᾱ.
        x_0, x_t: clean and noised latents (N, *D).
        timesteps: t of each (N,).
    """
    alpha, sigma = noise_levels(scheduler, timesteps, x_0)
    return (x_t - alpha * x_0) / sigma


class InPO(DiffusionDPO):
    """InPO's training step: a batch of preference pairs to loss and metrics.

    Args:
        args, kwargs: those of `DiffusionDPO`.
        num_steps, eta, generator: of `ddim_invert`.
    """

    def __init__(
        self,
        *args: Any,
        num_steps: int = 10,
        eta: float = 0.1,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.num_steps = num_steps
        self.eta = eta
        self.generator = generator

    def __call__(  # type: ignore[override]  # there is no noise to give
        self,
        winner: Float[Tensor, "B *D"],
        loser: Float[Tensor, "B *D"],
        conditioning: Any,
        timestep: int,
        *,
        captions: Sequence[Hashable] | Tensor | Candidates | None = None,
        hard_negatives: Sequence[Sequence[Hashable]] | None = None,
        image_ids: Sequence[Hashable] | Tensor | None = None,
        null: Any = None,
        image_conditioning: Mapping[str, Any] | None = None,
        agsm_batch: AGSMBatch | None = None,
    ) -> StepOutput:
        """One step on B pairs at one t, as published.

        Args:
            winner, loser, conditioning, image_conditioning: as in `DiffusionDPO`.
            timestep: t of all pairs, a training timestep.
            captions, hard_negatives, image_ids, null: for AGSM on the winners, at their inverted
                noise.
            agsm_batch: images for AGSM at Gaussian noise instead, e.g. the winners at timesteps of
                their own. This costs one more prediction. Prefer it: sampling starts from Gaussian
                noise, and a model trained with a large λ at inverted noise samples worse.

        Raises:
            ValueError: captions, hard_negatives, image_ids or null with `agsm_batch`, which has its
                own.
        """
        given = (captions, hard_negatives, image_ids, null)
        if agsm_batch is not None and any(one is not None for one in given):
            raise ValueError(
                "agsm_batch: expected it without captions, hard_negatives and image_ids, got both. "
                "Put them into the `AGSMBatch`."
            )
        batch = len(winner)
        both = torch.cat([winner, loser])
        texts = first_rows_twice(conditioning, batch)
        images = first_rows_twice(dict(image_conditioning or {}), batch)
        bank = bank_of(Bank.POSITIVE, 2 * batch)
        noisy = ddim_invert(
            lambda x, t: self.denoiser(x, t, texts, bank, **images),
            self.scheduler,
            both,
            timestep,
            num_steps=self.num_steps,
            eta=self.eta,
            generator=self.generator,
        )
        timesteps = torch.full((2 * batch,), timestep, device=both.device)
        noise = implied_noise(self.scheduler, both, noisy, timesteps)
        return self.compare(
            noisy,
            regression_target(self.scheduler, both, noise, timesteps),
            timesteps[:batch],
            conditioning,
            captions=captions,
            hard_negatives=hard_negatives,
            image_ids=image_ids,
            null=null,
            image_conditioning=image_conditioning,
            agsm_batch=agsm_batch,
        )
