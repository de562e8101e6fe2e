"""SPO, Step-by-step Preference Optimization (arXiv 2406.04314), alone or with AGSM as a term.

A DDIM step with η > 0 draws from a Gaussian. At a state x_t of a rollout, several x_{t−1} are drawn
and a preference model scores them. The best and the worst are a pair, and the loss compares their
likelihoods with the reference's.

>>> import torch
>>> from diffusers import DDIMScheduler
>>> from torch import nn
>>> from agsm_loss import EMA, AGSMLoss, AGSMRegularizer
>>> from agsm_loss.integrations.hosts.spo import SPO, classifier_free_guidance, sample_pairs
>>> from agsm_loss.integrations.hosts.base import AGSMBatch
>>> layer = nn.Linear(4 + 3, 4)
>>> def denoiser(noisy, timesteps, text, bank):  # yours: TokenDenoiser or PlainDenoiser
...     return layer(torch.cat([noisy, text], dim=1))
>>> start = EMA(layer.parameters(), decay=1.0)
>>> agsm = AGSMRegularizer(denoiser, loss=AGSMLoss(guidance_scale=3))
>>> scheduler = DDIMScheduler(steps_offset=1)
>>> step = SPO(denoiser, scheduler, reference=start.applied, agsm=agsm)

A rollout, without gradient; the score is a preference model's:

>>> text, empty = torch.randn(2, 3), torch.zeros(2, 3)
>>> denoise = classifier_free_guidance(denoiser, text, empty, guidance_scale=5.0)
>>> def score(clean, rows, timesteps):
...     return 9 * clean.mean(1)
>>> rollout = sample_pairs(denoise, scheduler, torch.randn(2, 4), score, num_steps=10)

A step on its pairs. SPO has no clean images with noise, so AGSM gets images of its own:

>>> images = AGSMBatch(
...     rollout.last, torch.tensor([10, 900]), torch.randn(2, 4), text, ["a dog", "a cat"],
...     null=empty,
... )
>>> loss, metrics = step(rollout.pairs, text, empty, agsm_batch=images)
>>> loss.backward()  # then optimizer.step() and
>>> step.update_ema()

Take those images from a captioned data set, where its images show what prompts should give. Where
there is none, take the rollout's last states, as here. AGSM treats every image as a match of its
caption, so keep only the best (`best_rows`, by the preference model's scores of the last states).
The captions of the other images may still be negatives.
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
from agsm_loss.integrations.hosts.base import (
    AGSMBatch,
    Host,
    bank_of,
    first_rows_twice,
    mean_log_prob,
    take_rows,
)
from agsm_loss.integrations.noise import clean_and_noise, ddim_sigma, noise_levels, prediction_type


class StatePairs(NamedTuple):
    """M pairs of next states, of any images and steps.

    Attributes:
        noisy: x_t (M, *D).
        winner, loser: the better and the worse x_{t−1} (M, *D) each.
        timesteps, previous: training timesteps of x_t and x_{t−1} (M,) each.
        rows: the image of each pair (M,), as its row of the conditioning.
    """

    noisy: Float[Tensor, "M *D"]
    winner: Float[Tensor, "M *D"]
    loser: Float[Tensor, "M *D"]
    timesteps: Int[Tensor, " M"]
    previous: Int[Tensor, " M"]
    rows: Int[Tensor, " M"]


class Rollout(NamedTuple):
    """A rollout of B images.

    Attributes:
        pairs: those of all its steps.
        last: x_0 at its end, (B, *D).
    """

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

    >>> from diffusers import DDIMScheduler
    >>> x_t, pred = torch.randn(2, 4), torch.randn(2, 4)
    >>> timesteps, previous = torch.tensor([901, 451]), torch.tensor([801, 351])
    >>> mean, std = ddim_gaussian(DDIMScheduler(), pred, x_t, timesteps, previous)
    >>> mean.shape, std.shape
    (torch.Size([2, 4]), torch.Size([2, 1]))

    Args:
        scheduler: a DDPM-like scheduler, for ᾱ and the prediction type.
        pred: the prediction at x_t (N, *D).
        x_t: states (N, *D).
        timesteps, previous: training timesteps of x_t and of x_{t−1}, (N,) each.
        eta: η ≥ 0, the noise as a multiple of DDPM's.
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
    """SPO's loss on M pairs: the mean of −log σ(d), and d of each pair.

    d = β(log r_w − log r_l) with r = clip(p/p_ref, 1 − clip, 1 + clip), of winner w and loser l
    (arXiv 2406.04314). A ratio outside of that range has no gradient.

    >>> ref_log_prob = torch.zeros(2), torch.zeros(2)
    >>> loss, inside = spo_loss((torch.tensor([0.01, 0.5]), torch.zeros(2)), ref_log_prob)
    >>> inside  # the second ratio is clipped: 10 log 1.1
    tensor([0.1000, 0.9531])

    Args:
        log_prob: log p of the winners and of the losers under the model, (M,) each
            (`mean_log_prob`).
        ref_log_prob: the same under the reference; no gradient reaches it.
        beta: β > 0; published: 10.
        clip: in (0, 1); published: 0.1.

    Raises:
        ValueError: beta or clip out of range.
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
    """Columns of the best and the worst of k candidates, and whether they are far enough apart.

    They are where the two entries of softmax([best, worst]) differ by more than the threshold.

    >>> choose_pairs(torch.tensor([[0.0, 2.0, 1.0], [0.1, 0.2, 0.1]]))
    (tensor([1, 1]), tensor([0, 0]), tensor([ True, False]))

    Args:
        scores: of each image's candidates (B, k), larger is better.
        threshold: in [0, 1]; published: 0.3, for scores on the scale of PickScore's logits.
    """
    best, worst = scores.argmax(1), scores.argmin(1)
    ends = torch.stack([scores.amax(1), scores.amin(1)], 1).softmax(1)
    return best, worst, ends[:, 0] - ends[:, 1] > threshold


def check_steps(num_steps: int, first_step: int) -> None:
    """ValueError where none of a rollout's steps collects pairs: the last has no noise."""
    if not 0 <= first_step <= num_steps - 2:
        raise ValueError(
            f"first_step: expected a step of 0..{num_steps - 2}, those with noise of {num_steps} "
            f"sampling steps, got {first_step}: there would be no pairs. Sample in more steps, or "
            "collect pairs from an earlier one on."
        )


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
    """A DDIM rollout of B images that collects pairs at its steps. No gradient.

    Args:
        denoise: x (N, *D), timesteps (N,) and rows (N,) to the prediction (N, *D), usually guided
            (`classifier_free_guidance`). `rows` holds the image of each sample, in 0..B-1.
        scheduler: a DDIM scheduler, for its spacing of the timesteps and ᾱ. Its `set_timesteps` is
            called.
        noise: x_T (B, *D).
        score: the preference model: predicted x_0 (N, *D), rows (N,) and timesteps (N,) to scores
            (N,), larger is better. The timesteps are those of the states that were denoised.
        num_steps: DDIM steps; published: 20.
        num_candidates: states drawn at each step; published: 2 to 4.
        first_step: pairs are collected from this step on; published: 4.
        threshold: of `choose_pairs`; published: 0.3.
        eta: η > 0; published: 1.
        generator: CPU generator of all draws; default: torch's own.

    Raises:
        ValueError: a flow-matching scheduler, η not above 0, fewer than two candidates, no step
            that collects pairs, or scores of another shape or that are not finite.
    """
    if prediction_type(scheduler) == "flow" or not eta > 0 or num_candidates < 2:
        raise ValueError(
            "expected a DDPM-like scheduler, eta > 0 and at least 2 candidates, got "
            f"{type(scheduler).__name__}, {eta} and {num_candidates}."
        )
    check_steps(num_steps, first_step)
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
        if not scores.isfinite().all():
            raise ValueError(
                f"score: expected finite numbers, got {scores[~scores.isfinite()].tolist()[:3]} at "
                f"timestep {before}. They make no pairs: look at the preference model's images."
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
    """A `denoise` for `sample_pairs`, with both branches in one call of the denoiser.

    It returns u + s(c − u), with the predictions c for the prompt and u for the empty prompt, and
    the scale s.

    Args:
        denoiser: as `AGSMRegularizer` calls it (`agsm_loss.Denoiser`).
        conditioning, unconditional: the encoded prompts and empty prompts: tensors, or dicts, lists
            and tuples of them, with a row an image.
        guidance_scale: s; 1 for no guidance.
        bank: the soft tokens of both branches.
        image_conditioning: what belongs to the image (SDXL's time ids): tensors with a row an
            image.
    """
    image = dict(image_conditioning or {})

    def denoise(x: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
        def both(one: Any, other: Any) -> Any:
            return torch.cat([one, other]) if isinstance(one, Tensor) else one

        text = tree_map(both, take_rows(unconditional, rows), take_rows(conditioning, rows))
        images = first_rows_twice(take_rows(image, rows), len(rows))
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
    """SPO's training step: pairs of states to loss and metrics.

    Args:
        denoiser, reference, reference_bank: as in `DiffusionDPO`.
        scheduler: the rollout's.
        beta, clip: of `spo_loss`.
        eta: η of the rollout.
        guidance_scale: that of the rollout, here for the model and for the reference; published: 5.
        agsm: the regularizer on the same denoiser; its `weight` is λ. None, or λ = 0: SPO alone,
            bit for bit.
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
        super().__init__(denoiser, scheduler, agsm)
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
        """One step on M pairs. Without a pair (M = 0) SPO's loss is a constant 0.

        In DDP every process has pairs of its own. One that has no pair and no AGSM makes no
        gradient, and the others would wait for it: run the model once there, with weight 0.

        Args:
            pairs: of `sample_pairs`.
            conditioning, unconditional, image_conditioning: those of the rollout, a row an image;
                `pairs.rows` says which.
            agsm_batch: images for AGSM; required with `agsm`.

        Returns:
            The loss, a scalar, and metrics: spo/pairs (M), spo/loss, spo/accuracy (the share of
            pairs with d > 0) and spo/margin (the mean of d), with d of `spo_loss`; agsm/... of the
            regularizer.

        Raises:
            ValueError: AGSM without images, or images without AGSM.
        """
        self._check_batch(agsm_batch)
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
        return self._with_agsm(StepOutput(loss, metrics), agsm_batch)

    def _log_probs(
        self, denoise: Callable[[Tensor, Tensor, Tensor], Tensor], pairs: StatePairs
    ) -> tuple[Tensor, Tensor]:
        pred = denoise(pairs.noisy, pairs.timesteps, pairs.rows)
        mean, std = ddim_gaussian(
            self.scheduler, pred, pairs.noisy, pairs.timesteps, pairs.previous, self.eta
        )
        return mean_log_prob(pairs.winner, mean, std), mean_log_prob(pairs.loser, mean, std)
