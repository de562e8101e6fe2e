"""Verdicts -> scores with 95 % intervals, and a table of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import binomtest

from world.scene import TAGS
from world.score import Verdict, summarize


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson's score interval)."""
    interval = binomtest(right, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def summarize_with_intervals(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """`world.score.summarize`, with `low` and `high` of every category and of the overall score.

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
    """A Markdown table: one row a method, one column a category, intervals in brackets."""
    first = next(iter(summaries.values()))
    tags = [tag for tag in TAGS if tag in first["categories"]]
    lines = [
        "| | overall | " + " | ".join(tag.replace("_", " ") for tag in tags) + " |",
        "| --- |" + " --- |" * (len(tags) + 1),
    ]
    for name, summary in summaries.items():
        cells = [_cell(summary["overall"], summary)]
        cells += [
            _cell(summary["categories"][tag]["score"], summary["categories"][tag]) for tag in tags
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(score: float, interval: Mapping[str, float]) -> str:
    return f"{score:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
