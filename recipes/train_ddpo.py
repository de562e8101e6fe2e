r"""DDPO by trl on a Stable Diffusion pipeline, alone or with AGSM beside the reward.

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

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelerate.tracking import GeneralTracker

from common.options import option, parse
from common.settings import (
    ImageOptions,
    PipelineOptions,
    RewardOptions,
    WarmupOptions,
    hard_per_image,
)
from common.stop import command

if TYPE_CHECKING:
    from agsm_loss.integrations.hosts.base import AGSMBatch
    from common.task import Captions, Task
    from common.trained_pipeline import TrainedPipeline


@dataclass(frozen=True)
class Options(RewardOptions, WarmupOptions, PipelineOptions, ImageOptions):
    """The recipe's own options, with trl's defaults; the shared ones are in common/settings.py."""

    TITLE = "DDPO"
    output_dir: str = "runs/ddpo"
    model: str = "recipes/models/epsilon"
    rank: int = 4
    learning_rate: float = 3e-4
    sampling_prompts: str = option(
        "", "File of prompts to sample, one per line, in place of the data set's captions."
    )
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
    agsm_images: Literal["data", "best"] = option(
        "data", "Images that AGSM trains on: the data set's, or the samples with the best rewards."
    )
    agsm_best: float = option(
        0.25,
        "Share of the samples that AGSM trains on, best reward first (for --agsm_images best).",
        above=0,
        at_most=1,
    )
    agsm_batch: int = option(8, "Images of AGSM per micro-step.", at_least=2)
    agsm_every: int = option(
        1, "Run AGSM in one of N micro-steps, with N times its weight.", at_least=1
    )


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = parse(Options, __doc__, arguments)

    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from common.checkpoints import opened
    from common.trained_pipeline import TrainedPipeline
    from world.task import open_task

    own_samples = options.agsm_weight and options.agsm_images == "best"
    range_ = (options.timestep_density, options.timestep_low)
    if own_samples and (options.candidates != "in_batch" or range_ != ("uniform", 0.0)):
        raise ValueError(
            "agsm_images: best has in-batch negatives and uniform timesteps only; expected "
            f"candidates in_batch and the defaults of timestep_*, got {options.candidates} and "
            f"{range_}."
        )
    # trl's parts log before they have made their own state.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    torch.manual_seed(options.seed)
    task = open_task(options, state)
    trained = TrainedPipeline.load(options, state.device, task)
    if type(trained.model.pipe).__name__ != "StableDiffusionPipeline":
        raise ValueError(
            f"model: expected a StableDiffusionPipeline, got {type(trained.model.pipe).__name__}: "
            "trl's DDPO knows no other. For flow models see recipes/train_flow_grpo.py."
        )
    with opened(options, state) as found:
        train(options, state, trained, found)


def train(options: Options, state: Any, trained: TrainedPipeline, found: Any) -> None:
    """The epochs from the checkpoint on that was found, if one was, and the result."""
    from tqdm.auto import tqdm

    from common.checkpoints import last_whole, save
    from common.messages import paused
    from common.stop import Stop

    output = Path(options.output_dir)
    first = 0 if found is None else found.step
    tracker = JsonLines(output / "log.jsonl")
    if state.is_main_process and options.report_to:
        tracker.extra = extra_tracker(options, first)
        tracker.repeat(first)
    due = {"sheet": False}

    def show(data: Any, step: int, _: Any) -> None:
        if due["sheet"]:
            samples_sheet(data, output / "sheets" / f"samples_{step:06d}.png")

    trainer = make_trainer(options, state, trained, tracker, found, show)
    trained.say_start()
    step = trainer.global_step
    main_process = trainer.accelerator.is_main_process

    def validate() -> None:
        if main_process:
            tracker.write({"scores": trained.validate(step)}, step)
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
                saved = save(trainer.accelerator, output, step, trained.parameters)
            if stopped:
                bar.close()
                stop.end(trainer.accelerator, f"epoch {epoch + 1}", saved, options)
    if main_process:
        trained.save()
    trainer.accelerator.end_training()


def make_trainer(
    options: Options,
    state: Any,
    trained: TrainedPipeline,
    tracker: JsonLines,
    found: Any,
    show: Callable[..., None],
) -> Any:
    """trl's trainer with AGSM in it, where the checkpoint has left it."""
    from agsm_loss.integrations.hosts.trl_ddpo import AGSMDDPOTrainer, LoadedPipeline
    from agsm_loss.schedule import as_schedule, linear_warmup

    schedule = as_schedule(options.agsm_weight)
    if options.agsm_warmup_steps:
        schedule = linear_warmup(schedule, options.agsm_warmup_steps)
    own: dict[str, Any] = {}
    if options.agsm_weight:
        own["agsm"] = lambda denoiser, parameters: trained.agsm(options.agsm_batch, schedule)
        if options.agsm_images == "data":
            own["batches"] = data_batches(options, trained, state)
    pipeline = LoadedPipeline(trained.model.pipe, full=options.full)
    trainer = AGSMDDPOTrainer(
        trl_config(options, tracker, None if found is None else found.folder),
        trl_reward(options, state.device, trained.task),
        prompts_of(options, trained.task),
        pipeline,
        show if state.is_main_process else None,  # trl's call asks for a tracker: only there
        attached=None if trained.tokens is None else trained.tokens.attached,
        best=options.agsm_best,
        batch_size=options.agsm_batch,
        every=options.agsm_every,
        **own,
    )
    pipeline.set_progress_bar_config(disable=None, leave=False, desc="sampling")
    return trainer


def samples_sheet(data: Any, path: Path, most: int = 32) -> None:
    """What an epoch sampled, with its rewards; as trl's hook is given it."""
    import torch

    from common.rewards import to_uint8
    from common.sheet import sheet

    images = torch.cat([images for images, *_ in data])[:most]
    told = [
        {"prompt": f"{float(reward):.3f} {prompt}"}
        for _, prompts, _, rewards, _ in data
        for prompt, reward in zip(prompts, rewards, strict=True)
    ]
    shown = to_uint8(2 * images.float() - 1).permute(0, 2, 3, 1).cpu().numpy()
    sheet(shown, told[:most], None, path, side=96)


def trl_config(options: Options, tracker: GeneralTracker, resumed: Path | None) -> Any:
    """The options by trl's names."""
    from trl import DDPOConfig

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
        sample_eta=options.eta,
        sample_guidance_scale=options.guidance_scale,
        sample_batch_size=options.sample_batch_size,
        sample_num_batches_per_epoch=options.sample_num_batches_per_epoch,
        train_batch_size=options.train_batch_size,
        train_learning_rate=options.learning_rate,
        train_adam_beta2=options.adam_beta2,
        train_adam_weight_decay=options.adam_weight_decay,
        train_gradient_accumulation_steps=options.gradient_accumulation_steps,
        train_max_grad_norm=options.max_grad_norm or float("inf"),
        train_num_inner_epochs=options.train_num_inner_epochs,
        train_cfg=options.guidance_scale > 1,
        train_adv_clip_max=options.train_adv_clip_max,
        train_clip_range=options.clip_range,
        train_timestep_fraction=options.train_timestep_fraction,
        per_prompt_stat_tracking=options.per_prompt_stat_tracking,
        per_prompt_stat_tracking_buffer_size=options.per_prompt_stat_tracking_buffer_size,
        per_prompt_stat_tracking_min_count=options.per_prompt_stat_tracking_min_count,
    )


def trl_reward(options: Options, device: Any, task: Task) -> Callable[..., Any]:
    """The reward as trl calls it: images in [0, 1], prompts and what the prompts came with."""
    from common.rewards import load

    score = load(options.reward, device, task.rewards)

    def reward(images: Any, prompts: Any, metadata: Any) -> tuple[Any, dict[str, Any]]:
        return score(2 * images.float() - 1, list(prompts)), {}

    return reward


def prompts_of(options: Options, task: Task) -> Callable[[], tuple[str, dict[str, Any]]]:
    """Draws a prompt, by torch's random numbers, which a checkpoint keeps."""
    import torch

    if options.sampling_prompts:
        lines = Path(options.sampling_prompts).read_text().splitlines()
        texts: Captions | list[str] = [line.strip() for line in lines if line.strip()]
    else:
        texts = task.captions()
    return lambda: (texts[int(torch.randint(len(texts), ()))], {})


def data_batches(
    options: Options, trained: TrainedPipeline, state: Any
) -> Callable[[int], AGSMBatch]:
    """AGSM's batch of each micro-step: the data set's images, noised as the options say."""
    from agsm_loss import draws

    hard = hard_per_image(options)
    batches = trained.task.images(options.agsm_batch, hard, options.image_column)

    def agsm_batch(number: int) -> AGSMBatch:
        batch = batches[number]
        generator = draws(options.seed, number, state.process_index, "agsm")
        latents = trained.model.encode_images(batch.pixels, generator)
        return trained.agsm_batch(batch, latents, generator)

    return agsm_batch


def extra_tracker(options: Options, first: int) -> GeneralTracker:
    """The tracker that was asked for beside log.jsonl, for steps from the first on."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

    from common.log import missing_tracker, tracker_settings

    if options.report_to not in LOGGER_TYPE_TO_CLASS or not filter_trackers(
        [options.report_to], options.output_dir
    ):
        raise missing_tracker(options.report_to)
    kind: Any = LOGGER_TYPE_TO_CLASS[options.report_to]
    where = {"logging_dir": options.output_dir} if kind.requires_logging_directory else {}
    settings = tracker_settings(options.report_to, first)
    tracker: GeneralTracker = kind("agsm-loss", **where, **settings)
    if hasattr(tracker, "start"):  # newer accelerate's
        tracker.start()
    tracker.store_init_configuration(vars(options))
    return tracker


class JsonLines(GeneralTracker):
    """accelerate's tracker to log.jsonl: a line for all that is logged at a step.

    extra: another tracker, which is given the same scalars (trl logs tensors, arrays and a nested
    config, which not all trackers take).
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.extra: GeneralTracker | None = None
        self.step = 0
        self.line: dict[str, Any] = {}
        self.last: dict[str, float] = {}

    @property
    def tracker(self) -> Path:
        return self.file

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The recipe writes options.json."""

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Scalars only; trl also logs the rewards one by one."""
        if step != self.step:
            self.flush()
        self.step = self.step if step is None else step
        scalars = {name: value.item() if hasattr(value, "item") else value
                   for name, value in values.items() if getattr(value, "ndim", 0) == 0}  # fmt: skip
        self.line |= scalars
        if self.extra is not None:
            self.extra.log(scalars, step=self.step)

    def write(self, values: Mapping[str, Any], step: int) -> None:
        """A line of its own."""
        from common.log import append_line, flat

        self.flush()
        append_line(self.file, {"step": step, **values})
        if self.extra is not None:
            self.extra.log(flat(values), step=step)

    def repeat(self, first: int) -> None:
        """Gives the other tracker what the log has of that step: a resumed one drops the step."""
        from common.log import flat, lines_of

        for line in map(json.loads, lines_of(self.file)):
            if self.extra is not None and line["step"] >= first:
                self.extra.log(flat({**line, "step": None}), step=line["step"])

    def flush(self) -> None:
        """What has been logged so far is written."""
        from common.log import append_line

        if self.line:
            append_line(self.file, {"step": self.step, **self.line})
            self.last |= self.line
        self.line = {}

    def shown(self) -> dict[str, float]:
        """For the progress bar."""
        now = {**self.last, **self.line}
        return {name: now[name] for name in ("reward_mean", "loss") if name in now}

    def finish(self) -> None:
        self.flush()
        if self.extra is not None:
            self.extra.finish()


if __name__ == "__main__":
    command(main)
