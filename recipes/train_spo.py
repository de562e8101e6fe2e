"""SPO (step-by-step preference optimisation) on a pipeline, alone or with AGSM in its step.

    python recipes/train_spo.py --rank 4 --num_tokens 0 --agsm_weight 30
    python recipes/train_spo.py --config recipes/configs/spo_sd15.yaml --agsm_weight 30

In every step the model samples images for a batch's captions, and `--reward` scores what its next
states lead to: `detector` (the embedded world's) or a CLIP model such as PickScore. `--model` is an
eps- or v-prediction pipeline: Stable Diffusion or SDXL.

AGSM trains on `--agsm_images data`, the data set's images (`--agsm_batch` of them: they need no
sampling), or on `best`, the sampled images with the best scores (`--agsm_best`). The captions of
the whole batch compete.

Under `--output_dir`:
    tokens/, lora/ or pipeline/   what was trained: soft tokens, a LoRA, or all weights
    log.jsonl, options.json       losses, metrics and validation scores; the run's options
    sheets/                       images of the validation prompts
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from run.options import option, parse
from run.settings import OnPolicyOptions
from run.stop import command

if TYPE_CHECKING:
    from data.image_data import Batch


@dataclass(frozen=True)
class Options(OnPolicyOptions):
    """The recipe's own options; the shared ones are in common/settings.py."""

    TITLE = "SPO"
    output_dir: str = "runs/spo"
    WORLD_MODEL = "recipes/lab/models/epsilon"
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
    eta: float = option(1.0, "Noise of the sampling steps, in units of DDIM's.", above=0)
    max_pairs: int = option(
        16, "Pairs per micro-step to train on, drawn at random from those found.", at_least=1
    )
    beta: float = option(
        10.0,
        "beta of {title}: scale of the difference to the reference in the loss. Larger: stronger "
        "gradients at first, and a model that stays closer to the reference.",
        above=0,
    )
    clip_range: float = option(
        0.1, "Distance from 1 at which likelihood ratios are clipped.", above=0, below=1
    )
    agsm_best: float = 0.5
    agsm_batch: int = option(
        0,
        "Images of AGSM per micro-step (for --agsm_images data); 0: those of the sampled captions.",
        at_least=0,
    )


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = parse(Options, __doc__, arguments)

    import torch
    from diffusers import DDIMScheduler

    from agsm_loss import Bank, draws
    from agsm_loss.integrations.hosts.base import best_rows
    from agsm_loss.integrations.hosts.spo import (
        SPO,
        StatePairs,
        classifier_free_guidance,
        sample_pairs,
    )
    from agsm_loss.integrations.noise import prediction_type
    from data.task import open_task
    from model.agsm import agsm_weight
    from model.trained_pipeline import TrainedPipeline
    from rewards.rewards import load
    from rewards.rollout import on_policy_images
    from run.loop import start

    if options.agsm_batch and options.agsm_images == "best":
        raise ValueError(
            f"agsm_batch: expected 0 with --agsm_images best, got {options.agsm_batch}: "
            "--train_batch_size says how many are sampled. Take --agsm_images data."
        )
    accelerator = start(options)
    task = open_task(options, accelerator)
    trained = TrainedPipeline.build(options, accelerator, task)
    model = trained.model
    if prediction_type(model.pipe.scheduler) == "flow":
        raise ValueError(
            f"model: expected eps- or v-prediction, got {type(model.pipe).__name__}, a flow: "
            "SPO compares the likelihoods of DDIM's steps. Use train_dpo.py."
        )
    scheduler = DDIMScheduler.from_config(model.pipe.scheduler.config)
    agsm = None
    if options.agsm_weight:
        images = options.agsm_batch or options.train_batch_size
        agsm = trained.agsm(images, agsm_weight(options))
    step = SPO(
        trained.denoiser,
        scheduler,
        reference=trained.reference,
        beta=options.beta,
        clip=options.clip_range,
        eta=options.eta,
        guidance_scale=options.guidance_scale,
        agsm=agsm,
    )
    reward = load(options.reward, accelerator.device)
    batches = on_policy_images(options, task, options.train_batch_size)
    more = None
    if options.agsm_batch and agsm is not None:
        more = on_policy_images(options, task, options.agsm_batch)

    def loss(batch: Batch, index: int) -> Any:
        generator = draws(options.seed, index, accelerator.process_index)
        latents = model.encode_images(batch.pixels, generator)
        image = model.image_conditioning(batch.pixels)
        text = model.encode_prompts(batch.captions)
        empty = model.encode_prompts([""] * len(batch.captions))

        def score(clean_latents: Any, rows: Any, timesteps: Any) -> Any:
            pixels = model.decode_latents(clean_latents)
            return reward(pixels, [batch.captions[int(row)] for row in rows])

        metrics: dict[str, Any] = {}
        with accelerator.autocast():
            rollout = sample_pairs(
                classifier_free_guidance(
                    trained.denoiser, text, empty, options.guidance_scale, image_conditioning=image
                ),
                scheduler,
                torch.randn(latents.shape, generator=generator).to(latents),
                score,
                num_steps=options.num_inference_steps,
                num_candidates=options.num_candidates,
                first_step=options.first_step,
                threshold=options.threshold,
                eta=options.eta,
                generator=generator,
            )
            number = len(rollout.pairs.noisy)
            kept = torch.randperm(number, generator=generator)[: options.max_pairs]
            pairs = StatePairs(*(part[kept.to(part.device)] for part in rollout.pairs))
            own = None
            if agsm is not None:
                # Draws of its own: the host's are what they are without AGSM.
                draw = draws(options.seed, index, accelerator.process_index, "agsm")
                shown, of, best = batch, latents, None
                if more is not None:
                    shown = more[index]
                    of = model.encode_images(shown.pixels, draw)
                if options.agsm_images == "best":
                    of = rollout.last
                    scores = reward(model.decode_latents(of), batch.captions)
                    best = best_rows(scores, options.agsm_best).cpu()
                    metrics["agsm/images_score"] = scores[best.to(scores.device)].float().mean()
                own = trained.agsm_batch(shown, of, draw, best)
            out = step(pairs, text, empty, image_conditioning=image, agsm_batch=own)
            total = out.loss
            if number == 0:
                # Other processes may have found pairs, and wait for this one's gradients: zeros,
                # through a call of the model, by which DDP knows that they will come.
                times = torch.full((1,), options.num_inference_steps, device=latents.device)
                first = {key: value[:1] for key, value in text.items()}
                seen = {key: value[:1] for key, value in image.items()}
                pred = trained.denoiser(latents[:1], times, first, Bank.POSITIVE, **seen)
                total = total + 0.0 * pred.sum()
        metrics |= {**out.metrics, "spo/found": torch.tensor(float(number))}
        return total, metrics

    trained.train(accelerator, batches, loss, step)


if __name__ == "__main__":
    command(main)
