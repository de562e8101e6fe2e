"""Trains a base text-to-image model of the world from nothing and saves a stock pipeline.

    python recipes/train_base.py --config recipes/configs/base_flow.yaml
    accelerate launch recipes/train_base.py --config recipes/configs/base_flow.yaml --steps 20000

Every key of the YAML file is an option of the command line, which wins. Under `--output` it
writes log.jsonl (loss, learning rate; scores on the validation prompts with the EMA weights),
sheets/ (samples with verdicts), checkpoints/ (for `--resume`: the run goes on exactly as if
it had not been stopped) and pipeline/ (the EMA weights, by save_pretrained, in half precision).

A share of the training captions can be corrupted (the image stays): wrong count, wrong colour, a
group not mentioned. Batches, noise and caption edits are functions of (seed, step, process).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def _option(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Options:
    """Every option, its default and its meaning."""

    base: str = _option(
        "flow", "flow (StableDiffusion3Pipeline) or epsilon (StableDiffusionPipeline)"
    )
    output: str = _option("runs/base", "folder for logs, sheets, checkpoints and the pipeline")
    width: int = _option(128, "of the transformer, or of the UNet's first level")
    layers: int = _option(6, "of the transformer, or a level of the UNet")
    steps: int = _option(10000, "optimizer steps")
    batch_size: int = _option(64, "images a process and step")
    lr: float = _option(1e-3, "peak learning rate")
    warmup: int = _option(200, "steps to the peak")
    decay: int = _option(2000, "last steps, over which the rate falls to zero linearly")
    ema_decay: float = _option(0.999, "of the weights that are scored and saved")
    drop_caption: float = _option(0.1, "share of empty captions, for classifier-free guidance")
    corrupt_count: float = _option(0.0, "share of captions with a wrong count")
    corrupt_colour: float = _option(0.0, "share with a wrong colour, of those that name one")
    corrupt_missing: float = _option(0.0, "share with a group left out, of those with two")
    init_from: str = _option("", "a saved pipeline to start from instead of random weights")
    seed: int = _option(0, "of weights, data and noise")
    mixed_precision: str = _option("no", "no, bf16 or fp16")
    compile: bool = _option(False, "torch.compile the denoiser")
    threads: int = _option(0, "CPU threads; 0 leaves torch's choice")
    log_every: int = _option(50, "steps")
    eval_every: int = _option(1000, "steps")
    eval_per_category: int = _option(32, "validation prompts a category")
    eval_steps: int = _option(20, "sampling steps")
    eval_cfg: float = _option(3.0, "guidance scale")
    save_every: int = _option(500, "steps")
    resume: bool = _option(False, "go on from the last checkpoint under output, if there is one")


def parse(arguments: list[str] | None = None) -> Options:
    """Defaults, then the YAML file, then the command line. Unknown keys are errors."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file with any of the options below")
    for option in fields(Options):
        flag = "--" + option.name.replace("_", "-")
        shared: dict[str, Any] = {"default": option.default, "help": option.metadata["help"]}
        if isinstance(option.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
        else:
            parser.add_argument(flag, type=type(option.default), **shared)
    config = parser.parse_known_args(arguments)[0].config
    if config is not None:
        import yaml

        values = yaml.safe_load(config.read_text()) or {}
        known = {option.name: type(option.default) for option in fields(Options)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"{config}: unknown keys {unknown}; expected keys among {list(known)}")
        for key, value in values.items():
            if known[key] is float and isinstance(value, int) and not isinstance(value, bool):
                values[key] = float(value)
            elif not isinstance(value, known[key]):
                raise ValueError(f"{config}: {key}: expected {known[key].__name__}, got {value!r}")
        parser.set_defaults(**values)
    chosen = vars(parser.parse_args(arguments))
    del chosen["config"]
    return Options(**chosen)


def rate(step: int, options: Options) -> float:
    """The learning rate's factor at a step: linear warm-up, constant, linear decay to zero."""
    rising = (step + 1) / options.warmup if options.warmup else 1.0
    falling = (options.steps - step) / options.decay if options.decay else 1.0
    return max(0.0, min(1.0, rising, falling))


def batch(options: Options, step: int, rank: int) -> tuple[torch.Tensor, list[str]]:
    """Images (B, 3, 24, 24) in [-1, 1] and their captions, a function of (seed, step, rank)."""
    import numpy as np
    import torch

    from world.captions import caption, corrupt
    from world.prompts import scenes
    from world.render import render, to_model

    rng = np.random.default_rng([options.seed, step, rank, 1])
    shares = {
        "count": options.corrupt_count,
        "colour": options.corrupt_colour,
        "missing": options.corrupt_missing,
    }
    stream = scenes(int(rng.integers(2**62)))
    images, captions = [], []
    for spec, scene in islice(stream, options.batch_size):
        images.append(render(scene))
        told = caption(corrupt(spec, shares, rng))
        captions.append("" if rng.random() < options.drop_caption else told)
    return torch.from_numpy(to_model(np.stack(images))), captions


def build(options: Options) -> torch.nn.Module:
    """The model to train, random or with the weights of `init_from`."""
    import diffusers

    from world_models import BASES

    if options.base not in BASES:
        raise ValueError(f"base: expected one of {list(BASES)}, got {options.base!r}")
    model = BASES[options.base](width=options.width, layers=options.layers)
    if options.init_from:
        saved = diffusers.DiffusionPipeline.from_pretrained(options.init_from)
        for name, part in model.pipeline().components.items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(saved.components[name].float().state_dict())
    return model


def evaluate(model: Any, options: Options, step: int) -> dict[str, Any]:
    """Scores the model on the validation prompts and saves a sheet; returns the summary."""
    import torch

    from world.prompts import rows
    from world.score import summarize
    from world_eval import sample, sheet, verdicts

    wanted = rows("validation", options.eval_per_category)
    pipe = model.pipeline()
    pipe.set_progress_bar_config(disable=True)
    with torch.compiler.set_stance("force_eager"):
        images = sample(
            pipe,
            [row["prompt"] for row in wanted],
            seed=options.seed,
            steps=options.eval_steps,
            cfg=options.eval_cfg,
        )
    judged = verdicts(images, wanted)
    shown = [i for i in range(len(wanted)) if i % options.eval_per_category < 8]
    sheet(
        images[shown],
        [wanted[i] for i in shown],
        [judged[i] for i in shown],
        Path(options.output) / "sheets" / f"{step:06d}.png",
    )
    return summarize(judged)


def main(arguments: list[str] | None = None) -> None:
    """Trains, evaluates, checkpoints and saves."""
    options = parse(arguments)

    import torch
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration, set_seed
    from diffusers.training_utils import EMAModel
    from tqdm.auto import tqdm

    from world_models import LATENT_SCALE

    if options.threads:
        torch.set_num_threads(options.threads)
    project = ProjectConfiguration(
        project_dir=options.output, automatic_checkpoint_naming=True, total_limit=2
    )
    accelerator = Accelerator(mixed_precision=options.mixed_precision, project_config=project)
    set_seed(options.seed)
    model = build(options)
    bare: Any = model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, options))
    model, optimizer = accelerator.prepare(model, optimizer)
    ema = EMAModel(bare.parameters(), decay=options.ema_decay)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema, schedule)
    if options.compile:
        bare.denoiser.compile(dynamic=False)

    start = 0
    saved = sorted(Path(options.output).glob("checkpoints/checkpoint_*"), key=_number)
    if saved and not options.resume:
        raise ValueError(f"{options.output} holds a run; add --resume or choose another --output")
    if saved:
        accelerator.load_state(str(saved[-1]))
        start = schedule.last_epoch
        project.iteration = _number(saved[-1]) + 1
    log = Path(options.output) / "log.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        _truncate(log, start)
        (log.parent / "options.json").write_text(json.dumps(vars(options), indent=1))

    began, total, count = time.time(), 0.0, 0
    bar = tqdm(
        range(start, options.steps),
        initial=start,
        total=options.steps,
        disable=not accelerator.is_local_main_process,
        mininterval=10,
    )
    for step in bar:
        images, captions = batch(options, step, accelerator.process_index)
        generator = torch.Generator().manual_seed(
            hash((options.seed, step, accelerator.process_index)) % 2**63
        )
        with accelerator.autocast():
            loss = model(images.to(accelerator.device) * LATENT_SCALE, captions, generator).mean()
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(bare.parameters())
        done = step + 1
        total, count = total + loss.item(), count + 1
        entry: dict[str, Any] = {}
        if done % options.log_every == 0 or done == options.steps:
            entry = {
                "loss": total / count,
                "grad_norm": float(norm),
                "lr": schedule.get_last_lr()[0],
            }
            bar.set_postfix(loss=f"{total / count:.4f}")
            total, count = 0.0, 0
        if done % options.eval_every == 0 or done == options.steps:
            if accelerator.is_main_process:
                ema.store(bare.parameters())
                ema.copy_to(bare.parameters())
                bare.eval()
                entry["scores"] = evaluate(bare, options, done)
                if done == options.steps:
                    _save(bare, Path(options.output) / "pipeline")
                bare.train()
                ema.restore(bare.parameters())
            accelerator.wait_for_everyone()
        if entry and accelerator.is_main_process:
            entry = {"step": done, "seconds": round(time.time() - began, 1), **entry}
            with log.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        if done % options.save_every == 0 or done == options.steps:
            accelerator.save_state()


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("_", 1)[1])


def _truncate(log: Path, step: int) -> None:
    """Drops the log's lines beyond the step that a run resumes from."""
    lines = log.read_text().splitlines() if log.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    log.write_text("".join(line + "\n" for line in kept))


def _save(model: Any, folder: Path) -> None:
    """Saves a half-precision copy as a stock pipeline; the model itself keeps its precision."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.float16).pipeline().to(torch.float16).save_pretrained(folder)


if __name__ == "__main__":
    main()
