"""DDPO by trl on a Stable Diffusion pipeline, alone or with AGSM beside the reward.

    python recipes/train_ddpo.py --config recipes/configs/ddpo_epsilon.yaml --agsm-weight 1
    accelerate launch recipes/train_ddpo.py --config recipes/configs/ddpo_sd15.yaml --data captions.parquet

An epoch samples `--sampling-batches` batches of prompts, scores the pictures by `--reward`, and trains on
the trajectories. Prompts are the data set's captions, or the lines of `--sampling-prompts`. AGSM trains on
the data set's pictures (`--agsm-images data`), or on the samples with the best rewards (`best`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import GeneralTracker

from common.options import option, parse
from common.trained import PostTrainingOptions, Student, hard_per_image

if TYPE_CHECKING:
    from agsm_loss.integrations.hosts.step import AGSMBatch
    from common.task import Task


@dataclass(frozen=True)
class Options(PostTrainingOptions):
    """Every option, its default and its meaning. Defaults are trl's where it has them."""

    output: str = option("runs/ddpo", "folder for what is trained, log, sheets and checkpoints")
    model: str = option("recipes/models/epsilon", "pipeline folder or hub id")
    lora_rank: int = option(4, "a LoRA on the denoiser's attention; 0 for none")
    lr: float = option(3e-4, "learning rate")
    image_column: str = option("image", "of the data set")
    reward: str = option("detector", "detector, jpeg_compressibility, jpeg_incompressibility, redness, "
                         "or a CLIP model's folder or hub id")  # fmt: skip
    sampling_prompts: str = option(
        "", "file of prompts to sample (lines); none: the data's captions"
    )
    epochs: int = option(100, "of sampling and training")
    sampling_steps: int = option(50, "DDIM steps of a trajectory")
    sampling_batch: int = option(8, "images sampled at a time by a process")
    sampling_batches: int = option(2, "of them an epoch")
    guidance_scale: float = option(5.0, "of the trajectories; 1 for none, in training as well")
    eta: float = option(1.0, "of DDIM")
    train_batch: int = option(4, "trajectories a micro-step")
    accumulate: int = option(1, "train batches an optimizer step (each over all its timesteps)")
    timestep_fraction: float = option(1.0, "share of a trajectory's steps that are trained on")
    inner_epochs: int = option(1, "passes over an epoch's trajectories")
    clip_range: float = option(1e-4, "of the likelihood ratios")
    advantage_clip: float = option(5.0, "advantages are clipped to it")
    per_prompt: bool = option(False, "advantages against the other images of the same prompt")
    per_prompt_buffer: int = option(16, "rewards kept a prompt")
    per_prompt_least: int = option(16, "of them, from which on they are used")
    eval_every: int = option(10, "epochs")
    save_every: int = option(10, "epochs")
    agsm_weight: float = option(0.0, "lambda: so much AGSM beside the host's loss; 0: the host")
    agsm_warmup: int = option(0, "steps over which lambda rises from 0")
    agsm_images: str = option("data", "what AGSM trains on", ("data", "best"))
    agsm_best: float = option(0.25, "share of an epoch's samples, best reward first")
    agsm_batch: int = option(8, "images a micro-step of AGSM")
    agsm_every: int = option(1, "AGSM in one of so many micro-steps, so many times as heavy")


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = parse(Options, __doc__, arguments)

    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env
    from tqdm.auto import tqdm

    from agsm_loss.integrations.hosts.trl_ddpo import AGSMDDPOTrainer, LoadedPipeline
    from agsm_loss.schedule import as_schedule, linear_warmup
    from common.loop import last_checkpoint, truncate_log
    from world.task import open_task

    own_samples = options.agsm_weight and options.agsm_images == "best"
    range_ = (options.timestep_density, options.timestep_low, options.timestep_high)
    if own_samples and (options.negatives != "in_batch" or range_ != ("uniform", 0.0, 1.0)):
        raise ValueError(
            "agsm_images: best has in-batch negatives and uniform timesteps only; expected negatives "
            f"in_batch and the defaults of timestep_*, got {options.negatives} and {range_}."
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    # trl's parts log before they have made their own state.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    output = Path(options.output)
    torch.manual_seed(options.seed)
    task = open_task(options, state)
    student = Student.load(options, state.device, task)
    if type(student.model.pipe).__name__ != "StableDiffusionPipeline":
        raise ValueError(
            f"model: expected a StableDiffusionPipeline, got {type(student.model.pipe).__name__}: trl's "
            "DDPO knows no other. For flow models see recipes/train_flow_grpo.py."
        )
    resumed = last_checkpoint(options, state)
    log = output / "log.jsonl"
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        (output / "options.json").write_text(json.dumps(vars(options), indent=1) + "\n")
    tracker = JsonLines(log, extra_tracker(options) if state.is_main_process else None)
    schedule = as_schedule(options.agsm_weight)
    if options.agsm_warmup:
        schedule = linear_warmup(schedule, options.agsm_warmup)
    own: dict[str, Any] = {}
    if options.agsm_weight:
        own["agsm"] = lambda denoiser, parameters: student.agsm(options.agsm_batch, schedule)
        if options.agsm_images == "data":
            own["batches"] = data_batches(options, student, state)
    pipeline = LoadedPipeline(student.model.pipe, full=options.full)
    due = {"sheet": False}

    def show(data: Any, step: int, _: Any) -> None:
        if due["sheet"]:
            samples_sheet(data, output / "sheets" / f"samples_{step:06d}.png")

    trainer = AGSMDDPOTrainer(
        trl_config(options, tracker, resumed),
        trl_reward(options, state.device, task),
        prompts_of(options, task),
        pipeline,
        show if state.is_main_process else None,  # trl's call asks for a tracker: only there
        attached=None if student.tokens is None else student.tokens.attached,
        best=options.agsm_best,
        batch_size=options.agsm_batch,
        every=options.agsm_every,
        **own,
    )
    pipeline.set_progress_bar_config(disable=None, leave=False, desc="sampling")
    step = trainer.global_step
    if state.is_main_process:
        truncate_log(log, step)
    main_process = trainer.accelerator.is_main_process

    def validate() -> None:
        if main_process:
            tracker.write({"scores": student.validate(step)}, step)
        trainer.accelerator.wait_for_everyone()

    if options.eval_at_start and step == 0:
        validate()
    done = range(trainer.first_epoch, options.epochs)
    bar = tqdm(done, initial=trainer.first_epoch, total=options.epochs, disable=not main_process)
    for epoch in bar:
        last = epoch + 1 == options.epochs
        due["sheet"] = last or (epoch + 1) % options.eval_every == 0
        step = trainer.step(epoch, step)
        bar.set_postfix({name: f"{value:.3f}" for name, value in tracker.shown().items()})
        if due["sheet"]:
            validate()
        if last or (epoch + 1) % options.save_every == 0:
            tracker.flush()
            trainer.save_checkpoint()
    if main_process:
        student.save()
    trainer.accelerator.end_training()


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
        project_kwargs={
            "project_dir": options.output,
            "automatic_checkpoint_naming": True,
            "total_limit": 2,
        },
        num_epochs=options.epochs,
        save_freq=2**31,  # the recipe says when
        mixed_precision=options.mixed_precision,
        resume_from="" if resumed is None else str(resumed.parent),
        sample_num_steps=options.sampling_steps,
        sample_eta=options.eta,
        sample_guidance_scale=options.guidance_scale,
        sample_batch_size=options.sampling_batch,
        sample_num_batches_per_epoch=options.sampling_batches,
        train_batch_size=options.train_batch,
        train_learning_rate=options.lr,
        train_adam_beta2=options.beta2,
        train_adam_weight_decay=options.weight_decay,
        train_gradient_accumulation_steps=options.accumulate,
        train_max_grad_norm=options.max_grad_norm or float("inf"),
        train_num_inner_epochs=options.inner_epochs,
        train_cfg=options.guidance_scale > 1,
        train_adv_clip_max=options.advantage_clip,
        train_clip_range=options.clip_range,
        train_timestep_fraction=options.timestep_fraction,
        per_prompt_stat_tracking=options.per_prompt,
        per_prompt_stat_tracking_buffer_size=options.per_prompt_buffer,
        per_prompt_stat_tracking_min_count=options.per_prompt_least,
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
        texts = [line.strip() for line in lines if line.strip()]

        def caption_of(number: int) -> str:
            return texts[number % len(texts)]
    else:
        caption_of = task.caption_of()
    return lambda: (caption_of(int(torch.randint(2**31, ()))), {})


def data_batches(options: Options, student: Student, state: Any) -> Callable[[int], AGSMBatch]:
    """AGSM's batch of each micro-step: the data set's images, noised as the options say."""
    from agsm_loss import draws

    hard = hard_per_image(options)
    batches = student.task.images(options.agsm_batch, hard, options.image_column)

    def agsm_batch(number: int) -> AGSMBatch:
        batch = batches[number]
        generator = draws(options.seed, number, state.process_index, "agsm")
        return student.agsm_batch(
            batch, student.model.encode_images(batch.pixels, generator), generator
        )

    return agsm_batch


def extra_tracker(options: Options) -> GeneralTracker | None:
    """The tracker that was asked for beside log.jsonl."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

    from common.loop import missing_tracker

    if not options.tracker:
        return None
    if options.tracker not in LOGGER_TYPE_TO_CLASS or not filter_trackers(
        [options.tracker], options.output
    ):
        raise missing_tracker(options.tracker)
    kind: Any = LOGGER_TYPE_TO_CLASS[options.tracker]
    where = {"logging_dir": options.output} if kind.requires_logging_directory else {}
    tracker: GeneralTracker = kind("agsm-loss", **where)
    if hasattr(tracker, "start"):  # newer accelerate's
        tracker.start()
    tracker.store_init_configuration(vars(options))
    return tracker


class JsonLines(GeneralTracker):
    """accelerate's tracker to log.jsonl: a line for all that is logged at a step.

    extra: another tracker, which is given the same scalars (trl logs tensors, arrays and a nested config,
    which not all trackers take).
    """

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, file: Path, extra: GeneralTracker | None = None) -> None:
        super().__init__()
        self.file = file
        self.extra = extra
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
        from common.loop import append_line, flat

        self.flush()
        append_line(self.file, {"step": step, **values})
        if self.extra is not None:
            self.extra.log(flat(values), step=step)

    def flush(self) -> None:
        """What has been logged so far is written."""
        from common.loop import append_line

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
    main()
