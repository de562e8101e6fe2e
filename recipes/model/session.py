"""A pipeline in training, validated and saved: images of prompts, and tokens/, lora/ or pipeline/.

model = Session(options, accelerator, task, method="AGSM").prepare(accelerator)
model.validate(step)
model.save()
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState

from data.pictures import sheet
from data.sources import is_world
from data.task import Task
from model.agsm import method_of, summary_of, unread_of
from model.card import Trained, write_cards
from model.sampling import sample
from model.trained import TrainedModel
from run.engines import gathered, is_sharded, run_inside
from run.log import say_saved, say_scores, say_validating
from run.options import option


@dataclass(frozen=True)
class ValidationOptions:
    """How a model is sampled and scored on validation prompts."""

    _argument_group_name = "validation"
    validation_per_category: int = option(
        32, "Validation prompts per category (only for --data world).", at_least=1
    )
    validation_inference_steps: int = option(20, "Sampling steps per validation image.", at_least=1)
    validation_guidance_scale: float | None = option(
        None,
        "Guidance scale of validation images; 1: no guidance. Left out: 1 where guidance is "
        "trained in, else 3. Flux.1-dev and FLUX.2-dev, whose input it is, train with it, too.",
        at_least=0,
    )


class Session(TrainedModel):
    """A `TrainedModel` with prompts to look at.

    Args:
        method: what trains it, in words; left out: the host of the options.
        every: what lies between two validations, in words; left out: of the options.
    """

    def __init__(
        self,
        options: Any,
        state: Accelerator | PartialState,
        task: Task,
        *,
        method: str | None = None,
        every: str = "",
    ) -> None:
        super().__init__(options, state, task)
        self.method = method_of(options) if method is None else method
        self.every = every or f"{options.validation_steps:,} steps"

    def summary(self) -> tuple[str, dict[str, str]]:
        """What is printed before the first step: the method, and a line for each name."""
        options, pipe, parts = self.options, self.pipeline.pipe, []
        if self.tokens is not None:
            layers = self.tokens.tokens.num_layers
            where = "" if layers is None else f" in {layers} layers"
            parts.append(f"{options.num_tokens} soft tokens{where}")
        parts += [f"a LoRA of rank {options.rank}"] if options.rank else []
        parts += ["all weights"] if options.full else []
        precision = str(pipe.dtype).removeprefix("torch.")
        if options.mixed_precision != "no":
            precision += f", passes in {options.mixed_precision}"
        lines = {
            "model": f"{options.model} ({type(pipe).__name__})",
            "device": f"{self.pipeline.device}, {precision}",
            "trains": f"{self.number:,} parameters: {' and '.join(parts)}; learning rate "
            f"{options.learning_rate:g}",
        }
        if self.has_agsm:
            lines["AGSM"] = summary_of(options)
        lines["not used"] = unread_of(options)
        return self.method, {**lines, "validation": self._looked_at()}

    def _looked_at(self) -> str:
        options, prompts = self.options, len(self.task.validation())
        if not prompts:
            return "none: give --validation_prompts FILE to see images of its lines"
        return (
            f"{prompts} prompts every {self.every}, {options.validation_inference_steps} sampling "
            f"steps, CFG {options.validation_guidance_scale:g}"
        )

    def validate(self, step: int) -> dict[str, Any]:
        """Samples the validation prompts with ψ⁺, saves a sheet; their scores, if there are any."""
        options, task = self.options, self.task
        rows = task.validation()
        if not rows:
            return {}
        is_main = PartialState().is_main_process
        if is_main:
            say_validating(len(rows), options.validation_inference_steps)
        with self.pipeline.loaded():
            images = run_inside(
                self.denoiser,
                lambda: sample(
                    self.pipeline.pipe,
                    [row["prompt"] for row in rows],
                    seeds=range(len(rows)),
                    num_inference_steps=options.validation_inference_steps,
                    guidance_scale=options.validation_guidance_scale,
                    arguments=self.pipeline.arguments,
                ),
            )
        if not is_main:  # it has helped with its shard of the weights
            return {}
        judged = task.judge(images, rows)
        shown = task.shown(rows)
        file = Path(options.output_dir) / "sheets" / f"{step:06d}.png"
        sheet(
            images[shown],
            [rows[i] for i in shown],
            None if judged is None else [judged[i] for i in shown],
            file,
        )
        scores = {} if judged is None else task.summarize(judged)
        say_scores(step, scores, file)
        return scores

    def save(self) -> None:
        """Saves it under `options.output_dir`, with cards, and prints the command that samples it.

        Every process calls it.
        """
        options, model = self.options, self.pipeline
        output, state = Path(options.output_dir), PartialState()
        saved: dict[str, Path] = {}
        with gathered(self.denoiser):
            if not state.is_main_process:
                return
            if self.tokens is not None:
                saved["tokens"] = output / "tokens"
                self.tokens.save_pretrained(
                    saved["tokens"], base_model=options.model, training=vars(options)
                )
            if options.rank:
                saved["lora"] = output / "lora"
                model.save_lora(saved["lora"])
            if options.full:
                saved["pipeline"] = output / "pipeline"
                if not is_sharded(state):  # as safetensors wants it
                    model.denoiser.to(memory_format=torch.contiguous_format)
                model.pipe.save_pretrained(saved["pipeline"])
        prompts = self.task.validation()
        prompt = prompts[0]["prompt"] if prompts else "two red circles"
        write_cards(
            saved,
            Trained(
                options,
                self.method,
                model.pipe,
                self.number,
                state.num_processes,
                prompt,
                model.arguments,
            ),
        )
        flags = {
            "model": str(saved.get("pipeline", options.model)),
            "tokens": str(saved.get("tokens", "")),
            "lora": str(saved.get("lora", "" if options.full else options.merge_lora)),
            "prompts": options.validation_prompts or "prompts.txt" * (not is_world(options.data)),
            "output_dir": str(output / "images"),
            "sheet": "true",
        }
        # generate.py loads one LoRA.
        say_saved([*saved.values()], None if options.rank and options.merge_lora else flags)
