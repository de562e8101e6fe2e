"""`AGSMLoss` and `SoftREPALoss`: modules that remember their settings; formulas: functional.py."""

from collections.abc import Callable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from agsm_loss import _checks
from agsm_loss import functional as AF


class AGSMLoss(nn.Module):
    """Alignment-Guided Score Matching (arXiv 2605.30038): tensors in, a scalar out.

    >>> import torch
    >>> from agsm_loss import AGSMLoss
    >>> pred = torch.zeros(2, 3, 4, 8, 8, requires_grad=True)  # (B, K, *D), column 0 matches
    >>> ema_pred, target = torch.zeros(2, 3, 4, 8, 8), torch.ones(2, 4, 8, 8)
    >>> loss = AGSMLoss(neg_scale=0.1)(pred, ema_pred, target)
    >>> loss.item()  # equal predictions guide nowhere: plain score matching, once a term
    2.0

    Args:
        pos_scale: γ⁺ ≥ 0, how far the matching caption's target is moved along its guidance.
        neg_scale: γ⁻ ≥ 0, how far the other captions' targets are moved against theirs. Choose it
            by what is trained:
            0 for a LoRA or the denoiser's own weights;
            0.1 (SD3) or 1 (SD1.5, SDXL), as published, for soft tokens on a frozen denoiser.
            The reason: 0 drops the negative term, and any γ⁻ above it brings the whole of it. The
            other captions are then trained towards this image, γ⁻Δ short of it. That is for ψ⁻
            alone; weights that all captions share would learn this image for wrong captions.
        temperature: T of the Plackett–Luce weights: a number (published: 0.1), a tensor () or
            (B,), or an `AdaptiveTemperature`, for errors whose gaps are far from 0.1.
        reward_weight: A(t), a function of the timesteps (B,) to (B,); None for 1. With it, the
            weights of ε-, v- and x_0-prediction models can be made to agree. The calls then take
            `timesteps`.

    Keep γ⁺ ≤ 1 and γ⁻ ≤ 1: there the closed loop of student and EMA is bounded for every K
    (`agsm_loss.functional`).
    """

    def __init__(
        self,
        *,
        pos_scale: float | int = 1.0,
        neg_scale: float | int,
        temperature: AF.Temperature = 0.1,
        reward_weight: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        _checks.check_scale("pos_scale", pos_scale)
        _checks.check_scale("neg_scale", neg_scale)
        if not callable(temperature):
            _checks.check_temperature("temperature", temperature)
        if reward_weight is not None and not callable(reward_weight):
            raise TypeError(
                "reward_weight: expected a function of the timesteps or None, got "
                f"{type(reward_weight).__name__}. `agsm_loss.functional` takes a tensor (B,)."
            )
        self.pos_scale = pos_scale
        self.neg_scale = neg_scale
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
        shown = f"pos_scale={self.pos_scale}, neg_scale={self.neg_scale}"
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
