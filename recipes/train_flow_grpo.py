"""Flow-GRPO on a flow-matching pipeline, alone or with AGSM in its step.

    python recipes/train_flow_grpo.py --rank 8 --num_tokens 0 --reward redness --agsm_weight 1

Each step samples `--group_size` images per caption of a batch, scores them by `--reward`, and
follows the gradient of the better ones' likelihood. AGSM trains on the data set's images. The file
shows how to add AGSM to a loop of your own. `--model` is a flow-matching pipeline: SD3 or Flux.1.

Under `--output_dir`:
    tokens/, lora/ or pipeline/   what was trained: soft tokens, a LoRA, or all weights
    log.jsonl, options.json       losses, metrics and validation scores; the run's options
    sheets/                       images of the validation prompts
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.options import option, parse
from common.settings import OnPolicyOptions
from common.stop import command

if TYPE_CHECKING:
    from common.image_data import Batch


@dataclass(frozen=True)
class Options(OnPolicyOptions):
    """The recipe's own options; the shared ones are in common/settings.py."""

    TITLE = "Flow-GRPO"
    output_dir: str = "runs/flow_grpo"
    group_size: int = option(
        4, "Images per caption, whose rewards are compared with each other.", at_least=2
    )
    num_inference_steps: int = option(10, "Sampling steps per image.", at_least=2)
    train_timesteps: int = option(
        4, "Sampling steps per image to train on, drawn at random.", at_least=1
    )
    noise_level: float = option(0.7, "a of the SDE: noise of its steps.", above=0)
    clip_range: float = option(
        1e-4, "Distance from 1 at which likelihood ratios are clipped.", above=0
    )


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = parse(Options, __doc__, arguments)

    import torch

    from agsm_loss import Bank, draws
    from agsm_loss.integrations.hosts.base import bank_of
    from agsm_loss.integrations.hosts.flow_grpo import FlowGRPO
    from agsm_loss.integrations.hosts.rollouts import group_advantages, sample_sde
    from common.loop import start
    from common.rewards import load
    from common.trained_pipeline import TrainedPipeline, on_policy_images
    from world.task import open_task

    accelerator = start(options)
    task = open_task(options, accelerator)
    trained = TrainedPipeline.build(options, accelerator, task)
    model, reward = trained.model, load(options.reward, accelerator.device, task.rewards)
    scheduler = model.pipe.scheduler
    agsm = None
    if options.agsm_weight:
        agsm = trained.agsm(options.train_batch_size, options.agsm_weight)
    step = FlowGRPO(
        trained.denoiser,
        scheduler,
        noise_level=options.noise_level,
        clip=options.clip_range,
        agsm=agsm,
        autocast=accelerator.autocast,
    )
    batches = on_policy_images(options, task)

    def loss(batch: Batch, index: int) -> Any:
        generator = draws(options.seed, index, accelerator.process_index)
        latents = model.encode_images(batch.pixels, generator)
        captions = [text for text in batch.captions for _ in range(options.group_size)]
        text = model.encode_prompts(captions)
        noise = torch.randn(len(captions), *latents.shape[1:], generator=generator).to(latents)
        image = model.image_conditioning(batch.pixels.repeat_interleave(options.group_size, 0))
        own = bank_of(Bank.POSITIVE, len(captions))
        with accelerator.autocast():
            trajectory = sample_sde(
                lambda x, times: trained.denoiser(x, times, text, own, **image).float(),
                scheduler,
                noise,
                num_steps=options.num_inference_steps,
                noise_level=options.noise_level,
                generator=generator,
            )
        rewards = reward(model.decode_latents(trajectory.last), captions).float()
        steps = torch.randperm(options.num_inference_steps - 1, generator=generator)
        agsm_batch = None
        if agsm is not None:
            # Draws of its own: the host's are what they are without AGSM.
            draw = draws(options.seed, index, accelerator.process_index, "agsm")
            agsm_batch = trained.agsm_batch(batch, latents, draw)
        out = step(
            trajectory,
            group_advantages(rewards, options.group_size).to(latents),
            text,
            steps[: options.train_timesteps],
            image_conditioning=image,
            agsm_batch=agsm_batch,
        )
        return out.loss, {**out.metrics, "reward_mean": rewards.mean()}

    trained.train(accelerator, batches, loss, step)


if __name__ == "__main__":
    command(main)
