"""Rows to batches: tables, captioned images and pairs, edited captions, prompts, sheets.

The embedded world is one lazy line (`sources.world`).
"""

import run  # noqa: F401 (says which package is missing)
