"""Every spec of the world, their three folds, and seeded streams of scenes.

The folds (`train`, `validation`, `heldout`) are disjoint sets of prompts, except in two categories:
`single_object` has three prompts and `two_object` six, so all folds share them. The specs of every
other category are enumerated, shuffled with `FOLD_SEED`, and dealt 60/20/20. Choose options on
`validation`, report `heldout`. The base models draw on `ALL` prompts; post-training can keep to
`train`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import permutations, product
from typing import Any

import numpy as np

from .captions import caption, hard_negatives, metadata
from .scene import COLOURS, GRID, MAX_COUNT, RELATIONS, SHAPES, TAGS, Group, Scene, Spec, place

FOLD_SEED = 20240
FOLDS = ("train", "validation", "heldout")
ALL = "all"
SHARED_BELOW = 10  # prompts; a category with fewer is shared by all folds
# How often a training scene is of each category: counting is the hardest to learn.
TAG_WEIGHTS = dict(zip(TAGS, (1.0, 2.0, 4.0, 1.0, 2.0, 2.0), strict=True))


def _enumerate(tag: str) -> list[Spec]:
    if tag == "single_object":
        return [Spec(tag, (Group(shape),)) for shape in SHAPES]
    if tag == "colors":
        return [Spec(tag, (Group(s, 1, c),)) for s, c in product(SHAPES, COLOURS)]
    if tag == "counting":
        counts, colours = range(2, MAX_COUNT + 1), (None, *COLOURS)
        return [Spec(tag, (Group(s, n, c),)) for s, n, c in product(SHAPES, counts, colours)]
    shapes = list(permutations(SHAPES, 2))
    plain = [(Group(one), Group(other)) for one, other in shapes]
    coloured = [
        (Group(one, 1, first), Group(other, 1, second))
        for (one, other), (first, second) in product(shapes, permutations(COLOURS, 2))
    ]
    if tag == "two_object":
        return [Spec(tag, groups) for groups in plain]
    if tag == "color_attr":
        return [Spec(tag, groups) for groups in coloured]
    return [Spec(tag, g, r) for g, r in product([*plain, *coloured], RELATIONS)]


@cache
def specs(tag: str, fold: str = ALL) -> tuple[Spec, ...]:
    """The specs of a category in a fold (`train`, `validation`, `heldout` or `all`)."""
    if fold not in (*FOLDS, ALL):
        raise ValueError(f"fold: expected one of {(*FOLDS, ALL)}, got {fold!r}")
    every = _enumerate(tag)
    if fold == ALL or len(every) < SHARED_BELOW:
        return tuple(every)
    order = np.random.default_rng([FOLD_SEED, TAGS.index(tag)]).permutation(len(every))
    fifth = len(every) // 5
    parts = {"validation": order[:fifth], "heldout": order[fifth : 2 * fifth]}
    chosen = parts.get(fold, order[2 * fifth :])
    return tuple(every[index] for index in sorted(chosen))


@cache
def row_by_prompt() -> dict[str, dict[str, Any]]:
    """Every prompt of the world -> its GenEval row."""
    return {caption(spec): metadata(spec) for tag in TAGS for spec in specs(tag)}


def draw_spec(rng: np.random.Generator, fold: str = ALL) -> Spec:
    """One spec: its category by TAG_WEIGHTS, then uniform within it (coloured or not alike)."""
    weights = np.array([TAG_WEIGHTS[tag] for tag in TAGS])
    choices = specs(TAGS[int(rng.choice(len(TAGS), p=weights / weights.sum()))], fold)
    if choices[0].tag == "position":  # coloured ones are twelve times as many: half of each
        named = bool(rng.integers(2))
        choices = tuple(s for s in choices if (s.groups[0].colour is not None) == named)
    return choices[int(rng.integers(len(choices)))]


def scenes(seed: int, fold: str = ALL, side: int = GRID) -> Iterator[tuple[Spec, Scene]]:
    """An endless stream of (spec, scene) pairs, the same for the same seed and fold.

    side: of `place`; 2 for the lower left corner.
    """
    rng = np.random.default_rng(seed)
    while True:
        spec = draw_spec(rng, fold)
        yield spec, place(spec, rng, side)


def corner_scenes(seed: int, number: int) -> Iterator[tuple[Spec, Scene]]:
    """An endless stream of `number` train scenes, the same for all seeds, in the lower left."""
    few = np.random.default_rng([FOLD_SEED, number])
    drawn = [draw_spec(few, "train") for _ in range(number)]
    album = [(spec, place(spec, few, 2)) for spec in drawn]
    rng = np.random.default_rng(seed)
    while True:
        yield album[int(rng.integers(number))]


def pair_of_scenes(spec: Spec, scene: Scene, rng: np.random.Generator) -> tuple[Scene, Scene]:
    """The right scene and a wrong one: the caption's hard negative, one edit away."""
    edits = [
        edit
        for edit in hard_negatives(spec)
        if sum(group.count for group in edit.groups) <= MAX_COUNT
    ]
    edit = edits[int(rng.integers(len(edits)))]
    # Colours that the caption leaves open are the right image's: only the edit differs.
    shown = {thing.shape: thing.colour for thing in scene}
    groups = tuple(
        replace(group, colour=group.colour or shown.get(group.shape)) for group in edit.groups
    )
    return scene, place(replace(edit, groups=groups), rng)


def rows(
    fold: str, per_category: int, seed: int = 0, tags: Sequence[str] = TAGS
) -> list[dict[str, Any]]:
    """GenEval rows of a fold: `per_category` a category of `tags`, grouped by category.

    A category's prompts are shuffled with `seed` and dealt round and round, so that every prompt
    comes equally often (to within one).
    """
    if per_category < 1:
        raise ValueError(f"per_category: expected 1 or more, got {per_category}")
    dealt: list[Spec] = []
    for tag in tags:
        choices, index = specs(tag, fold), TAGS.index(tag)
        order = np.random.default_rng([seed, index]).permutation(len(choices))
        dealt += [choices[order[i % len(choices)]] for i in range(per_category)]
    return [metadata(spec) for spec in dealt]
