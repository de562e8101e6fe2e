"""The parts of `flow_factory` that run without Flow-Factory: options, denoiser, images.

>>> from types import SimpleNamespace
>>> import torch
>>> from torch import nn
>>> from agsm_loss.integrations.hosts.flow_factory_parts import AdapterDenoiser, noised
>>> class Adapter:  # Flow-Factory's, of a model that it trains
...     transformer = nn.Linear(4 + 3, 4)
...     trainable_components = [transformer]
...     def forward(self, t, latents, prompt_embeds, **options):
...         made = self.transformer(torch.cat([latents, prompt_embeds], dim=1))
...         return SimpleNamespace(noise_pred=made)
>>> denoiser = AdapterDenoiser(Adapter())
>>> denoiser.names
['prompt_embeds']
>>> rollout = [  # Flow-Factory's samples
...     SimpleNamespace(prompt=text, prompt_embeds=torch.randn(3), all_latents=torch.randn(2, 4))
...     for text in ("a dog", "a cat")
... ]
>>> empty = {"prompt_embeds": torch.zeros(1, 3)}
>>> batch = noised(rollout, denoiser.names, torch.Generator(), null=empty)
>>> denoiser(batch.latents, batch.timesteps, batch.conditioning, torch.zeros(2)).shape
torch.Size([2, 4])
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agsm_loss.integrations.hosts.base import AGSMBatch


@dataclass
class AGSMArguments:
    """AGSM's options, under `train:` in Flow-Factory's YAML file.

    Args:
        agsm_weight: λ; with 0 the trained weights are those of Flow-Factory's trainer, bit for bit.
        agsm_warmup_steps: first optimizer steps, in which λ rises from 0.
        agsm_batch: images of AGSM in a process and micro-step (a forward and backward pass).
        agsm_guidance_scale: s of `AGSMLoss`: the guidance to train in; 1 is plain denoising.
        agsm_num_negatives: prompts of other images that compete with an image's own, besides the
            empty caption.
        agsm_timestep_low: least noise of AGSM's images, as a share of the schedule in [0, 1).
        agsm_temperature: T of `AGSMLoss`, for the weights of several other captions.
        agsm_ema_decay: decay per optimizer step of an EMA that is AGSM's teacher; None: the model
            itself is.

    Raises:
        ValueError: a value that is out of range.
    """

    agsm_weight: float = 1.0
    agsm_warmup_steps: int = 0
    agsm_batch: int = 8
    agsm_guidance_scale: float = 3.0
    agsm_num_negatives: int = 0
    agsm_timestep_low: float = 0.0
    agsm_temperature: float = 0.1
    agsm_ema_decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # Flow-Factory's
        for name, at_least in (
            ("agsm_weight", 0),
            ("agsm_warmup_steps", 0),
            ("agsm_guidance_scale", 1),
            ("agsm_num_negatives", 0),
            ("agsm_batch", 2 if self.agsm_num_negatives else 1),
        ):
            if getattr(self, name) < at_least:
                raise ValueError(
                    f"{name}: expected at least {at_least}, got {getattr(self, name)}."
                )
        if not 0 <= self.agsm_timestep_low < 1:
            raise ValueError(
                f"agsm_timestep_low: expected a share in [0, 1), got {self.agsm_timestep_low}."
            )


@dataclass
class RolloutArguments(AGSMArguments):
    """Those of the trainers whose best samples AGSM trains on.

    Args:
        agsm_best: share of all processes' samples that AGSM trains on, best advantage first, in
            (0, 1]. At least `agsm_batch` for each process are taken. Every process keeps their
            last latents and encoded prompts on the CPU.

    Raises:
        ValueError: a value that is out of range.
    """

    agsm_best: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.agsm_best <= 1:
            raise ValueError(f"agsm_best: expected a share in (0, 1], got {self.agsm_best}.")


class AdapterDenoiser(nn.Module):
    """What Flow-Factory trains, as `AGSMRegularizer` calls it (an `agsm_loss.Denoiser`).

    It runs the `forward` of Flow-Factory's model adapter, which knows the architecture; without
    classifier-free guidance.

    Args:
        adapter: Flow-Factory's, after `accelerator.prepare`.

    Raises:
        ValueError: the adapter's `forward` needs more than latents, timesteps and the prompt.
    """

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self.model = nn.ModuleList(adapter.trainable_components)
        self.adapter = adapter
        needed = [
            name
            for name, one in inspect.signature(adapter.forward).parameters.items()
            if one.default is one.empty and one.kind is not one.VAR_KEYWORD
        ]
        self.names = [name for name in needed if "prompt" in name]
        more = sorted({*needed} - {"t", "latents", *self.names})
        if more:
            raise ValueError(
                "model_type: expected a model whose forward needs latents and prompts alone, as "
                f"sd3-5, got a {type(adapter).__name__}, which needs {more} too."
            )

    def forward(
        self, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], bank: Tensor
    ) -> Tensor:
        output = self.adapter.forward(
            t=timesteps,
            t_next=torch.zeros_like(timesteps),
            latents=noisy,
            next_latents=noisy,  # not read; without it the scheduler would draw noise
            guidance_scale=1.0,
            compute_log_prob=False,
            return_kwargs=["noise_pred"],
            noise_level=0.0,
            **conditioning,
        )
        pred: Tensor = output.noise_pred
        return pred


def noised(
    shown: Sequence[Any],
    names: Sequence[str],
    generator: torch.Generator,
    *,
    null: Mapping[str, Tensor],
    low: float = 0.0,
    steps: int = 1000,
    device: torch.device | str = "cpu",
) -> AGSMBatch:
    """B of Flow-Factory's samples as images for AGSM, at uniform timesteps.

    Args:
        shown: the samples, each on any device; the last of `all_latents` (T, *D) is clean.
        names: of the samples' fields that encode the prompt.
        generator: of noise and timesteps, on the CPU.
        null: the empty caption's fields, a row each.
        low: share of the schedule, from no noise on, whose timesteps are left out.
        steps: training timesteps of the scheduler.
        device: of the batch.
    """
    latents = torch.stack([one.all_latents[-1].to(device, torch.float32) for one in shown])
    text = {name: torch.stack([getattr(one, name).to(device) for one in shown]) for name in names}
    noise = torch.randn(latents.shape, generator=generator).to(device)
    times = torch.rand(len(shown), generator=generator).to(device)
    times = (low + (1 - low) * times) * steps
    return AGSMBatch(latents, times, noise, text, [one.prompt for one in shown], null=dict(null))
