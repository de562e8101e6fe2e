"""Tables of captioned images, from files, folders or the hub.

table = open_table("photos.parquet", "train")
table = open_table("coco/annotations/captions_train2017.json", "train")
"""

from __future__ import annotations

import glob
import io
import logging
import os
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.compute
import pyarrow.parquet
import xxhash
from datasets.exceptions import DatasetsError

from data.pictures import SUFFIXES, files_of
from data.prompts import is_unicode, lines_of, rows_of
from data.sources import loading

LOGGER = logging.getLogger(__name__)
AT_ONCE = 10_000
"""Rows in memory as Python's objects."""
OF_LIBRARIES = (DatasetsError, pyarrow.ArrowException, tarfile.TarError)
ENDS = 2**16
"""Bytes at an image's beginning, and at its end, by which it is known."""
LISTS = pyarrow.list_(pyarrow.string())
KINDS = (".parquet", ".tar", ".jsonl", ".csv", ".tsv", ".json")
"""Endings of tables. A folder with files of several has those of the first."""
BESIDE = (".txt", ".caption")
"""Endings of a caption beside its picture."""
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
"""Names of folders and shards, and the split that they are."""


def open_table(
    data: str, split: str, *, columns: Collection[str] = ("image",), text: str = "caption"
) -> Any:
    """Tables of one or more files ("shards/*.parquet"), a folder of them or of images, or a hub id.

    .parquet, .jsonl, .csv, .tsv, .json of rows or of COCO's captions, or .tar of webdataset (its
    columns are the files' endings: jpg, txt). Of all but .parquet only `text` and `columns` are
    read. A folder of images has metadata.csv, .jsonl or .parquet in it, with a column file_name; or
    a .txt or .caption beside each image, as kohya's trainers take them. Folders and shards in it
    that are called train, test, validation... are splits.

    Raises:
        FileNotFoundError, ValueError: nothing is there; it cannot be read, or has no rows; some of
            its files are of another split, and others of none.
    """
    path = Path(data).expanduser()
    files = _matching(path)
    if _is_saved(path):
        table = _open_saved(path, split)
    elif path.is_dir() and not _says_its_files(path):
        table = _open_folder(path, split, columns, text)
    elif files or path.suffix.lower() in KINDS:
        if not files:
            raise FileNotFoundError(
                f"data: no such file: {data}. Give one that exists (from here, {Path.cwd()})."
            )
        endings = {file.suffix.lower() for file in files}
        if len(endings) > 1 or not endings <= {*KINDS}:
            raise ValueError(
                f"data: expected files that end in one of {', '.join(KINDS)}, got "
                f"{', '.join(sorted(endings)) or 'none'} of {data}. Unpack them, or write them as "
                "one of these; pictures are read by their folder."
            )
        table = _open_files(files, columns, text)
    else:
        with loading("data", data, ValueError, RuntimeError, DatasetsError) as name:
            table = datasets.load_dataset(name, split=split)
    if not len(table):
        raise ValueError(f"data: expected at least one row in {data}, got none.")
    try:
        table.data.validate(full=True)  # that texts are
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"data: {data} cannot be read: {error}. Write it again.") from error
    return table


def _matching(path: Path) -> list[Path]:
    """The file, or those of a pattern; in a folder's name that there is, nothing is a pattern."""
    if os.path.exists(path):
        return [path] if path.is_file() else []
    there = next((one for one in path.parents if os.path.exists(one)), Path())
    pattern = os.path.join(glob.escape(str(there)), path.relative_to(there))
    return [Path(one) for one in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(one)]


def _is_saved(folder: Path) -> bool:
    saved = ["dataset_dict.json"], ["dataset_info.json", "state.json"]
    return any(all((folder / name).is_file() for name in names) for names in saved)


def _open_saved(folder: Path, split: str) -> Any:
    """What `save_to_disk` of `datasets` wrote."""
    with _readable(folder):
        found = datasets.load_from_disk(str(folder))
    if isinstance(found, dict):
        if split not in found:
            known = ", ".join(found)
            raise ValueError(f"split: expected one of {folder} ({known}), got {split!r}.")
        found = found[split]
    return found.with_format(None)


def check_columns(table: Any, images: Collection[str], text: str) -> None:
    """ValueError where a table lacks one of them, or the texts are none."""
    missing = sorted({*images, text} - set(table.column_names))
    if missing:
        small = {name.lower() for name in missing}
        alike = [name for name in table.column_names if name.lower() in small]
        told = f" (capitals count: {', '.join(alike)})" if alike else ""
        raise ValueError(
            f"data: expected columns {[*images, text]}, {missing} missing among "
            f"{table.column_names}{told}. Name them with --caption_column, and --image_column "
            "where there is one image."
        )
    kind = table.features[text]
    one = getattr(kind, "feature", kind)  # of a list of several
    if getattr(one, "dtype", None) not in ("string", "large_string", "string_view", "null"):
        raise ValueError(
            f"data: expected texts in the column {text}, or lists of texts, got {kind}. Name "
            "another with --caption_column."
        )


def as_images(table: Any, columns: Sequence[str]) -> Any:
    """The columns undecoded, so that a damaged image is an error of its own row.

    Raises:
        ValueError: one of them has no images.
    """
    for name in columns if len(table) else ():
        try:
            table = table.cast_column(name, datasets.Image(decode=False))
        except (TypeError, ValueError, pyarrow.ArrowException) as error:
            raise ValueError(
                f"data: expected images in the column {name}, paths or bytes, got "
                f"{table.features[name]}. Name another with --image_column."
            ) from error
    return table


def fingerprint(table: Any, *others: Any) -> str:
    """A hash of a table's rows in their order: texts, names of files, and what is in images.

    others: arrays that belong to it. Of an image, a file or bytes, its size and `ENDS` are read.
    """
    digest = xxhash.xxh3_128(repr((len(table), table.column_names)).encode())
    for column in table.data.columns:
        for chunk in column.chunks:
            for start in range(0, len(chunk), AT_ONCE):
                for values in _lean(chunk[start : start + AT_ONCE]):
                    digest.update("".join(map(repr, values)).encode())
    for other in others:
        digest.update(repr(other if other is None else other.tolist()).encode())
    return digest.hexdigest()


def _lean(values: Any) -> Iterator[list[Any]]:
    """An arrow array's values; of images their names and their sizes and ends."""
    kind = values.type
    if not pyarrow.types.is_struct(kind):
        yield values.to_pylist()
        return
    for name in (kind.field(place).name for place in range(kind.num_fields)):
        part = pyarrow.compute.struct_field(values, name)
        if name == "bytes":
            yield [one.is_valid and _ends(io.BytesIO(one.as_buffer())) for one in part]
        elif name == "path":
            found = part.to_pylist()
            yield [one and os.path.basename(one) for one in found]
            yield [one and _ends_of_file(one) for one in found]
        else:
            yield part.to_pylist()


def _ends_of_file(path: str) -> str | None:
    """None where it is no file here."""
    try:
        with open(path, "rb", buffering=0) as file:
            return _ends(file)
    except (OSError, ValueError):  # of a path with a NUL
        return None


def _ends(file: Any) -> str:
    """A hash of a file's size, and of its first and last bytes."""
    size = file.seek(0, os.SEEK_END)
    digest = xxhash.xxh3_128(str(size).encode())
    for start in {0, max(0, size - ENDS)}:
        file.seek(start)
        digest.update(file.read(ENDS))
    return digest.hexdigest()


def _says_its_files(folder: Path) -> bool:
    """Whether its README.md lists the splits' files, as data sets of the hub have it."""
    readme = folder / "README.md"
    return readme.is_file() and "data_files:" in readme.read_text(errors="replace")


def _open_folder(folder: Path, split: str, columns: Collection[str], text: str) -> Any:
    files = files_of(folder)
    of_kind = {kind: [one for one in files if one.suffix.lower() == kind] for kind in KINDS}
    told = [one for kind in KINDS for one in of_kind[kind] if one.stem.lower() == "metadata"]
    pictures = [one for one in files if one.suffix.lower() in SUFFIXES]
    shards = KINDS[:2] if pictures else KINDS
    tables: list[Path] = next((of_kind[kind] for kind in shards if of_kind[kind]), [])
    if tables and not told:
        others = len(pictures) + sum(map(len, of_kind.values())) - len(tables)
        _tell(folder, others, "pictures and tables of another kind")
        return _open_files(_of_split(tables, folder, split), columns, text)
    if pictures or told:
        return _open_pictures(folder, files, told, split, columns, text)
    with loading("data", str(folder), ValueError, RuntimeError, DatasetsError):
        return datasets.load_dataset(str(folder), split=split)


def _open_pictures(
    folder: Path,
    files: Sequence[Path],
    told: Sequence[Path],
    split: str,
    columns: Collection[str],
    text: str,
) -> Any:
    """A row for each of the files `told`, and for each other picture with a text beside it."""
    rows = [one for file in told for one in _rows_of_metadata(file)]
    seen = {picture for picture, _, _ in rows}
    bare, texts = 0, {one for one in files if one.suffix.lower() in BESIDE}
    named = {one.with_suffix(one.suffix.lower()): one for one in sorted(texts)}
    for picture in files:
        if picture.suffix.lower() in SUFFIXES:
            beside = [named[one] for one in map(picture.with_suffix, BESIDE) if one in named]
            texts -= {*beside}
            if picture in seen:
                continue
            bare += not beside
            for one in beside[:1]:
                row = {"image": str(picture), "caption": "".join(lines_of(one))}
                rows.append((picture, str(one), row))
    if not rows:
        raise ValueError(
            f"data: {folder}: expected metadata.csv or metadata.jsonl with the columns file_name "
            f"and caption, or a .txt beside each picture, got {bare} pictures without a caption."
        )
    _tell(folder, bare, "pictures without a caption")
    _tell(folder, len(texts), "texts without a picture")
    kept = set(_of_split([picture for picture, _, _ in rows], folder, split))
    return _table(((where, row) for one, where, row in rows if one in kept), columns, text)


def _rows_of_metadata(file: Path) -> Iterator[tuple[Path, str, dict[str, Any]]]:
    """(picture, file and line, row); file_name is `image`, and x_file_name is x."""
    for where, row in _rows_of_table(file):
        found = dict(row)
        for name in [one for one in row if one == "file_name" or one.endswith("_file_name")]:
            path = row[name]
            if not isinstance(path, str) or not path:
                raise ValueError(f"data: {where}: expected a path in {name}, got {path!r}.")
            own = "image" if name == "file_name" else name.removesuffix("_file_name")
            found[own] = os.path.normpath(file.parent / path)
            picture = Path(found[own])
        if len(found) == len(row):
            raise ValueError(
                f"data: {where}: expected a column file_name, got {list(row)}. Name it so, in "
                "small letters."
            )
        yield picture, where, found


def _tell(where: Path, number: int, what: str) -> None:
    if number:
        LOGGER.warning("data: %s: %d %s are not read.", where, number, what)


def _of_split(files: Sequence[Path], folder: Path, split: str) -> list[Path]:
    """Those of the split, where the folders or shards of all files say one; else all of them.

    Raises:
        ValueError: no such split; some are of another one, and others say none.
    """
    paths = [Path(os.path.relpath(file, folder)) for file in files]
    splits = list(map(_split, paths))
    if None in splits:
        others = [i for i, name in enumerate(splits) if name not in (None, "train")]
        if others:
            raise ValueError(
                f"data: {folder}: expected all files to be of a split by their names, or none, got "
                f"{paths[splits.index(None)]} beside {paths[others[0]]}. Rename or move some "
                "(train_0.parquet, train/), or give the folder or the file to read in --data."
            )
        splits = ["train"] * len(files)
    wanted = SPLITS.get(split, split)
    found = [file for file, name in zip(files, splits, strict=True) if name == wanted]
    if not found:
        known = ", ".join(sorted({str(name) for name in splits}))
        raise ValueError(f"split: expected one of {folder} ({known}), got {split!r}.")
    _tell(folder, len(files) - len(found), f"files of splits other than {split}")
    return found


def _split(path: Path) -> str | None:
    """That of a file in train/ or train2017/, or of a shard train-00000-of-00002.parquet."""
    shard = path.stem if path.suffix.lower() in KINDS else ""
    names = [
        re.fullmatch(r"([a-z]+)([-_.]?\d.*)?", one.lower()) for one in (*path.parts[:-1], shard)
    ]
    return next((SPLITS[one[1]] for one in names if one and one[1] in SPLITS), None)


def _open_files(files: Sequence[Path], columns: Collection[str], text: str) -> Any:
    """Files of one kind as one table."""
    kind = files[0].suffix.lower()
    if kind == ".tar":
        return _open_tars(files, {*columns, text}, text)
    if kind == ".parquet":
        return _open_parquet(files)
    return _table((row for file in files for row in _rows_of_table(file)), columns, text)


def _open_parquet(files: Sequence[Path]) -> Any:
    schemas: dict[Path, Any] = {}
    for file in files:
        if "::" in str(file):
            raise ValueError(
                f"data: {file}: expected a path without ::, which is a chain of addresses for "
                "`datasets`. Rename it."
            )
        with _readable(file):
            about = pyarrow.parquet.read_metadata(file)
            if about.num_rows:  # `datasets` takes no others
                schemas[file] = about.schema.to_arrow_schema()
    if not schemas:
        return datasets.Dataset.from_dict({})
    found = {"train": [glob.escape(str(file)) for file in schemas]}
    common, odd = _common_schema(schemas)
    features = common and datasets.Features.from_arrow_schema(common)
    try:
        with _readable(*files):
            return datasets.load_dataset(
                "parquet", data_files=found, split="train", features=features
            )
    except ValueError as error:
        raise (ValueError(odd) if odd else error) from error.__cause__


def _common_schema(schemas: Mapping[Path, Any]) -> tuple[Any, str]:
    """All shards' columns, with types that hold those of each; None where they are the same.

    None also where the types of one do not fit, and what to tell if `datasets` cannot convert them.
    """
    common, *others = schemas.values()
    if all(one.equals(common) for one in others):
        return None, ""
    for file, schema in schemas.items():
        try:
            common = pyarrow.unify_schemas([common, schema], promote_options="permissive")
        except pyarrow.ArrowException as error:
            return None, (
                f"data: {file}: expected columns of types that fit those of the files before it, "
                f"got others ({error}). Write it with the same types."
            )
    return common, ""


@contextmanager
def _readable(*files: Path) -> Iterator[None]:
    """What libraries cannot read is a ValueError with the file's name."""
    try:
        yield
    except (OSError, ValueError, EOFError, *OF_LIBRARIES) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the outer ones say only that there is one
            cause = cause.__cause__
        told = (str(cause).strip().splitlines() or [type(cause).__name__])[0].rstrip(".")
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise ValueError(
            f"data: {files[0]}{more} cannot be read: {told}. Write it again."
        ) from error


def _table(
    rows: Iterable[tuple[str, Mapping[str, Any]]], columns: Collection[str], text: str
) -> Any:
    """Rows of texts; columns that are not asked for are left empty.

    That of `text` has lists where a row has one.
    """
    rows = iter(rows)
    names: dict[str, None] = {}
    parts: dict[str, list[Any]] = {name: [] for name in (*columns, text)}
    while some := list(islice(rows, AT_ONCE)):
        names |= dict.fromkeys(name for _, row in some for name in row if name)
        for name, found in parts.items():
            cells = [_cell(row.get(name), name == text, where) for where, row in some]
            found.append(_texts(cells) if any(isinstance(one, list) for one in cells) else
                         pyarrow.array(cells, pyarrow.string()))  # fmt: skip
    if any(part.type == LISTS for part in parts[text]):
        parts[text] = [
            part if part.type == LISTS else _texts(part.to_pylist()) for part in parts[text]
        ]
    number = sum(map(len, parts[text]))
    table = {
        name: pyarrow.chunked_array(parts[name]) if name in parts else pyarrow.nulls(number)
        for name in names
    }
    return datasets.Dataset(pyarrow.table(table))


def _texts(cells: Sequence[Any]) -> Any:
    return pyarrow.array([one if isinstance(one, list) else [one] for one in cells], LISTS)


def _cell(value: Any, is_text: bool, where: str) -> Any:
    """A text, that of a number, or none; of a text's column also a list of them."""
    if is_text and isinstance(value, list):
        return [_text(one, where) for one in value]
    if not is_text and isinstance(value, bool | int | float):
        with suppress(OverflowError):
            return str(float(value))
    return _text(value, where)


def _text(value: Any, where: str) -> str | None:
    if value is not None and not (isinstance(value, str) and is_unicode(value)):
        raise ValueError(f"data: {where}: expected a text, got {str(value)[:80]!r}.")
    return value


def _rows_of_table(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file and line, row) of a table of texts, of COCO's captions, or of a parquet."""
    if file.suffix.lower() == ".parquet":
        with _readable(file):
            rows = pyarrow.parquet.read_table(file).to_pylist()
        yield from ((f"{file}, row {i}", row) for i, row in enumerate(rows))
        return
    for where, row in rows_of(file):
        if not isinstance(row, Mapping):
            raise ValueError(f"data: {where}: expected a row of names and values, got {row!r:.80}.")
        if file.suffix.lower() == ".json" and {"images", "annotations"} <= set(row):
            yield from _rows_of_coco(file, row)
        else:
            yield where, row


def _rows_of_coco(file: Path, found: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row an image, with all of its captions. Images without one are left out."""
    captions: dict[Any, list[Any]] = {}
    try:
        for one in found["annotations"]:
            captions.setdefault(one["image_id"], []).append(one["caption"])
        names: dict[Any, str] = {}
        for one in found["images"]:
            first, name = names.setdefault(one["id"], str(one["file_name"])), str(one["file_name"])
            if first != name:
                raise ValueError(
                    f"data: {file}: expected an id for each image, got {one['id']!r} for {first} "
                    f"and {name}. Give them different ones."
                )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"data: {file}: expected COCO's captions (captions_*.json): images with id and "
            f"file_name, annotations with image_id and caption, got some without ({error})."
        ) from error
    shown = {key: name for key, name in names.items() if key in captions}
    _tell(file, len(names) - len(shown), "images without a caption")
    _tell(file, len(captions) - len(shown), "images with captions, but without a file_name,")
    folder = _folder_of_coco(file, list(shown.values()))
    for key, name in shown.items():
        yield f"{file}, image {key}", {"image": str(folder / name), "caption": captions[key]}


def _folder_of_coco(file: Path, names: Sequence[str]) -> Path:
    """coco/train2017 of coco/annotations/captions_train2017.json, or the file's own folder."""
    split = file.stem.rpartition("_")[2]
    looked = [file.parent.parent / split, file.parent / split, file.parent]
    for folder in looked:
        if not names or any(os.path.exists(folder / name) for name in names):
            return folder
    raise FileNotFoundError(
        f"data: no image {names[0]} of {file} in {', '.join(map(str, looked))}. Put the images "
        "into one of these folders."
    )


def _open_tars(files: Sequence[Path], columns: Collection[str], text: str) -> Any:
    """webdataset: a row a stem, a column an ending; those that are not asked for are left empty.

    `datasets`' own reader decodes every file, so that one array among the images can end a run.
    """
    with _readable(files[0]), tarfile.open(files[0]) as tar:
        endings = dict.fromkeys(_key_and_ending(member)[1] for member in islice(tar, 1000))
    kinds = {name: "binary" if name in columns else "null" for name in endings if name}
    kinds |= {text: "string"} if text in kinds else {}
    with _readable(*files):
        return datasets.Dataset.from_generator(
            _rows_of_tars,
            features=datasets.Features(
                {name: datasets.Value(kind) for name, kind in kinds.items()}
            ),
            # Sizes and times: the cache of rows is found by these arguments.
            gen_kwargs={"files": [_stamped(file) for file in files], "kinds": kinds},
        )


def _stamped(file: Path) -> tuple[str, int, int]:
    about = file.stat()
    return os.path.abspath(file), about.st_size, about.st_mtime_ns


def _rows_of_tars(
    files: Sequence[tuple[str, int, int]], kinds: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    for file, *_ in files:
        try:
            with tarfile.open(file) as tar:
                named = ((member, *_key_and_ending(member)) for member in tar)
                seen: set[tuple[str, str]] = set()
                for key, group in groupby((one for one in named if one[2]), key=lambda one: one[1]):
                    row: dict[str, Any] = dict.fromkeys(kinds)
                    for member, _, ending in group:
                        if kinds.get(ending, "null") != "null":
                            if (key, ending) in seen:
                                raise tarfile.ReadError(f"it has {member.name} twice")
                            seen.add((key, ending))
                            content = tar.extractfile(member).read()
                            row[ending] = (
                                _decoded(content) if kinds[ending] == "string" else content
                            )
                    yield row
                _check_end(tar)
        except (tarfile.TarError, EOFError) as error:
            raise ValueError(f"{file}: {error}") from None


def _check_end(tar: tarfile.TarFile) -> None:
    """tarfile takes a header that it cannot read, and anything after it, for the end."""
    tar.fileobj.seek(tar.offset)
    whole = False
    while block := tar.fileobj.read(2**20):
        whole = not block.strip(b"\0")
        if not whole:
            break
    if not whole:
        raise tarfile.ReadError("its end is missing, or there are files behind it")


def _key_and_ending(member: tarfile.TarInfo) -> tuple[str, str]:
    """("a/001", "seg.png") of a/001.seg.png; no ending: not a file of webdataset."""
    folder, name = os.path.split(member.name)
    stem, _, ending = name.partition(".")
    return os.path.join(folder, stem), ending.lower() if stem and member.isfile() else ""


def _decoded(content: bytes) -> str | None:
    """None makes the row unreadable."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
