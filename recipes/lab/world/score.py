"""GenEval's verdict on an image, with the reason for a wrong one.

Rules follow GenEval's evaluator (arXiv 2310.11513): a row's `include` entries ask for at least
`count` objects of a class, of a colour and in a place if they name them; its `exclude` entries
forbid `count` or more. The overall score is the mean of the categories' scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rewards.geneval.rules import relations

from .detect import Detection, detect, in_corner

REASONS = ("missing", "wrong_colour", "wrong_place", "extra")


@dataclass(frozen=True)
class Verdict:
    """`reason` is None where the image is right; counts are over the classes the row includes.

    `found` is None where the evaluator didn't say. `cornered`: whether the image shows all that it
    does in the lower left; None where nobody asked.
    """

    tag: str
    correct: bool
    reason: str | None
    expected: int
    found: int | None
    cornered: bool | None = None


def _reason(found: Sequence[Detection], row: Mapping[str, Any]) -> str | None:
    """The first of REASONS that applies, or None."""
    matched: list[list[Detection]] = []
    failed: set[str] = set()
    for wanted in row["include"]:
        objects = [one for one in found if one.shape == wanted["class"]]
        if len(objects) < wanted["count"]:
            failed.add("missing")
        elif "color" in wanted:
            objects = [one for one in objects if one.colour == wanted["color"]]
            if len(objects) < wanted["count"]:
                failed.add("wrong_colour")
        if "position" in wanted and objects:
            relation, target = wanted["position"]
            anchors = matched[target]
            seen = [relations(one.box, other.box) for one in objects for other in anchors]
            if seen and not any(relation in places for places in seen):
                failed.add("wrong_place")
        matched.append(objects)
    for unwanted in row.get("exclude", []):
        if sum(one.shape == unwanted["class"] for one in found) >= unwanted["count"]:
            failed.add("extra")
    return next((reason for reason in REASONS if reason in failed), None)


def judge(found: Sequence[Detection], row: Mapping[str, Any]) -> Verdict:
    """The verdict on an image's detections against its GenEval row."""
    missing = sorted({"tag", "include"} - set(row))
    if missing:
        raise ValueError(f"row: expected a GenEval row with tag and include, {missing} missing")
    reason = _reason(found, row)
    classes = {wanted["class"] for wanted in row["include"]}
    return Verdict(
        tag=row["tag"],
        correct=reason is None,
        reason=reason,
        expected=sum(wanted["count"] for wanted in row["include"]),
        found=sum(one.shape in classes for one in found),
    )


def verdicts(
    images: npt.NDArray[np.uint8], rows: Sequence[Mapping[str, Any]], corner: bool = False
) -> list[Verdict]:
    """The verdict on each image (N, H, W, 3) against its GenEval row, by the exact detector.

    corner: whether it says too if all is in the lower left.
    """
    if len(images) != len(rows):
        raise ValueError(f"expected one row per image, got {len(images)} images, {len(rows)} rows")
    return [
        replace(judge(detect(image), row), cornered=in_corner(image) if corner else None)
        for image, row in zip(images, rows, strict=True)
    ]


def summarize(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """Scores of many verdicts.

    Returns `overall` (mean of the categories' scores), `n`, and under `categories` for each tag
    present: `score`, `n`, `over` and `under` (shares of its images with too many or too few
    objects of the classes asked for), `count_error` (mean |found - expected|), these three only
    where `found` is known, and `reasons` (how many wrong images for each reason). `cornered` where
    that is known.
    """
    by_tag: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_tag.setdefault(verdict.tag, []).append(verdict)
    if not by_tag:
        raise ValueError("verdicts: expected at least one, got none")
    categories: dict[str, dict[str, Any]] = {}
    for tag, group in by_tag.items():
        n = len(group)
        reasons = Counter(verdict.reason for verdict in group if verdict.reason is not None)
        categories[tag] = {
            "score": sum(verdict.correct for verdict in group) / n,
            "n": n,
            **_counts(group),
            "reasons": {reason: reasons[reason] for reason in REASONS},
        }
    return {
        "overall": sum(category["score"] for category in categories.values()) / len(categories),
        "n": sum(category["n"] for category in categories.values()),
        "categories": categories,
        **_cornered(by_tag),
    }


def _cornered(by_tag: Mapping[str, Sequence[Verdict]]) -> dict[str, float]:
    """The share of images with all in the lower left; nothing where it isn't known."""
    known = [one.cornered for group in by_tag.values() for one in group if one.cornered is not None]
    return {"cornered": sum(known) / len(known)} if known else {}


def _counts(group: Sequence[Verdict]) -> dict[str, float]:
    """Shares of over- and under-counting images and the mean error; none where it isn't known."""
    off = [verdict.found - verdict.expected for verdict in group if verdict.found is not None]
    if not off:
        return {}
    return {
        "over": sum(error > 0 for error in off) / len(off),
        "under": sum(error < 0 for error in off) / len(off),
        "count_error": sum(map(abs, off)) / len(off),
    }
