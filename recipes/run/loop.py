"""A run: accelerator, folder, log, validation, checkpoints, exact resume. Nothing of diffusion.

    with Run(options, "AGSM") as run:
        model = ...                                    # a `Trained`: module, optimizer, validation
        for index, batch in run.steps(model, batches, step):
            run.backward(*step(batch, run.draws(index)))
        model.save()

`batches` is a map-style data set: one item a micro-step, a function of its index, so that a resumed
run sees what an uninterrupted one sees. Between two items the run clips, takes the optimizer's
step, updates the EMA, logs, validates and checkpoints, where that is due.

Only trainable parameters are checkpointed. Under `options.output_dir`: log.jsonl (a line every
`logging_steps` steps, with the validation's scores), options.json and checkpoints/. Ctrl-C and
SIGTERM end the run after the step at hand, with a checkpoint and the command that continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    set_seed,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from agsm_loss._random import draws
from run.checkpoints import RunState, check_left, check_output, last_whole, opened, save
from run.engines import check_launched, fit, is_sharded
from run.log import (
    FirstStep,
    Log,
    flat,
    log_sheet,
    missing_tracker,
    paused,
    say_summary,
    steps_line,
    tracker_settings,
)
from run.options import option
from run.stop import Stop, end_helpers, signals_kept

if TYPE_CHECKING:
    from typing import Self  # Python 3.11's

LOGGER = get_logger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """Of every command that trains, in whoever's loop."""

    _argument_group_name = "run"
    output_dir: str = option(
        "runs/train", "Folder for the log, sheets, checkpoints and what was trained."
    )
    seed: int = option(0, "Seed of weights, data and noise.", at_least=0)
    gradient_accumulation_steps: int = option(
        1, "Micro-steps per optimizer step; their gradients are averaged.", at_least=1
    )
    max_grad_norm: float = option(
        1.0, "Norm to which gradients are clipped; 0: no clipping.", at_least=0
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = option(
        "no", "Precision of the denoiser's forward passes."
    )
    resume_from_checkpoint: Literal["latest"] | None = option(
        None, "Continue from the latest checkpoint under output_dir, if there is one."
    )
    report_to: str = option(
        "",
        "Tracker to log to as well as log.jsonl: tensorboard, wandb, trackio or another of "
        "accelerate's.",
    )


@dataclass(frozen=True)
class LoopOptions:
    """Of `Run.steps`."""

    _argument_group_name = "training"
    max_train_steps: int = option(1000, "Optimizer steps to run.", at_least=1)
    train_batch_size: int = option(16, "Images per process and micro-step.", at_least=1)
    dataloader_num_workers: int = option(
        0,
        "Processes that prepare batches ahead; 0: the training process prepares them.",
        at_least=0,
    )
    logging_steps: int = option(50, "Optimizer steps between two lines of the log.", at_least=1)
    validation_steps: int = option(
        1000,
        "Optimizer steps between two validations. There is one before the first step too, unless "
        "max_train_steps is less than this.",
        at_least=1,
    )
    checkpointing_steps: int = option(500, "Optimizer steps between two checkpoints.", at_least=1)
    lr_warmup_steps: int = option(
        0, "Number of first steps in which the learning rate rises to its peak.", at_least=0
    )
    lr_decay_steps: int = option(
        0,
        "Number of final steps in which the learning rate falls linearly to 0.",
        at_least=0,
    )


class Trained(Protocol):
    """What a run trains.

    module, optimizer: prepared by accelerate. `validate` runs on the main process, and on all where
    the engine shards the weights (`engines.is_sharded`); what it returns goes into the log.
    `summary`: title, and lines by name, to print before the first step. It may have a
    `fingerprint`, a text, of what a resumed run has to begin with: the base model's weights.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def validate(self, step: int) -> dict[str, Any]: ...

    def summary(self) -> tuple[str, dict[str, str]]: ...


class Run:
    """One training in its folder.

    Makes the accelerator and seeds: enter it before any weight is drawn.

    Args:
        options: `RunOptions` and `LoopOptions` among them.
        sharding: whether the command runs in FSDP2 and DeepSpeed too.

    Raises:
        ValueError: the launcher asks for what the command or its options do not; the output folder
            cannot be used (`checkpoints.check_output`).
    """

    def __init__(self, options: Any, *, sharding: bool = False) -> None:
        self.options, self.output = options, Path(options.output_dir)
        self.accelerator = _accelerator(options, sharding)
        self._stack = ExitStack()
        self._helpers: set[Any] = set()  # processes that prepare batches

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._stack:
            if kind is None:
                self.accelerator.wait_for_everyone()
                self.accelerator.end_training()
                return
            killed = [one.exitcode for one in self._helpers if one.exitcode]
            end_helpers(self._helpers)
            if killed and isinstance(error, Exception):  # of torch, or of a pipe
                raise RuntimeError(
                    "dataloader_num_workers: expected processes that prepare batches, got one that "
                    f"ended with exit code {killed[0]}, most often for want of memory. "
                    f"{last_whole(self.output)} Go on with fewer --dataloader_num_workers."
                ) from error

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return bool(self.accelerator.is_main_process)

    def draws(self, *names: int | str) -> torch.Generator:
        """A generator of this run, process and names: index of the micro-step, say."""
        first, *others = names
        return draws(self.options.seed, first, self.accelerator.process_index, *others)

    def steps(
        self,
        trained: Trained,
        batches: Dataset[Any],
        step: Any,
        *,
        fill: Callable[[Iterator[tuple[int, Any]], int], None] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """(index, batch) of each micro-step; the caller gives its loss to `backward`.

        Runs `options.max_train_steps` optimizer steps, less those done before a resume.

        batches: may have a `fingerprint`, a text, of what a resumed run has to go on with.
        step: its `update_ema` is called after each optimizer step that fp16's scaler does not skip,
            and a checkpoint holds its `state_dict`.
        fill: called on every process before the first step, with (index, batch) of each micro-step
            to come, and their number (of `model.precompute`).

        Raises:
            ValueError: `options.output_dir` cannot be used or resumed (`checkpoints.opened`), or
                has more steps than are to be done.
            FloatingPointError: a loss, a gradient, a weight, the optimizer's state or an average is
                not finite; it does not get into a checkpoint. DeepSpeed has taken the step by then,
                any other engine has not.
            SystemExit: SIGINT or SIGTERM came; there is a checkpoint.
        """
        options, accelerator = self.options, self.accelerator
        module, optimizer = trained.module, trained.optimizer
        looks = self.is_main or is_sharded(accelerator)
        self.log = Log(self.output / "log.jsonl")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: rate(at, options))
        others = {"schedule": schedule, "log": self.log, "averages": step}
        state = RunState(accelerator, module, optimizer, others)
        both = {"data": batches, "model": trained} if accelerator.is_main_process else {}
        made_of = {name: text for name, one in both.items()
                   if (text := getattr(one, "fingerprint", ""))}  # fmt: skip
        done = self._resume(state, made_of)
        _follow(schedule, options)
        if self.is_main:
            title, lines = trained.summary()
            rows = batches.about() if hasattr(batches, "about") else ""
            steps = steps_line(options, done, accelerator.num_processes, rows)
            say_summary(title, {**lines, **steps, "output": options.output_dir})
        if fill is not None:
            number = (options.max_train_steps - done) * options.gradient_accumulation_steps
            fill(self._items(batches, done), number)
        if options.validation_steps <= options.max_train_steps and done == 0 and looks:
            self._write(0, {"scores": trained.validate(0)})
        accelerator.wait_for_everyone()
        bar = tqdm(
            initial=done,
            total=options.max_train_steps,
            disable=not accelerator.is_local_main_process,
            mininterval=2,
        )
        first = FirstStep(module) if self.is_main else None
        items = self._items(batches, done)
        stop = self._stack.enter_context(Stop(_STOPPING if self.is_main else "").watching())
        for number in range(done + 1, options.max_train_steps + 1):
            self._number, self._seen = number, []
            for _ in range(options.gradient_accumulation_steps):
                index, batch = next(items)
                self._seen.append({"micro-step": index, **_described(batch)})
                with accelerator.accumulate(module):
                    yield index, batch  # the caller calls `backward`
            lr = schedule.get_last_lr()[0]
            if self._optimizer_step(module, optimizer):
                schedule.step()
                step.update_ema()
            bar.update()
            if first is not None:
                first.tell()
                first = None
            last = number == options.max_train_steps
            entry: dict[str, Any] = {}
            if number % options.logging_steps == 0 or last:
                entry = {**self.log.take(), "lr": lr}
                shown = {k: f"{entry[k]:.3g}" for k in _SHOWN if k in entry}
                bar.set_postfix(shown, refresh=False)
            if number % options.validation_steps == 0 or last:
                if looks:
                    with paused(bar):
                        entry["scores"] = trained.validate(number)
                accelerator.wait_for_everyone()
            if entry:
                self._write(number, entry)
            stopped = stop.asked(accelerator) and not last
            if number % options.checkpointing_steps == 0 or last or stopped:
                parts = state.parts()
                write = partial(state.write, parts)
                saved = save(accelerator, self.output, number, parts, write, made_of)
            if stopped:
                bar.close()
                stop.end(accelerator, f"step {number}", saved, options)
        bar.close()

    def backward(self, loss: Tensor, metrics: Mapping[str, Any]) -> None:
        """A micro-step's gradient, and its loss and metrics into the log's means."""
        if not bool(torch.isfinite(loss)):
            raise self._broken("loss", loss, self._seen[-1:])
        self.accelerator.backward(loss)  # DeepSpeed takes the step in here
        self.log.add({"loss": loss, **metrics})

    def _resume(self, state: RunState, made_of: Mapping[str, str]) -> int:
        """Opens the folder; the optimizer steps done before."""
        options = self.options
        found = self._stack.enter_context(opened(options, self.accelerator, made_of))
        done = 0 if found is None else found.step
        check_left("max_train_steps", options.max_train_steps, done)
        if found is not None:
            state.load(found.folder)
        if options.report_to:
            settings = tracker_settings(options.report_to, done + 1 if done else 0)
            self.accelerator.init_trackers(
                "agsm-loss", vars(options), {options.report_to: settings}
            )
        return done

    def _items(self, batches: Dataset[Any], done: int) -> Iterator[tuple[int, Any]]:
        """(index, batch) of each micro-step from there on."""
        a_step = self.options.gradient_accumulation_steps
        micro = range(done * a_step, self.options.max_train_steps * a_step)
        # Spawned: a forked worker hangs in torch's threads as soon as the parent has used them.
        workers = self.options.dataloader_num_workers
        loader = DataLoader(
            batches,
            batch_size=None,
            sampler=micro,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
        )
        before = set(active_children())
        with signals_kept():
            items = iter(loader)
        self._helpers |= set(active_children()) - before
        return zip(micro, items, strict=True)

    def _optimizer_step(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
        """The step, if the gradient is finite; whether fp16's scaler has let it be taken."""
        accelerator = self.accelerator
        most = self.options.max_grad_norm or float("inf")
        norm = torch.as_tensor(accelerator.clip_grad_norm_(module.parameters(), most))
        if bool(torch.isfinite(norm)):
            self.log.add({"grad_norm": norm})
        elif not _skips(accelerator):
            raise self._broken("gradient's norm", norm, self._seen)
        optimizer.step()
        optimizer.zero_grad()
        return not accelerator.optimizer_step_was_skipped

    def _broken(self, name: str, value: Tensor, on: list[dict[str, Any]]) -> FloatingPointError:
        return FloatingPointError(
            f"{name}: expected a finite number, got {value.item()} in step {self._number}, on "
            f"{on}. The step is in no checkpoint. {last_whole(self.output)} Leave out what is "
            "damaged there, or start anew with a lower --learning_rate."
        )

    def _write(self, step: int, entry: dict[str, Any]) -> None:
        """Into log.jsonl and, where there is one, the tracker, which gets the step's sheet too."""
        if not self.is_main:
            return
        self.log.write(step, entry)
        if self.options.report_to:
            self.accelerator.log(flat(entry), step=step)
            log_sheet(self.accelerator.trackers, self.output, step)


_SHOWN = ("loss", "reward/mean", "dpo/loss", "dpo/accuracy", "spo/loss", "spo/accuracy",
          "agsm/loss", "agsm/win_rate")  # fmt: skip
_STOPPING = "the run ends after this step, with a checkpoint"
_LEAST_SCALE = 2.0**-20


def _accelerator(options: Any, sharding: bool) -> Accelerator:
    check_launched(options, sharding=sharding)
    check_output(options)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=options.report_to or None,
        project_config=ProjectConfiguration(project_dir=options.output_dir),
        # Buffers here are constants. To exchange them would make processes that call the model a
        # different number of times (rollouts with and without a pair, say) wait for ever.
        # The others wait while the first process samples validation prompts.
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(hours=6)),
        ],
    )
    if options.report_to and not accelerator.log_with:  # accelerate leaves it out without a word
        raise missing_tracker(options.report_to)
    fit(accelerator, options)
    set_seed(options.seed)
    return accelerator


def rate(step: int, options: Any) -> float:
    """The learning rate's factor at a step: linear warm-up, constant, linear decay to zero.

    options: `LoopOptions` among them.
    """
    rising = (step + 1) / options.lr_warmup_steps if options.lr_warmup_steps else 1.0
    falling = (
        (options.max_train_steps - step) / options.lr_decay_steps if options.lr_decay_steps else 1.0
    )
    return max(0.0, min(1.0, rising, falling))


def _follow(schedule: torch.optim.lr_scheduler.LambdaLR, options: Any) -> None:
    """The next step's learning rate by these options, which may be longer than a checkpoint's."""
    was, factor = schedule.get_last_lr(), rate(schedule.last_epoch, options)
    now = [factor * base for base in schedule.base_lrs]
    if now != was:
        LOGGER.warning(
            "max_train_steps: the rate falls in the last %d steps, which are others now. The next "
            "step's learning rate is %g, and was to be %g.", options.lr_decay_steps, now[0], was[0]
        )  # fmt: skip
        schedule._last_lr = now
        for group, value in zip(schedule.optimizer.param_groups, now, strict=True):
            group["lr"] = value


def _described(batch: Any) -> dict[str, Any]:
    """Which rows of the data a batch is, where it knows them, for errors."""
    captions = [str(text)[:80] for text in getattr(batch, "captions", ())]
    return {"rows": getattr(batch, "image_ids", []), "captions": captions}


def _skips(accelerator: Accelerator) -> bool:
    """Whether fp16's scaler skips a step that is not finite, and lowers its scale for the next."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it ends at its lowest scale
        return bool(accelerator.mixed_precision == "fp16")
    return accelerator.scaler is not None and accelerator.scaler.get_scale() >= _LEAST_SCALE
