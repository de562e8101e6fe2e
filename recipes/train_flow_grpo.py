"""Flow-GRPO on a flow-matching pipeline, alone or with AGSM in its step.

    python recipes/train_flow_grpo.py --rank 8 --num_tokens 0 --reward redness --agsm_weight 0.1

Samples have no guidance, so a start with guidance in it does more than AGSM in the step
(recipes/lab/results/rewards.md, study_reward_start):

    python recipes/train_agsm.py --rank 16 --agsm_guidance_scale 3 --timestep_low 0.6
    python recipes/train_flow_grpo.py --merge_lora runs/agsm/lora --reward redness

Each step samples `--group_size` images per prompt, scores them by `--reward`, and follows the
gradient of the better ones' likelihood. Prompts are the data set's captions, or the lines of
`--sampling_prompts`. AGSM trains on the data set's images (`--agsm_images data`), or on the samples
with the best rewards (`best`). `--model` is a flow-matching pipeline: SD3, Flux.1, FLUX.2,
Qwen-Image, Sana or Z-Image.

Under `--output_dir`:
    tokens/, lora/ or pipeline/   what was trained: soft tokens, a LoRA, or all weights
    log.jsonl, options.json       losses, metrics and validation scores; the run's options
    sheets/                       images of the validation prompts and of a step's samples
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from agsm_loss.integrations.hosts import rollouts
from agsm_loss.integrations.hosts.dynamics import Dynamics
from agsm_loss.integrations.hosts.flow_grpo import FlowGRPO
from data.task import DataOptions, ImageOptions, PromptFileOptions, open_task
from model.agsm import AGSMOptions, HostOptions
from model.session import Session, ValidationOptions
from model.trained import ModelOptions, TimestepOptions, resolve
from rewards.rewards import check
from rewards.rollout import GroupOptions, OnPolicy, PromptOptions, RewardOptions
from run.cli import command
from run.loop import LoopOptions, Run, RunOptions
from run.options import OptionSet, option


@dataclass(frozen=True)
class Options:
    """Of Flow-GRPO (arXiv 2505.05470)."""

    train_timesteps: int = option(
        4, "Sampling steps per image to train on, drawn at random.", at_least=1
    )
    sde_type: Literal["sde", "cps"] = option(
        "sde",
        "Samples by Flow-GRPO's SDE, or by Flow-CPS's steps: clean after few steps too.",
    )
    noise_level: float | None = option(
        None,
        "Noise of the sampling steps: a of the SDE, or eta of cps, at most 1; left out: the "
        "published 0.7 or 0.8.",
        above=0,
    )
    clip_range: float = option(
        1e-4, "Distance from 1 at which likelihood ratios are clipped.", above=0
    )


OPTIONS = OptionSet(
    Options,
    HostOptions,
    RewardOptions,
    PromptOptions,
    GroupOptions,
    ModelOptions,
    DataOptions,
    ImageOptions,
    AGSMOptions,
    TimestepOptions,
    LoopOptions,
    RunOptions,
    ValidationOptions,
    PromptFileOptions,
    title="Flow-GRPO",
    resolve=resolve,
    output_dir="runs/flow_grpo",
    train_batch_size=option(16, "Captions to sample per process and micro-step.", at_least=1),
)


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = OPTIONS.parse(__doc__, arguments)

    Dynamics.of(options.sde_type, options.noise_level)  # checked before anything is loaded
    check(options.reward)
    with Run(options) as run:
        task = open_task(options, run.accelerator)
        model = Session(options, run.accelerator, task).prepare(run.accelerator)
        own = OnPolicy(options, run.accelerator, model, prompts=options.train_batch_size)
        step = FlowGRPO(
            model.denoiser,
            model.scheduler,
            clip=options.clip_range,
            reference=model.reference,
            kl_weight=options.kl_weight,
            agsm=own.agsm,
            autocast=run.accelerator.autocast,
        )
        for index, batch in run.steps(model, own.batches, step):
            generator = run.draws(index)
            captions = own.grouped(batch.captions)
            text, image = own.conditioning(captions)
            trajectory = rollouts.sample_sde(
                own.denoise(text, image),
                model.scheduler,
                own.noise(len(captions), generator),
                num_steps=options.num_inference_steps,
                sde_type=options.sde_type,
                noise_level=options.noise_level,
                **own.levels(options.num_inference_steps),
                generator=generator,
            )
            rewards = own.rewards(trajectory.last, captions, index)
            best = own.best(trajectory.last, captions, rewards)
            steps = torch.randperm(options.num_inference_steps - 1, generator=generator)
            out = step(
                trajectory,
                own.advantages(rewards),
                text,
                steps[: options.train_timesteps],
                image_conditioning=image,
                agsm_batch=own.agsm_batch(batch, index, best),
            )
            run.backward(out.loss, {**out.metrics, **own.logged})
        own.differences.check()
        model.save()


if __name__ == "__main__":
    command(main)
