"""Scores of images: rewards, metrics, rollouts that are scored, GenEval's rules."""

import run  # noqa: F401 (says which package is missing)
