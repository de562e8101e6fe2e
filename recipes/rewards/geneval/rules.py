"""GenEval's prompts -> their rows, and detections -> its verdict.

A row is a line of GenEval's metadata: `tag`, `prompt`, `include` and sometimes `exclude`. Each
entry of `include` asks for at least `count` objects of a `class`, of a `color` and in a `position`
(relation, index of an earlier entry) where it names them. An entry of `exclude` forbids `count` or
more. Colours and places are those of the `count` surest objects alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Box = Sequence[float]
"""left, top, right, bottom in pixels."""
POSITION_THRESHOLD = 0.1
"""An offset counts by what exceeds this share of both objects' sizes."""
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse",
    "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's 80, in its order, as GenEval names them."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
RELATIONS = ("left of", "right of", "above", "below")

_PLURALS = {name + ("es" if name.endswith("s") else "s"): name for name in CLASSES}


@dataclass(frozen=True)
class Detected:
    """An object. score: 0 to 1. mask: (H, W) bool of the whole image; None for a box alone."""

    label: str
    score: float
    box: Box
    mask: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Judgement:
    """reason: "" where the image is right, else a line for each entry that fails.

    credit: 0 to 1, and 1 only where it is right. The mean over `include`: the share of the objects
    that were found, or 1/2 where they have the wrong colour or place. Each object that `exclude`
    forbids takes 1/(how many it allows) of it away; in counting this leaves 1 - |n - n*| / n*.
    """

    correct: bool
    reason: str
    credit: float


@dataclass(frozen=True)
class Rules:
    """Which detections count, with GenEval's own numbers.

    threshold: scores that are not above it are dropped; counting_threshold: in counting.
    max_objects: of a class, the surest.
    max_overlap: of two boxes of a class with this intersection over union or more, only the surer
        counts; 1: both.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0

    def keep(self, found: Sequence[Detected], tag: str) -> dict[str, list[Detected]]:
        """Class -> its objects, the surest first."""
        threshold = self.counting_threshold if tag == "counting" else self.threshold
        by_class: dict[str, list[Detected]] = {}
        for one in sorted(found, key=lambda one: -one.score):
            if one.score > threshold:
                by_class.setdefault(one.label, []).append(one)
        return {label: self._apart(group[: self.max_objects]) for label, group in by_class.items()}

    def _apart(self, group: list[Detected]) -> list[Detected]:
        if self.max_overlap == 1:
            return group
        kept: list[Detected] = []
        for one in group:
            if all(overlap(one.box, other.box) < self.max_overlap for other in kept):
                kept.append(one)
        return kept


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes whose last pixels are inside."""

    def area(left: float, top: float, right: float, bottom: float) -> float:
        return max(right - left + 1, 0) * max(bottom - top + 1, 0)

    both = area(
        max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])
    )
    union = area(*one) + area(*other) - both
    return both / union if union else 0.0


def relations(one: Box, other: Box) -> set[str]:
    """Where `one` is as seen from `other`: none to two of left of, right of, above, below."""
    boxes = np.array([one, other], dtype=float).reshape(2, 2, 2)
    centre_one, centre_other = boxes.mean(axis=1)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centre_one - centre_other
    reach = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes.sum(axis=0), 0) * np.sign(offset)
    if np.all(np.abs(reach) < 1e-3):
        return set()
    dx, dy = reach / np.linalg.norm(offset)
    tests = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, holds in tests.items() if holds}


Colours = Callable[[Sequence[Detected], str], Sequence[str]]
"""Objects and their class -> the colour of each."""


def judge(
    kept: Mapping[str, Sequence[Detected]], row: Mapping[str, Any], colours: Colours
) -> Judgement:
    """The verdict on what `Rules.keep` left of an image's detections.

    Raises:
        ValueError: the row has no `include`.
    """
    if not row.get("include"):
        raise ValueError(f"row: expected a GenEval row with include, got {sorted(row)}.")
    reasons: list[str] = []
    credits: list[float] = []
    matched: list[Sequence[Detected]] = []  # of each entry; empty where it fails
    for wanted in row["include"]:
        name, count = wanted["class"], wanted["count"]
        objects = kept.get(name, [])[:count]
        if len(objects) < count:
            failed = f"expected {name}>={count}, found {len(objects)}"
            credit = len(objects) / count
        else:
            failed = _colour(wanted, objects, colours) or _place(wanted, objects, matched)
            credit = 0.5 if failed else 1.0
        reasons += [failed] if failed else []
        credits.append(credit)
        matched.append([] if failed else objects)
    total = sum(credits) / len(credits)
    for unwanted in row.get("exclude", []):
        number, allowed = len(kept.get(unwanted["class"], [])), unwanted["count"] - 1
        if number > allowed:
            reasons.append(f"expected {unwanted['class']}<{unwanted['count']}, found {number}")
            total *= max(0.0, 1 - (number - allowed) / max(allowed, 1))
    return Judgement(not reasons, "\n".join(reasons), total)


def _colour(wanted: Mapping[str, Any], objects: Sequence[Detected], colours: Colours) -> str:
    if "color" not in wanted:
        return ""
    seen = Counter(colours(objects, wanted["class"]))
    if seen[wanted["color"]] >= wanted["count"]:
        return ""
    told = ", ".join(f"{number} {colour}" for colour, number in seen.items())
    return (
        f"expected {wanted['color']} {wanted['class']}>={wanted['count']}, found "
        f"{seen[wanted['color']]} {wanted['color']}; and {told}"
    )


def _place(
    wanted: Mapping[str, Any],
    objects: Sequence[Detected],
    matched: Sequence[Sequence[Detected]],
) -> str:
    """All objects must be so placed to all of the target's."""
    if "position" not in wanted:
        return ""
    relation, target = wanted["position"]
    if not matched[target]:
        return f"no target for {wanted['class']} to be {relation}"
    for one in objects:
        for other in matched[target]:
            found = relations(one.box, other.box)
            if relation not in found:
                told = " and ".join(sorted(found))
                return f"expected {wanted['class']} {relation} target, found {told} target"
    return ""


def reason_kind(reason: str) -> str:
    """`missing`, `wrong_colour`, `wrong_place` or `extra`: the kind of a reason's first line."""
    line = reason.splitlines()[0] if reason else ""
    if line.startswith("no target") or line.endswith(" target"):
        return "wrong_place"
    if "; and " in line:
        return "wrong_colour"
    if ">=" in line:
        return "missing"
    return "extra" if line.startswith("expected") and "<" in line else line


def row_of(prompt: str) -> dict[str, Any]:
    """The row of one of GenEval's prompts.

    Raises:
        ValueError: not a prompt of its six templates, of COCO's classes.
    """
    text = prompt.strip().removeprefix("a photo of ")
    number, _, plural = text.partition(" ")
    if number in NUMBERS and plural in _PLURALS:
        name, count = _PLURALS[plural], NUMBERS.index(number)
        return {
            "tag": "counting",
            "include": [{"class": name, "count": count}],
            "exclude": [{"class": name, "count": count + 1}],
            "prompt": prompt,
        }
    parts = re.split(f" ({'|'.join(RELATIONS)}|and) ", text)
    things = [_thing(part, prompt) for part in parts[::2]]
    joints, coloured = parts[1::2], ["color" in thing for thing in things]
    if not joints:
        tag = "colors" if coloured[0] else "single_object"
    elif joints == ["and"] and coloured[0] == coloured[1]:
        tag = "color_attr" if coloured[0] else "two_object"
    elif len(joints) == 1 and joints != ["and"]:
        placed, target = things
        tag, things = "position", [target, placed | {"position": [joints[0], 0]}]
    else:
        raise _unknown(prompt)
    return {"tag": tag, "include": things, "prompt": prompt}


def _thing(text: str, prompt: str) -> dict[str, Any]:
    """ "a red car" -> its entry of `include`."""
    article, _, name = text.partition(" ")
    colour, _, rest = name.partition(" ")
    if article not in ("a", "an"):
        raise _unknown(prompt)
    if name in CLASSES:
        return {"class": name, "count": 1}
    if colour in COLOURS and rest in CLASSES:
        return {"class": rest, "count": 1, "color": colour}
    raise _unknown(prompt)


def _unknown(prompt: str) -> ValueError:
    return ValueError(
        f"prompts: expected GenEval's, such as 'a photo of two dogs' or 'a photo of a red car left "
        f"of a cup', of COCO's classes; got {prompt!r}."
    )
