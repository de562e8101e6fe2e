"""What a caption says (`Spec`) and what an image shows (`Scene`).

A spec is one of GenEval's six categories (arXiv 2310.11513) over shapes instead of COCO classes.
A scene places every object of a spec in its own cell of a 3x3 grid of 8x8-pixel cells, jittered
by one pixel, so that two objects are always at least one pixel apart. Coordinates are pixels,
x to the right and y downwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MAX_COUNT = 4

GRID = 3  # cells along a side
CELL = 8  # pixels along a cell
IMAGE_SIDE = GRID * CELL
SHAPE_SIDE = 6  # pixels along a shape's box


@dataclass(frozen=True)
class Group:
    """`count` objects of one shape; `colour` None where the caption does not name it."""

    shape: str
    count: int = 1
    colour: str | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape: expected one of {SHAPES}, got {self.shape!r}")
        if self.colour is not None and self.colour not in COLOURS:
            raise ValueError(f"colour: expected None or one of {COLOURS}, got {self.colour!r}")
        if not 1 <= self.count <= MAX_COUNT:
            raise ValueError(f"count: expected 1 to {MAX_COUNT}, got {self.count}")


@dataclass(frozen=True)
class Spec:
    """What a caption says: one or two groups; `relation` places the first against the second."""

    tag: str
    groups: tuple[Group, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if self.tag not in TAGS:
            raise ValueError(f"tag: expected one of {TAGS}, got {self.tag!r}")
        if len(self.groups) not in (1, 2):
            raise ValueError(f"groups: expected one or two, got {len(self.groups)}")
        if self.relation is not None and self.relation not in RELATIONS:
            raise ValueError(
                f"relation: expected None or one of {RELATIONS}, got {self.relation!r}"
            )
        if self.relation is not None and len(self.groups) != 2:
            raise ValueError("relation: expected two groups to relate, got one")


@dataclass(frozen=True)
class Thing:
    """One object of a scene; (x, y) is its box's top-left pixel."""

    shape: str
    colour: str
    x: int
    y: int


Scene = tuple[Thing, ...]


def _related_cells(relation: str, rng: np.random.Generator, side: int) -> list[tuple[int, int]]:
    """Two (column, row) cells, the first in `relation` to the second along the dominant axis."""
    along = int(rng.integers(1, side))  # cells between the two, along the relation's axis
    across = int(rng.integers(-along, along + 1))
    start = int(rng.integers(0, side - along))
    other = int(rng.integers(max(0, -across), min(side, side - across)))
    near, far = (start, other), (start + along, other + across)
    if relation in ("above", "below"):
        near, far = near[::-1], far[::-1]
    return [near, far] if relation in ("left of", "above") else [far, near]


def place(spec: Spec, rng: np.random.Generator, side: int = GRID) -> Scene:
    """A random scene that shows exactly what `spec` says.

    side: in cells; 2 for scenes in the lower left corner, of two by two cells.

    A group without a colour gets one at random, the same for all of its objects.
    """
    if spec.relation is not None:
        cells = _related_cells(spec.relation, rng, side)
    else:
        total = sum(group.count for group in spec.groups)
        chosen = rng.choice(side * side, size=total, replace=False)
        cells = [(int(cell) % side, int(cell) // side) for cell in chosen]
    things: list[Thing] = []
    for group in spec.groups:
        colour = group.colour or COLOURS[int(rng.integers(len(COLOURS)))]
        for _ in range(group.count):
            column, row = cells[len(things)]
            row += GRID - side
            jitter_x, jitter_y = (int(jitter) for jitter in rng.integers(1, 3, size=2))
            things.append(
                Thing(group.shape, colour, column * CELL + jitter_x, row * CELL + jitter_y)
            )
    return tuple(things)
