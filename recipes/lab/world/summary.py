"""Verdicts -> scores with 95 % intervals, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import binomtest  # type: ignore[import-untyped]

from lab.world.scene import TAGS
from lab.world.score import Verdict, summarize


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval)."""
    interval = binomtest(right, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def summarize_with_intervals(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """`summarize`, with `low` and `high` of every category and of the overall score.

    The overall score is a mean of independent shares; its interval puts their Wilson intervals
    together by squares (Newcombe 1998, "square and add").
    """
    summary = summarize(verdicts)
    below = above = 0.0
    for category in summary["categories"].values():
        score = category["score"]
        low, high = wilson(round(score * category["n"]), category["n"])
        category["low"], category["high"] = low, high
        below, above = below + (score - low) ** 2, above + (high - score) ** 2
    number = len(summary["categories"])
    summary["low"] = summary["overall"] - below**0.5 / number
    summary["high"] = summary["overall"] + above**0.5 / number
    return summary


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: one row a folder, one column a category or metric, intervals in brackets.

    summaries: of `summarize_with_intervals`, or nothing of it, and `metrics` by name.
    """
    found = {name: _columns(summary) for name, summary in summaries.items()}
    columns = list(dict.fromkeys(column for row in found.values() for column in row))
    rows = [[name, *(row.get(column, "") for column in columns)] for name, row in found.items()]
    return markdown_table(["", *columns], rows)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Heads and rows as Markdown; nothing if there are no rows. Tags are heads as they are."""
    if not rows:
        return ""
    lines = [[head.replace("_", " ") for head in heads], ["---"] * len(heads), *rows]
    cells = [[f" {plain(cell)} " if cell else " " for cell in line] for line in lines]
    return "\n".join(f"|{'|'.join(line)}|" for line in cells)


def plain(text: str) -> str:
    """For Markdown's text and table cells: no HTML, no other column, no other line."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "&#124;")


def _columns(summary: Mapping[str, Any]) -> dict[str, str]:
    """A row's cells by their column."""
    found = {"overall": _cell(summary["overall"], summary)} if "overall" in summary else {}
    categories = summary.get("categories", {})
    for tag in [*TAGS, *(tag for tag in categories if tag not in TAGS)]:
        if tag in categories:
            found[tag] = _cell(categories[tag]["score"], categories[tag])
    for name, metric in summary.get("metrics", {}).items():
        size = abs(metric["score"])
        digits = 3 if size < 1e-6 else max(0, min(6, 3 - math.floor(math.log10(size))))
        found[name] = _cell(metric["score"], metric, digits)
    return found


def _cell(score: float, interval: Mapping[str, float], digits: int = 3) -> str:
    if "low" not in interval:
        return f"{score:.{digits}f}"
    return f"{score:.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"
