"""Alignment-Guided Score Matching (arXiv 2605.30038) as a loss for any diffusion trainer."""

from agsm_loss import _clone, candidates, functional, schedule
from agsm_loss._random import draws as draws
from agsm_loss.candidates import Candidates, Grid, Hard, InBatch, Mixed, Rule, caption_pool
from agsm_loss.ema import EMA
from agsm_loss.loss import AGSMLoss, SoftREPALoss
from agsm_loss.regularizer import AGSMRegularizer, Denoiser, Passes, StepOutput
from agsm_loss.soft_tokens import Bank, SoftTokens
from agsm_loss.temperature import AdaptiveTemperature

__version__ = "0.1.0"

_clone.find_integrations()

__all__ = [
    "EMA",
    "AGSMLoss",
    "AGSMRegularizer",
    "AdaptiveTemperature",
    "Bank",
    "Candidates",
    "Denoiser",
    "Grid",
    "Hard",
    "InBatch",
    "Mixed",
    "Passes",
    "Rule",
    "SoftREPALoss",
    "SoftTokens",
    "StepOutput",
    "candidates",
    "caption_pool",
    "functional",
    "schedule",
]
