"""SPO (step-by-step preference optimisation) on a pipeline, alone or with AGSM in its step.

    python recipes/train_spo.py --rank 4 --num_tokens 0 --agsm_weight 30
    python recipes/train_spo.py --config recipes/configs/spo_sd15.yaml --agsm_weight 30

In every step the model samples images for a batch's captions, and `--reward` scores what its next
states lead to: `detector` (the embedded world's) or a CLIP model such as PickScore. `--model` is an
eps- or v-prediction pipeline: Stable Diffusion or SDXL.

AGSM trains on `--agsm_images data`, the data set's images (`--agsm_batch` of them: they need no
sampling), or on `best`, the sampled images of all processes with the best scores (`--agsm_best`),
as many in each. The captions of the whole batch compete.

Under `--output_dir`:
    tokens/, lora/ or pipeline/   what was trained: soft tokens, a LoRA, or all weights
    log.jsonl, options.json       losses, metrics and validation scores; the run's options
    sheets/                       images of the validation prompts
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler

from agsm_loss import Bank
from agsm_loss.integrations.hosts.spo import (
    SPO,
    StatePairs,
    check_steps,
    classifier_free_guidance,
    sample_pairs,
)
from agsm_loss.integrations.noise import prediction_type
from data.task import DataOptions, ImageOptions, PromptFileOptions, open_task
from model.agsm import AGSMOptions, HostOptions
from model.session import Session, ValidationOptions
from model.trained import ModelOptions, TimestepOptions, resolve
from rewards.rewards import check, load
from rewards.rollout import (
    Findings,
    RewardOptions,
    check_prompts,
    dealt,
    decoded_scores,
    on_policy_images,
)
from run.cli import command
from run.loop import LoopOptions, Run, RunOptions
from run.options import OptionSet, option


@dataclass(frozen=True)
class Options:
    """Of SPO (arXiv 2406.04314)."""

    num_inference_steps: int = option(20, "DDIM steps per sampled image.", at_least=1)
    first_step: int = option(4, "First sampling step at which pairs are drawn.", at_least=0)
    num_candidates: int = option(4, "Next states per step to draw and score.", at_least=2)
    threshold: float = option(
        0.3, "Difference that a pair's softmax scores must exceed.", at_least=0, at_most=1
    )
    guidance_scale: float = option(
        5.0,
        "Classifier-free guidance scale of sampling and of the loss; 1: no guidance.",
        at_least=0,
    )
    max_pairs: int = option(
        16, "Pairs per micro-step to train on, drawn at random from those found.", at_least=1
    )
    beta: float = option(
        10.0,
        "beta of {title}: scale of the difference to the reference in the loss. Larger: stronger "
        "gradients at first, and a model that stays closer to the reference.",
        above=0,
    )


OPTIONS = OptionSet(
    Options,
    HostOptions,
    RewardOptions,
    ModelOptions,
    DataOptions,
    ImageOptions,
    AGSMOptions,
    TimestepOptions,
    LoopOptions,
    RunOptions,
    ValidationOptions,
    PromptFileOptions,
    title="SPO",
    resolve=partial(resolve, of_world="recipes/lab/models/epsilon"),
    output_dir="runs/spo",
    train_batch_size=option(16, "Captions to sample per process and micro-step.", at_least=1),
    agsm_best=0.5,
    agsm_batch=option(
        8,
        "Images of AGSM per process and micro-step (for --agsm_images data).",
        at_least=2,
    ),
)


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = OPTIONS.parse(__doc__, arguments)

    check_steps(options.num_inference_steps, options.first_step)
    usual = OPTIONS.defaults["agsm_batch"]
    if options.agsm_images == "best" and options.agsm_batch != usual:
        raise ValueError(
            f"agsm_batch: expected the default {usual} with --agsm_images best, got "
            f"{options.agsm_batch}: --train_batch_size says how many are sampled, and --agsm_best "
            "which of them AGSM takes. Leave it out, or take --agsm_images data."
        )
    check(options.reward)
    with Run(options) as run:
        task = open_task(options, run.accelerator)
        model = Session(options, run.accelerator, task).prepare(run.accelerator)
        if prediction_type(model.scheduler) == "flow":
            raise ValueError(
                f"model: expected eps- or v-prediction, got {type(model.pipeline.pipe).__name__}, "
                "a flow: SPO compares the likelihoods of DDIM's steps. Use train_dpo.py."
            )
        scheduler = DDIMScheduler.from_config(model.scheduler.config)
        batches, more = on_policy_images(options, task, options.train_batch_size), None
        on_best = options.agsm_images == "best"
        agsm = model.agsm_in_step(options.train_batch_size if on_best else options.agsm_batch)
        if agsm is not None and not on_best:
            more = on_policy_images(options, task, options.agsm_batch)
        step = SPO(
            model.denoiser,
            scheduler,
            reference=model.reference,
            beta=options.beta,
            guidance_scale=options.guidance_scale,
            agsm=agsm,
        )
        reward = load(options.reward, run.accelerator.device)
        check_prompts(reward, options, task)
        pairs_found = Findings(
            f"pairs whose softmax scores differ by more than --threshold {options.threshold}",
            "Take a smaller --threshold (0.3 is for scores of PickScore's size: differences above "
            "0.6), or give the reward a weight.",
        )

        def scored(clean: Any, captions: list[str]) -> Any:
            scores, _ = decoded_scores(model.pipeline, reward, clean, captions)
            return reward.total(scores)

        for index, batch in run.steps(model, batches, step):
            generator = run.draws(index)
            latents = model.pipeline.encode_images(batch.pixels, generator)
            image = model.pipeline.image_conditioning(batch.pixels)
            text = model.pipeline.encode_prompts(batch.captions)
            empty = model.pipeline.encode_prompts([""] * len(batch.captions))

            def score(clean: Any, rows: Any, timesteps: Any, batch: Any = batch) -> Any:
                return scored(clean, [batch.captions[int(row)] for row in rows])

            metrics: dict[str, Any] = {}
            rollout = sample_pairs(
                classifier_free_guidance(
                    model.denoiser,
                    text,
                    empty,
                    options.guidance_scale,
                    image_conditioning=image,
                ),
                scheduler,
                torch.randn(latents.shape, generator=generator).to(latents),
                score,
                num_steps=options.num_inference_steps,
                num_candidates=options.num_candidates,
                first_step=options.first_step,
                threshold=options.threshold,
                generator=generator,
            )
            number = len(rollout.pairs.noisy)
            if not pairs_found.found:  # the same on all processes
                every = torch.tensor(number, device=latents.device)
                pairs_found.saw(int(run.accelerator.reduce(every)))
            kept = torch.randperm(number, generator=generator)[: options.max_pairs]
            pairs = StatePairs(*(part[kept.to(part.device)] for part in rollout.pairs))
            own = None
            if agsm is not None:
                # Draws of its own: the host's are what they are without AGSM.
                draw = run.draws(index, "agsm")
                if more is not None:
                    shown, best = more[index], None
                    of = model.pipeline.encode_images(shown.pixels, draw)
                else:
                    scores = scored(rollout.last, batch.captions)
                    shown, of, best, scores = dealt(
                        run.accelerator, batch, rollout.last, scores, options.agsm_best
                    )
                    metrics["agsm/images_score"] = scores.float().mean()
                own = model.agsm_batch(shown, of, draw, best)
            out = step(pairs, text, empty, image_conditioning=image, agsm_batch=own)
            total = out.loss
            if number == 0:
                # Other processes may have found pairs, and wait for this one's gradients:
                # zeros, through a call of the model, by which DDP knows that they will come.
                times = torch.full((1,), options.num_inference_steps, device=latents.device)
                first = {key: value[:1] for key, value in text.items()}
                seen = {key: value[:1] for key, value in image.items()}
                pred = model.denoiser(latents[:1], times, first, Bank.POSITIVE, **seen)
                total = total + 0.0 * pred.sum()
            metrics |= {**out.metrics, "spo/found": torch.tensor(float(number))}
            run.backward(total, metrics)
        pairs_found.check()
        model.save()


if __name__ == "__main__":
    command(main)
