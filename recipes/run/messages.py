"""What a run prints besides its progress bar, and which messages it turns off."""

from __future__ import annotations

import logging
import shlex
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
