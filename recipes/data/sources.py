"""What an option names: a folder or a file, an id of the hub, or a Python object."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def check_source(option: str, name: str) -> None:
    """FileNotFoundError where a name can only be a path, and nothing is there. "" names nothing."""
    path = Path(name).expanduser()
    if not name or path.exists() or _may_be_id(name):
        return
    raise FileNotFoundError(
        f"{option}: no such file or folder: {name}. Give one that exists (from here, {Path.cwd()}),"
        " or a hub id (owner/name)."
    )


def is_hub_id(name: str) -> bool:
    """Whether the hub takes it as an id; it may be a folder here all the same."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _may_be_id(name: str) -> bool:
    """One of the hub's "owner/name"s; one whose owner is a folder here is a path."""
    owner, slash, _ = name.partition("/")
    of_path = (slash and Path(owner).is_dir()) or Path(name).suffix.lower() in _ENDINGS
    return is_hub_id(name) and not of_path


_ENDINGS = {".parquet", ".jsonl", ".json", ".csv", ".tsv", ".tar", ".txt", ".safetensors", ".yaml"}


def found_here(name: str) -> Path | None:
    """The file or folder of a name; of a hub id, its snapshot in the hub's cache; None: neither."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def content_of(name: str) -> str | None:
    """A hash of a file or a folder of weights and configs; of a hub id, the commit that is here.

    None where it is not here; "" for "".
    """
    if not name:
        return ""
    path = found_here(name)
    if path is None or not Path(name).expanduser().exists():
        return path and path.name
    digest = xxhash.xxh3_128()
    for file in _files_under(path) if path.is_dir() else [path]:
        if file.is_file() and file.suffix in _HELD:
            digest.update(f"{file.relative_to(path)}: {file.stat().st_size}".encode())
            with file.open("rb") as opened:
                while block := opened.read(2**24):
                    digest.update(block)
    return digest.hexdigest()


def _files_under(folder: Path) -> list[Path]:
    """In order. Links are followed, but for those to a folder that they lie in."""
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        above = {os.path.realpath(one) for one in (root, *Path(root).parents)}
        folders[:] = [n for n in folders if os.path.realpath(os.path.join(root, n)) not in above]
        found += [Path(root, name) for name in names]
    return sorted(found)


_HELD = {".safetensors", ".bin", ".pt", ".json", ".txt", ".model"}


@contextmanager
def loading(option: str, name: str, *more: type[Exception]) -> Iterator[str]:
    """What is loaded inside is the option's; what the libraries do not find is a ValueError.

    Gives the name to load, with ~ as the home folder.

    more: errors of the libraries besides OSError that say so.
    """
    check_source(option, name)
    try:
        yield str(Path(name).expanduser()) if name.startswith("~") else name
    except (OSError, *more) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if not isinstance(error, OSError | ValueError):
            lines[0] = f"{type(error).__name__}: {lines[0]}"
        raise ValueError(
            f"{option}: expected a folder, or a hub id that can be reached, got {name}: {lines[0]}"
        ) from error


def load_object(option: str, name: str) -> Any:
    """What `package.module:name` names; its module is imported.

    Raises:
        ValueError: no such module, or nothing of that name in it.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{option}: expected package.module:name that can be imported, got {name}: {error}. "
            "The module has to be installed, or on PYTHONPATH."
        ) from error


def world(module: str) -> Any:
    """A module of the embedded world, for `--data world` and `world:` prompts.

    The world is evidence (`lab/`): nothing else of it is imported by the recipes.
    """
    return importlib.import_module(f"lab.world.{module}")


def is_world(data: str) -> bool:
    """Whether `--data` names the embedded world, or a variant of it (`world:corner:400`)."""
    return data.partition(":")[0] == "world"


CLONE = Path(__file__).resolve().parents[2]


def given_model(model: str, data: str, of_world: str) -> str:
    """The model; where none is given and the data are the world's, the world's.

    One that lies in the clone is found there from any folder.

    Raises:
        ValueError: none is given for other data.
    """
    if not model and not is_world(data):
        raise ValueError(
            f"model: expected a pipeline for the data {data}, a folder or a hub id, got none. Give "
            f"--model: only the embedded world's data have one of their own, {of_world}."
        )
    model = model or of_world
    in_clone = CLONE / model
    return model if Path(model).exists() or not in_clone.exists() else os.path.relpath(in_clone)
