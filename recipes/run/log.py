"""What a run tells: log.jsonl, a tracker, and what it prints.

    log = Log(output / "log.jsonl")
    log.add({"loss": loss})                        each micro-step
    log.write(step, {**log.take(), "lr": 1e-3})    each `logging_steps`

A line of log.jsonl has the means, over all processes, of what was measured since the last one. A
checkpoint holds the open ones, so that a resumed log is that of a run that was not stopped.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm


class Log:
    """log.jsonl with running means of scalars; its state is the means and the time so far."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.sums: dict[str, tuple[Tensor | float, int]] = {}
        self.began = time.time()

    def add(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            # Left where it is: to fetch it would wait for the device in every micro-step.
            self.sums[name] = total + torch.as_tensor(value).detach().float(), count + 1

    def take(self) -> dict[str, float]:
        """The means since the last call, over all processes; each of them calls it."""
        sums, self.sums = _sum(self.state_dict()["sums"]), {}
        return {name: total / count for name, (total, count) in sums.items()}

    def write(self, step: int, entry: Mapping[str, Any]) -> None:
        append_line(self.file, {"step": step, **used_since(self.began), **entry})

    def state_dict(self) -> dict[str, Any]:
        """Each process calls it: the sums of all of them."""
        own = {name: (float(total), count) for name, (total, count) in self.sums.items()}
        return {"sums": gather_object([own]), "seconds": time.time() - self.began}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Processes go on with their own sums; fewer ones, with those of several."""
        now = PartialState()
        self.sums = _sum(state["sums"][now.process_index :: now.num_processes])
        self.began = time.time() - state["seconds"]


def _sum(sums: Sequence[Mapping[str, tuple[float, int]]]) -> dict[str, tuple[Any, int]]:
    """Totals and their counts, of several processes."""
    found: dict[str, tuple[Any, int]] = {}
    for one in sums:
        for name, (total, count) in one.items():
            before = found.get(name, (0.0, 0))
            found[name] = before[0] + total, before[1] + count
    return found


USED = ("seconds", "gpu_memory")


def used_since(began: float) -> dict[str, float]:
    """Seconds, and the most GiB torch had allocated on this process's GPU since the last call."""
    used = {"seconds": round(time.time() - began, 1)}
    if torch.cuda.is_initialized():
        used["gpu_memory"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        torch.cuda.reset_peak_memory_stats()
    return used


@contextmanager
def writing(file: Path, then: str = "give the command again") -> Iterator[Path]:
    """What is written inside is this file; an OSError says so."""
    try:
        yield file
    except OSError as error:
        raise OSError(
            f"{file}: could not be written: {error.strerror or error}. Make room on the disk, or "
            f"make it writable, then {then}."
        ) from error


def check_writable(output: Path, folder: Path) -> None:
    """ValueError where a folder in an output_dir, or the output_dir, cannot be written."""
    place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise not_writable(output, f"{place} is {'read-only' if place.is_dir() else 'a file'}")


def not_writable(output: Path, why: str) -> ValueError:
    """The error for an output_dir."""
    return ValueError(
        f"output_dir: expected a folder that can be written, got {output}: {why}. Choose another "
        "--output_dir."
    )


def append_line(file: Path, line: Mapping[str, Any]) -> None:
    with (
        writing(file, "continue with --resume_from_checkpoint latest"),
        file.open("a") as log,
    ):
        log.write(json.dumps(line) + "\n")


def lines_of(file: Path) -> list[str]:
    """The log's lines; what is no JSON of names and values is left out: a full disk cuts lines."""
    text = file.read_text(errors="replace") if file.exists() else ""
    return [line for line in text.split("\n") if _whole(line)]


def keep_lines(file: Path, number: int) -> None:
    """Drops what was written after a checkpoint: all but the first lines, and cut ones."""
    replace_text(file, "".join(line + "\n" for line in lines_of(file)[:number]))


def replace_text(file: Path, text: str) -> None:
    """Writes a file such that at each moment it has its old text or its new one."""
    part = file.with_name(file.name + ".part")
    with part.open("w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    part.replace(file)


def _whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def flat(entry: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers as tracker names: {"scores": {"overall": 1}} -> {"scores/overall": 1}."""
    found: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[prefix + name] = value
    return found


def tracker_settings(name: str, first: int) -> dict[str, Any]:
    """What a tracker is made with in a run that logs from step `first` on."""
    # TensorBoard then drops what an earlier process has logged from there on.
    return {"purge_step": first} if name == "tensorboard" and first else {}


def log_sheet(trackers: Sequence[Any], output: Path, step: int) -> None:
    """Gives trackers that show images the step's sheet, if there is one."""
    file = output / "sheets" / f"{step:06d}.png"
    if not file.exists():
        return
    with Image.open(file) as sheet:
        images = np.asarray(sheet.convert("RGB"))[None]
    for tracker in trackers:
        if tracker.name in ("tensorboard", "wandb"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": images}, step=step, **layout)


def missing_tracker(name: str) -> ValueError:
    """The error for a tracker that accelerate does not know or find."""
    return ValueError(
        f"report_to: expected one that is installed, got {name!r}. pip install {name}, or leave it "
        "out: log.jsonl is always written."
    )


def say(text: str) -> None:
    """A line above the progress bar."""
    tqdm.write(text)


@contextmanager
def paused(bar: tqdm) -> Iterator[None]:
    """What runs inside is no part of the bar's time per step."""
    began = time.time()
    try:
        yield
    finally:
        if not bar.disable:
            bar.start_t += time.time() - began
            bar.last_print_t += time.time() - began


def say_validating(number: int, steps: int) -> None:
    say(f"Validating: {number} prompts, {steps} steps")


def say_scores(step: int, scores: Mapping[str, Any], sheet: Path) -> None:
    """The overall score and counting's; where the images have no scores, where they are."""
    if not scores:
        say(f"step {step}: images in {sheet}")
        return
    shown = {"overall": scores["overall"]}
    if "counting" in scores["categories"]:
        shown["counting"] = scores["categories"]["counting"]["score"]
    say(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in shown.items()))


def say_saved(folders: list[Path], flags: Mapping[str, str] | None) -> None:
    """What was saved, and the command that samples it; flags: None where generate.py cannot."""
    say(f"Saved {', '.join(map(str, folders))}, with a card in each.")
    if flags is not None:
        given = [part for name, value in flags.items() if value for part in (f"--{name}", value)]
        say(f"Next: {shlex.join(['python', 'recipes/generate.py', *given])}")


# Of an optional package, of our models' VAE, of no modules at all, and of a LoRA's text encoder,
# which is not trained; all of it works.
_IDLE = ("requires torchvision", "Expected types for vae", "'block_out_channels'",
         "should be kept in float32: []", "No LoRA keys associated to CLIPText",
         "Setting accelerator to CPU")  # fmt: skip


class _NotIdle(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in _IDLE)


def quiet_libraries() -> None:
    """Turns off the libraries' loading bars and messages that ask for nothing."""
    warnings.filterwarnings("ignore", r"`_encode_prompt\(\)` is deprecated")  # trl calls it
    _filter(logging.getLogger("DeepSpeed"))  # that it finds no GPU, where it is installed
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library, module in (("diffusers", of_diffusers), ("transformers", of_transformers)):
        module.get_logger()  # makes the library's handler
        module.disable_progress_bar()
        for handler in logging.getLogger(library).handlers:
            _filter(handler)


def _filter(one: logging.Filterer) -> None:
    if not any(isinstance(known, _NotIdle) for known in one.filters):
        one.addFilter(_NotIdle())


def say_summary(title: str, lines: Mapping[str, str]) -> None:
    """The title, and under it a line for each name; empty ones are left out."""
    say("\n".join([title, *(f"  {name:<11}{text}" for name, text in lines.items() if text)]))


def steps_line(options: Any, done: int, processes: int, rows: str) -> dict[str, str]:
    """How long the run is, and what a step sees. done: steps before a resume."""
    batch, micro = options.train_batch_size, options.gradient_accumulation_steps
    first = f"{done + 1:,} (resumed)" if done else "1"
    if done == options.max_train_steps:
        return {"data": rows, "steps": f"all {done:,} are done"}
    total = batch * micro * processes
    factors = "".join(
        f" x {number} {name}"
        for number, name in ((micro, "micro-steps"), (processes, "processes"))
        if number > 1
    )
    return {
        "data": rows,
        "steps": f"{first} to {options.max_train_steps:,}, in batches of {total:,}"
        + (f" ({batch}{factors})" if factors else ""),
    }


class FirstStep:
    """Counts what passes through a denoiser in the first step of this process, and tells it."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.passes = self.trained = 0
        self.began = time.time()
        self._handle = denoiser.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.passes += len(inputs[0])
        self.trained += len(inputs[0]) if torch.is_grad_enabled() else 0

    def tell(self) -> None:
        """Prints the counts, and counts no more."""
        self._handle.remove()
        say(
            f"A step: {self.passes} forward passes of one image, {self.trained} of them with a "
            f"gradient; the first took {time.time() - self.began:.1f} s"
        )
