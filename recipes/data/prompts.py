"""Prompts to sample, from a file or from the embedded world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.sources import world


def read_prompts(source: str) -> list[dict[str, Any]]:
    """A row with a "prompt" each: of a GenEval jsonl, or of a text file with one a line.

    `world:FOLD:PER_CATEGORY` names prompts of the embedded world.

    Raises:
        FileNotFoundError, ValueError: no such file, or a row of it without a prompt.
    """
    if source.startswith("world:"):
        found: list[dict[str, Any]] = world("task").read_prompts(source)
        return found
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"prompts: no file {source!r}")
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return [{"prompt": line.strip()} for line in lines]
    found = [json.loads(line) for line in lines]
    if any("prompt" not in row for row in found):
        raise ValueError(f"{source}: expected a prompt in every row")
    return found
