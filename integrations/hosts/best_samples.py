"""What `trl_ddpo` adds to trl's trainer and needs nothing of trl for."""

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agsm_loss import draws
from agsm_loss.integrations.hosts.step import AGSMBatch, best_rows


def check_schedule(scheduler: Any, config: Any) -> None:
    scheduler.set_timesteps(config.sample_num_steps)
    if config.sample_eta <= 0 or int(scheduler.timesteps[-1]) == 0:
        raise ValueError(
            "expected sample_eta above 0 and a schedule that ends above timestep 0, got "
            f"{config.sample_eta} and timesteps {scheduler.timesteps.tolist()}: a step without "
            "noise has no log-probability. Set the scheduler's steps_offset to 1."
        )


class Progress:
    """What a checkpoint holds in addition to weights and optimizer."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        tracker = getattr(trainer, "stat_tracker", None)
        rewards = {} if tracker is None else tracker.stats
        return {
            "epoch": trainer._epoch + 1,
            "global_step": trainer.global_step,
            "micro_step": trainer._micro_step,
            "agsm": None if trainer.agsm is None else trainer.agsm.state_dict(),
            "rewards": {str(name): torch.tensor(np.array(kept)) for name, kept in rewards.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state  # trl loads before there is a regularizer

    def restore(self) -> None:
        state, trainer = self.loaded, self.trainer
        if state is None:
            return
        if (state["agsm"] is None) != (trainer.agsm is None):
            had, has = (one is not None for one in (state["agsm"], trainer.agsm))
            raise ValueError(
                f"agsm: expected {'one' if had else 'none'}, as the checkpoint has, got "
                f"{'one' if has else 'none'}. Resume with what the run began with."
            )
        if trainer.agsm is not None:
            trainer.agsm.load_state_dict(state["agsm"])
        if hasattr(trainer, "stat_tracker"):
            size = trainer.stat_tracker.buffer_size
            trainer.stat_tracker.stats = {
                name: deque(values.numpy(), maxlen=size)
                for name, values in state["rewards"].items()
            }
        trainer.first_epoch = int(state["epoch"])
        trainer.global_step = int(state["global_step"])
        trainer._micro_step = int(state["micro_step"])


class BestSamples:
    """The epoch's samples with the best rewards, as what AGSM trains on."""

    def __init__(self, share: float, batch_size: int, seed: int, rank: int = 0) -> None:
        self.share, self.batch_size, self.seed, self.rank = share, batch_size, seed, rank
        self.latents = self.embeds = torch.empty(0)
        self.prompts: list[str] = []
        self.steps = 1000

    def offer(self, samples: list[dict[str, Tensor]], pairs: list[Any], scheduler: Any) -> None:
        """Samples as trl keeps them: latents (B, T, *D) and prompts, batch by batch."""
        self.latents = torch.cat([one["next_latents"][:, -1] for one in samples])
        self.embeds = torch.cat([one["prompt_embeds"] for one in samples])
        self.prompts = [prompt for _, prompts, _ in pairs for prompt in prompts]
        self.steps = scheduler.config.num_train_timesteps

    def choose(self, rewards: Tensor) -> None:
        """rewards (N,) of what was offered."""
        share = max(self.share, min(1.0, self.batch_size / len(rewards)))
        kept = best_rows(rewards.float(), share).to(self.latents.device)
        self.latents, self.embeds = self.latents[kept], self.embeds[kept]
        self.prompts = [self.prompts[int(i)] for i in kept]

    def batch(self, number: int) -> AGSMBatch:
        """A micro-step's draw of them."""
        generator = draws(self.seed, self.rank, number)
        rows = torch.randperm(len(self.latents), generator=generator)[: self.batch_size]
        latents = self.latents[rows.to(self.latents.device)]
        times = torch.randint(self.steps, (len(rows),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        return AGSMBatch(
            latents,
            times.to(latents.device),
            noise.to(latents),
            {"prompt_embeds": self.embeds[rows.to(self.embeds.device)]},
            [self.prompts[int(row)] for row in rows],
        )
