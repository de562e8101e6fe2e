"""Scene -> image: crisp 6x6-pixel shapes in full colours on mid-grey."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .scene import IMAGE_SIDE, SHAPE_SIDE, SHAPES, Scene

Image = npt.NDArray[np.uint8]

GROUND = (128, 128, 128)
PALETTE = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
_ROWS = {  # width of each row of a shape, top to bottom, centred in its box
    "circle": (2, 4, 6, 6, 4, 2),
    "square": (6, 6, 6, 6, 6, 6),
    "triangle": (2, 2, 4, 4, 6, 6),
}


def _mask(widths: Sequence[int]) -> npt.NDArray[np.bool_]:
    columns = np.arange(SHAPE_SIDE)
    inset = (SHAPE_SIDE - np.asarray(widths)[:, None]) // 2
    return (columns >= inset) & (columns < SHAPE_SIDE - inset)


MASKS = {shape: _mask(_ROWS[shape]) for shape in SHAPES}  # shape -> (6, 6) bool


def render(scene: Scene) -> Image:
    """The image of a scene, (24, 24, 3) uint8. Raises ValueError on an object outside it."""
    image = np.full((IMAGE_SIDE, IMAGE_SIDE, 3), GROUND, dtype=np.uint8)
    for thing in scene:
        if not (
            0 <= thing.x <= IMAGE_SIDE - SHAPE_SIDE and 0 <= thing.y <= IMAGE_SIDE - SHAPE_SIDE
        ):
            raise ValueError(
                f"expected an object inside the {IMAGE_SIDE}x{IMAGE_SIDE} image, got {thing}"
            )
        box = image[thing.y : thing.y + SHAPE_SIDE, thing.x : thing.x + SHAPE_SIDE]
        box[MASKS[thing.shape]] = PALETTE[thing.colour]
    return image
