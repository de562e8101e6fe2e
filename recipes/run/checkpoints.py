"""A run's folder: one run at a time, the options that it began with, and whole checkpoints.

    with opened(options, accelerator, made_of) as found:    the checkpoint to go on from, or None
        state = RunState(accelerator, model, optimizer, {"schedule": schedule, ...})
        state.load(found.folder)
        ...
        parts = state.parts()
        save(accelerator, output, step, parts, partial(state.write, parts), made_of)

A checkpoint is named by its step, and the two latest are kept. It counts once its file `complete`
is there, with the step, the lines of the log so far, what the run is made of, and the SHA-256 of
each file. One that is damaged is put aside, and the one before it is used. Nothing in a checkpoint
is run: its pickles are loaded as data.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.utils import (
    DistributedType,
    broadcast_object_list,
    extract_model_from_parallel,
    gather_object,
    patch_environment,
)
from accelerate.utils import load as load_data
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._pytree import tree_leaves

from run.engines import held, reshard
from run.log import check_writable, keep_lines, lines_of, not_writable, replace_text

LOGGER = logging.getLogger(__name__)
COMPLETE, KEPT = "complete", 2
WEIGHTS, OPTIMIZER, OTHERS = "trainable.safetensors", "optimizer.bin", "others.bin"

# Options that a resumed run may have otherwise; all the others make another run, the learning
# rate too: the optimizer's and the schedule's state hold the old one.
MAY_CHANGE = frozenset(
    (
        # How far, and the EMA's decay, which goes by that where it is left out (see `_may_change`).
        *("max_train_steps", "num_epochs", "ema_decay"),
        # What is looked at.
        *("logging_steps", "report_to", "validation_steps", "validation_epochs"),
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
    """A whole one. step: optimizer steps done. lines: of the log by then. made_of: see `opened`."""

    folder: Path
    step: int
    lines: int
    made_of: Mapping[str, str]


@contextmanager
def opened(
    options: Any, state: Accelerator | PartialState, made_of: Mapping[str, str]
) -> Iterator[Checkpoint | None]:
    """Holds `options.output_dir` for this run, and finds where it goes on.

    options.json is written, and the log cut to the checkpoint's lines.

    made_of: a fingerprint of the "data", of the "model"; a resumed run has to have the same.

    Raises:
        ValueError: another run holds the folder, or it cannot be written; it has a run and
            `options.resume_from_checkpoint` is off, or that run's options, data or model make
            another one; all checkpoints are damaged.
    """
    lock = FileLock(Path(options.output_dir) / ".lock")
    try:
        yield _agreed(state, lambda: _open(options, lock, made_of))
    finally:
        lock.release()


def check_output(options: Any) -> None:
    """Reads only; `opened` does it too, and recipes call it before they load anything.

    Raises:
        ValueError: the folder cannot be written; it has a run and `options.resume_from_checkpoint`
            is off, or that run's options make another one.
    """
    output = Path(options.output_dir)
    check_writable(output, output)
    for name in ("log.jsonl", "options.json", "checkpoints"):
        if (taken := output / name).exists() and taken.is_dir() != (name == "checkpoints"):
            kind = "folder" if taken.is_dir() else "file"
            raise not_writable(output, f"{name} there is a {kind}, no run's")
    if not _checkpoints(output):
        return
    if not options.resume_from_checkpoint:
        raise ValueError(
            f"{output} holds a run; add --resume_from_checkpoint latest or choose another "
            "--output_dir"
        )
    changed = _changed_options(options, output / "options.json")
    refused = [_told(name, *both) for name, both in changed.items() if not _may_change(name, *both)]
    if refused:
        raise ValueError(
            f"{output / 'options.json'}: expected the options that the run began with, got "
            f"{', '.join(refused)}. Give them as they were, or choose another --output_dir."
        )


def check_left(option: str, wanted: int, done: int) -> None:
    """ValueError where a resumed run has already done more than is wanted of it."""
    if wanted < done:
        raise ValueError(
            f"{option}: expected at least {done}, which the run has done, got {wanted}. Give more, "
            "or choose another --output_dir to start anew."
        )


def _open(options: Any, lock: FileLock, made_of: Mapping[str, str]) -> Checkpoint | None:
    check_output(options)
    output = Path(options.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"{output}: another run is writing there. Wait until it ends, or choose another "
            "--output_dir."
        ) from None
    except NotImplementedError:
        LOGGER.warning("%s: its file system has no locks; start no second run there.", output)
    except OSError as error:
        raise not_writable(output, str(error)) from None
    check_output(options)  # now that no other run changes it
    found, log = None, output / "log.jsonl"
    if folders := _checkpoints(output):
        _tell_of_options(options, output / "options.json")
        found = _latest(folders)
    if found is not None:
        _check_made_of(found, made_of)
        if (lines := len(lines_of(log))) < found.lines:
            LOGGER.warning("%s: expected the %d lines that it had, got %d; the others are lost.",
                           log, found.lines, lines)  # fmt: skip
    keep_lines(log, 0 if found is None else found.lines)
    replace_text(output / "options.json", json.dumps(vars(options), indent=1) + "\n")
    return found


def save(
    accelerator: Accelerator,
    output: Path,
    step: int,
    parts: Mapping[str, Any],
    write: Callable[[Path], Any],
    made_of: Mapping[str, str],
) -> Path:
    """Saves a checkpoint, on every process; the older ones are removed but for the latest.

    parts: the tensors of "weights", "optimizer", ..., in dicts and lists, that have to be finite.
    write: fills the folder that it is given, on every process. made_of: as of `opened`.

    Raises:
        FloatingPointError: one of the parts is not finite. Nothing is saved.
        OSError: the disk is full, say. What was written is removed.
    """
    counts = torch.tensor([_broken(part) for part in parts.values()], device=accelerator.device)
    broken: Any = accelerator.reduce(counts)
    if int(broken.sum()):
        bad = [f"{int(n)} of {name}" for name, n in zip(parts, broken, strict=True) if n]
        raise FloatingPointError(
            f"checkpoint: expected finite numbers after step {step}, got others in tensors: "
            f"{', '.join(bad)}. They are not saved. {last_whole(output)} Start anew with a lower "
            "--learning_rate."
        )
    folder = _agreed(accelerator, lambda: _make_room(output, step))
    failed = ""
    try:
        write(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        failed = str(error) or type(error).__name__
    failures = [one for one in gather_object([failed]) if one]

    def mark() -> Path:
        try:
            if failures:
                raise OSError(failures[0])
            marker = {
                "step": step,
                "lines": len(lines_of(output / "log.jsonl")),
                "made_of": made_of,
                "sha256": {name: digest_of(folder / name) for name in _files_of(folder)},
            }
            replace_text(folder / COMPLETE, json.dumps(marker, indent=1) + "\n")
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder}: could not be written: {error}. {last_whole(output)} Make room on the "
                "disk, then continue with --resume_from_checkpoint latest."
            ) from None
        return folder

    return _agreed(accelerator, mark)


def last_whole(output: Path) -> str:
    """A sentence for errors: where a run can go on."""
    whole = [folder for folder in _checkpoints(output) if (folder / COMPLETE).exists()]
    return f"The last good checkpoint is {whole[-1]}." if whole else "There is no checkpoint yet."


class RunState:
    """What a run goes on from: what is trained, its optimizer, other state, random numbers.

    Weights and the optimizer's state are saved whole, by name, and load in any number of processes
    and in any engine but DeepSpeed. That writes files of its own, for as many processes.

    model, optimizer: prepared. Of the model only what is trained is saved.
    others: objects with `state_dict` and `load_state_dict`, by name; the main process's are saved.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        others: Mapping[str, Any],
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.others = others
        self.tag = ""
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            stage = accelerator.state.deepspeed_plugin.zero_stage
            self.tag = f"zero{stage}_of_{accelerator.num_processes}"

    def parts(self) -> dict[str, Any]:
        """Weights, optimizer and others' states, for `save`. Every process calls it."""
        optimizer = self.optimizer.optimizer
        if self.tag:  # checked, and saved by the engine
            own: Any = [held(one) for one in self.model.parameters() if one.requires_grad]
            state: Any = list(optimizer.state.values())
        else:
            reshard(self.model)
            whole = StateDictOptions(
                full_state_dict=True, cpu_offload=True, ignore_frozen_params=True
            )
            weights = get_model_state_dict(self.model, options=whole)
            own = {name: weights[name] for name in self._trained() if name in weights}
            if _has_torchs_state(optimizer):
                state = get_optimizer_state_dict(self.model, optimizer, options=whole)
            else:
                state = optimizer.state_dict()
        others = {name: one.state_dict() for name, one in self.others.items()}
        return {"weights": own, "optimizer": state, **others}

    def write(self, parts: Mapping[str, Any], folder: Path) -> None:
        """Writes the parts into the folder. Every process calls it."""
        accelerator = self.accelerator
        folder.mkdir(parents=True, exist_ok=True)
        if self.tag:
            engine: Any = self.model
            engine.save_checkpoint(str(folder), self.tag, exclude_frozen_parameters=True)
        if accelerator.is_main_process:
            if not self.tag:
                own = {name: one.contiguous() for name, one in parts["weights"].items()}
                save_file(own, folder / WEIGHTS)
                torch.save(parts["optimizer"], folder / OPTIMIZER)
            torch.save({name: parts[name] for name in self.others}, folder / OTHERS)
        save_accelerator_state(
            str(folder),
            model_states=[],
            optimizers=[],
            schedulers=[],
            dataloaders=[],
            process_index=accelerator.process_index,
            step=accelerator.step,
            scaler=accelerator.scaler,
        )

    def load(self, folder: Path) -> None:
        """Every process calls it.

        Raises:
            ValueError: another engine or other options wrote it, or there is more in it than
                finite numbers.
        """
        found = next((one.name for one in folder.glob("zero*_of_*")), "")
        if found != self.tag:
            names = [name or "no DeepSpeed" for name in (found, self.tag)]
            raise ValueError(
                f"{folder}: expected the engine that wrote it ({names[0]}: ZeRO's stage and the "
                f"number of processes), got {names[1]}. Resume with the --config_file and "
                "--num_processes that the run began with."
            )
        with data_only(folder):
            others = torch.load(folder / OTHERS, map_location="cpu")
            if self.tag:
                engine: Any = self.model
                engine.load_checkpoint(str(folder), self.tag, load_module_strict=False)
                broken = 0
            else:
                broken = self._load_whole(folder)
            index = self.accelerator.process_index
            random = folder / f"random_states_{index}.pkl"
            if random.exists():
                load_data(random)  # accelerate goes on without a word where it cannot
            load_accelerator_state(
                str(folder),
                models=[],
                optimizers=[],
                schedulers=[],
                dataloaders=[],
                process_index=index,
                scaler=self.accelerator.scaler,
                map_location="cpu",
            )
            if broken or _broken(others):
                raise ValueError(
                    f"{folder}: expected finite numbers, got others. Remove the folder to go on "
                    "from the checkpoint before it, or start anew with a lower --learning_rate."
                )
            for name, one in self.others.items():
                one.load_state_dict(others[name])

    def _load_whole(self, folder: Path) -> int:
        """Loads weights and optimizer; how many of their tensors are not finite."""
        weights, own = load_file(folder / WEIGHTS), self._trained()
        if weights.keys() != set(own):
            raise ValueError(
                f"{folder}: expected parameters {sorted(own)}, got {sorted(weights)}. Resume with "
                "the options that the run began with."
            )
        reshard(self.model)
        whole = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self.model, weights, options=whole)
        state = torch.load(folder / OPTIMIZER, map_location="cpu")
        broken = _broken((weights, state))
        optimizer = self.optimizer.optimizer
        if _has_torchs_state(optimizer):
            set_optimizer_state_dict(self.model, optimizer, state, options=whole)
        else:
            optimizer.load_state_dict(state)
        return broken

    def _trained(self) -> list[str]:
        module = extract_model_from_parallel(self.model)
        return [name for name, one in module.named_parameters() if one.requires_grad]


def _has_torchs_state(optimizer: torch.optim.Optimizer) -> bool:
    """Not so of an optimizer of several, such as `lab.world.muon`'s: its state is its own."""
    return {"state", "param_groups"} <= optimizer.state_dict().keys()


@contextmanager
def data_only(folder: Path) -> Iterator[None]:
    """What torch, accelerate or DeepSpeed unpickles inside is data; code in it is not run.

    Raises:
        ValueError: there is code in it, or it cannot be loaded.
    """
    safe = []
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:  # classes that its files name
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        safe = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        with (
            patch_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"),
            torch.serialization.safe_globals(safe),
        ):
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(
            f"{folder}: expected numbers alone, got {named[1] if named else 'code'} in a pickle, "
            "which could run anything. It is not loaded. Resume from checkpoints of your own."
        ) from None
    except Exception as error:  # a damaged file can raise any
        ours = isinstance(error, ValueError | MemoryError) and not isinstance(error, UnicodeError)
        if ours:
            raise
        told = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{folder}: expected a checkpoint of this run, got what cannot be loaded "
            f"({type(error).__name__}: {told}). Remove the folder to go on from the checkpoint "
            "before it."
        ) from error


def fingerprint_of(tensors: Mapping[str, Tensor], *others: Any) -> str:
    """A digest of others' texts, and of tensors: names, shapes, 16 numbers, the sum of all bits."""
    digest = hashlib.sha256(repr(others).encode())
    for name, one in tensors.items():
        flat = one.detach().flatten()
        few = flat[:: max(1, len(flat) // 16)].float().cpu()
        told = f"{name} {tuple(one.shape)} {_sum_of_bits(flat)}"
        digest.update(told.encode() + few.numpy().tobytes())
    return digest.hexdigest()


def _sum_of_bits(flat: Tensor) -> int:
    """Of a tensor's memory as integers of 64 bits: a single flipped bit changes it."""
    raw = flat.view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = len(raw) // 8 * 8
    return int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())


def digest_of(file: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _broken(tree: Any) -> int:
    """How many tensors in dicts and lists are not finite."""
    tensors = [one for one in tree_leaves(tree) if isinstance(one, Tensor)]
    return sum(not bool(held(one).isfinite().all()) for one in tensors)


def _may_change(name: str, was: Any, now: Any) -> bool:
    """Whether a resumed run may have the option so.

    The EMA stays one: without it, or frozen (decay 1), the teacher and the target are others.
    """
    kinds = [None if one is None else one == 1 for one in (was, now)]
    return name in MAY_CHANGE and (name != "ema_decay" or kinds[0] == kinds[1])


def _told(name: str, was: Any, now: Any) -> str:
    return f"{name} {was} -> {now}"


def _changed_options(options: Any, file: Path) -> dict[str, tuple[Any, Any]]:
    """Name -> what it was and what it is, of the options that the run began with otherwise.

    Raises:
        ValueError: the file cannot be read.
    """
    if not file.exists():
        return {}
    try:
        stored = dict(json.loads(file.read_text()))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: expected the run's options, got {error}. Remove the file to resume with the "
            "options that you give."
        ) from None
    was, now = {**options.of.defaults, **stored}, vars(options)
    both = {name: (was[name], now.get(name, "none")) for name in was}
    return {name: (one, other) for name, (one, other) in both.items() if one != other}


def _tell_of_options(options: Any, file: Path) -> None:
    """A warning of those that a resumed run has otherwise."""
    if not file.exists():
        LOGGER.warning("%s is missing: the options are taken to be the run's.", file)
    changed = _changed_options(options, file)
    quiet = {"output_dir", "resume_from_checkpoint"}
    allowed = [_told(name, *both) for name, both in changed.items() if name not in quiet]
    if allowed:
        LOGGER.warning("Resumed with other options: %s.", ", ".join(allowed))


def _check_made_of(found: Checkpoint, made_of: Mapping[str, str]) -> None:
    for name in found.made_of.keys() & made_of.keys():
        if found.made_of[name] != made_of[name]:
            why = (
                "its weights differ"
                if name == "model"
                else "other rows or images, or in another order"
            )
            raise ValueError(
                f"{name}: expected that which the run in {found.folder.parents[1]} began with, got "
                f"another: {why}. Give the old one, or choose another --output_dir."
            )


def _latest(folders: list[Path]) -> Checkpoint | None:
    """The last whole checkpoint; those after it are renamed."""
    damaged = []
    for folder in reversed(folders):
        try:
            return _verified(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if (folder / COMPLETE).exists():
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
    LOGGER.warning("%s: no checkpoint is whole. The run starts anew, at step 1.", folders[0].parent)
    return None


def _verified(folder: Path) -> Checkpoint:
    """Reads the marker and compares each file with it."""
    if not (folder / COMPLETE).exists():
        raise ValueError(f"{folder} has no file {COMPLETE}: it was not written to its end")
    try:
        marker = json.loads((folder / COMPLETE).read_text())
        found = Checkpoint(
            folder, int(marker["step"]), int(marker["lines"]), dict(marker.get("made_of", {}))
        )
        digests = dict(marker["sha256"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{folder / COMPLETE} is damaged: {error!r}") from None
    if folder.name != f"checkpoint_{found.step}" or not {*_files_of(folder)} <= {*digests}:
        raise ValueError(f"{folder / COMPLETE} is damaged: it is not of this folder")
    for name, digest in digests.items():
        if not (folder / name).exists():
            raise ValueError(f"{folder / name} is missing")
        if digest_of(folder / name) != digest:
            raise ValueError(f"{folder / name} is damaged: its checksum is another")
    return found


def _files_of(folder: Path) -> list[str]:
    """The names of a checkpoint's files, without the marker's."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return [file.relative_to(folder).as_posix() for file in files if file.name != COMPLETE]


def _make_room(output: Path, step: int) -> Path:
    """The next checkpoint's folder."""
    for folder in _checkpoints(output)[: 1 - KEPT]:
        shutil.rmtree(folder)
    return output / "checkpoints" / f"checkpoint_{step}"


def _checkpoints(output: Path) -> list[Path]:
    """Those that a run has written, in order; folders of other names are nobody's business here."""
    found = (output / "checkpoints").glob("checkpoint_*")
    return sorted(
        (one for one in found if re.fullmatch(r"checkpoint_\d+", one.name)),
        key=lambda one: int(one.name.rsplit("_", 1)[1]),
    )


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
