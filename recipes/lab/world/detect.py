"""Image -> shapes, exactly: nearest colour, connected components, best template.

1. A pixel belongs to the palette's nearest colour (the ground is one) if that is closer than
   `CLEAR` in RGB; a pixel that is near none is `unclear`.
2. Pixels of one colour that touch by a side form a component. Fewer than `SPECK` pixels: dropped.
3. A component is the shape whose 6x6 template it overlaps best over all shifts, if the overlap
   (intersection over union) reaches `OVERLAP`; otherwise, or when its colour is unclear, it is
   a `blob`. Templates overlap each other by 0.67 at most, so there is no tie to break.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage  # type: ignore[import-untyped]

from .render import GROUND, MASKS, PALETTE
from .scene import CELL, GRID, SHAPE_SIDE

CLEAR = 100.0  # RGB units; the palette's colours are at least 220 apart, so half of it is clear
SPECK = 6  # pixels; the smallest shape has 24
OVERLAP = 0.75

_NAMES = ("ground", *PALETTE, "unclear")
_COLOURS = np.array([GROUND, *PALETTE.values()], dtype=np.float32)


@dataclass(frozen=True)
class Detection:
    """One component: `shape` is a shape's name or "blob", `colour` a colour's or "unclear".

    box: left, top, right, bottom in pixels, right and bottom exclusive.
    """

    shape: str
    colour: str
    box: tuple[int, int, int, int]

    @property
    def position(self) -> tuple[float, float]:
        """The box's centre (x, y) in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


def _best_template(component: npt.NDArray[np.bool_]) -> tuple[str, float]:
    """The best shape of a component's (h, w) mask and its overlap."""
    height, width = component.shape
    if max(height, width) > 2 * SHAPE_SIDE:  # cannot reach OVERLAP with a 6x6 template
        return "blob", 0.0
    padded = np.pad(component, SHAPE_SIDE - 1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (SHAPE_SIDE, SHAPE_SIDE))
    area = int(component.sum())
    best, best_overlap = "blob", 0.0
    for shape, mask in MASKS.items():
        common = (windows & mask).sum(axis=(2, 3)).max()
        overlap = float(common / (area + int(mask.sum()) - common))
        if overlap > best_overlap:
            best, best_overlap = shape, overlap
    return best, best_overlap


def _distances(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(..., 3) uint8 -> (..., 5), the distance in RGB to the ground and to each colour."""
    gaps = pixels[..., None, :].astype(np.float32) - _COLOURS
    return np.asarray(np.linalg.norm(gaps, axis=-1), dtype=np.float32)


def colour_map(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """(H, W, 3) uint8 -> (H, W) index into ("ground", *PALETTE, "unclear")."""
    distance = _distances(image)
    nearest = distance.argmin(axis=-1)
    return np.where(distance.min(axis=-1) < CLEAR, nearest, len(_COLOURS))


def detect(image: npt.NDArray[np.uint8]) -> list[Detection]:
    """Every shape and blob of an image (H, W, 3) uint8, top to bottom, left to right."""
    if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
        raise ValueError(
            f"image: expected (H, W, 3) uint8, got {image.shape} {image.dtype}; "
            "convert with np.asarray(pil_image.convert('RGB'))"
        )
    colours = colour_map(image)
    found: list[Detection] = []
    for index, colour in enumerate(_NAMES[1:], 1):  # without the ground
        labels, count = ndimage.label(colours == index)
        for label, box in zip(range(1, count + 1), ndimage.find_objects(labels), strict=True):
            component = labels[box] == label
            if component.sum() < SPECK:
                continue
            shape, overlap = _best_template(component)
            if overlap < OVERLAP or colour == "unclear":
                shape = "blob"
            rows, columns = box
            corners = (columns.start, rows.start, columns.stop, rows.stop)
            found.append(Detection(shape, colour, corners))
    return sorted(found, key=lambda one: (one.box[1], one.box[0]))


def in_corner(image: npt.NDArray[np.uint8]) -> bool:
    """Whether an image shows something, and all of it in the lower left two by two cells."""
    boxes = [one.box for one in detect(image)]
    edge = (GRID - 1) * CELL
    return bool(boxes) and all(right <= edge and top >= CELL for _, top, right, _ in boxes)


def palette_error(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """How dirty pictures (N, H, W, 3) are: the RMS distance of pixels to the palette's nearest.

    (N,), in RGB units of 0 to 255. A rendered scene has 0. What `detect` reads through shows here.
    """
    squares = _distances(images).min(axis=-1) ** 2
    return np.asarray(np.sqrt(squares.mean(axis=(1, 2))), dtype=np.float32)
