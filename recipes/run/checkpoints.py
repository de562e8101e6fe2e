"""A run's folder: one run at a time, the options that it began with, and whole checkpoints.

    with opened(options, accelerator) as found:          the checkpoint to go on from, or None
        state.load(found.folder)
        ...
        save(accelerator, output, step, parameters, state.save)    the two latest are kept

A checkpoint counts once its file `complete` is there, with the step, the lines of the log so far,
and the SHA-256 of each file. What is damaged is put aside, and the checkpoint before it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from torch import nn

from run.engines import held
from run.log import keep_lines, lines_of, replace_text

LOGGER = logging.getLogger(__name__)
COMPLETE, KEPT = "complete", 2

# Options that a resumed run may have otherwise; all the others make another run, the learning
# rate too: the optimizer's and the schedule's state hold the old one.
MAY_CHANGE = frozenset(
    (
        # How far.
        *("max_train_steps", "num_epochs"),
        # What is looked at.
        *(
            "logging_steps",
            "report_to",
            "skip_first_validation",
            "validation_steps",
            "validation_epochs",
        ),
        *("validation_prompts", "validation_per_category"),
        *("validation_inference_steps", "validation_guidance_scale"),
        # How it runs: the same but for rounding.
        *("compile", "gradient_checkpointing", "chunk_size", "dataloader_num_workers"),
        "precompute",
        # What is kept, and where.
        *("checkpointing_steps", "checkpointing_epochs", "output_dir", "resume_from_checkpoint"),
    )
)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Checkpoint:
    """A whole one. step: optimizer steps done. lines: of the log by then."""

    folder: Path
    step: int
    lines: int


@contextmanager
def opened(options: Any, state: Accelerator | PartialState) -> Iterator[Checkpoint | None]:
    """Holds `options.output_dir` for this run, and finds where it goes on.

    options.json is written, and the log cut to the checkpoint's lines.

    Raises:
        ValueError: another run holds the folder; it has a run and `options.resume_from_checkpoint`
            is off, or that run's options make another one; all checkpoints are damaged.
    """
    lock = FileLock(Path(options.output_dir) / ".lock")
    try:
        yield _agreed(state, lambda: _open(options, lock))
    finally:
        lock.release()


def check_output(options: Any) -> None:
    """Reads only; `opened` does it too, and recipes call it before they load anything.

    Raises:
        ValueError: the folder has a run and `options.resume_from_checkpoint` is off, or that run's
            options make another one.
    """
    output = Path(options.output_dir)
    if not _checkpoints(output):
        return
    if not options.resume_from_checkpoint:
        raise ValueError(
            f"{output} holds a run; add --resume_from_checkpoint latest or choose another "
            "--output_dir"
        )
    changed = _changed_options(options, output / "options.json")
    refused = [text for name, text in changed.items() if name not in MAY_CHANGE]
    if refused:
        raise ValueError(
            f"{output / 'options.json'}: expected the options that the run began with, got "
            f"{', '.join(refused)}. Give them as they were, or choose another --output_dir."
        )


def _open(options: Any, lock: FileLock) -> Checkpoint | None:
    output = Path(options.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"{output}: another run is writing there. Wait until it ends, or choose another "
            "--output_dir."
        ) from None
    except NotImplementedError:
        LOGGER.warning("%s: its file system has no locks; start no second run there.", output)
    check_output(options)
    all_of_it = _checkpoints(output)
    if all_of_it:
        _tell_of_options(options, output / "options.json")
    found = _latest(output, all_of_it)
    keep_lines(output / "log.jsonl", 0 if found is None else found.lines)
    replace_text(output / "options.json", json.dumps(vars(options), indent=1) + "\n")
    return found


def save(
    accelerator: Accelerator,
    output: Path,
    step: int,
    trained: Iterable[nn.Parameter],
    write: Callable[[Path], Any],
) -> Path:
    """Saves a checkpoint, on every process; the older ones are removed but for the latest.

    write: fills the folder that it is given, on every process.

    Raises:
        FloatingPointError: one of the trained parameters is not finite. Nothing is saved.
    """
    broken = sum(not bool(held(one).isfinite().all()) for one in trained if one.requires_grad)
    if int(accelerator.reduce(torch.tensor(broken, device=accelerator.device))):
        raise FloatingPointError(
            f"weights: expected finite numbers after step {step}, got others in {broken} tensors. "
            f"They are not saved. {last_whole(output)} Start anew with a lower --learning_rate."
        )
    folder = _agreed(accelerator, lambda: _make_room(output))
    write(folder)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        marker = {
            "step": step,
            "lines": len(lines_of(output / "log.jsonl")),
            "sha256": {
                file.relative_to(folder).as_posix(): _digest(file)
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            },
        }
        replace_text(folder / COMPLETE, json.dumps(marker, indent=1) + "\n")
    accelerator.wait_for_everyone()
    return folder


def last_whole(output: Path) -> str:
    """A sentence for errors: where a run can go on."""
    whole = [folder for folder in _checkpoints(output) if (folder / COMPLETE).exists()]
    return f"The last good checkpoint is {whole[-1]}." if whole else "There is no checkpoint yet."


def _changed_options(options: Any, file: Path) -> dict[str, str]:
    """Name -> what it was and what it is, of the options that the run began with otherwise.

    Raises:
        ValueError: the file cannot be read.
    """
    if not file.exists():
        return {}
    try:
        stored = dict(json.loads(file.read_text()))
    except ValueError as error:
        raise ValueError(
            f"{file}: expected the run's options, got {error}. Remove the file to resume with the "
            "options that you give."
        ) from None
    defaults = options.of.defaults
    return {
        name: f"{name} {stored.get(name, defaults.get(name))} -> {vars(options).get(name, 'none')}"
        for name in {**defaults, **stored}
        if stored.get(name, defaults.get(name)) != vars(options).get(name, "none")
    }


def _tell_of_options(options: Any, file: Path) -> None:
    """A warning of those that a resumed run has otherwise."""
    if not file.exists():
        LOGGER.warning("%s is missing: the options are taken to be the run's.", file)
    changed = _changed_options(options, file)
    quiet = {"output_dir", "resume_from_checkpoint"}
    allowed = [text for name, text in changed.items() if name not in quiet]
    if allowed:
        LOGGER.warning("Resumed with other options: %s.", ", ".join(allowed))


def _latest(output: Path, folders: list[Path]) -> Checkpoint | None:
    """The last whole checkpoint; unfinished ones are removed, damaged ones renamed."""
    damaged = []
    for folder in reversed(folders):
        if not (folder / COMPLETE).exists():  # the run was killed while it wrote it
            shutil.rmtree(folder)
            continue
        try:
            return _verified(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(str(error))
            aside = folder.with_name(f"damaged_{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            LOGGER.warning("%s. It is now %s; the one before is tried.", error, aside.name)
    if damaged:
        raise ValueError(
            f"no checkpoint is whole: {'; '.join(damaged)}. Choose another --output_dir, to start "
            "anew."
        )
    return None


def _verified(folder: Path) -> Checkpoint:
    """Reads the marker and compares each file with it."""
    try:
        marker = json.loads((folder / COMPLETE).read_text())
        found = Checkpoint(folder, int(marker["step"]), int(marker["lines"]))
        digests = dict(marker["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / COMPLETE} is damaged: {error!r}") from None
    for name, digest in digests.items():
        if not (folder / name).exists():
            raise ValueError(f"{folder / name} is missing")
        if _digest(folder / name) != digest:
            raise ValueError(f"{folder / name} is damaged: its checksum is another")
    return found


def _make_room(output: Path) -> Path:
    """The next checkpoint's folder."""
    found = _checkpoints(output)
    for folder in found[: 1 - KEPT]:
        shutil.rmtree(folder)
    return output / "checkpoints" / f"checkpoint_{_number(found[-1]) + 1 if found else 0}"


def _checkpoints(output: Path) -> list[Path]:
    """Those that a run has written, in order; folders of other names are nobody's business here."""
    found = (output / "checkpoints").glob("checkpoint_*")
    return sorted((one for one in found if re.fullmatch(r"checkpoint_\d+", one.name)), key=_number)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("_", 1)[1])


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _agreed(state: Accelerator | PartialState, function: Callable[[], Found]) -> Found:
    """What the function does on the main process, as every process's result or error."""
    told: list[Any] = [None]
    if state.is_main_process:
        try:
            told = [function()]
        except (OSError, ValueError) as error:
            told = [error]
    broadcast_object_list(told)
    if isinstance(told[0], Exception):
        raise told[0]
    found: Found = told[0]
    return found
