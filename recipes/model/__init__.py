"""A diffusers pipeline: loaded, trained, given AGSM, sampled, validated, saved with cards."""

import run  # noqa: F401 (says which package is missing)
