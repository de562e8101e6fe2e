"""DiffusionNFT on a pipeline, alone or with AGSM in its step.

    python recipes/train_nft.py --reward redness --agsm_weight 1
    python recipes/train_nft.py --model recipes/lab/models/epsilon --agsm_images best \
        --agsm_weight 1

Rollouts have no guidance, so a start with guidance in it does more than AGSM in the step
(recipes/lab/results/rewards.md, study_reward_start):

    python recipes/train_agsm.py --rank 16 --agsm_guidance_scale 3 --timestep_low 0.6
    python recipes/train_nft.py --merge_lora runs/agsm/lora --reward redness

A rollout samples `--sample_num_batches_per_epoch` batches of images without guidance, by the
pipeline's own scheduler, and scores them by `--reward`. It is trained on
`--train_num_inner_epochs` times, each time at fresh timesteps and noise. Prompts are the data set's
captions, or the lines of `--sampling_prompts`. AGSM trains on the data set's images (`--agsm_images
data`), or on the samples with the best rewards (`best`).

Under `--output_dir`:
    tokens/, lora/ or pipeline/   what was trained: soft tokens, a LoRA, or all weights
    log.jsonl, options.json       losses, metrics and validation scores; the run's options
    sheets/                       images of the validation prompts and of a rollout
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from agsm_loss import EMA
from agsm_loss.integrations.hosts.base import take_rows
from agsm_loss.integrations.hosts.diffusion_nft import DiffusionNFT, rising_decay
from agsm_loss.integrations.hosts.rollouts import sample_latents
from data.task import DataOptions, ImageOptions, PromptFileOptions, open_task
from model.agsm import AGSMOptions, HostOptions
from model.session import Session, ValidationOptions
from model.trained import ModelOptions, TimestepOptions, resolve
from rewards.rewards import check
from rewards.rollout import BestSample, GroupOptions, OnPolicy, PromptOptions, RewardOptions
from run.cli import command
from run.loop import LoopOptions, Run, RunOptions
from run.options import OptionSet, option


@dataclass(frozen=True)
class Options:
    """Of DiffusionNFT (arXiv 2509.16117)."""

    sample_batch_size: int = option(16, "Images per process and sampling batch.", at_least=1)
    sample_num_batches_per_epoch: int = option(4, "Batches to sample per rollout.", at_least=1)
    train_num_inner_epochs: int = option(1, "Passes over a rollout's samples.", at_least=1)
    beta: float = option(
        1.0,
        "beta of {title}: distance of the implicit policies from the old one, in units of the "
        "model's. Published: 1; 0.1 for several rewards.",
        above=0,
    )
    old_decay_max: float = option(
        0.5,
        "Largest decay of the old policy, which moves once per rollout and whose decay rises by "
        "0.001 a step; 0: it is the model as each rollout begins.",
        at_least=0,
        at_most=1,
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
    title="DiffusionNFT",
    resolve=resolve,
    output_dir="runs/nft",
    num_tokens=0,
    rank=8,
    learning_rate=3e-4,
    group_size=8,
    kl_weight=option(
        1e-4,
        "Weight of the mean squared difference of the predictions to the reference's (the model as "
        "it was given); 0: none.",
        at_least=0,
    ),
    train_batch_size=option(16, "Sampled images per process and micro-step.", at_least=1),
)


class Rollout(NamedTuple):
    """A rollout's number, and its images with their prompts and advantages.

    best: all processes' best samples, for AGSM.
    """

    number: int
    captions: list[str]
    latents: Tensor
    advantages: Tensor
    best: list[BestSample]


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = OPTIONS.parse(__doc__, arguments)

    images = options.sample_batch_size * options.sample_num_batches_per_epoch
    batch_size, group = options.train_batch_size, options.group_size
    passes = images // batch_size  # micro-steps a pass
    micro_steps = passes * options.train_num_inner_epochs
    steps, rest = divmod(micro_steps, options.gradient_accumulation_steps)
    if images % group or images % batch_size or rest:
        raise ValueError(
            f"sample_num_batches_per_epoch: expected a rollout of whole groups, micro-steps and "
            f"optimizer steps, got {images} images in groups of {group}, {batch_size} a micro-step "
            f"(--train_batch_size), and {micro_steps} micro-steps in "
            f"--gradient_accumulation_steps {options.gradient_accumulation_steps}."
        )
    check(options.reward)
    with Run(options) as run:
        task = open_task(options, run.accelerator)
        model = Session(options, run.accelerator, task).prepare(run.accelerator)
        own = OnPolicy(
            options,
            run.accelerator,
            model,
            prompts=images // group,
            micro_steps=micro_steps,
            at_once=options.sample_batch_size,
        )
        step = DiffusionNFT(
            model.denoiser,
            model.scheduler,
            old=EMA(model.denoiser),
            reference=model.reference,
            beta=options.beta,
            kl_weight=options.kl_weight,
            old_decay=rising_decay(most=options.old_decay_max),
            steps_per_epoch=steps,
            agsm=own.agsm,
            autocast=run.accelerator.autocast,
        )

        def sampled(number: int, prompts: list[str]) -> Rollout:
            """Of the old policy, which rests meanwhile: a resumed run samples the same again."""
            generator = run.draws(number, "rollout")
            captions = own.grouped(prompts)
            parts = []
            for first in range(0, images, options.sample_batch_size):
                text, image = own.conditioning(captions[first : first + options.sample_batch_size])
                with step.old.applied():
                    parts.append(
                        sample_latents(
                            own.denoise(text, image),
                            model.scheduler,
                            own.noise(options.sample_batch_size, generator),
                            num_steps=options.num_inference_steps,
                            **own.levels(options.num_inference_steps),
                            generator=generator,
                        )
                    )
            latents = torch.cat(parts)
            rewards = own.rewards(latents, captions, number * micro_steps)
            advantages = own.advantages(rewards, global_std=True)
            best = own.best(latents, captions, rewards)
            return Rollout(number, captions, latents, advantages, best)

        latest: Rollout | None = None
        for index, batch in run.steps(model, own.batches, step):
            number, inside = divmod(index, micro_steps)
            if latest is None or latest.number != number:
                latest = sampled(number, batch.captions)
            turn, place = divmod(inside, passes)
            order = torch.randperm(images, generator=run.draws(number, turn))
            rows = order[place * batch_size : (place + 1) * batch_size]
            text, image = own.conditioning([latest.captions[int(row)] for row in rows])
            latents, advantages = take_rows(
                (latest.latents, latest.advantages), rows.to(latest.latents.device)
            )
            generator = run.draws(index, "noise")
            out = step(
                latents,
                advantages,
                text,
                model.timesteps(batch_size, generator),
                own.noise(batch_size, generator),
                image_conditioning=image,
                agsm_batch=own.agsm_batch(batch, index, latest.best),
            )
            run.backward(out.loss, {**out.metrics, **own.logged})
        own.differences.check()
        model.save()


if __name__ == "__main__":
    command(main)
