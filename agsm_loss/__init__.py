"""Alignment-Guided Score Matching (arXiv 2605.30038) as a loss that any diffusion trainer can add."""

from agsm_loss import candidates, functional, schedule
from agsm_loss.candidates import (
    Candidates,
    caption_pool,
    grid_candidates,
    hard_candidates,
    in_batch_candidates,
    mixed_candidates,
)
from agsm_loss.ema import EMA
from agsm_loss.loss import AGSMLoss, SoftREPALoss
from agsm_loss.regularizer import AGSMRegularizer, Denoiser, RegularizerOutput
from agsm_loss.soft_tokens import Bank, SoftTokens
from agsm_loss.temperature import AdaptiveTemperature

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "AGSMLoss",
    "AGSMRegularizer",
    "AdaptiveTemperature",
    "Bank",
    "Candidates",
    "Denoiser",
    "RegularizerOutput",
    "SoftREPALoss",
    "SoftTokens",
    "candidates",
    "caption_pool",
    "functional",
    "grid_candidates",
    "hard_candidates",
    "in_batch_candidates",
    "mixed_candidates",
    "schedule",
]
