"""SPO, Step-by-step Preference Optimization (arXiv 2406.04314), alone or with AGSM in its step.

    pairs = sample_pairs(denoise, scheduler, noise, score)          # on-policy, no gradient
    loss, metrics = step(pairs, conditioning, unconditional, agsm_batch=agsm_batch)
    loss.backward(); optimizer.step(); step.update_ema()

A DDIM step with η > 0 is a Gaussian. At a state x_t several x_{t−1} are drawn, a preference model
scores them, and the best and the worst become a pair whose likelihoods are compared with the
reference's.

There is no clean image with a known noise in it for AGSM, so it is given its own (`AGSMBatch`):
latents of a captioned data set, where the prompts' pictures are what the model should learn; or
the rollout's last states, where there is no such set, re-noised. AGSM learns whatever it is shown
as a match, so take the best of them (`best_rows`, by the preference model's scores of the final
pictures); the captions of the others may still compete.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
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
from agsm_loss.integrations.noise import clean_and_noise, ddim_sigma, noise_levels, prediction_type


class StatePairs(NamedTuple):
    """M pairs of next states, of any images and steps.

    Attributes:
        noisy: x_t (M, *D).
        winner, loser: x_{t−1} (M, *D).
        timesteps, previous: t and t−1 on the sampling schedule (M,).
        rows: which image each is of, i.e. its row of the conditioning (M,).
    """

    noisy: Float[Tensor, "M *D"]
    winner: Float[Tensor, "M *D"]
    loser: Float[Tensor, "M *D"]
    timesteps: Int[Tensor, " M"]
    previous: Int[Tensor, " M"]
    rows: Int[Tensor, " M"]


class Rollout(NamedTuple):
    """`pairs` of the whole rollout; `last` (B, *D): x_0 of the state that was gone on from."""

    pairs: StatePairs
    last: Float[Tensor, "B *D"]


def ddim_gaussian(
    scheduler: Any,
    pred: Float[Tensor, "N *D"],
    x_t: Float[Tensor, "N *D"],
    timesteps: Int[Tensor, " N"],
    previous: Int[Tensor, " N"],
    eta: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mean (N, *D) and standard deviation (N, 1, …) of the next state x_{t−1}.

    arXiv 2010.02502, eq. 12 and 16.
    """
    alpha_0, sigma_0 = noise_levels(scheduler, previous, x_t)
    std = eta * ddim_sigma(scheduler, timesteps, previous, x_t)
    clean, noise = clean_and_noise(scheduler, x_t, pred, timesteps)
    return alpha_0 * clean + (sigma_0**2 - std**2).clamp(min=0).sqrt() * noise, std


def spo_loss(
    log_prob: tuple[Tensor, Tensor],
    ref_log_prob: tuple[Tensor, Tensor],
    beta: float = 10.0,
    clip: float = 0.1,
) -> tuple[Float[Tensor, ""], Float[Tensor, " M"]]:
    """The mean of −log σ(β(log r_w − log r_l)), and β(log r_w − log r_l) of each pair.

    r = clip(p_θ/p_ref, 1 − clip, 1 + clip): outside of the range a pair has no gradient.

    Args:
        log_prob, ref_log_prob: of winner and loser, (M,) each, under model and reference.
        beta: β; published: 10. clip: published: 0.1.
    """
    if not 0 < clip < 1 or not beta > 0:
        raise ValueError(f"expected beta > 0 and clip in (0, 1), got {beta} and {clip}.")
    winner, loser = (
        (ours - theirs.detach()).exp().clamp(1 - clip, 1 + clip).log()
        for ours, theirs in zip(log_prob, ref_log_prob, strict=True)
    )
    inside = beta * (winner - loser)
    return -F.logsigmoid(inside).mean(), inside


def choose_pairs(
    scores: Float[Tensor, "B k"], threshold: float = 0.3
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"], Bool[Tensor, " B"]]:
    """Best, worst, and whether softmax([best, worst]) differs by more than the threshold.

    The published threshold, 0.3, is for scores on the scale of PickScore's logits.
    """
    best, worst = scores.argmax(1), scores.argmin(1)
    ends = torch.stack([scores.amax(1), scores.amin(1)], 1).softmax(1)
    return best, worst, ends[:, 0] - ends[:, 1] > threshold


@no_grad_pass()
def sample_pairs(
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Float[Tensor, "B *D"],
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    num_steps: int = 20,
    num_candidates: int = 4,
    first_step: int = 4,
    threshold: float = 0.3,
    eta: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollout:
    """A DDIM rollout that collects pairs on its way.

    Args:
        denoise: x (N, *D), timesteps (N,), rows (N,) -> the (guided) prediction; `rows` says
            which image each sample is of.
        scheduler: a DDIM scheduler, for its spacing of the timesteps and ᾱ.
        noise: x_T.
        score: the preference model: predicted x_0 (N, *D), rows (N,), timesteps (N,) -> (N,),
            larger is better. The timesteps are those of the noisy states that were denoised.
        num_steps, first_step, num_candidates, threshold, eta: published: 20 steps, from step 4 on 2
            to 4 candidates, 0.3, η = 1.
        generator: CPU generator of all draws.

    Raises:
        ValueError: a flow-matching scheduler, η not positive, or fewer than two candidates.
    """
    if prediction_type(scheduler) == "flow" or not eta > 0 or num_candidates < 2:
        raise ValueError(
            "expected a DDPM-like scheduler, eta > 0 and at least 2 candidates, got "
            f"{type(scheduler).__name__}, {eta} and {num_candidates}."
        )
    scheduler.set_timesteps(num_steps)
    times = [int(t) for t in scheduler.timesteps]
    batch, found = len(noise), []
    x, rows = noise, torch.arange(batch, device=noise.device)

    def spread(of: Tensor) -> Tensor:
        return of.repeat_interleave(num_candidates, 0)

    def randn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for step, (t, before) in enumerate(pairwise(times)):
        here, there = torch.full_like(rows, t), torch.full_like(rows, before)
        mean, std = ddim_gaussian(scheduler, denoise(x, here, rows), x, here, there, eta)
        if step < first_step:
            x = mean + std * randn(mean)
            continue
        drawn = spread(mean) + spread(std.expand_as(mean)) * randn(spread(mean))
        clean, _ = clean_and_noise(
            scheduler, drawn, denoise(drawn, spread(there), spread(rows)), spread(there)
        )
        scores = score(clean, spread(rows), spread(there))
        if scores.shape != (len(drawn),):
            raise ValueError(
                f"score: expected ({len(drawn)},), one for each state, got {tuple(scores.shape)}."
            )
        best, worst, keep = choose_pairs(scores.float().reshape(batch, -1).to(x.device), threshold)
        states = drawn.unflatten(0, (batch, num_candidates))
        pairs = StatePairs(x, states[rows, best], states[rows, worst], here, there, rows)
        found.append(StatePairs(*(part[keep] for part in pairs)))
        chosen = torch.randint(num_candidates, (batch,), generator=generator).to(x.device)
        x = states[rows, chosen]
    last = torch.full_like(rows, times[-1])
    clean, _ = clean_and_noise(scheduler, x, denoise(x, last, rows), last)
    empty = StatePairs(x[:0], x[:0], x[:0], rows[:0], rows[:0], rows[:0])
    return Rollout(
        StatePairs(*(torch.cat(parts) for parts in zip(empty, *found, strict=True))), clean
    )


def classifier_free_guidance(
    denoiser: Denoiser,
    conditioning: Any,
    unconditional: Any,
    guidance_scale: float,
    bank: Bank = Bank.POSITIVE,
    image_conditioning: Mapping[str, Tensor] | None = None,
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`denoise` with classifier-free guidance, both branches in one call and with the same bank.

    conditioning, unconditional: trees of tensors with a row an image; `image_conditioning` too.
    """
    image = dict(image_conditioning or {})

    def denoise(x: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        def take(tree: Any) -> Any:
            return tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, tree)

        def both(one: Any, other: Any) -> Any:
            return torch.cat([one, other]) if isinstance(one, Tensor) else one

        text = tree_map(both, take(unconditional), take(conditioning))
        images = {name: torch.cat([value[rows]] * 2) for name, value in image.items()}
        pred = denoiser(
            torch.cat([x, x]),
            torch.cat([timesteps, timesteps]),
            text,
            bank_of(bank, 2 * len(x)),
            **images,
        )
        without, with_text = pred.chunk(2)
        return without + guidance_scale * (with_text - without)

    return denoise


class SPO(Host):
    """Pairs of states -> loss and metrics.

    Args:
        denoiser, scheduler, reference, reference_bank, agsm: as of `DiffusionDPO`.
        beta, clip: of `spo_loss`.
        eta: η of the rollout.
        guidance_scale: of the rollout, and of both models here; published: 5.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Any,
        *,
        reference: Callable[[], AbstractContextManager[Any]],
        reference_bank: Bank = Bank.OFF,
        beta: float = 10.0,
        clip: float = 0.1,
        eta: float = 1.0,
        guidance_scale: float = 5.0,
        agsm: AGSMRegularizer | None = None,
    ) -> None:
        super().__init__(agsm)
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.reference = reference
        self.reference_bank = reference_bank
        self.beta = beta
        self.clip = clip
        self.eta = eta
        self.guidance_scale = guidance_scale

    def __call__(
        self,
        pairs: StatePairs,
        conditioning: Any,
        unconditional: Any,
        *,
        image_conditioning: Mapping[str, Tensor] | None = None,
        agsm_batch: AGSMBatch | None = None,
    ) -> StepOutput:
        """One step. Without a pair (nothing passed the threshold) SPO's loss is a constant 0.

        Where DDP's processes find pairs for themselves, one without any and without AGSM has run
        nothing with a gradient, and the others wait for it: call the model once (`train_spo.py`).

        Args:
            pairs: of `sample_pairs`.
            conditioning, unconditional: the rollout's encoded prompts and empty prompts, a row an
                image, which `pairs.rows` points into; `image_conditioning` too.
            agsm_batch: what AGSM trains on; needed where `agsm` was given.
        """
        if (agsm_batch is None) != (self.agsm is None):
            raise ValueError("agsm_batch: expected it with agsm, and only then.")
        loss, metrics = pairs.noisy.new_zeros((), dtype=torch.float32), {}
        metrics["spo/pairs"] = torch.tensor(float(len(pairs.noisy)))
        if len(pairs.noisy):
            given = (conditioning, unconditional, self.guidance_scale)
            with no_grad_pass(), self.reference():
                ref = self._log_probs(
                    classifier_free_guidance(
                        self.denoiser, *given, self.reference_bank, image_conditioning
                    ),
                    pairs,
                )
            ours = self._log_probs(
                classifier_free_guidance(self.denoiser, *given, Bank.POSITIVE, image_conditioning),
                pairs,
            )
            loss, inside = spo_loss(ours, ref, self.beta, self.clip)
            metrics["spo/loss"] = loss.detach()
            metrics["spo/accuracy"] = (inside.detach() > 0).float().mean()
            metrics["spo/margin"] = inside.detach().mean()
        if self.agsm is not None and agsm_batch is not None:
            term = agsm_on(agsm_batch, self.agsm, self.scheduler)
            loss, metrics = loss + term.loss, metrics | term.metrics
        return StepOutput(loss, metrics)

    def _log_probs(
        self, denoise: Callable[[Tensor, Tensor, Tensor], Tensor], pairs: StatePairs
    ) -> tuple[Tensor, Tensor]:
        pred = denoise(pairs.noisy, pairs.timesteps, pairs.rows)
        mean, std = ddim_gaussian(
            self.scheduler, pred, pairs.noisy, pairs.timesteps, pairs.previous, self.eta
        )
        return mean_log_prob(pairs.winner, mean, std), mean_log_prob(pairs.loser, mean, std)
