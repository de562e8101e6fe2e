r"""DDPO by trl on a Stable Diffusion pipeline, alone or with AGSM in its step.

    python recipes/train_ddpo.py --config recipes/configs/ddpo_epsilon.yaml --agsm_weight 0.3
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

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather, parse_flag_from_env
from tqdm.auto import tqdm

from agsm_loss._random import draws
from agsm_loss.integrations.hosts.base import AGSMBatch
from agsm_loss.integrations.hosts.ddpo_parts import check_fraction
from data.task import DataOptions, ImageOptions, PromptFileOptions, Task, open_task
from model.agsm import AGSMOptions, Competitors, HostOptions
from model.session import Session, ValidationOptions
from model.trained import ModelOptions, TimestepOptions, resolve
from rewards.rewards import check, load
from rewards.rollout import (
    Findings,
    PromptOptions,
    RewardOptions,
    check_best,
    check_prompts,
    fingerprint_of,
    on_policy_images,
    prompts_of,
    samples_sheet,
)
from run.checkpoints import check_left, check_output, data_only, last_whole, opened, save
from run.cli import command
from run.engines import check_launched
from run.log import log_sheet, paused, say_summary
from run.loop import RunOptions
from run.options import OptionSet, option
from run.stop import Stop
from run.trackers import JsonLines, extra_tracker


@dataclass(frozen=True)
class Options:
    """Of DDPO (arXiv 2305.13301), with trl's defaults."""

    num_epochs: int = option(100, "Epochs of sampling and training to run.", at_least=1)
    num_inference_steps: int = option(50, "DDIM steps per sampled image.", at_least=1)
    sample_batch_size: int = option(8, "Images per process and sampling batch.", at_least=1)
    sample_num_batches_per_epoch: int = option(2, "Batches to sample per epoch.", at_least=1)
    guidance_scale: float = option(
        5.0, "Guidance scale of the samples; 1: no guidance, in training either.", at_least=0
    )
    train_batch_size: int = option(4, "Sampled images per process and micro-step.", at_least=1)
    train_timestep_fraction: float = option(
        1.0, "Share of an image's sampling steps to train on.", above=0, at_most=1
    )
    train_num_inner_epochs: int = option(1, "Passes over an epoch's samples.", at_least=1)
    clip_range: float = option(
        1e-4, "Distance from 1 at which likelihood ratios are clipped.", above=0
    )
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


OPTIONS = OptionSet(
    Options,
    HostOptions,
    RewardOptions,
    PromptOptions,
    ModelOptions,
    DataOptions,
    ImageOptions,
    AGSMOptions,
    TimestepOptions,
    RunOptions,
    ValidationOptions,
    PromptFileOptions,
    title="DDPO",
    resolve=partial(resolve, of_world="recipes/lab/models/epsilon"),
    output_dir="runs/ddpo",
    rank=4,
    learning_rate=3e-4,
)


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = OPTIONS.parse(__doc__, arguments)
    check(options.reward)
    check_fraction(options.num_inference_steps, options.train_timestep_fraction)
    if options.agsm_weight and options.agsm_images == "best":
        check_best(options)
        competitors = Competitors.read(options.candidates)
        range_ = (options.timestep_density, options.timestep_low)
        if range_ != ("uniform", 0.0) or (competitors.empty and competitors.in_batch):
            raise ValueError(
                "agsm_images: best has uniform timesteps in trl's DDPO, and captions of one kind; "
                "expected the defaults of timestep_density and timestep_low, and candidates empty "
                f"or in_batch:N, got {range_} and {options.candidates}."
            )
    check_launched(options, sharding=False)
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # trl's are of sampling steps
    check_output(options)
    # trl's parts log before they have made their own state.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    torch.manual_seed(options.seed)
    task = open_task(options, state)
    model = Session(options, state, task, every=f"{options.validation_epochs:,} epochs")
    if type(model.pipeline.pipe).__name__ != "StableDiffusionPipeline":
        raise ValueError(
            f"model: expected a StableDiffusionPipeline, got {type(model.pipeline.pipe).__name__}: "
            "trl's DDPO knows no other. For flow models see recipes/train_flow_grpo.py."
        )
    on_data = options.agsm_weight and options.agsm_images == "data"
    images = on_policy_images(options, task, options.agsm_batch) if on_data else None
    data = fingerprint_of(prompts_of(options, task)) + getattr(images, "fingerprint", "")
    made_of = {"model": model.fingerprint, "data": data}
    with opened(options, state, made_of) as found:
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

        with data_only(output):
            trainer = make_trainer(options, state, model, images, tracker, found, show)
        step = trainer.global_step
        check_left("num_epochs", options.num_epochs, trainer.first_epoch)
        prompts = options.sample_batch_size * options.sample_num_batches_per_epoch
        about = {
            "epochs": f"{trainer.first_epoch + 1:,} to {options.num_epochs:,}, each on "
            f"{prompts * state.num_processes:,} sampled images"
        }
        if state.is_main_process:
            title, lines = model.summary()
            say_summary(title, {**lines, **about, "output": options.output_dir})
        main_process = trainer.accelerator.is_main_process

        def validate() -> None:
            if main_process:
                tracker.write({"scores": model.validate(step)}, step)
                log_sheet([tracker.extra] if tracker.extra else [], output, step)
            trainer.accelerator.wait_for_everyone()

        if options.validation_epochs <= options.num_epochs and step == 0:
            validate()
        differences = Findings("rewards that differ", "Take other prompts or another --reward.")
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
                    differences.saw(int(not trainer.equal))
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
                    averages = trainer.agsm.state_dict() if trainer.agsm is not None else {}
                    optimizer = trainer.optimizer.state_dict()
                    parts = {"weights": model.parameters, "optimizer": optimizer}
                    saved = save(
                        trainer.accelerator,
                        output,
                        step,
                        {**parts, "averages": averages},
                        lambda folder: trainer.accelerator.save_state(str(folder)),
                        made_of,
                    )
                if stopped:
                    bar.close()
                    stop.end(trainer.accelerator, f"epoch {epoch + 1}", saved, options)
        differences.check()
        model.save()
        trainer.accelerator.end_training()


def make_trainer(
    options: Any,
    state: Any,
    model: Session,
    images: Any,
    tracker: JsonLines,
    found: Any,
    show: Callable[..., None],
) -> Any:
    """trl's trainer with AGSM in it, on `images` if any, where the checkpoint has left it."""
    from agsm_loss.integrations.hosts.trl_ddpo import AGSMDDPOTrainer, LoadedPipeline

    own: dict[str, Any] = {}
    if options.agsm_weight:
        own["agsm"] = lambda denoiser, parameters: model.agsm_in_step(options.agsm_batch)
        if images is not None:
            own["batches"] = data_batches(options, model, images, state)
    pipeline = LoadedPipeline(model.pipeline.pipe, full=options.full)
    trainer = AGSMDDPOTrainer(
        trl_config(options, tracker, None if found is None else found.folder),
        trl_reward(options, state, model.task, tracker.rewards),
        drawn_prompts(options, model.task),
        pipeline,
        show if state.is_main_process else None,  # trl's call asks for a tracker: only there
        attached=None if model.tokens is None else model.tokens.attached,
        best=options.agsm_best,
        batch_size=options.agsm_batch,
        every=options.agsm_every,
        **own,
    )
    pipeline.set_progress_bar_config(disable=None, leave=False, desc="sampling")
    return trainer


def sheet_of(data: Any, path: Path) -> None:
    """What an epoch sampled, with its rewards; as trl's hook is given it."""
    pixels = torch.cat([2 * images.float() - 1 for images, *_ in data])
    prompts = [prompt for _, prompts, *_ in data for prompt in prompts]
    rewards = torch.cat([torch.as_tensor(rewards).flatten() for _, _, _, rewards, _ in data])
    samples_sheet(pixels, prompts, rewards, path)


def trl_config(options: Any, tracker: GeneralTracker, resumed: Path | None) -> Any:
    """The options by trl's names."""
    from trl import DDPOConfig  # the trainer's module says which trl it needs

    return DDPOConfig(
        seed=options.seed,
        log_with=[tracker],
        tracker_project_name="agsm-loss",
        project_kwargs={"project_dir": options.output_dir},
        num_epochs=options.num_epochs,
        save_freq=2**31,  # the recipe says when
        mixed_precision=options.mixed_precision,
        resume_from="" if resumed is None else str(resumed),
        sample_num_steps=options.num_inference_steps,
        sample_guidance_scale=options.guidance_scale,
        sample_batch_size=options.sample_batch_size,
        sample_num_batches_per_epoch=options.sample_num_batches_per_epoch,
        train_batch_size=options.train_batch_size,
        train_learning_rate=options.learning_rate,
        train_adam_beta2=0.999,
        train_adam_weight_decay=1e-4,
        train_gradient_accumulation_steps=options.gradient_accumulation_steps,
        train_max_grad_norm=options.max_grad_norm or float("inf"),
        train_num_inner_epochs=options.train_num_inner_epochs,
        train_cfg=options.guidance_scale > 1,
        train_clip_range=options.clip_range,
        train_timestep_fraction=options.train_timestep_fraction,
        per_prompt_stat_tracking=options.per_prompt_stat_tracking,
        per_prompt_stat_tracking_buffer_size=options.per_prompt_stat_tracking_buffer_size,
        per_prompt_stat_tracking_min_count=options.per_prompt_stat_tracking_min_count,
    )


def trl_reward(
    options: Any, state: Any, task: Task, parts: dict[str, list[float]]
) -> Callable[..., Any]:
    """The reward as trl calls it: images in [0, 1], prompts and what the prompts came with.

    parts: on the main process it gets the mean of each part of a sum, over all processes, at each
    call.
    """
    score = load(options.reward, state.device)
    check_prompts(score, options, task)

    def reward(images: Any, prompts: Any, metadata: Any) -> tuple[Any, dict[str, Any]]:
        scores = score.scores(2 * images.float() - 1, list(prompts))
        if len(scores) > 1:
            every: Any = gather(torch.stack(list(scores.values()), dim=1).to(state.device))
            if state.is_main_process:
                for name, mean in zip(scores, every.mean(0).tolist(), strict=True):
                    parts.setdefault(f"reward/{name}", []).append(mean)
        return score.total(scores), {}

    return reward


def drawn_prompts(options: Any, task: Task) -> Callable[[], tuple[str, dict[str, Any]]]:
    """Draws a prompt, by torch's random numbers, which a checkpoint keeps."""
    texts = prompts_of(options, task)
    return lambda: (texts[int(torch.randint(len(texts), ()))], {})


def data_batches(
    options: Any, model: Session, images: Any, state: Any
) -> Callable[[int], AGSMBatch]:
    """AGSM's batch of each micro-step: the data set's images, noised as the options say."""

    def agsm_batch(number: int) -> AGSMBatch:
        batch = images[number]
        generator = draws(options.seed, number, state.process_index, "agsm")
        latents = model.pipeline.encode_images(batch.pixels, generator)
        return model.agsm_batch(batch, latents, generator)

    return agsm_batch


if __name__ == "__main__":
    command(main)
