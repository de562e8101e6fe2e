"""The training loop of every recipe, on accelerate: log, validation, checkpoints, exact resume.

A recipe gives a module, the batches (a map-style data set: one item a micro-step, a function of
its index, so that a resumed run sees what an uninterrupted one sees), and what to do with them:

    train(options, model, batches, Hooks(loss=..., validate=..., finish=...))

Only trainable parameters are checkpointed. Under `options.output_dir`: log.jsonl (a line every
`logging_steps` steps, with the validation's scores), options.json and checkpoints/.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    set_seed,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from common.settings import LoopOptions, TrainingOptions

WEIGHTS, COMPLETE = "trainable.safetensors", "complete"


@dataclass(frozen=True)
class Hooks:
    """What a recipe does in the loop.

    loss: batch, index of the micro-step -> (scalar, metrics); called on every process.
    update_ema: called after each optimizer step.
    validate: step -> what goes into the log; `finish`: after the last step. Both run on the main
        process only.
    state: objects with state_dict and load_state_dict to checkpoint.
    validate_first: validate before the first step as well; the log then has a line for step 0.
    """

    loss: Callable[[Any, int], tuple[Tensor, Mapping[str, Tensor]]]
    validate: Callable[[int], dict[str, Any]]
    finish: Callable[[], None]
    update_ema: Callable[[], None] = lambda: None
    state: Sequence[Any] = field(default_factory=tuple)
    validate_first: bool = False


def start(options: LoopOptions) -> Accelerator:
    """Seeds and the accelerator; call it before any weight is drawn."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", options.mixed_precision):
        raise ValueError(
            f"mixed_precision: expected {launched}, as accelerate's launcher says, got "
            f"{options.mixed_precision}. Give --mixed_precision {launched}."
        )
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=options.report_to or None,
        project_config=ProjectConfiguration(
            project_dir=options.output_dir, automatic_checkpoint_naming=True, total_limit=2
        ),
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
    set_seed(options.seed)
    return accelerator


def missing_tracker(name: str) -> ValueError:
    """The error for a tracker that accelerate does not know or find."""
    return ValueError(
        f"report_to: expected one that is installed, got {name!r}. pip install {name}, or leave it out: "
        "log.jsonl is always written."
    )


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
        ValueError: `options.output_dir` holds a run and `options.resume_from_checkpoint` is off.
        FloatingPointError: the loss is not finite; the last checkpoint is kept.
    """
    output = Path(options.output_dir)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, options))
    accelerator.register_for_checkpointing(schedule, *hooks.state)
    _checkpoint_trainable(accelerator)
    done = _resume(options, accelerator, schedule)
    log = output / "log.jsonl"
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        truncate_log(log, done)
        (output / "options.json").write_text(json.dumps(vars(options), indent=1) + "\n")
    if options.report_to:
        accelerator.init_trackers("agsm-loss", config=vars(options))
    micro = range(
        done * options.gradient_accumulation_steps,
        options.max_train_steps * options.gradient_accumulation_steps,
    )
    # Spawned: a forked worker hangs in torch's threads as soon as the parent has used them.
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=micro,
        num_workers=options.dataloader_num_workers,
        multiprocessing_context="spawn" if options.dataloader_num_workers else None,
    )
    means = _Means()
    began = time.time()
    if hooks.validate_first and done == 0 and accelerator.is_main_process:
        append_line(log, {"step": 0, "seconds": 0.0, "scores": hooks.validate(0)})
    accelerator.wait_for_everyone()
    bar = tqdm(
        initial=done,
        total=options.max_train_steps,
        disable=not accelerator.is_local_main_process,
        mininterval=2,
    )
    for index, batch in zip(micro, loader, strict=True):
        last = (index + 1) % options.gradient_accumulation_steps == 0
        with _sync(accelerator, model, last):
            loss, metrics = hooks.loss(batch, index)
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(
                    f"loss: expected a finite number, got {loss.item()} at step {done + 1}. Lower "
                    f"--learning_rate; the last checkpoint is under {output / 'checkpoints'}."
                )
            accelerator.backward(loss / options.gradient_accumulation_steps)
        means.add({"loss": loss, **metrics})
        if not last:
            continue
        if options.max_grad_norm:
            norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            means.add({"grad_norm": norm})
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        hooks.update_ema()
        done += 1
        bar.update()
        entry: dict[str, Any] = {}
        if done % options.logging_steps == 0 or done == options.max_train_steps:
            entry = {**means.take(), "lr": schedule.get_last_lr()[0]}
            shown = {k.rsplit("/", 1)[-1]: f"{entry[k]:.4f}" for k in entry if k in _SHOWN}
            bar.set_postfix(shown, refresh=False)
        if done % options.validation_steps == 0 or done == options.max_train_steps:
            if accelerator.is_main_process:
                entry["scores"] = hooks.validate(done)
            accelerator.wait_for_everyone()
        if entry and accelerator.is_main_process:
            line = {"step": done, "seconds": round(time.time() - began, 1), **entry}
            append_line(log, line)
            if options.report_to:
                accelerator.log(flat(entry), step=done)
        if done % options.checkpointing_steps == 0 or done == options.max_train_steps:
            _save(accelerator)
    bar.close()
    if accelerator.is_main_process:
        hooks.finish()
    accelerator.wait_for_everyone()
    accelerator.end_training()


_SHOWN = ("loss", "agsm/win_rate", "agsm/score_margin")


class _Means:
    """Running means of scalars between two lines of the log."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            total, count = self.sums.get(name, (torch.zeros(()), 0))
            # Left where it is: to fetch it would wait for the device in every micro-step.
            self.sums[name] = total + torch.as_tensor(value).detach().float(), count + 1

    def take(self) -> dict[str, float]:
        means = {name: (total / count).item() for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means


def _sync(accelerator: Accelerator, model: nn.Module, last: bool) -> Any:
    """Gradients are exchanged between processes in the last micro-step only."""
    import contextlib

    return contextlib.nullcontext() if last else accelerator.no_sync(model)


def _checkpoint_trainable(accelerator: Accelerator) -> None:
    """Checkpoints hold what is trained and never a second copy of a frozen backbone."""

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            for number, model in enumerate(models):
                own = {n: p.contiguous() for n, p in _trainable(accelerator, model).items()}
                save_file(own, Path(folder) / f"{number}_{WEIGHTS}")
        weights.clear()

    def load(models: list[nn.Module], folder: str) -> None:
        for number, model in enumerate(models):
            saved = load_file(Path(folder) / f"{number}_{WEIGHTS}")
            own = _trainable(accelerator, model)
            if saved.keys() != own.keys():
                raise ValueError(
                    f"{folder}: expected parameters {sorted(own)}, got {sorted(saved)}. Resume "
                    "with the options that the run began with."
                )
            for name, value in own.items():
                value.copy_(saved[name])
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _trainable(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    bare = accelerator.unwrap_model(model)
    return {n: p.data for n, p in bare.named_parameters() if p.requires_grad}


def _save(accelerator: Accelerator) -> None:
    """A checkpoint counts once it is marked complete: a run can be killed while it writes one."""
    folder = Path(accelerator.save_state())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (folder / COMPLETE).touch()


def _resume(options: LoopOptions, accelerator: Accelerator, schedule: Any) -> int:
    """Loads the last checkpoint, if there is one; returns the optimizer steps already done."""
    saved = last_checkpoint(options, accelerator)
    if saved is None:
        return 0
    accelerator.load_state(str(saved))
    accelerator.project_configuration.iteration = _number(saved) + 1
    return int(schedule.last_epoch)


def last_checkpoint(options: TrainingOptions, state: Accelerator | PartialState) -> Path | None:
    """The last whole checkpoint under `options.output_dir`; unfinished ones are removed.

    Raises:
        ValueError: there is a run and `options.resume_from_checkpoint` is off.
    """
    found = sorted(Path(options.output_dir).glob("checkpoints/checkpoint_*"), key=_number)
    if found and not options.resume_from_checkpoint:
        raise ValueError(
            f"{options.output_dir} holds a run; add --resume_from_checkpoint latest or choose another "
            "--output_dir"
        )
    saved = [folder for folder in found if (folder / COMPLETE).exists()]
    state.wait_for_everyone()
    if state.is_main_process:
        for folder in set(found) - set(saved):
            shutil.rmtree(folder)
    state.wait_for_everyone()
    return saved[-1] if saved else None


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("_", 1)[1])


def append_line(log: Path, line: Mapping[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")


def truncate_log(log: Path, step: int) -> None:
    """Drops the log's lines beyond the step that a run resumes from."""
    lines = log.read_text().splitlines() if log.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    log.write_text("".join(line + "\n" for line in kept))


def flat(entry: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers as tracker names: {"scores": {"overall": 1}} -> {"scores/overall": 1}."""
    found: dict[str, float] = {}
    for name, value in entry.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[prefix + name] = value
    return found
