"""Saves what a recipe has trained: tokens/, lora/ or pipeline/, each with its card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState

from model.card import Run, write_cards
from run.engines import gathered, is_sharded
from run.messages import say_saved

if TYPE_CHECKING:
    from model.trained_pipeline import TrainedPipeline


def save(trained: TrainedPipeline) -> None:
    """Saves it under `options.output_dir`, and prints the command that samples it.

    Every process calls it.
    """
    options, model = trained.options, trained.model
    output, state = Path(options.output_dir), PartialState()
    saved: dict[str, Path] = {}
    with gathered(trained.denoiser):
        if not state.is_main_process:
            return
        if trained.tokens is not None:
            saved["tokens"] = output / "tokens"
            trained.tokens.save_pretrained(
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
    prompts = trained.task.validation()
    prompt = prompts[0]["prompt"] if prompts else "two red circles"
    write_cards(
        saved,
        Run(options, model.pipe, trained.number, state.num_processes, prompt, model.arguments),
    )
    flags = {
        "model": str(saved.get("pipeline", options.model)),
        "tokens": str(saved.get("tokens", "")),
        "lora": str(saved.get("lora", "" if options.full else options.merge_lora)),
        "prompts": options.validation_prompts or "prompts.txt" * (options.data != "world"),
        "output_dir": str(output / "images"),
        "sheet": "true",
    }
    # generate.py loads one LoRA.
    say_saved([*saved.values()], None if options.rank and options.merge_lora else flags)
