"""Verdicts -> scores with 95 % intervals, and a table of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, sem, t  # type: ignore[import-untyped]

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


def mean_with_interval(
    values: Sequence[float] | npt.NDArray[np.floating], rows: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Mean of a metric's values, one an image, with a t interval over the prompts' means.

    rows: each image's; images of a prompt are alike. A single prompt has no interval.
    """
    by_prompt: dict[str, list[float]] = {}
    for value, row in zip(values, rows, strict=True):
        by_prompt.setdefault(row["prompt"], []).append(float(value))
    means = np.array([np.mean(group) for group in by_prompt.values()])
    found = {"score": float(means.mean())}
    if len(means) > 1:
        reach = float(sem(means) * t.ppf(0.975, len(means) - 1))
        found |= {"low": found["score"] - reach, "high": found["score"] + reach}
    return found


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: one row a folder, one column a category or metric, intervals in brackets.

    summaries: of `summarize_with_intervals`, or nothing of it, and `metrics` by name.
    """
    rows = {name: _columns(summary) for name, summary in summaries.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [
        "| | " + " | ".join(column.replace("_", " ") for column in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(row.get(column, "") for column in columns) + " |")
    return "\n".join(lines)


def _columns(summary: Mapping[str, Any]) -> dict[str, str]:
    """A row's cells by their column."""
    found = {"overall": _cell(summary["overall"], summary)} if "overall" in summary else {}
    categories = summary.get("categories", {})
    for tag in [*TAGS, *(tag for tag in categories if tag not in TAGS)]:
        if tag in categories:
            found[tag] = _cell(categories[tag]["score"], categories[tag])
    for name, metric in summary.get("metrics", {}).items():
        found[name] = _cell(metric["score"], metric)
    return found


def _cell(score: float, interval: Mapping[str, float]) -> str:
    digits = 3 if abs(score) < 10 else 2
    if "low" not in interval:
        return f"{score:.{digits}f}"
    return f"{score:.{digits}f} [{interval['low']:.{digits}f}, {interval['high']:.{digits}f}]"
