"""Flow-GRPO on a flow-matching pipeline, alone or with AGSM beside the reward.

    python recipes/train_flow_grpo.py --lora-rank 8 --num-tokens 0 --reward redness --agsm-weight 1

Each step samples `--group` pictures for every caption of a batch, scores them by `--reward`, and follows
the gradient of the better ones' likelihood. It shows how any loop that is not trl's has AGSM in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.options import option, parse
from common.trained import OnPolicyOptions, Student, on_policy_images

if TYPE_CHECKING:
    from common.images import Batch


@dataclass(frozen=True)
class Options(OnPolicyOptions):
    """Every option, its default and its meaning."""

    output: str = option("runs/flow_grpo", "folder for what is trained, log, sheets, checkpoints")
    reward: str = option("detector", "as of train_ddpo.py")
    group: int = option(4, "pictures of each caption, whose rewards are compared")
    sampling_steps: int = option(10, "of a trajectory")
    train_steps: int = option(4, "of them, drawn at random, that are trained on")
    noise_level: float = option(0.7, "a of the SDE")
    clip_range: float = option(1e-4, "of the likelihood ratios")


def main(arguments: list[str] | None = None) -> None:
    """Trains, validates, checkpoints and saves."""
    options = parse(Options, __doc__, arguments)

    import torch

    from agsm_loss import Bank, draws
    from agsm_loss.integrations.hosts.flow_grpo import FlowGRPO, group_advantages, sample_sde
    from agsm_loss.integrations.hosts.step import bank_of
    from common.loop import start
    from common.rewards import load
    from world.task import open_task

    accelerator = start(options)
    task = open_task(options, accelerator)
    student = Student.build(options, accelerator, task)
    model, reward = student.model, load(options.reward, accelerator.device, task.rewards)
    scheduler = model.pipe.scheduler
    agsm = None
    if options.agsm_weight:
        agsm = student.agsm(options.batch_size, options.agsm_weight)
    step = FlowGRPO(
        student.denoiser,
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
        captions = [text for text in batch.captions for _ in range(options.group)]
        text = model.encode_prompts(captions)
        noise = torch.randn(len(captions), *latents.shape[1:], generator=generator).to(latents)
        image = model.image_conditioning(batch.pixels.repeat_interleave(options.group, 0))
        own = bank_of(Bank.POSITIVE, len(captions))
        with accelerator.autocast():
            trajectory = sample_sde(
                lambda x, times: student.denoiser(x, times, text, own, **image).float(),
                scheduler,
                noise,
                num_steps=options.sampling_steps,
                noise_level=options.noise_level,
                generator=generator,
            )
        rewards = reward(model.decode_latents(trajectory.last), captions).float()
        steps = torch.randperm(options.sampling_steps - 1, generator=generator)
        agsm_batch = None
        if agsm is not None:
            # Draws of its own: the host's are what they are without AGSM.
            draw = draws(options.seed, index, accelerator.process_index, "agsm")
            agsm_batch = student.agsm_batch(batch, latents, draw)
        out = step(
            trajectory,
            group_advantages(rewards, options.group).to(latents),
            text,
            steps[: options.train_steps],
            image_conditioning=image,
            agsm_batch=agsm_batch,
        )
        return out.loss, {**out.metrics, "reward_mean": rewards.mean()}

    student.train(accelerator, batches, loss, step)


if __name__ == "__main__":
    main()
