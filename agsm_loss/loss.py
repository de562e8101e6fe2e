"""`AGSMLoss` and `SoftREPALoss`: modules that remember their settings; formulas: functional.py."""

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from agsm_loss import _checks
from agsm_loss import functional as AF


class AGSMLoss(nn.Module):
    """Alignment-Guided Score Matching (arXiv 2605.30038): tensors in, a scalar out.

    >>> import torch
    >>> from agsm_loss import AGSMLoss
    >>> pred = torch.zeros(2, 2, 4, 8, 8, requires_grad=True)  # (B, K, *D), column 0 matches
    >>> target = torch.ones(2, 4, 8, 8)
    >>> AGSMLoss(guidance_scale=3)(pred, pred.detach(), target).item()  # nothing to move away from
    1.0

    Give `guidance_scale`, or the published form.

    Args:
        guidance_scale: s ≥ 1, the classifier-free guidance scale to train in. The matching
            caption's target is τ + (1 − 1/s)(p̂_y − p̄), p̄ being the weighted mean of the other
            captions' predictions, and the trained model comes to rest where a sampler with scale s
            would have been. 1 is plain denoising. The other captions are not trained.
        frozen_teacher: with `guidance_scale`, for a teacher that never follows the student (the
            base model): the target is then τ + (s − 1)(p̂_y − p̄).
        pos_scale: γ⁺ ≥ 0 of the published form: the target is τ + γ⁺Δ_y, whose strength
            γ⁺(1 − w_y) falls as the model gets sure. 1 where only `neg_scale` is given. Keep it
            ≤ 1, and γ⁻ too: there the closed loop is bounded for every K (`functional`).
        neg_scale: γ⁻ ≥ 0 of the published form, how far the other captions' targets are moved
            against theirs; 0 by default. Published: 0.1 (SD3), 1 (SD1.5, SDXL), for soft tokens on
            a frozen denoiser. Any value above 0 trains the other captions towards this image, γ⁻Δ
            short of it. That is for ψ⁻ alone: a LoRA or the denoiser's own weights, which all
            captions share, would learn this image for wrong captions.
        temperature: T of the Plackett–Luce weights: a number (published: 0.1), a tensor () or
            (B,), or an `AdaptiveTemperature`, for errors whose gaps are far from 0.1. With
            `guidance_scale` and one competitor it changes nothing.
        reward_weight: A(t), a function of the timesteps (B,) to (B,); None for 1. With it, the
            weights of ε-, v- and x_0-prediction models can be made to agree. The calls then take
            `timesteps`.

    Other names of the same loss, and what each one's value and gradient are, stand in
    `agsm_loss.functional`.
    """

    def __init__(
        self,
        *,
        guidance_scale: float | int | None = None,
        frozen_teacher: bool = False,
        pos_scale: float | int | None = None,
        neg_scale: float | int | None = None,
        temperature: AF.Temperature = 0.1,
        reward_weight: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not callable(temperature):
            _checks.check_temperature("temperature", temperature)
        if reward_weight is not None and not callable(reward_weight):
            raise TypeError(
                "reward_weight: expected a function of the timesteps or None, got "
                f"{type(reward_weight).__name__}. `agsm_loss.functional` takes a tensor (B,)."
            )
        pos, self.neg_scale = AF.scales(guidance_scale, frozen_teacher, pos_scale, neg_scale)
        self.pos_scale = pos if guidance_scale is None else None
        self.guidance_scale = guidance_scale
        self.frozen_teacher = frozen_teacher
        self.temperature = temperature
        self.reward_weight = reward_weight

    def forward(
        self,
        pred: Float[Tensor, "B K *D"],
        ema_pred: Float[Tensor, "B K *D"],
        target: Float[Tensor, "B *D"],
        positives: AF.Positives = None,
        mask: Bool[Tensor, "B K"] | None = None,
        *,
        timesteps: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """The scalar loss; arguments and errors as in `agsm_loss.functional.agsm_loss`.

        `timesteps` (B,) is needed where the module has a `reward_weight`, and refused elsewhere.
        """
        return self.terms(pred, ema_pred, target, positives, mask, timesteps=timesteps).loss

    def terms(
        self,
        pred: Float[Tensor, "B K *D"],
        ema_pred: Float[Tensor, "B K *D"],
        target: Float[Tensor, "B *D"],
        positives: AF.Positives = None,
        mask: Bool[Tensor, "B K"] | None = None,
        *,
        timesteps: Tensor | None = None,
    ) -> AF.AGSMTerms:
        """Every named term and diagnostic; `.loss` is what `forward` returns."""
        _checks.check_predictions(pred, ema_pred, target)
        if torch.is_grad_enabled() and not pred.requires_grad:
            warnings.warn(
                "pred: expected the student's predictions with their graph, got a tensor without "
                "gradient: the loss trains nothing. Leave out .detach() and torch.no_grad().",
                stacklevel=3,
            )
        guidance = self.guide(ema_pred, target, positives, mask, timesteps=timesteps)
        return AF.agsm_terms(pred, guidance)

    def guide(
        self,
        ema_pred: Float[Tensor, "B K *D"],
        target: Float[Tensor, "B *D"],
        positives: AF.Positives = None,
        mask: Bool[Tensor, "B K"] | None = None,
        *,
        timesteps: Tensor | None = None,
    ) -> AF.Guidance:
        """Weights and guided targets alone, for loops that visit the candidates one by one."""
        return AF.guide(
            ema_pred,
            target,
            positives,
            mask,
            guidance_scale=self.guidance_scale,
            frozen_teacher=self.frozen_teacher,
            pos_scale=self.pos_scale,
            neg_scale=self.neg_scale,
            temperature=self.temperature,
            reward_weight=self._reward_weight_at(timesteps),
        )

    def _reward_weight_at(self, timesteps: Tensor | None) -> Tensor | None:
        if self.reward_weight is None:
            if timesteps is not None:
                raise ValueError(
                    "timesteps: this AGSMLoss has no reward_weight function to use them. Construct "
                    "it with reward_weight=A, or leave timesteps out."
                )
            return None
        if timesteps is None:
            raise ValueError(
                "timesteps: expected a tensor (B,), because this AGSMLoss was constructed with a "
                "reward_weight function of them; got None."
            )
        return self.reward_weight(timesteps)

    def extra_repr(self) -> str:
        if self.guidance_scale is None:
            shown = f"pos_scale={self.pos_scale}, neg_scale={self.neg_scale}"
        else:
            shown = f"guidance_scale={self.guidance_scale}"
            shown += ", frozen_teacher=True" if self.frozen_teacher else ""
        if not isinstance(self.temperature, nn.Module):
            shown += f", temperature={self.temperature}"
        return shown


class SoftREPALoss(nn.Module):
    """SoftREPA's contrastive loss (arXiv 2503.08250) over the candidates of each image.

    >>> import torch
    >>> from agsm_loss import SoftREPALoss
    >>> pred, target = torch.zeros(2, 2, 4, 8, 8), torch.ones(2, 4, 8, 8)
    >>> round(SoftREPALoss()(pred, target, positives=torch.arange(2)).item(), 4)  # log 2
    0.6931

    Args:
        logit_scale: s ≥ 0 of the logits s·exp(−e/T).
        temperature: T > 0, in units of mean squared error.
        denoising_weight: weight ≥ 0 of the matching captions' mean error, added to the loss.
    """

    def __init__(
        self,
        *,
        logit_scale: float = 4.0,
        temperature: float = 0.07,
        denoising_weight: float = 0.0,
    ) -> None:
        super().__init__()
        _checks.check_scale("logit_scale", logit_scale)
        _checks.check_temperature("temperature", temperature)
        _checks.check_scale("denoising_weight", denoising_weight)
        self.logit_scale = logit_scale
        self.temperature = temperature
        self.denoising_weight = denoising_weight

    def forward(
        self,
        pred: Float[Tensor, "B K *D"],
        target: Float[Tensor, "B *D"],
        positives: Int[Tensor, " B"] | None = None,
        mask: Bool[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, ""]:
        """The scalar loss; arguments and errors as in `agsm_loss.functional.softrepa_loss`."""
        return AF.softrepa_loss(
            pred,
            target,
            positives,
            mask,
            logit_scale=self.logit_scale,
            temperature=self.temperature,
            denoising_weight=self.denoising_weight,
        )

    def extra_repr(self) -> str:
        return (
            f"logit_scale={self.logit_scale}, temperature={self.temperature}, "
            f"denoising_weight={self.denoising_weight}"
        )
