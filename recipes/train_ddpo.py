r"""DDPO by trl on a Stable Diffusion pipeline, alone or with AGSM in its step.

    python recipes/train_ddpo.py --config recipes/configs/ddpo_epsilon.yaml --agsm_weight 1
    accelerate launch recipes/train_ddpo.py --config recipes/configs/ddpo_sd15.yaml \
        --data captions.parquet

An epoch samples `--sample_num_batches_per_epoch` batches of images, scores them by `--reward`, and
trains on their sampling steps. Prompts are the data set's captions, or the lines of
`--sampling_prompts`. AGSM trains on the data set's images (`--agsm_images data`), or on the samples
with the best rewards (`best`).

Under `--output_dir`:
    tokens/, lora/ or pipeline/   what was trained: soft tokens, a LoRA, or all weights
    log.jsonl, options.json       losses, metrics and validation scores; the run's options
    sheets/                       images of the validation prompts and of an epoch's samples
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from run.options import option, parse
from run.settings import ImageOptions, PipelineOptions, PromptOptions, RewardOptions
from run.stop import command


@dataclass(frozen=True)
class Options(RewardOptions, PromptOptions, PipelineOptions, ImageOptions):
    """The recipe's own options, with trl's defaults; the shared ones are in common/settings.py."""

    TITLE = "DDPO"
    output_dir: str = "runs/ddpo"
    WORLD_MODEL = "recipes/lab/models/epsilon"
    rank: int = 4
    learning_rate: float = 3e-4
    num_epochs: int = option(100, "Epochs of sampling and training to run.", at_least=1)
    num_inference_steps: int = option(50, "DDIM steps per sampled image.", at_least=1)
    sample_batch_size: int = option(8, "Images per process and sampling batch.", at_least=1)
    sample_num_batches_per_epoch: int = option(2, "Batches to sample per epoch.", at_least=1)
    guidance_scale: float = option(
        5.0, "Guidance scale of the samples; 1: no guidance, in training either.", at_least=0
    )
    eta: float = option(1.0, "Noise of the sampling steps, in units of DDIM's.", above=0)
    train_batch_size: int = option(4, "Sampled images per process and micro-step.", at_least=1)
    train_timestep_fraction: float = option(
        1.0, "Share of an image's sampling steps to train on.", above=0, at_most=1
    )
    train_num_inner_epochs: int = option(1, "Passes over an epoch's samples.", at_least=1)
    clip_range: float = option(
        1e-4, "Distance from 1 at which likelihood ratios are clipped.", above=0
    )
    train_adv_clip_max: float = option(5.0, "Size to which advantages are clipped.", above=0)
    per_prompt_stat_tracking: bool = option(
        False, "Compare rewards with those of the same prompt, not with the epoch's."
    )
    per_prompt_stat_tracking_buffer_size: int = option(
        16, "Rewards remembered per prompt.", at_least=1
    )
    per_prompt_stat_tracking_min_count: int = option(
        16,
        "Rewards remembered per prompt before they are used; until then the epoch's are.",
        at_least=1,
    )
    validation_epochs: int = option(10, "Epochs between two validations.", at_least=1)
    checkpointing_epochs: int = option(10, "Epochs between two checkpoints.", at_least=1)
    agsm_every: int = option(
        1, "Run AGSM in one of N micro-steps, with N times its weight.", at_least=1
    )


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = parse(Options, __doc__, arguments)

    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from tqdm.auto import tqdm

    from data.task import open_task
    from model.trained_pipeline import TrainedPipeline
    from rewards.ddpo import JsonLines, extra_tracker, make_trainer, sheet_of
    from rewards.rollout import check_best
    from run.checkpoints import check_output, last_whole, opened, save
    from run.engines import check_launched
    from run.log import log_sheet
    from run.messages import paused
    from run.stop import Stop

    if options.agsm_weight and options.agsm_images == "best":
        check_best(options)
        range_ = (options.timestep_density, options.timestep_low, options.null_caption)
        if range_ != ("uniform", 0.0, False):
            raise ValueError(
                "agsm_images: best has uniform timesteps and no empty caption in trl's DDPO; "
                "expected the defaults of timestep_density, timestep_low and null_caption, got "
                f"{range_}."
            )
    check_launched(sharding=False)
    check_output(options)
    # trl's parts log before they have made their own state.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    torch.manual_seed(options.seed)
    task = open_task(options, state)
    trained = TrainedPipeline.load(options, state, task)
    if type(trained.model.pipe).__name__ != "StableDiffusionPipeline":
        raise ValueError(
            f"model: expected a StableDiffusionPipeline, got {type(trained.model.pipe).__name__}: "
            "trl's DDPO knows no other. For flow models see recipes/train_flow_grpo.py."
        )
    with opened(options, state) as found:
        output = Path(options.output_dir)
        first = 0 if found is None else found.step
        tracker = JsonLines(output / "log.jsonl")
        if state.is_main_process and options.report_to:
            tracker.extra = extra_tracker(options, first)
            tracker.repeat(first)
        due = {"sheet": False}

        def show(data: Any, step: int, _: Any) -> None:
            if due["sheet"]:
                sheet_of(data, output / "sheets" / f"samples_{step:06d}.png")

        trainer = make_trainer(options, state, trained, tracker, found, show)
        step = trainer.global_step
        prompts = options.sample_batch_size * options.sample_num_batches_per_epoch
        about = {
            "epochs": f"{trainer.first_epoch + 1:,} to {options.num_epochs:,}, each on "
            f"{prompts * state.num_processes:,} sampled images"
        }
        trained.say_start(about, f"{options.validation_epochs:,} epochs")
        main_process = trainer.accelerator.is_main_process

        def validate() -> None:
            if main_process:
                tracker.write({"scores": trained.validate(step)}, step)
                log_sheet([tracker.extra] if tracker.extra else [], output, step)
            trainer.accelerator.wait_for_everyone()

        if not options.skip_first_validation and step == 0:
            validate()
        epochs = range(trainer.first_epoch, options.num_epochs)
        bar = tqdm(
            epochs, initial=trainer.first_epoch, total=options.num_epochs, disable=not main_process
        )
        ending = "the run ends after this epoch, with a checkpoint" if main_process else ""
        with Stop(ending).watching() as stop:
            for epoch in bar:
                last = epoch + 1 == options.num_epochs
                due["sheet"] = last or (epoch + 1) % options.validation_epochs == 0
                try:
                    step = trainer.step(epoch, step)
                except FloatingPointError as error:
                    tracker.flush()
                    raise FloatingPointError(f"{error} {last_whole(output)}") from None
                bar.set_postfix({name: f"{value:.3f}" for name, value in tracker.shown().items()})
                if due["sheet"]:
                    with paused(bar):
                        validate()
                stopped = stop.asked(trainer.accelerator) and not last
                if last or stopped or (epoch + 1) % options.checkpointing_epochs == 0:
                    tracker.flush()
                    saved = save(
                        trainer.accelerator,
                        output,
                        step,
                        trained.parameters,
                        lambda folder: trainer.accelerator.save_state(str(folder)),
                    )
                if stopped:
                    bar.close()
                    stop.end(trainer.accelerator, f"epoch {epoch + 1}", saved, options)
        if main_process:
            trained.save()
        trainer.accelerator.end_training()


if __name__ == "__main__":
    command(main)
