"""The training loop of every recipe, on accelerate: log, validation, checkpoints, exact resume.

A recipe gives a module, the batches (a map-style data set: one item a micro-step, a function of
its index, so that a resumed run sees what an uninterrupted one sees), and what to do with them:

    hooks = Hooks(loss=..., validate=..., finish=...)
    train(options, accelerator, model, optimizer, batches, hooks)

Only trainable parameters are checkpointed. Under `options.output_dir`: log.jsonl (a line every
`logging_steps` steps, with the validation's scores), options.json and checkpoints/. Ctrl-C and
SIGTERM end the run after the step at hand, with a checkpoint and the command that continues.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
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

from run.checkpoints import check_output, last_whole, opened, save
from run.engines import check_launched, fit, is_sharded
from run.log import Log, flat, log_sheet, missing_tracker, tracker_settings
from run.messages import paused
from run.settings import LoopOptions
from run.state import RunState
from run.stop import Stop, signals_kept


def rows_and_captions(batch: Any) -> dict[str, Any]:
    """Which rows of the data a batch is, where it knows them, for errors."""
    captions = [str(text)[:80] for text in getattr(batch, "captions", ())]
    return {"rows": getattr(batch, "image_ids", []), "captions": captions}


@dataclass(frozen=True)
class Hooks:
    """What a recipe does in the loop.

    loss: batch, index of the micro-step -> (scalar, metrics); called on every process.
    update_ema: called after each optimizer step.
    validate: step -> what goes into the log; `finish`: after the last step. Both run on the main
        process, and on all where the engine shards the weights (`engines.is_sharded`).
    state: objects with state_dict and load_state_dict to checkpoint.
    validate_first: validate before the first step as well; the log then has a line for step 0.
    describe: batch -> what an error tells of it.
    precompute: called on every process before the first step, with (index, batch) of each
        micro-step to come, and their number.
    begin: called on every process with the number of steps done before, once that is known.
    """

    loss: Callable[[Any, int], tuple[Tensor, Mapping[str, Tensor]]]
    validate: Callable[[int], dict[str, Any]]
    finish: Callable[[], None]
    update_ema: Callable[[], None] = lambda: None
    state: Sequence[Any] = field(default_factory=tuple)
    validate_first: bool = False
    describe: Callable[[Any], Mapping[str, Any]] = rows_and_captions
    precompute: Callable[[Iterator[tuple[int, Any]], int], None] | None = None
    begin: Callable[[int], None] = lambda done: None


def start(options: LoopOptions, *, sharding: bool = False) -> Accelerator:
    """Seeds and the accelerator; call it before any weight is drawn.

    sharding: whether the recipe runs in FSDP2 and DeepSpeed too.

    Raises:
        ValueError: the launcher asks for what the recipe or its options do not; the output folder
            cannot be used (`checkpoints.check_output`).
    """
    check_launched(sharding=sharding)
    check_output(options)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", options.mixed_precision):
        raise ValueError(
            f"mixed_precision: expected {launched}, as accelerate's launcher says, got "
            f"{options.mixed_precision}. Give --mixed_precision {launched}."
        )
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


def rate(step: int, options: LoopOptions) -> float:
    """The learning rate's factor at a step: linear warm-up, constant, linear decay to zero."""
    rising = (step + 1) / options.lr_warmup_steps if options.lr_warmup_steps else 1.0
    falling = (
        (options.max_train_steps - step) / options.lr_decay_steps if options.lr_decay_steps else 1.0
    )
    return max(0.0, min(1.0, rising, falling))


def train(
    options: LoopOptions,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Dataset[Any],
    hooks: Hooks,
) -> None:
    """Runs `options.max_train_steps` optimizer steps. `model` and `optimizer` come prepared.

    Raises:
        ValueError: `options.output_dir` cannot be used or resumed (`checkpoints.opened`).
        FloatingPointError: a loss, a gradient or a weight is not finite; it does not get into a
            checkpoint. DeepSpeed has taken the step by then, any other engine has not.
        SystemExit: SIGINT or SIGTERM came; there is a checkpoint.
    """
    output = Path(options.output_dir)
    log = Log(output / "log.jsonl")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, options))
    state = RunState(accelerator, model, optimizer, [schedule, log, *hooks.state])
    main = accelerator.is_main_process
    looks = main or is_sharded(accelerator)
    with opened(options, accelerator) as found:
        done = 0 if found is None else found.step
        if found is not None:
            state.load(found.folder)
        hooks.begin(done)
        if options.report_to:
            settings = tracker_settings(options.report_to, done + 1 if done else 0)
            accelerator.init_trackers("agsm-loss", vars(options), {options.report_to: settings})
        if hooks.precompute is not None:
            number = (options.max_train_steps - done) * options.gradient_accumulation_steps
            hooks.precompute(_items(options, batches, done), number)
        if hooks.validate_first and done == 0 and looks:
            scores = hooks.validate(0)
            if main:
                _write(options, accelerator, log, 0, {"scores": scores})
        accelerator.wait_for_everyone()
        bar = tqdm(
            initial=done,
            total=options.max_train_steps,
            disable=not accelerator.is_local_main_process,
            mininterval=2,
        )
        items = _items(options, batches, done)
        with Stop(_STOPPING if main else "").watching() as stop:
            for step in range(done + 1, options.max_train_steps + 1):
                _optimizer_step(options, accelerator, model, optimizer, items, hooks, log, step)
                schedule.step()
                hooks.update_ema()
                bar.update()
                last = step == options.max_train_steps
                entry: dict[str, Any] = {}
                if step % options.logging_steps == 0 or last:
                    entry = {**log.take(), "lr": schedule.get_last_lr()[0]}
                    shown = {k: f"{entry[k]:.3g}" for k in _SHOWN if k in entry}
                    bar.set_postfix(shown, refresh=False)
                if step % options.validation_steps == 0 or last:
                    if looks:
                        with paused(bar):
                            entry["scores"] = hooks.validate(step)
                    accelerator.wait_for_everyone()
                if entry and main:
                    _write(options, accelerator, log, step, entry)
                stopped = stop.asked(accelerator) and not last
                if step % options.checkpointing_steps == 0 or last or stopped:
                    saved = save(accelerator, output, step, model.parameters(), state.save)
                if stopped:
                    bar.close()
                    stop.end(accelerator, f"step {step}", saved, options)
        bar.close()
        if looks:
            hooks.finish()
        accelerator.wait_for_everyone()
        accelerator.end_training()


def _write(
    options: LoopOptions, accelerator: Accelerator, log: Log, step: int, entry: dict[str, Any]
) -> None:
    """Into log.jsonl and, where there is one, the tracker, which gets the step's sheet too."""
    log.write(step, entry)
    if options.report_to:
        accelerator.log(flat(entry), step=step)
        log_sheet(accelerator.trackers, Path(options.output_dir), step)


_SHOWN = ("loss", "reward/mean", "dpo/loss", "dpo/accuracy", "spo/loss", "spo/accuracy",
          "agsm/loss", "agsm/win_rate")  # fmt: skip
_STOPPING = "the run ends after this step, with a checkpoint"
_LEAST_SCALE = 2.0**-20


def _items(options: LoopOptions, batches: Dataset[Any], done: int) -> Iterator[tuple[int, Any]]:
    """(index, batch) of each micro-step from there on."""
    a_step = options.gradient_accumulation_steps
    micro = range(done * a_step, options.max_train_steps * a_step)
    # Spawned: a forked worker hangs in torch's threads as soon as the parent has used them.
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=micro,
        num_workers=options.dataloader_num_workers,
        multiprocessing_context="spawn" if options.dataloader_num_workers else None,
    )
    with signals_kept():
        items = iter(loader)
    return zip(micro, items, strict=True)


def _optimizer_step(
    options: LoopOptions,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    items: Iterator[tuple[int, Any]],
    hooks: Hooks,
    log: Log,
    step: int,
) -> None:
    """The micro-steps of an optimizer step, and the step, if all its numbers are finite."""
    seen: list[dict[str, Any]] = []

    def broken(name: str, value: Tensor, on: list[dict[str, Any]]) -> FloatingPointError:
        return FloatingPointError(
            f"{name}: expected a finite number, got {value.item()} in step {step}, on {on}. The "
            f"step is in no checkpoint. {last_whole(Path(options.output_dir))} Leave out what is "
            "damaged there, or start anew with a lower --learning_rate."
        )

    for _ in range(options.gradient_accumulation_steps):
        index, batch = next(items)
        seen.append({"micro-step": index, **hooks.describe(batch)})
        with accelerator.accumulate(model):
            loss, metrics = hooks.loss(batch, index)
            if not bool(torch.isfinite(loss)):
                raise broken("loss", loss, seen[-1:])
            accelerator.backward(loss)  # DeepSpeed takes the step in here
        log.add({"loss": loss, **metrics})
    norm = torch.as_tensor(
        accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm or float("inf"))
    )
    if bool(torch.isfinite(norm)):
        log.add({"grad_norm": norm})
    elif not _skips(accelerator):
        raise broken("gradient's norm", norm, seen)
    optimizer.step()
    optimizer.zero_grad()


def _skips(accelerator: Accelerator) -> bool:
    """Whether fp16's scaler skips a step that is not finite, and lowers its scale for the next."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # it ends at its lowest scale
        return bool(accelerator.mixed_precision == "fp16")
    return accelerator.scaler is not None and accelerator.scaler.get_scale() >= _LEAST_SCALE
