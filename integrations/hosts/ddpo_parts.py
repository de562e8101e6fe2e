"""The parts of `trl_ddpo` that run without trl: checks, precision, checkpoints, best samples.

>>> from diffusers import DDIMScheduler
>>> from agsm_loss.integrations.hosts.ddpo_parts import BestSamples, check_schedule
>>> scheduler = DDIMScheduler(steps_offset=1)
>>> check_schedule(scheduler, num_steps=10, eta=1.0)

AGSM trains on those of an epoch's samples that have the best rewards:

>>> import torch
>>> latents, embeds = torch.randn(4, 10, 4, 8, 8), torch.randn(4, 6, 16)
>>> samples = [{"next_latents": latents, "prompt_embeds": embeds}]
>>> prompts = ["a dog", "a cat", "two dogs", "a red cube"]
>>> best = BestSamples(share=0.5, batch_size=2, seed=0)
>>> best.offer(samples, [(None, prompts, None)], scheduler)
>>> best.choose(torch.tensor([0.1, 0.9, 0.4, 0.7]))
>>> sorted(best.batch(0).captions)
['a cat', 'a red cube']
"""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agsm_loss._random import draws
from agsm_loss.integrations.hosts.base import AGSMBatch, best_samples
from agsm_loss.integrations.prompts import caption_ids


def check_schedule(scheduler: Any, num_steps: int, eta: float) -> None:
    """Checks that every sampling step has noise, and so a log-probability.

    Args:
        scheduler: the pipeline's, a DDIM scheduler. Its `set_timesteps` is called.
        num_steps: sampling steps.
        eta: η of DDIM.

    Raises:
        ValueError: η not above 0, or a last timestep of 0.
    """
    scheduler.set_timesteps(num_steps)
    if eta <= 0 or int(scheduler.timesteps[-1]) == 0:
        raise ValueError(
            "expected sample_eta above 0 and a schedule that ends above timestep 0, got "
            f"{eta} and timesteps {scheduler.timesteps.tolist()}: a step without noise has no "
            "log-probability. Set the scheduler's steps_offset to 1."
        )


def check_fraction(num_steps: int, fraction: float) -> None:
    """ValueError where int(num_steps · fraction), the steps of a sample that train, is 0."""
    if int(num_steps * fraction) < 1:
        raise ValueError(
            f"train_timestep_fraction: expected at least one of {num_steps} sampling steps, got "
            f"{fraction} of them: nothing would be trained. Take {1 / num_steps:.3g} at least."
        )


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Attributes of an object, its methods too, for a while."""
    before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(owner)[name]
        vars(owner).update(before)


def kept_precision(module: Any) -> AbstractContextManager[None]:
    """What runs inside can move a module, but not cast it."""
    return replaced(module, to=lambda device=None, **_: type(module).to(module, device))


@contextmanager
def float32_states(pipe: Any) -> Iterator[None]:
    """A pipeline whose latents are float32, and whose VAE runs in its own precision.

    A state that is rounded after its log-probability was taken has another one.
    """
    prepare, decode = pipe.prepare_latents, pipe.vae.decode

    def prepared(*args: Any) -> Tensor:  # batch, channels, height, width, dtype, ...
        latents: Tensor = prepare(*args[:4], torch.float32, *args[5:])
        return latents

    def decoded(latents: Tensor, *args: Any, **settings: Any) -> Any:
        with torch.autocast(pipe.vae.device.type, enabled=False):
            return decode(latents.to(pipe.vae.dtype), *args, **settings)

    with replaced(pipe, prepare_latents=prepared), replaced(pipe.vae, decode=decoded):
        yield


class Progress:
    """What a checkpoint holds in addition to weights and optimizer; made for `trainer`.

    That is epoch, steps, AGSM's state and the rewards kept for each prompt. trl loads a checkpoint
    before the regularizer exists, so the state is kept until `restore()`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        trainer = self.trainer
        tracker = getattr(trainer, "stat_tracker", None)
        rewards = {} if tracker is None else tracker.stats
        return {
            "epoch": trainer.epoch + 1,
            "global_step": trainer.global_step,
            "micro_step": trainer.micro_step,
            "agsm": None if trainer.agsm is None else trainer.agsm.state_dict(),
            "rewards": {str(name): torch.tensor(np.array(kept)) for name, kept in rewards.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state

    def restore(self) -> None:
        """Puts the loaded state into the trainer; nothing where none was loaded.

        Raises:
            ValueError: AGSM in the checkpoint or in the trainer, but not in both.
        """
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
        trainer.micro_step = int(state["micro_step"])


class BestSamples:
    """The samples of an epoch that have the best rewards, for AGSM to train on.

    Args:
        share: of the epoch's samples, of all processes, to draw from, in (0, 1].
        batch_size: images a batch, at the most.
        seed, rank: each batch draws from these and its number.
    """

    def __init__(self, share: float, batch_size: int, seed: int, rank: int = 0) -> None:
        self.share, self.batch_size, self.seed, self.rank = share, batch_size, seed, rank
        self.latents = self.embeds = torch.empty(0)
        self.prompts: list[Any] = []
        self.best: list[tuple[Tensor, Tensor, Any]] = []
        self.steps = 1000

    def offer(
        self,
        samples: list[dict[str, Tensor]],
        pairs: list[Any],
        scheduler: Any,
        pipe: Any = None,
    ) -> None:
        """This process's N samples of the epoch, before they have rewards.

        Args:
            samples: trl's, a dict a batch: "next_latents" (B, T, *D), of which the last of T is
                clean, and "prompt_embeds" (B, S, d).
            pairs: trl's, a batch each: images, prompts, metadata.
            scheduler: for the number of training timesteps.
            pipe: captions are compared by its tokens; None: by their texts.
        """
        self.latents = torch.cat([one["next_latents"][:, -1] for one in samples])
        self.embeds = torch.cat([one["prompt_embeds"] for one in samples])
        prompts = [prompt for _, few, _ in pairs for prompt in few]
        self.prompts = prompts if pipe is None else caption_ids(pipe, prompts)
        self.steps = scheduler.config.num_train_timesteps

    def choose(self, rewards: Tensor) -> None:
        """The batches are of all processes' best, by their rewards (N,). Every process calls it."""
        samples = list(zip(self.latents, self.embeds, self.prompts, strict=True))
        self.best = best_samples(rewards.float(), samples, self.share, each=self.batch_size)

    def batch(self, number: int, null: Tensor | None = None) -> AGSMBatch:
        """The batch of micro-step `number`: some of the best, noised at uniform timesteps.

        null: the encoded empty caption (1, S, d), where it competes.
        """
        generator = draws(self.seed, self.rank, number)
        rows = torch.randperm(len(self.best), generator=generator)[: self.batch_size].tolist()
        clean, embeds, prompts = zip(*(self.best[row] for row in rows), strict=True)
        latents = torch.stack(clean).to(self.latents.device)
        times = torch.randint(self.steps, (len(rows),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        return AGSMBatch(
            latents,
            times.to(latents.device),
            noise.to(latents),
            {"prompt_embeds": torch.stack(embeds).to(self.embeds.device)},
            list(prompts),
            null=None if null is None else {"prompt_embeds": null},
        )
