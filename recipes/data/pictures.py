"""Pictures from files and folders, from pixels, and on sheets: many in one PNG, prompts below."""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageCms, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = frozenset(
    (
        *(".avif", ".bmp", ".dds", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg"),
        *(".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
    )
)
"""Of the files that are pictures."""


def files_of(folder: Path) -> list[Path]:
    """All files under a folder, in order; not hidden ones.

    Links are followed, each folder once: by its own name where it lies here, else by that of the
    first link in order.
    """
    found, seen, links = [], set(), [str(folder)]
    for link in links:  # it grows
        for root, folders, names in os.walk(link):
            real = os.path.realpath(root)
            folders[:] = sorted(one for one in folders if one[0] != "." and real not in seen)
            if real not in seen:
                seen.add(real)
                inside = [os.path.join(root, one) for one in folders]
                links += filter(os.path.islink, inside)
                found += [Path(root, name) for name in names if name[0] != "."]
    return sorted(found)


def image_files(folder: Path) -> list[Path]:
    """The pictures of `files_of`."""
    return [file for file in files_of(folder) if file.suffix.lower() in SUFFIXES]


def read_picture(source: str | Path | bytes) -> Image.Image:
    """A picture as it is meant to be seen, from its file or the file's bytes: RGB, 8 bits, upright.

    It is turned as its EXIF says, 16 bits and floats are scaled, the colours of an ICC profile are
    made sRGB's, and what is transparent is laid on white.

    Raises:
        ValueError: it cannot be read. The message names the file.
    """
    name = "an image" if isinstance(source, bytes) else str(source)
    try:
        # Bytes always: Pillow maps files that it is given by name, and damaged ones then differ.
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(content)) as file:
            _scale_transparent(file)
            upright = ImageOps.exif_transpose(file)
            return _in_srgb(_in_eight_bits(upright, file.format), file.info.get("icc_profile"))
    except Exception as error:  # each format of PIL has errors of its own
        told = str(getattr(error, "strerror", None) or error).rstrip(".")
        if isinstance(error, UnidentifiedImageError):  # PIL tells the bytes' address
            told = "it is damaged, or of no format that Pillow knows"
        raise ValueError(f"{name} cannot be read: {told}. Write it again, or remove it.") from error


def _scale_transparent(file: Any) -> None:
    """The colour that a PNG names transparent, as its pixels: Pillow scales those alone."""
    named, kind = file.info.get("transparency"), file.tile[0].args if file.tile else ""
    if named is not None and kind in ("L;2", "L;4"):
        file.info["transparency"] = named * {"L;2": 85, "L;4": 17}[kind]
    elif named is not None and kind == "RGB;16B":
        file.info["transparency"] = tuple(one >> 8 for one in named)


def _in_eight_bits(image: Any, kind: str | None) -> Image.Image:
    """Grey images of 16 bits or floats scaled to 0..255, where PIL would clip; others as is."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image  # type: ignore[no-any-return]
    values, top = np.asarray(image), 1.0 if image.mode == "F" else 65535.0
    known = image.mode != "I" or kind in ("PNG", "PPM")  # formats with at most 16 bits
    if not known or not 0 <= values.min() <= values.max() <= top:
        raise ValueError(
            f"expected floats from 0 to 1, or integers of 8 or 16 bits, got mode {image.mode} with "
            f"values from {values.min()} to {values.max()}, whose white is not known"
        )
    grey = Image.fromarray((values * (255 / top) + 0.5).astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    shown = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(shown)))


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """On white where it is transparent; as without a profile where that one does not fit."""
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        grey = image.mode in ("1", "LA", "La")
        image = image.convert("L" if grey else "RGBA").convert("L" if grey else "RGB")
    try:
        seen = _to_srgb(profile, image.mode).apply(image) if profile else image.convert("RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        seen = image.convert("RGB")
    if alpha is None:
        return seen
    return Image.composite(seen, Image.new("RGB", seen.size, "white"), alpha)


@lru_cache(8)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, "RGB")


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] -> 0..255.

    Raises:
        FloatingPointError: a pixel is NaN or infinite, which would be black or white.
    """
    if not bool(pixels.isfinite().all()):
        raise FloatingPointError(
            f"images: expected finite numbers, got {'NaN' if pixels.isnan().any() else 'infinity'}."
            " The model's weights are not finite, or float16 is too small for it: take bfloat16 or "
            "float32."
        )
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) in [-1, 1] -> N pictures."""
    return [Image.fromarray(one) for one in to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()]


class Judged(Protocol):
    """Whether a picture is right, and why not."""

    @property
    def correct(self) -> bool: ...

    @property
    def reason(self) -> str | None: ...


def sheet(
    images: Sequence[npt.NDArray[np.uint8]] | npt.NDArray[np.uint8],
    rows: Sequence[Mapping[str, Any]],
    judged: Sequence[Judged] | None,
    path: Path,
    *,
    columns: int = 8,
    side: int = 144,
    titles: Sequence[str] = (),
) -> None:
    """Saves a PNG of N images (H, W, 3), enlarged or reduced to `side` pixels. Under each are its
    verdict, where they were judged, and its prompt. titles: one a column, above them."""
    cell_width, cell_height = side + 8, side + 52
    lines = -(-len(images) // columns)
    headings = [textwrap.wrap(title, width=side // 6) for title in titles]
    top_margin = 4 + 12 * max(map(len, headings)) if headings else 0
    page = Image.new("RGB", (columns * cell_width, lines * cell_height + top_margin), "white")
    draw = ImageDraw.Draw(page)
    for column, heading in enumerate(headings):
        draw.multiline_text(
            (column * cell_width + 4, 2), "\n".join(heading), fill="black", spacing=1
        )
    for index, (image, row) in enumerate(zip(images, rows, strict=True)):
        left = index % columns * cell_width + 4
        top = index // columns * cell_height + 2 + top_margin
        crisp = max(image.shape[:2]) <= side
        filter_ = Image.Resampling.NEAREST if crisp else Image.Resampling.LANCZOS
        page.paste(Image.fromarray(image).resize((side, side), filter_), (left, top))
        below = top + side + 1
        if judged is not None:
            verdict = judged[index]
            text, colour = (
                ("right", "green") if verdict.correct else (str(verdict.reason)[: side // 6], "red")
            )
            draw.text((left, below), text, fill=colour)
            below += 12
        told = textwrap.wrap(row["prompt"], width=side // 6)[:3]
        draw.multiline_text((left, below), "\n".join(told), fill="black", spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def side_by_side(
    columns: Mapping[str, Sequence[npt.NDArray[np.uint8]]],
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    judged: Mapping[str, Sequence[Judged]] | None = None,
    prompts_a_line: int | None = None,
) -> None:
    """Saves a PNG with each prompt's image of every column beside each other, titled.

    A single column is a sheet without a title. judged: verdicts, by column. prompts_a_line: left
    out, as many as four images.
    """
    images = [image for prompt in zip(*columns.values(), strict=True) for image in prompt]
    told = [row for row in rows for _ in columns]
    verdicts = [judged[name][i] for i in range(len(rows)) for name in columns] if judged else None
    side = 144 if max(images[0].shape[:2]) <= 144 else 256
    beside = prompts_a_line or max(1, 4 // len(columns))
    titles = beside * list(columns) if len(columns) > 1 else ()
    wide = beside * len(columns)
    sheet(np.stack(images), told, verdicts, path, columns=wide, side=side, titles=titles)
