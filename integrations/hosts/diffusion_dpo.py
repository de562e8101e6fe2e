"""Diffusion-DPO (arXiv 2311.12908), alone or with AGSM in its step.

    step = DiffusionDPO(denoiser, scheduler, reference=lambda: adapters_off(unet), agsm=agsm)
    loss, metrics = step(winner, loser, conditioning, timesteps, noise, captions=captions)
    loss.backward(); optimizer.step(); step.update_ema()

AGSM (`AGSMRegularizer`, whose `weight` is λ) runs on the winner under its own caption, at the
host's x_t, t and target, and takes the host's own prediction. The negatives are the batch's other
captions, or edited ones. The winner's term trains all that the host trains; the negatives train the
soft tokens (`negatives_train`), and nothing else trains ψ⁻.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from agsm_loss import AGSMRegularizer, Bank, Candidates, Denoiser, StepOutput
from agsm_loss import functional as AF
from agsm_loss.integrations.denoisers import no_grad_pass
from agsm_loss.integrations.hosts.step import (
    AGSMBatch,
    Host,
    agsm_on,
    bank_of,
    first_rows_twice,
)
from agsm_loss.integrations.noise import add_noise, regression_target

LossType = Literal["sigmoid", "hinge", "ipo"]


class PreferenceTerms(NamedTuple):
    """What `diffusion_dpo_loss` makes of B pairs; all but `loss` are detached.

    Attributes:
        loss: mean over the pairs.
        margin: half of how much more the model prefers the winner than the reference does,
            ½((m_l − m_w) − (f_l − f_w)), with m and f the mean squared errors of both.
        accuracy: "implicit accuracy", the share of pairs with a positive margin.
        error: the model's mean squared error over winners and losers.
    """

    loss: Float[Tensor, ""]
    margin: Float[Tensor, " B"]
    accuracy: Float[Tensor, ""]
    error: Float[Tensor, ""]


def diffusion_dpo_loss(
    pred: Float[Tensor, "N *D"],
    ref_pred: Float[Tensor, "N *D"],
    target: Float[Tensor, "N *D"],
    beta: float = 5000.0,
    loss_type: LossType = "sigmoid",
) -> PreferenceTerms:
    """Eq. 14 of arXiv 2311.12908, and its siblings, on B pairs (N = 2B).

    With the margin d of `PreferenceTerms`: sigmoid −log σ(βd), the published one; hinge
    max(0, 1 − βd); IPO (arXiv 2310.12036) (d − 1/(2β))².

    Args:
        pred: the model's predictions, of the B winners and then of their B losers; a pair shares
            its noise and timestep.
        ref_pred: the reference's; no gradient reaches it.
        target: regression targets in the same parametrisation.
        beta: β > 0; published: 5000 for SD1.5 and SDXL.
        loss_type: "sigmoid", "hinge" or "ipo".

    Raises:
        ValueError: shapes that differ, an odd number of rows, β not positive, unknown loss type.
    """
    if not pred.shape == ref_pred.shape == target.shape or pred.ndim < 2 or len(pred) % 2:
        raise ValueError(
            "expected pred, ref_pred and target of one shape (2B, ...), the winners first, got "
            f"{tuple(pred.shape)}, {tuple(ref_pred.shape)} and {tuple(target.shape)}."
        )
    if not beta > 0:
        raise ValueError(f"beta: expected a positive number, got {beta}.")
    if loss_type not in get_args(LossType):
        raise ValueError(f"loss_type: expected one of {get_args(LossType)}, got {loss_type!r}.")
    error = AF.denoising_error(pred.unsqueeze(1), target).squeeze(1)
    ref_error = AF.denoising_error(ref_pred.detach().unsqueeze(1), target).squeeze(1)
    winner, loser = (error - ref_error).chunk(2)
    margin = (loser - winner) / 2
    losses = {
        "sigmoid": lambda: -F.logsigmoid(beta * margin),
        "hinge": lambda: F.relu(1 - beta * margin),
        "ipo": lambda: (margin - 1 / (2 * beta)).square(),
    }[loss_type]()
    accuracy = (margin.detach() > 0).float().mean()
    return PreferenceTerms(losses.mean(), margin.detach(), accuracy, error.detach().mean())


class DiffusionDPO(Host):
    """A batch of preference pairs -> loss and metrics.

    Args:
        denoiser: the student, e.g. `TokenDenoiser`. Its host predictions use ψ⁺, as at inference.
        scheduler: the training scheduler; tells how to noise and what is predicted.
        reference: makes a context in which the denoiser is the reference: `adapters_off` for a LoRA
            (no second model), `EMA(parameters, decay=1.0).applied` for full fine-tuning (a copy of
            what is trained), `contextlib.nullcontext` where tokens alone are trained.
        reference_bank: the tokens of the reference; ψ⁺ where the model was given with its tokens.
        beta, loss_type: of `diffusion_dpo_loss`.
        agsm: AGSM in its step; its own `weight` is λ (number or schedule). None, or λ = 0: the host
            alone, bit for bit. A batch in which no winner has another's caption to compete with
            (one pair) is an error, or, where its candidates allow it (`InBatch(allow_empty=True)`),
            gets the denoising error of the winner.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Any,
        *,
        reference: Callable[[], AbstractContextManager[Any]],
        reference_bank: Bank = Bank.OFF,
        beta: float = 5000.0,
        loss_type: LossType = "sigmoid",
        agsm: AGSMRegularizer | None = None,
    ) -> None:
        super().__init__(agsm)
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.reference = reference
        self.reference_bank = reference_bank
        self.beta = beta
        self.loss_type: LossType = loss_type

    def __call__(
        self,
        winner: Float[Tensor, "B *D"],
        loser: Float[Tensor, "B *D"],
        conditioning: Any,
        timesteps: Tensor,
        noise: Float[Tensor, "B *D"],
        *,
        captions: Sequence[Hashable] | Tensor | Candidates | None = None,
        hard_negatives: Sequence[Sequence[Hashable]] | None = None,
        image_ids: Sequence[Hashable] | Tensor | None = None,
        image_conditioning: Mapping[str, Any] | None = None,
    ) -> StepOutput:
        """One step on B pairs.

        Args:
            winner, loser: latents x_0.
            conditioning: encoded captions, one row a caption; the first B are the pairs' own. More
                than B with `hard_negatives`, or `Candidates` as captions: the rows are the pool's.
            timesteps, noise: t (B,) and ε, shared by both of a pair.
            captions, hard_negatives, image_ids: as AGSM takes them; not read without AGSM.
            image_conditioning: what belongs to the image (SDXL's time ids), B rows.
        """
        both, twice = torch.cat([winner, loser]), torch.cat([noise, noise])
        doubled = torch.cat([timesteps, timesteps])
        noisy = add_noise(self.scheduler, both, twice, doubled)
        target = regression_target(self.scheduler, both, twice, doubled)
        return self.compare(
            noisy,
            target,
            timesteps,
            conditioning,
            captions=captions,
            hard_negatives=hard_negatives,
            image_ids=image_ids,
            image_conditioning=image_conditioning,
        )

    def compare(
        self,
        noisy: Float[Tensor, "N *D"],
        target: Float[Tensor, "N *D"],
        timesteps: Tensor,
        conditioning: Any,
        *,
        image_conditioning: Mapping[str, Any] | None = None,
        agsm_batch: AGSMBatch | None = None,
        **agsm: Any,
    ) -> StepOutput:
        """The step after noising: x_t and targets (2B, *D), the winners first.

        agsm_batch: what AGSM trains on, with its own noise, in place of these winners.
        """
        batch = len(timesteps)
        doubled = torch.cat([timesteps, timesteps])
        image = dict(image_conditioning or {})
        inputs = (noisy, doubled, first_rows_twice(conditioning, batch))
        images = first_rows_twice(image, batch)
        with no_grad_pass(), self.reference():
            ref_pred = self.denoiser(*inputs, bank_of(self.reference_bank, 2 * batch), **images)
        pred = self.denoiser(*inputs, bank_of(Bank.POSITIVE, 2 * batch), **images)
        terms = diffusion_dpo_loss(pred, ref_pred, target, self.beta, self.loss_type)
        loss = terms.loss
        metrics = {
            "dpo/loss": loss.detach(),
            "dpo/margin": terms.margin.mean(),
            "dpo/accuracy": terms.accuracy,
            "dpo/error": terms.error,
        }
        if self.agsm is not None:
            if agsm_batch is not None:
                term = agsm_on(agsm_batch, self.agsm, self.scheduler)
            else:
                term = self.agsm(
                    noisy[:batch],
                    timesteps,
                    target[:batch],
                    conditioning,
                    pred=pred[:batch],
                    image_conditioning=image,
                    **agsm,
                )
            loss, metrics = loss + term.loss, metrics | term.metrics
        return StepOutput(loss, metrics)
