"""What a run prints before its first step: what is trained, on what, how and for how long.

say_summary("AGSM", {"model": "...", "data": "..."})       a title, and a line for each
counter = FirstStep(denoiser)                              counts forward passes until `tell`
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from run.messages import say
from run.settings import LoopOptions, ValidationOptions

if TYPE_CHECKING:
    from model.trained_pipeline import TrainedPipeline


def say_summary(title: str, lines: Mapping[str, str]) -> None:
    """The title, and under it a line for each name; empty ones are left out."""
    say("\n".join([title, *(f"  {name:<11}{text}" for name, text in lines.items() if text)]))


def steps_line(options: LoopOptions, done: int, processes: int, rows: str) -> dict[str, str]:
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


def validation_line(options: ValidationOptions, prompts: int, every: str) -> str:
    """What is looked at during the run."""
    if not prompts:
        return "none: give --validation_prompts FILE to see images of its lines"
    return (
        f"{prompts} prompts every {every}, {options.validation_inference_steps} sampling steps, "
        f"CFG {options.validation_guidance_scale:g}"
    )


def say_start(trained: TrainedPipeline, about: Mapping[str, str], every: str) -> None:
    """The summary of a pipeline's training.

    about: lines of its data and steps. every: what lies between two validations.
    """
    options, pipe, parts = trained.options, trained.model.pipe, []
    if trained.tokens is not None:
        layers = trained.tokens.tokens.num_layers
        where = "" if layers is None else f" in {layers} layers"
        parts.append(f"{options.num_tokens} soft tokens{where}")
    parts += [f"a LoRA of rank {options.rank}"] if options.rank else []
    parts += ["all weights"] if options.full else []
    gamma = f"; gamma- {options.neg_scale:g}" if trained.has_agsm else ""
    precision = str(pipe.dtype).removeprefix("torch.")
    if options.mixed_precision != "no":
        precision += f", passes in {options.mixed_precision}"
    lines = {
        "model": f"{options.model} ({type(pipe).__name__})",
        "device": f"{trained.model.device}, {precision}",
        "trains": f"{trained.number:,} parameters: {' and '.join(parts)}{gamma}",
        **about,
        "validation": validation_line(options, len(trained.task.validation()), every),
        "output": options.output_dir,
    }
    say_summary(options.method, lines)


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
