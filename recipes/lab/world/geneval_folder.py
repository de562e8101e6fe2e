"""Images in GenEval's folder layout, and the results that its evaluator writes of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from data.pictures import image_files, read_picture
from data.prompts import read_prompts, rows_of
from lab.world.scene import IMAGE_SIDE, SHAPES
from lab.world.score import Verdict
from rewards.geneval.evaluator import Evaluator, result
from rewards.geneval.rules import RELATIONS, reason_kind
from run.log import writing

AT_ONCE = 32
"""Images in memory."""


def read_images(folder: Path) -> tuple[list[Path], list[dict[str, Any]]]:
    """Every image of a folder in GenEval's layout and its row; hidden files are left out.

    Raises:
        FileNotFoundError, ValueError: no images; some are missing, or have no row; an image, or a
            row, that cannot be read.
    """
    images = {one.parent: image_files(one) for one in sorted(folder.glob("*/samples"))}
    owners = [one.parent for one in sorted(folder.glob("*/metadata.jsonl"))]
    row_of = {one: _read_row(one / "metadata.jsonl") for one in owners}
    files = [file for one in owners for file in images.get(one, [])]
    rows = [row_of[one] for one in owners for _ in images.get(one, [])]
    strangers = [one for one, found in images.items() if found and one not in row_of]
    if strangers:
        raise ValueError(
            f"{folder}: expected metadata.jsonl beside all images, got none in {len(strangers)} "
            f"folders, first {strangers[0].name}. Write it again, or take them out."
        )
    if not files:
        raise FileNotFoundError(
            f"{folder}: no images. Expected NNNNN/metadata.jsonl and NNNNN/samples/*.png, as "
            "recipes/generate.py writes them."
        )
    most = max(map(len, images.values()))
    short = [one for one in owners if len(images.get(one, [])) < most]
    if short:
        raise ValueError(
            f"{folder}: expected {most} images of every prompt, got fewer for {len(short)} of "
            f"{len(owners)} prompts, first {short[0].name}. Call generate.py again, which goes on, "
            "or take their folders out."
        )
    for file in tqdm(files, desc="reading", leave=False):  # before minutes of scoring
        read_picture(file)
    return files, rows


def _read_row(file: Path) -> dict[str, Any]:
    rows = read_prompts(str(file))
    if len(rows) > 1:
        raise ValueError(
            f"{file}: expected one row, that of all images in samples, got {len(rows)}. Leave one."
        )
    if not _is_genevals(rows[0]):
        raise ValueError(
            f"{file}: expected include, a class and a count, or several, with tag as in GenEval's "
            f"evaluation_metadata.jsonl, got {rows[0]!r}. Mend the row, or leave both out."
        )
    return rows[0]


def _is_genevals(row: Mapping[str, Any]) -> bool:
    """Whether tag, include and exclude are as GenEval writes them; it need not have them."""
    include, exclude = row.get("include", []), row.get("exclude", [])
    return (
        isinstance(row.get("tag", ""), str)
        and isinstance(include, list)
        and isinstance(exclude, list)
        and (bool(include) or "include" not in row)
        and all(_is_entry(one, index) for index, one in enumerate(include))
        and all(_is_entry(one, 0) for one in exclude)
    )


def _is_entry(one: Any, index: int) -> bool:
    """Whether it has a class and a count, and a place as seen from an earlier entry if any."""
    if not isinstance(one, dict):
        return False
    count = one.get("count")
    if "position" in one:
        place: Any = one["position"]
        of_two = isinstance(place, list) and len(place) == 2 and place[0] in RELATIONS
        if not of_two or type(place[1]) is not int or not 0 <= place[1] < index:
            return False
    texts = (one.get("class"), one.get("color", ""))
    return type(count) is int and count > 0 and all(isinstance(text, str) for text in texts)


def pixels(file: Path) -> npt.NDArray[np.uint8]:
    """An image file as (H, W, 3)."""
    return np.asarray(read_picture(file))


def world_pixels(files: Sequence[Path]) -> npt.NDArray[np.uint8]:
    """Image files of the world as (N, 24, 24, 3).

    Raises:
        ValueError: an image has another size.
    """
    images = [pixels(file) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != (IMAGE_SIDE, IMAGE_SIDE, 3):
            raise ValueError(
                f"{file}: expected {IMAGE_SIDE} pixels a side, as the world's detector does, got "
                f"{image.shape[1]} x {image.shape[0]}. Give --detector for other images."
            )
    return np.stack(images)


def of_world(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the world's detector can judge all rows' images."""
    asked = {one["class"] for row in rows for one in row.get("include") or []}
    return asked <= set(SHAPES) and all("tag" in row and "include" in row for row in rows)


def judge_folder(
    evaluator: Evaluator, files: Sequence[Path], rows: Sequence[Mapping[str, Any]], results: Path
) -> list[Verdict]:
    """The verdicts, after writing a line of `results` for each image, as GenEval's evaluator does.

    Raises:
        ValueError: rows that are not GenEval's, or a class that the detector does not know.
    """
    missing = sorted(key for key in ("tag", "include") if any(key not in row for row in rows))
    if missing:
        raise ValueError(
            f"{files[0].parents[2]}: expected GenEval's rows in metadata.jsonl, some have no "
            f"{' and no '.join(missing)}. Sample GenEval's evaluation_metadata.jsonl."
        )
    lines = []
    for start in tqdm(range(0, len(files), AT_ONCE), desc="detecting", leave=False):
        part = range(start, min(start + AT_ONCE, len(files)))
        judged = evaluator([read_picture(files[i]) for i in part], [rows[i] for i in part])
        lines += [result(files[i], rows[i], *one) for i, one in zip(part, judged, strict=True)]
    with writing(results):
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [_verdict(line) for line in lines]


def read_results(results: Path, files: Sequence[Path], folder: Path) -> list[Verdict]:
    """The verdicts of a `results.jsonl`, GenEval's or ours, in the order of `files`.

    Where filenames have the images' folder, it is this one: it may have moved, with its name.

    Raises:
        ValueError: a row that cannot be read or contradicts another; another folder's; none.
    """
    by_name: dict[str, Verdict] = {}
    first = None
    for where, row in rows_of(results):
        known = isinstance(row, dict) and {"filename", "tag", "correct"} <= set(row)
        if not known or not isinstance(row["filename"], str):
            raise ValueError(
                f"{where}: expected filename, tag, correct and reason, as GenEval's "
                f"evaluate_images.py writes them, got {row!r}."
            )
        *parents, number, samples, image = ("", "", *Path(row["filename"]).parts)
        named, name = Path(*parents), f"{number}/{samples}/{image}"
        first = named if first is None else first
        if named != first or not _is_of(folder, named, row["filename"]):
            raise ValueError(
                f"{where}: expected results of {folder} alone, got one of {named}. Give --images "
                "the folder that was judged, under its name, and --results its file."
            )
        verdict = _verdict(row, f"{where}: ")
        if by_name.setdefault(name, verdict) != verdict:
            raise ValueError(
                f"{where}: expected one result for {name}, got two that differ. Judge the folder "
                "again, into an empty file."
            )
    judged = []
    for file in files:
        name = "/".join(file.parts[-3:])
        if name not in by_name:
            raise ValueError(f"{results}: no result for {name} of {folder}. Judge it again.")
        judged.append(by_name[name])
    return judged


def _is_of(folder: Path, named: Path, file: str) -> bool:
    """Whether a result's file may be the folder's, by the folder that its name has, if any."""
    if named.name and os.path.exists(file):
        return named.samefile(folder)
    return named.name in ("", folder.absolute().name, folder.resolve().name)


_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def _verdict(row: Mapping[str, Any], where: str = "") -> Verdict:
    """Of a line; how many objects were found is in its details, where it has them."""
    correct = _BOOLEANS.get(str(row["correct"]).strip().lower())
    if correct is None or not isinstance(row["tag"], str) or not row["tag"]:
        raise ValueError(
            f"{where}expected a tag, and correct as true or false, got {row['tag']!r} and "
            f"{row['correct']!r}. Mend the row."
        )
    metadata = _table(row.get("metadata", {}))
    if metadata is None or not _is_genevals(metadata):
        raise ValueError(
            f"{where}expected metadata as GenEval's, with a class and a count in each of include, "
            f"got {row['metadata']!r}. Mend the row, or leave the column out."
        )
    wanted = metadata.get("include", [])
    found = None
    if "details" in row:
        details = _table(row["details"])
        if details is None or not all(isinstance(one, list) for one in details.values()):
            raise ValueError(
                f"{where}expected details as a list of boxes for each class, got "
                f"{row['details']!r}. Mend the row, or leave the column out."
            )
        found = sum(len(details.get(name, [])) for name in {one["class"] for one in wanted})
    reason = None if correct else reason_kind(str(row.get("reason") or "")) or "wrong"
    expected = sum(one["count"] for one in wanted)
    return Verdict(row["tag"], correct, reason, expected, found)


def _table(value: Any) -> dict[str, Any] | None:
    """A mapping, or the text of one, as GenEval's evaluator writes it; None where it is neither."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
