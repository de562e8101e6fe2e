"""InPO (arXiv 2503.18454): Diffusion-DPO at noise that DDIM inversion finds, alone or with AGSM.

    step = InPO(denoiser, scheduler, reference=lambda: adapters_off(unet), agsm=agsm)
    loss, metrics = step(winner, loser, conditioning, timestep, captions=captions)

Each image is carried to x_t by the model being trained, without gradient, and the noise that x_t
then implies is the target. AGSM runs on the winner there, as in `DiffusionDPO`, or on images at
Gaussian noise (`agsm_batch`). For ε- and v-prediction.

The authors' script stops at the last of its ten levels below t and calls that x_t, so that at small
t almost no noise is implied; here a last step goes from that level to t itself.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from agsm_loss import Bank, Candidates, StepOutput
from agsm_loss.integrations.denoisers import no_grad_pass
from agsm_loss.integrations.hosts.diffusion_dpo import DiffusionDPO
from agsm_loss.integrations.hosts.step import AGSMBatch, bank_of, first_rows_twice
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

    From the clean image over the levels 0, N/num_steps, 2N/num_steps, … below t, to t. Between
    levels s < s' the predicted x_0 and ε are kept: x_s' = √ᾱ' x_0 + √(1 − ᾱ') ε.

    Args:
        denoise: x (N, *D) and timesteps (N,) -> the model's prediction. It is asked at s', as
            diffusers' `DDIMInverseScheduler` asks.
        scheduler: a DDPM-like scheduler, for ᾱ and the prediction type.
        x_0: latents.
        timestep: t, a training timestep.
        num_steps: levels of the whole schedule; published: 10.
        eta: η, so many of DDIM's σ are added as noise after each step; published: 0.1.
        generator: of that noise, on the CPU.

    Raises:
        ValueError: another kind of prediction, t outside the schedule, no level.
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
            # The model is asked at the level to come; x is still at the one before.
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
    """The ε with which x_0 becomes x_t: (x_t − √ᾱ x_0)/√(1 − ᾱ)."""
    alpha, sigma = noise_levels(scheduler, timesteps, x_0)
    return (x_t - alpha * x_0) / sigma


class InPO(DiffusionDPO):
    """A batch of preference pairs -> loss and metrics.

    Args: those of `DiffusionDPO`, and
        num_steps, eta: of `ddim_invert`.
        generator: CPU generator of its noise; default: torch's own.
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
        image_conditioning: Mapping[str, Any] | None = None,
        agsm_batch: AGSMBatch | None = None,
    ) -> StepOutput:
        """One step on B pairs at one t, as published; the rest as in `DiffusionDPO`.

        agsm_batch: AGSM's images with Gaussian noise, e.g. the winners at timesteps of their own,
            in place of the winners at their inverted noise. It costs a further pass. Inverted noise
            is not what sampling starts from: a model that a large λ teaches to find it samples
            worse.

        Raises:
            ValueError: captions, hard_negatives or image_ids with `agsm_batch`, which has its own.
        """
        given = (captions, hard_negatives, image_ids)
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
            image_conditioning=image_conditioning,
            agsm_batch=agsm_batch,
        )
