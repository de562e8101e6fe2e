"""Trains soft tokens, a LoRA or all weights of a pipeline by AGSM, SoftREPA or plain denoising.

    python recipes/train_agsm.py --model recipes/models/flow
    accelerate launch recipes/train_agsm.py --config recipes/configs/agsm_sd3.yaml
    python recipes/train_agsm.py --model <folder or hub id> --data <parquet, folder or hub id>

`--model` is any Stable Diffusion, SDXL, SD3 or Flux.1 pipeline, a preference-tuned one too
(`--merge_lora` for a tuned LoRA). `--data world` (the default) renders the embedded world and
scores validation prompts exactly. With other data, `--validation_prompts FILE` are sampled.

Under `--output_dir`:
    tokens/, lora/ or pipeline/   what was trained: soft tokens, a LoRA, or all weights
    log.jsonl, options.json       losses, metrics and validation scores; the run's options
    sheets/                       images of the validation prompts
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from common.options import option, parse
from common.settings import ImageOptions, PipelineLoopOptions, hard_per_image
from common.stop import command

if TYPE_CHECKING:
    import torch

    from common.image_data import Batch
    from common.objectives import Inputs
    from common.trained_pipeline import TrainedPipeline


@dataclass(frozen=True)
class Options(PipelineLoopOptions, ImageOptions):
    """The recipe's own options; the shared ones are in common/settings.py."""

    TITLE = "objective"
    output_dir: str = "runs/agsm"
    objective: Literal["agsm", "softrepa", "denoising"] = option("agsm", "Loss to minimize.")
    softrepa_scale: float = option(4.0, "s of SoftREPA: scale of its logits.", at_least=0)
    softrepa_temperature: float = option(0.07, "T of SoftREPA: temperature of its logits.", above=0)
    denoising_weight: float = option(
        0.0, "Weight of the denoising error in SoftREPA's loss.", at_least=0
    )


def make_objective(options: Options, trained: TrainedPipeline) -> Any:
    """The chosen objective over the (prepared) denoiser."""
    from agsm_loss import SoftREPALoss
    from common.objectives import AGSM, Denoising, SoftREPA

    if options.objective == "agsm":
        return AGSM(trained.agsm(options.train_batch_size))
    if options.objective == "softrepa":
        if options.banks != "shared":
            raise ValueError(
                f"banks: SoftREPA has one bank; expected shared, got {options.banks}. AGSM's "
                "ablation with two banks is --objective agsm."
            )
        loss = SoftREPALoss(
            logit_scale=options.softrepa_scale,
            temperature=options.softrepa_temperature,
            denoising_weight=options.denoising_weight,
        )
        return SoftREPA(trained.denoiser, loss)
    return Denoising(trained.denoiser)


def prepare(
    options: Options, trained: TrainedPipeline, batch: Batch, generator: torch.Generator
) -> Inputs:
    """Noises a batch and chooses who competes; the draws are the generator's alone."""
    import torch

    from agsm_loss.integrations.noise import add_noise, regression_target
    from common.objectives import Inputs
    from common.trained_pipeline import competitors

    model = trained.model
    latents = model.encode_images(batch.pixels, generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    timesteps = trained.timesteps(len(latents), generator)
    pool, candidates = competitors(batch, options.num_negatives - hard_of(options), generator)
    scheduler = model.pipe.scheduler
    return Inputs(
        add_noise(scheduler, latents, noise, timesteps),
        timesteps,
        regression_target(scheduler, latents, noise, timesteps),
        model.encode_prompts(pool),
        model.image_conditioning(batch.pixels),
        candidates,
    )


def hard_of(options: Options) -> int:
    """Edited captions per image; plain denoising has no use for any."""
    return 0 if options.objective == "denoising" else hard_per_image(options)


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves the tokens."""
    options = parse(Options, __doc__, arguments)

    from agsm_loss import draws
    from common.loop import start
    from common.trained_pipeline import TrainedPipeline
    from world.task import open_task

    accelerator = start(options)
    task = open_task(options, accelerator)
    trained = TrainedPipeline.build(options, accelerator, task)
    objective = make_objective(options, trained)
    batches = task.images(options.train_batch_size, hard_of(options), options.image_column)

    def loss(batch: Batch, index: int) -> Any:
        generator = draws(options.seed, index, accelerator.process_index)
        inputs = prepare(options, trained, batch, generator)
        with accelerator.autocast():
            return objective(inputs)

    trained.train(accelerator, batches, loss, objective)


if __name__ == "__main__":
    command(main)
