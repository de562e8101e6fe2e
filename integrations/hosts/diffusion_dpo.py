"""Diffusion-DPO (arXiv 2311.12908), alone or with AGSM as a term.

Trains on pairs of images of one caption, of which people preferred the winner to the loser. AGSM
runs on the winner under its own caption, at the host's x_t, t and target, and uses the host's own
prediction. The captions that compete are the AGSMRegularizer's to choose.

All of the model is trained here; its reference is a copy of how it began:

>>> import torch
>>> from diffusers import DDPMScheduler
>>> from torch import nn
>>> from agsm_loss import EMA, AGSMLoss, AGSMRegularizer
>>> from agsm_loss.integrations.hosts.diffusion_dpo import DiffusionDPO
>>> layer = nn.Linear(4 + 3, 4)
>>> def denoiser(noisy, timesteps, text, bank):  # yours: TokenDenoiser or PlainDenoiser
...     return layer(torch.cat([noisy, text], dim=1))
>>> start = EMA(layer.parameters(), decay=1.0)
>>> agsm = AGSMRegularizer(denoiser, loss=AGSMLoss(guidance_scale=3), weight=10000.0)
>>> step = DiffusionDPO(denoiser, DDPMScheduler(), reference=start.applied, agsm=agsm)
>>> winner, loser, noise = torch.randn(3, 2, 4)
>>> text, timesteps = torch.randn(2, 3), torch.tensor([10, 900])
>>> captions, empty = ["a dog", "a cat"], torch.zeros(1, 3)  # the empty caption, encoded
>>> loss, metrics = step(winner, loser, text, timesteps, noise, captions=captions, null=empty)
>>> loss.backward()  # then optimizer.step() and
>>> step.update_ema()
>>> metrics["dpo/loss"]  # log 2: the model is still its reference
tensor(0.6931)

For a LoRA on a diffusers model, `reference=lambda: adapters_off(unet)` (of `step`).
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
from agsm_loss.integrations.hosts.base import (
    AGSMBatch,
    Host,
    added,
    bank_of,
    first_rows_twice,
)
from agsm_loss.integrations.noise import add_noise, regression_target

LossType = Literal["sigmoid", "hinge", "ipo"]


class PreferenceTerms(NamedTuple):
    """The result of `diffusion_dpo_loss` for B pairs; all but `loss` are detached.

    With m and f the mean squared errors of the model and of the reference, on winner w and loser l:

    Attributes:
        loss: mean over the pairs, a scalar.
        margin: d = ½((m_l − m_w) − (f_l − f_w)), (B,): above 0 where the model prefers the winner
            more than the reference does.
        accuracy: "implicit accuracy", the share of pairs with a margin above 0, a scalar.
        error: the mean of m over winners and losers, a scalar.
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
    """Diffusion-DPO's loss on B pairs (N = 2B): eq. 14 of arXiv 2311.12908, and two others.

    With the margin d of `PreferenceTerms`, the mean over the pairs of: sigmoid −log σ(βd), the
    published loss; hinge max(0, 1 − βd); IPO (arXiv 2310.12036) (d − 1/(2β))².

    >>> target = torch.zeros(2, 4)
    >>> pred = torch.stack([torch.full((4,), 0.1), torch.full((4,), 0.3)])  # winner, loser
    >>> ref_pred = torch.full((2, 4), 0.2)
    >>> loss, margin, accuracy, error = diffusion_dpo_loss(pred, ref_pred, target, beta=10.0)
    >>> margin, loss
    (tensor([0.0400]), tensor(0.5130))

    Args:
        pred: the model's predictions (2B, *D), the B winners first, then their B losers. A pair
            shares its noise and timestep.
        ref_pred: the reference's predictions (2B, *D); no gradient reaches them.
        target: regression targets (2B, *D) in the same parametrisation.
        beta: β > 0; published: 5000 for SD1.5 and SDXL.
        loss_type: "sigmoid", "hinge" or "ipo".

    Raises:
        ValueError: shapes that differ, an odd number of rows, β not above 0, unknown loss type.
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
    """Diffusion-DPO's training step: a batch of preference pairs to loss and metrics.

    Args:
        denoiser: the model in training, e.g. `TokenDenoiser`. DPO's predictions use ψ⁺, as sampling
            does.
        scheduler: the training scheduler, for the noise levels and what is predicted.
        reference: returns a context in which the denoiser is the reference: `adapters_off` for a
            LoRA (no second model), `EMA(denoiser, decay=1.0).applied` for full fine-tuning (a
            copy of what is trained), `contextlib.nullcontext` where tokens alone are trained.
        reference_bank: the reference's tokens: none, or ψ⁺ where the model began with its tokens.
        beta, loss_type: of `diffusion_dpo_loss`.
        agsm: the regularizer on the same denoiser; its `weight` is λ, a number or a schedule. None,
            or λ = 0: DPO alone, bit for bit. With soft tokens and γ⁻ > 0 the winner's own caption
            trains everything that DPO trains, and the negatives train the soft tokens only
            (`negatives_train`). A batch of one pair has no negatives, which is an error; with
            `InBatch(allow_empty=True)` AGSM is then the winner's denoising error.
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
        super().__init__(denoiser, scheduler, agsm)
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
        null: Any = None,
        image_conditioning: Mapping[str, Any] | None = None,
    ) -> StepOutput:
        """One step on B pairs.

        Args:
            winner, loser: clean latents x_0, (B, *D) each.
            conditioning: the encoded captions: a tensor, or dicts, lists and tuples of tensors,
                with one row a caption. The first B are the pairs' own; those of `hard_negatives`
                follow, image by image.
            timesteps: t (B,) of each pair, as the scheduler counts them.
            noise: ε (B, *D) of each pair.
            captions, hard_negatives, image_ids, null: as `AGSMRegularizer` takes them; not read
                without AGSM.
            image_conditioning: what belongs to the image (SDXL's time ids): tensors with B rows.

        Returns:
            The loss, a scalar, and metrics: dpo/loss, dpo/margin (the mean), dpo/accuracy and
            dpo/error of `PreferenceTerms`; agsm/... of the regularizer.
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
            null=null,
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
        """The step on pairs that are noised already.

        Args:
            noisy, target: x_t and regression targets (2B, *D), the winners first.
            timesteps: t (B,).
            conditioning, image_conditioning: as in a call.
            agsm_batch: images for AGSM, with their own noise, in place of the winners.
            agsm: captions, hard_negatives, image_ids and null of the winners.
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
        host = StepOutput(
            terms.loss,
            {
                "dpo/loss": terms.loss.detach(),
                "dpo/margin": terms.margin.mean(),
                "dpo/accuracy": terms.accuracy,
                "dpo/error": terms.error,
            },
        )
        if self.agsm is None or agsm_batch is not None:
            return self._with_agsm(host, agsm_batch)
        term = self.agsm(
            noisy[:batch],
            timesteps,
            target[:batch],
            conditioning,
            pred=pred[:batch],
            image_conditioning=image,
            **agsm,
        )
        return added(host, term)
