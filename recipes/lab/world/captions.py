"""A spec's caption, its GenEval row, and edited captions: noise and hard negatives.

The GenEval row is the format of the benchmark's `evaluation_metadata.jsonl`: `include` lists
what must be there, `exclude` lists counts that are too many. Our rows exclude everything the
caption does not say (a further object of any shape, and any `blob` that is no shape), so that
a picture is right only if it shows the caption and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from .scene import COLOURS, MAX_COUNT, SHAPES, Group, Spec

COUNT_WORDS = ("a", "two", "three", "four")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
CORRUPTIONS = ("count", "colour", "missing")
# Sources sign some of their captions, as web captions show where they come from: by hand, scraped.
CAREFUL, CARELESS = "h", "s"


def _phrase(group: Group) -> str:
    noun = group.shape if group.count == 1 else group.shape + "s"
    words = (COUNT_WORDS[group.count - 1], group.colour, noun)
    return " ".join(word for word in words if word)


def caption(spec: Spec) -> str:
    """The caption, e.g. "three red circles" or "a square left of a circle"."""
    return f" {spec.relation or 'and'} ".join(_phrase(group) for group in spec.groups)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    words = {*COUNT_WORDS, *COLOURS, *SHAPES, *(shape + "s" for shape in SHAPES), "and"}
    return sorted(words | {word for relation in OPPOSITE for word in relation.split()})


def metadata(spec: Spec) -> dict[str, Any]:
    """The GenEval row of `spec`: tag, include, exclude, prompt."""
    include: list[dict[str, Any]] = []
    # GenEval lists the reference object first, and the placed object points at it by index.
    for group in spec.groups if spec.relation is None else reversed(spec.groups):
        row: dict[str, Any] = {"class": group.shape, "count": group.count}
        if group.colour is not None:
            row["color"] = group.colour
        include.append(row)
    if spec.relation is not None:
        include[1]["position"] = [spec.relation, 0]
    told = {shape: sum(g.count for g in spec.groups if g.shape == shape) for shape in SHAPES}
    exclude = [{"class": shape, "count": count + 1} for shape, count in told.items()]
    exclude.append({"class": "blob", "count": 1})
    return {"tag": spec.tag, "include": include, "exclude": exclude, "prompt": caption(spec)}


def _with(spec: Spec, index: int, **changes: Any) -> Spec:
    """`spec` with another count, colour or shape of a group."""
    groups = list(spec.groups)
    groups[index] = replace(groups[index], **changes)
    return replace(spec, groups=tuple(groups))


def corrupt(spec: Spec, shares: Mapping[str, float], rng: np.random.Generator) -> Spec:
    """`spec` as a careless annotator would have it: the text is wrong, the image is not.

    shares: probability of each edit, applied where it makes sense and independently:
    `count` (a group of two or more gets another count of 2 to 4: people miscount, but they see
    a single object), `colour` (another colour for one group that names its colour), `missing`
    (one of two groups is not mentioned).
    """
    unknown = sorted(set(shares) - set(CORRUPTIONS))
    if unknown:
        raise ValueError(f"shares: expected keys among {CORRUPTIONS}, got also {unknown}")
    hits = {kind: rng.random() < shares.get(kind, 0.0) for kind in CORRUPTIONS}
    if hits["missing"] and len(spec.groups) == 2:
        kept = spec.groups[int(rng.integers(2))]
        spec = replace(spec, groups=(kept,), relation=None)
    several = [index for index, group in enumerate(spec.groups) if group.count > 1]
    if hits["count"] and several:
        index = several[int(rng.integers(len(several)))]
        others = [n for n in range(2, MAX_COUNT + 1) if n != spec.groups[index].count]
        spec = _with(spec, index, count=others[int(rng.integers(2))])
    coloured = [index for index, group in enumerate(spec.groups) if group.colour is not None]
    if hits["colour"] and coloured:
        index = coloured[int(rng.integers(len(coloured)))]
        others = [colour for colour in COLOURS if colour != spec.groups[index].colour]
        spec = _with(spec, index, colour=others[int(rng.integers(3))])
    return spec


def hard_negatives(spec: Spec) -> list[Spec]:
    """Every spec one edit away that the image of `spec` does not show.

    Count one up or down, colour swapped, shape swapped, relation reversed. Where the caption has
    two groups, colours (or shapes) are also exchanged between them.
    """
    edits: list[Spec] = []
    for index, group in enumerate(spec.groups):
        if spec.relation is None:
            counts = (group.count - 1, group.count + 1)
            edits += [_with(spec, index, count=n) for n in counts if 1 <= n <= MAX_COUNT]
        if group.colour is not None:
            edits += [_with(spec, index, colour=colour) for colour in COLOURS]
        edits += [_with(spec, index, shape=shape) for shape in SHAPES]
    if len(spec.groups) == 2:
        first, second = spec.groups
        swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
        edits.append(replace(spec, groups=swapped))
    if spec.relation is not None:
        edits.append(replace(spec, relation=OPPOSITE[spec.relation]))
    return [edit for edit in dict.fromkeys(edits) if not _same(edit, spec)]


def _same(one: Spec, other: Spec) -> bool:
    """Whether two specs say the same, without a relation in any order of their groups."""
    in_any_order = one.relation is None and set(one.groups) == set(other.groups)
    return one == other or in_any_order
