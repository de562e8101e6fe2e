"""What an option names to load: a folder or a file, or an id of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
    of_path = (slash and Path(owner).is_dir()) or Path(name).suffix in _ENDINGS
    return is_hub_id(name) and not of_path


_ENDINGS = {".parquet", ".jsonl", ".json", ".csv", ".tar", ".safetensors", ".yaml"}


@contextmanager
def loading(option: str, name: str, *more: type[Exception]) -> Iterator[None]:
    """What is loaded inside is the option's; what the libraries do not find is a ValueError.

    more: errors of the libraries besides OSError that say so.
    """
    check_source(option, name)
    try:
        yield
    except (OSError, *more) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{option}: expected a folder, or a hub id that can be reached, got {name}: {lines[0]}"
        ) from error
