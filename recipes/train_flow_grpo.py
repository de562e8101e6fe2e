"""Flow-GRPO on a flow-matching pipeline, alone or with AGSM in its step.

    python recipes/train_flow_grpo.py --rank 8 --num_tokens 0 --reward redness --agsm_weight 1

Each step samples `--group_size` images per prompt, scores them by `--reward`, and follows the
gradient of the better ones' likelihood. Prompts are the data set's captions, or the lines of
`--sampling_prompts`. AGSM trains on the data set's images (`--agsm_images data`), or on the samples
with the best rewards (`best`). `--model` is a flow-matching pipeline: SD3, Flux.1, Qwen-Image or
Sana.

Under `--output_dir`:
    tokens/, lora/ or pipeline/   what was trained: soft tokens, a LoRA, or all weights
    log.jsonl, options.json       losses, metrics and validation scores; the run's options
    sheets/                       images of the validation prompts and of a step's samples
    checkpoints/                  for `--resume_from_checkpoint latest`, which continues exactly
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from run.options import option, parse
from run.settings import GroupOptions
from run.stop import command

if TYPE_CHECKING:
    from rewards.rollout import PromptBatch


@dataclass(frozen=True)
class Options(GroupOptions):
    """The recipe's own options; the shared ones are in common/settings.py."""

    TITLE = "Flow-GRPO"
    output_dir: str = "runs/flow_grpo"
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


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = parse(Options, __doc__, arguments)

    import torch

    from agsm_loss import draws
    from agsm_loss.integrations.hosts.dynamics import Dynamics
    from agsm_loss.integrations.hosts.flow_grpo import FlowGRPO
    from agsm_loss.integrations.hosts.rollouts import group_advantages, sample_sde
    from data.task import open_task
    from model.trained_pipeline import TrainedPipeline
    from rewards.rollout import OnPolicy
    from run.loop import start

    Dynamics.of(options.sde_type, options.noise_level)  # checked before anything is loaded
    accelerator = start(options)
    task = open_task(options, accelerator)
    trained = TrainedPipeline.build(options, accelerator, task)
    own = OnPolicy(options, accelerator, trained, prompts=options.train_batch_size)
    scheduler = trained.model.pipe.scheduler
    step = FlowGRPO(
        trained.denoiser,
        scheduler,
        clip=options.clip_range,
        reference=trained.reference,
        kl_weight=options.kl_weight,
        agsm=own.agsm,
        autocast=accelerator.autocast,
    )

    def loss(batch: PromptBatch, index: int) -> Any:
        generator = draws(options.seed, index, accelerator.process_index)
        captions = own.grouped(batch.captions)
        text, image = own.conditioning(captions)
        with accelerator.autocast():
            trajectory = sample_sde(
                own.denoise(text, image),
                scheduler,
                own.noise(len(captions), generator),
                num_steps=options.num_inference_steps,
                sde_type=options.sde_type,
                noise_level=options.noise_level,
                generator=generator,
            )
        rewards = own.rewards(trajectory.last, captions, index)
        steps = torch.randperm(options.num_inference_steps - 1, generator=generator)
        out = step(
            trajectory,
            group_advantages(rewards, options.group_size),
            text,
            steps[: options.train_timesteps],
            image_conditioning=image,
            agsm_batch=own.agsm_batch(batch, index, trajectory.last, captions, rewards),
        )
        return out.loss, {**out.metrics, **own.metrics(rewards)}

    trained.train(accelerator, own.batches, loss, step)


if __name__ == "__main__":
    command(main)
