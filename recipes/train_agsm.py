"""Trains soft tokens, a LoRA or all weights of a pipeline by AGSM, SoftREPA or plain denoising.

    python recipes/train_agsm.py --model recipes/lab/models/flow
    accelerate launch recipes/train_agsm.py --config recipes/configs/agsm_sd3.yaml
    python recipes/train_agsm.py --model <folder or hub id> --data <parquet, folder or hub id>

`--model` is any Stable Diffusion, SDXL, SD3, Flux.1, Qwen-Image or Sana pipeline, a
preference-tuned one too (`--merge_lora` for a tuned LoRA). `--data world` (the default) renders the
embedded world and scores validation prompts exactly. With other data, `--validation_prompts FILE`
are sampled.

Under `--output_dir`:
    tokens/, lora/ or pipeline/   what was trained: soft tokens, a LoRA, or all weights
    log.jsonl, options.json       losses, metrics and validation scores; the run's options
    sheets/                       images of the validation prompts
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from run.options import option, parse
from run.settings import ImageOptions, PipelineLoopOptions, PrecomputeOptions
from run.stop import command

if TYPE_CHECKING:
    from data.image_data import Batch


@dataclass(frozen=True)
class Options(PipelineLoopOptions, ImageOptions, PrecomputeOptions):
    """The recipe's own options; the shared ones are in common/settings.py."""

    TITLE = "objective"
    output_dir: str = "runs/agsm"
    objective: Literal["agsm", "softrepa", "denoising"] = option("agsm", "Loss to minimize.")
    softrepa_scale: float = option(4.0, "s of SoftREPA: scale of its logits.", at_least=0)
    softrepa_temperature: float = option(0.07, "T of SoftREPA: temperature of its logits.", above=0)
    denoising_weight: float = option(
        0.0, "Weight of the denoising error in SoftREPA's loss.", at_least=0
    )

    @property
    def method(self) -> str:
        """The objective, in words."""
        return {"agsm": "AGSM", "softrepa": "SoftREPA"}.get(self.objective, "plain denoising")


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves the tokens."""
    options = parse(Options, __doc__, arguments)

    from agsm_loss import draws
    from data.task import open_task
    from model.agsm import check_competitors
    from model.objectives import hard_of, make_objective, prepare
    from model.precompute import precompute
    from model.trained_pipeline import TrainedPipeline
    from run.loop import start

    accelerator = start(options, sharding=True)
    task = open_task(options, accelerator)
    if options.objective != "denoising":
        check_competitors(options, task)
    trained = TrainedPipeline.build(options, accelerator, task)
    objective = make_objective(options, trained)
    batches = task.images(options.train_batch_size, hard_of(options), options.image_column)

    def loss(batch: Batch, index: int) -> Any:
        generator = draws(options.seed, index, accelerator.process_index)
        inputs = prepare(options, trained, batch, generator)
        with accelerator.autocast():
            return objective(inputs)

    fill = precompute(options.precompute, trained.model, accelerator)
    trained.train(accelerator, batches, loss, objective, fill)


if __name__ == "__main__":
    command(main)
