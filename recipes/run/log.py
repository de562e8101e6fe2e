"""log.jsonl: a line every few steps, with the means of what was measured since the last one.

    log = Log(output / "log.jsonl")
    log.add({"loss": loss})                        each micro-step
    log.write(step, {**log.take(), "lr": 1e-3})    each `logging_steps`

A checkpoint holds the open means, so that a resumed log is that of a run that was not stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class Log:
    """log.jsonl with running means of scalars; its state is the means and the time so far."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.sums: dict[str, tuple[Tensor, int]] = {}
        self.began = time.time()

    def add(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            total, count = self.sums.get(name, (torch.zeros(()), 0))
            # Left where it is: to fetch it would wait for the device in every micro-step.
            self.sums[name] = total + torch.as_tensor(value).detach().float(), count + 1

    def take(self) -> dict[str, float]:
        """The means since the last call."""
        means = {name: (total / count).item() for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means

    def write(self, step: int, entry: Mapping[str, Any]) -> None:
        append_line(self.file, {"step": step, **used_since(self.began), **entry})

    def state_dict(self) -> dict[str, Any]:
        sums = {name: (total.cpu(), count) for name, (total, count) in self.sums.items()}
        return {"sums": sums, "seconds": time.time() - self.began}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = dict(state["sums"])
        self.began = time.time() - state["seconds"]


USED = ("seconds", "gpu_memory")


def used_since(began: float) -> dict[str, float]:
    """Seconds, and the most GiB torch had allocated on this process's GPU since the last call."""
    used = {"seconds": round(time.time() - began, 1)}
    if torch.cuda.is_initialized():
        used["gpu_memory"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        torch.cuda.reset_peak_memory_stats()
    return used


def append_line(file: Path, line: Mapping[str, Any]) -> None:
    with file.open("a") as log:
        log.write(json.dumps(line) + "\n")


def lines_of(file: Path) -> list[str]:
    """The log's lines; a line that is no JSON is left out: a full disk cuts lines."""
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
        json.loads(line)
    except ValueError:
        return False
    return True


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
