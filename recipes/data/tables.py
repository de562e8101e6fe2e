"""Tables of captioned images, from files, folders or the hub.

table = open_table("photos.parquet", "train")
table = open_table("coco/annotations/captions_train2017.json", "train")
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import datasets

from data.sources import check_source, loading


def open_table(
    data: str, split: str, *, columns: Collection[str] = ("image",), text: str = "caption"
) -> Any:
    """Tables of one or more files ("shards/*.parquet"), a folder of them or of images, or a hub id.

    .parquet, .jsonl, .csv, .json of COCO's captions, or .tar of webdataset (its columns are the
    files' endings: jpg, txt; only `text` and `columns` are read).
    """
    if not glob.has_magic(data):
        check_source("data", data)
    path = Path(data)
    kinds = {
        ".parquet": "parquet",
        ".jsonl": "json",
        ".json": "json",
        ".csv": "csv",
        ".tar": "tar",
    }
    if path.is_dir():
        pictures = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
        if any(file.suffix.lower() in pictures for file in path.rglob("*")):
            return datasets.load_dataset("imagefolder", data_dir=data, split=split)
        return datasets.load_dataset(data, split=split)
    if path.suffix in kinds:
        files = [data] if path.exists() else sorted(glob.glob(data, recursive=True))
        if not files:
            raise FileNotFoundError(f"data: no file {data}")
        if path.suffix == ".tar":
            return _open_tars(files, {*columns, text}, text)
        if path.suffix == ".json":
            coco = [_coco_captions(file) for file in files]
            if all(coco):
                tables = [
                    _open_coco(Path(file), found) for file, found in zip(files, coco, strict=True)
                ]
                return datasets.concatenate_datasets(tables)
        return datasets.load_dataset(kinds[path.suffix], data_files={split: files}, split=split)
    with loading("data", data):
        return datasets.load_dataset(data, split=split)


def check_columns(table: Any, names: Collection[str]) -> None:
    """ValueError where a table lacks one of them."""
    missing = sorted(set(names) - set(table.column_names))
    if missing:
        raise ValueError(
            f"data: expected columns {list(names)}, {missing} missing among {table.column_names}. "
            "Name them with --caption_column, and --image_column where there is one image."
        )


def _open_tars(files: Sequence[str], columns: Collection[str], text: str) -> Any:
    """webdataset: a row a stem, a column an ending; those that are not asked for are left empty.

    `datasets`' own reader decodes every file, so that one array among the images can end a run.
    """
    with tarfile.open(files[0]) as tar:
        endings = dict.fromkeys(_key_and_ending(member)[1] for member in islice(tar, 1000))
    kinds = {name: "binary" if name in columns else "null" for name in endings if name}
    kinds |= {text: "string"} if text in kinds else {}
    return datasets.Dataset.from_generator(
        _rows_of_tars,
        features=datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()}),
        # Sizes and times: the cache of rows is found by these arguments.
        gen_kwargs={
            "files": [(file, os.stat(file).st_size, os.stat(file).st_mtime) for file in files],
            "kinds": kinds,
        },
    )


def _rows_of_tars(
    files: Sequence[tuple[str, int, float]], kinds: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    for file, *_ in files:
        with tarfile.open(file) as tar:
            named = ((member, *_key_and_ending(member)) for member in tar)
            for _, group in groupby((one for one in named if one[2]), key=lambda one: one[1]):
                row: dict[str, Any] = dict.fromkeys(kinds)
                for member, _, ending in group:
                    if kinds.get(ending, "null") != "null":
                        content = tar.extractfile(member).read()
                        row[ending] = _decoded(content) if kinds[ending] == "string" else content
                yield row


def _key_and_ending(member: tarfile.TarInfo) -> tuple[str, str]:
    """("a/001", "seg.png") of a/001.seg.png; no ending: not a file of webdataset."""
    folder, name = os.path.split(member.name)
    stem, _, ending = name.partition(".")
    return os.path.join(folder, stem), ending if stem and member.isfile() else ""


def _decoded(content: bytes) -> str | None:
    """None makes the row unreadable."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _coco_captions(file: str) -> dict[str, Any]:
    """What is in COCO's captions file; nothing for a file of another kind."""
    try:
        found = json.loads(Path(file).read_text())
    except json.JSONDecodeError:  # a row a line
        return {}
    return found if isinstance(found, dict) and {"images", "annotations"} <= set(found) else {}


def _open_coco(file: Path, found: Mapping[str, Any]) -> Any:
    """A row an image, with all of its captions. Images without one are left out."""
    captions: dict[int, list[str]] = {}
    for one in found["annotations"]:
        if "caption" not in one:
            raise ValueError(
                f"data: expected COCO's captions (captions_*.json), got annotations with "
                f"{sorted(one)} in {file}."
            )
        captions.setdefault(one["image_id"], []).append(one["caption"].strip())
    shown = [one for one in found["images"] if one["id"] in captions]
    folder = _folder_of_coco(file, shown[0]["file_name"]) if shown else file.parent
    return datasets.Dataset.from_dict(
        {
            "image": [str(folder / one["file_name"]) for one in shown],
            "caption": [captions[one["id"]] for one in shown],
        },
        features=datasets.Features(
            image=datasets.Image(decode=False),
            caption=[datasets.Value("string")],
        ),
    )


def _folder_of_coco(file: Path, name: str) -> Path:
    """coco/train2017 of coco/annotations/captions_train2017.json, or the file's own folder."""
    split = file.stem.rpartition("_")[2]
    looked = [file.parent.parent / split, file.parent / split, file.parent]
    for folder in looked:
        if (folder / name).exists():
            return folder
    raise FileNotFoundError(
        f"data: no image {name} of {file} in {', '.join(map(str, looked))}. Put the images "
        "into one of these folders."
    )
