"""What `train_ddpo.py` gives trl's trainer: settings, rewards, prompts, AGSM's batches, the log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, filter_trackers
from accelerate.utils import gather

from agsm_loss import draws
from agsm_loss.integrations.hosts.base import AGSMBatch
from agsm_loss.integrations.hosts.trl_ddpo import AGSMDDPOTrainer, LoadedPipeline
from data.task import Task
from model.agsm import agsm_weight
from model.trained_pipeline import TrainedPipeline
from rewards.rewards import load
from rewards.rollout import on_policy_images, prompts_of, samples_sheet
from run.log import (
    USED,
    append_line,
    flat,
    lines_of,
    missing_tracker,
    tracker_settings,
    used_since,
)


def make_trainer(
    options: Any,
    state: Any,
    trained: TrainedPipeline,
    tracker: JsonLines,
    found: Any,
    show: Callable[..., None],
) -> Any:
    """trl's trainer with AGSM in it, where the checkpoint has left it."""
    own: dict[str, Any] = {}
    if options.agsm_weight:
        own["agsm"] = lambda denoiser, parameters: trained.agsm(
            options.agsm_batch, agsm_weight(options)
        )
        if options.agsm_images == "data":
            own["batches"] = data_batches(options, trained, state)
    pipeline = LoadedPipeline(trained.model.pipe, full=options.full)
    trainer = AGSMDDPOTrainer(
        trl_config(options, tracker, None if found is None else found.folder),
        trl_reward(options, state, trained.task, tracker.rewards),
        drawn_prompts(options, trained.task),
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


def trl_reward(
    options: Any, state: Any, task: Task, parts: dict[str, list[float]]
) -> Callable[..., Any]:
    """The reward as trl calls it: images in [0, 1], prompts and what the prompts came with.

    parts: on the main process it gets the mean of each part of a sum, over all processes, at each
    call.
    """
    score = load(options.reward, state.device)

    def reward(images: Any, prompts: Any, metadata: Any) -> tuple[Any, dict[str, Any]]:
        rewards = score(2 * images.float() - 1, list(prompts))
        last: dict[str, torch.Tensor] = getattr(score, "last", {})
        if last:
            scores: Any = gather(torch.stack(list(last.values()), dim=1).to(state.device))
            if state.is_main_process:
                for name, mean in zip(last, scores.mean(0).tolist(), strict=True):
                    parts.setdefault(f"reward/{name}", []).append(mean)
        return rewards, {}

    return reward


def drawn_prompts(options: Any, task: Task) -> Callable[[], tuple[str, dict[str, Any]]]:
    """Draws a prompt, by torch's random numbers, which a checkpoint keeps."""
    texts = prompts_of(options, task)
    return lambda: (texts[int(torch.randint(len(texts), ()))], {})


def data_batches(options: Any, trained: TrainedPipeline, state: Any) -> Callable[[int], AGSMBatch]:
    """AGSM's batch of each micro-step: the data set's images, noised as the options say."""
    batches = on_policy_images(options, trained.task, options.agsm_batch)

    def agsm_batch(number: int) -> AGSMBatch:
        batch = batches[number]
        generator = draws(options.seed, number, state.process_index, "agsm")
        latents = trained.model.encode_images(batch.pixels, generator)
        return trained.agsm_batch(batch, latents, generator)

    return agsm_batch


def extra_tracker(options: Any, first: int) -> GeneralTracker:
    """The tracker that was asked for in addition to log.jsonl, for steps from the first on."""
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


# trl's names, as the other recipes have them.
_NAMES = {"reward_mean": "reward/mean", "reward_std": "reward/std"}


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
        self.rewards: dict[str, list[float]] = {}  # of an epoch's batches, by the name in the log
        lines = lines_of(file)  # of the run that is resumed
        self.began = time.time() - (json.loads(lines[-1]).get("seconds", 0.0) if lines else 0.0)

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
        scalars = {_NAMES.get(name, name): value.item() if hasattr(value, "item") else value
                   for name, value in values.items() if getattr(value, "ndim", 0) == 0}  # fmt: skip
        if "reward/mean" in scalars:
            scalars |= {name: sum(means) / len(means) for name, means in self.rewards.items()}
            self.rewards.clear()
        self.line |= scalars
        if self.extra is not None:
            self.extra.log(scalars, step=self.step)

    def write(self, values: Mapping[str, Any], step: int) -> None:
        """A line of its own."""
        self.flush()
        self._append(step, values)
        if self.extra is not None:
            self.extra.log(flat(values), step=step)

    def repeat(self, first: int) -> None:
        """Gives the other tracker what the log has of that step: a resumed one drops the step."""
        for line in map(json.loads, lines_of(self.file)):
            if self.extra is not None and line["step"] >= first:
                values = {name: one for name, one in line.items() if name not in ("step", *USED)}
                self.extra.log(flat(values), step=line["step"])

    def flush(self) -> None:
        """What has been logged so far is written."""
        if self.line:
            self._append(self.step, self.line)
            self.last |= self.line
        self.line = {}

    def _append(self, step: int, values: Mapping[str, Any]) -> None:
        append_line(self.file, {"step": step, **used_since(self.began), **values})

    def shown(self) -> dict[str, float]:
        """For the progress bar."""
        now = {**self.last, **self.line}
        return {name: now[name] for name in ("reward/mean", "loss") if name in now}

    def finish(self) -> None:
        self.flush()
        if self.extra is not None:
            self.extra.finish()
