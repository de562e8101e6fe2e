"""What a run prints before its first step: what is trained, on what, how and for how long.

say_summary("AGSM", {"model": "...", "data": "..."})       a title, and a line for each
counter = FirstStep(module)                                counts forward passes until `tell`
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from run.messages import say


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
