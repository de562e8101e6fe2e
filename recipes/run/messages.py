"""What a run prints besides its progress bar, and which messages of libraries it turns off.

say_summary("AGSM", {"model": "...", "data": "..."})       a title, and a line for each
counter = FirstStep(module)                                counts forward passes until `tell`
"""

from __future__ import annotations

import logging
import shlex
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm


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
        self._handle: Any = denoiser.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.passes += len(inputs[0])
        self.trained += len(inputs[0]) if torch.is_grad_enabled() else 0

    def tell(self) -> None:
        """Prints the counts, once."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            say(
                f"A step: {self.passes} forward passes of one image, {self.trained} of them with a "
                f"gradient; the first took {time.time() - self.began:.1f} s"
            )
