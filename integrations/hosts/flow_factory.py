"""Flow-Factory's GRPO, DiffusionNFT and DPO trainers (X-GenGroup/Flow-Factory) with AGSM.

In its YAML file, name a class of this module as `trainer_type`; options of AGSM stand beside it:

    train:
      trainer_type: agsm_loss.integrations.hosts.flow_factory.AGSMNFT
      agsm_weight: 1.0
      agsm_guidance_scale: 3.0

Flow-Factory imports `trainer_type` twice: as the class of the training arguments, and as what it
calls for a trainer. The classes here are both.

>>> from flow_factory.hparams import Arguments
>>> path = "agsm_loss.integrations.hosts.flow_factory.AGSMNFT"
>>> arguments = Arguments.from_dict({"train": {"trainer_type": path, "agsm_weight": 0.5}})
>>> arguments.training_args.agsm_weight, arguments.training_args.nft_beta
(0.5, 1.0)

Nothing of Flow-Factory is copied. While its `optimize` runs, λ·AGSM is added to what it gives to
`accelerator.backward`, and each `optimizer.step` moves AGSM's EMA. AGSM's images are the samples of
all processes with the best advantages, or DPO's chosen ones: it takes these for true matches of
their prompts, and so repeats the reward's mistakes.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, InBatch
from agsm_loss._random import draws
from agsm_loss.integrations.hosts.base import AGSMBatch, agsm_on, best_samples
from agsm_loss.integrations.hosts.flow_factory_parts import (
    AdapterDenoiser,
    AGSMArguments,
    RolloutArguments,
    noised,
)
from agsm_loss.schedule import as_schedule, linear_warmup

COMMIT = "a0b2bc5a2b4fbf9125429b3fb70c0c5d7631047c"
STATE = "agsm.pt"


def _differs(what: str) -> str:
    """How Flow-Factory differs from what is expected here, and what to do."""
    return (
        f"Flow-Factory: expected its trainers as at commit {COMMIT[:7]}, got {what}. In a clone of "
        f"https://github.com/X-GenGroup/Flow-Factory: git checkout {COMMIT} && pip install -e ."
    )


try:
    from flow_factory.hparams import (
        DPOTrainingArguments,
        GRPOTrainingArguments,
        NFTTrainingArguments,
    )
    from flow_factory.trainers.dpo import DPOTrainer
    from flow_factory.trainers.grpo import GRPOTrainer
    from flow_factory.trainers.nft import DiffusionNFTTrainer
    from flow_factory.utils.dist import reduce_loss_info
except ImportError as error:
    found = "none" if error.name == "flow_factory" else f"another layout: {error}"
    raise ImportError(_differs(found)) from error


class AGSMTrainer:
    """What the trainers below add to Flow-Factory's, which come after it in their bases.

    Attributes:
        agsm: the `AGSMRegularizer`.

    Raises:
        ValueError: a model that `AdapterDenoiser` refuses; `resume_type: state`.
        RuntimeError: (in `optimize`) Flow-Factory's trainer made no step that AGSM could join.
    """

    accelerator: Any
    adapter: Any
    config: Any
    optimizer: Any
    step: int
    training_args: Any

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        options, resume_path = self.training_args, self.config.model_args.resume_path
        if resume_path and self.config.model_args.resume_type == "state":
            raise ValueError(
                "resume_type: expected lora or full, got state, with which Flow-Factory loads no "
                "weights: it does so before accelerator.prepare. Save with save_model_only: true."
            )
        weight = as_schedule(options.agsm_weight)
        if options.agsm_warmup_steps:
            weight = linear_warmup(weight, options.agsm_warmup_steps)
        self._denoiser = AdapterDenoiser(self.adapter)
        decay, number = options.agsm_ema_decay, options.agsm_num_negatives
        self.agsm = AGSMRegularizer(
            self._denoiser,
            None if decay is None else EMA(self._denoiser, decay=decay),
            AGSMLoss(
                guidance_scale=options.agsm_guidance_scale, temperature=options.agsm_temperature
            ),
            weight=weight,
            candidates=InBatch(number) if number else None,
        )
        self._null = self._encoded_null()
        self._images: list[Any] = []
        self._metrics: dict[str, list[Tensor]] = defaultdict(list)
        self._load_agsm(resume_path)

    def agsm_images(self, samples: Sequence[Any]) -> list[Any]:
        """What AGSM trains on of all processes' samples: those with the best advantages."""
        options = self.training_args
        advantages = torch.tensor([float(one.extra_kwargs["advantage"]) for one in samples])
        fields = [
            {"prompt": one.prompt, "all_latents": one.all_latents[-1:]}
            | {name: getattr(one, name) for name in self._denoiser.names}
            for one in samples
        ]
        best = best_samples(advantages, fields, options.agsm_best, each=options.agsm_batch)
        return [SimpleNamespace(**one) for one in best]

    def optimize(self, samples: list[Any]) -> None:
        """Flow-Factory's optimizer steps of an epoch, with λ·AGSM in their losses."""
        self._images = self.agsm_images(samples)
        before = self.agsm.step
        with self._in_optimize():
            super().optimize(samples)  # type: ignore[misc]
        if self.agsm.step == before:
            raise RuntimeError(_differs("one whose optimize made no step that AGSM could join"))
        self._images = []

    def save_checkpoint(self, save_directory: str, epoch: int | None = None) -> None:
        """Flow-Factory's checkpoint, with AGSM's state in it."""
        folder = Path(save_directory) / ("" if epoch is None else f"checkpoint-{epoch}")
        super().save_checkpoint(str(folder))  # type: ignore[misc]
        state = self.agsm.state_dict()  # in every process, where the EMA is sharded
        if self.accelerator.is_main_process:
            torch.save(state, folder / STATE)
        self.accelerator.wait_for_everyone()

    def load_checkpoint(self, path: str, resume_type: str | None = None) -> None:
        """Flow-Factory's checkpoint, and AGSM's state where it has one."""
        super().load_checkpoint(path, resume_type)  # type: ignore[misc]
        self._load_agsm(path)

    def _load_agsm(self, path: str | None) -> None:
        file = None if path is None else Path(path).expanduser() / STATE
        if file is not None and file.exists():
            self.agsm.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    @contextmanager
    def _in_optimize(self) -> Iterator[None]:
        """λ·AGSM in what is run backward, and AGSM's step after each of the optimizer's."""
        backward, step = self.accelerator.backward, self.optimizer.step

        def with_agsm(loss: Tensor, **kwargs: Any) -> None:
            backward(loss + self._term() if self.agsm.weight(self.agsm.step) else loss, **kwargs)

        def with_update(*args: Any, **kwargs: Any) -> None:
            step(*args, **kwargs)
            if not self.optimizer.step_was_skipped:  # fp16 overflowed
                self._after_step()

        self.accelerator.backward, self.optimizer.step = with_agsm, with_update
        try:
            yield
        finally:
            self.accelerator.backward, self.optimizer.step = backward, step

    def _term(self) -> Tensor:
        """λ·AGSM of a micro-step."""
        loss, metrics = agsm_on(self._batch(), self.agsm, self.adapter.scheduler)
        for name, value in metrics.items():
            self._metrics[name].append(value.to(loss.device))
        return loss

    def _batch(self) -> AGSMBatch:
        """Some of AGSM's images, noised at uniform timesteps. Leaves the host's draws alone."""
        if not self._images:
            raise RuntimeError(_differs("one whose optimize names no images for AGSM"))
        generator = draws(self.agsm.seed, self.agsm.calls, "images")
        rows = torch.randperm(len(self._images), generator=generator)
        return noised(
            [self._images[int(row)] for row in rows[: self.training_args.agsm_batch]],
            self._denoiser.names,
            generator,
            null=self._null,
            low=self.training_args.agsm_timestep_low,
            steps=self.adapter.scheduler.config.num_train_timesteps,
            device=self.accelerator.device,
        )

    @torch.no_grad()
    def _encoded_null(self) -> dict[str, Tensor]:
        """The empty caption as the prompts are encoded, a row each; the encoders' place is kept."""
        adapter, modules = self.adapter, self.adapter.preprocessing_modules
        adapter.on_load_components(modules, self.accelerator.device)
        row = adapter.preprocess_func([""], **{**self.training_args, "guidance_scale": 1.0})
        if self.config.data_args.enable_preprocess:
            adapter.off_load_components(modules)
            adapter.on_load_components(adapter.inference_modules, self.accelerator.device)
        return {name: row[name] for name in self._denoiser.names}

    def _after_step(self) -> None:
        self.agsm.update_ema()
        if self._metrics:
            metrics = reduce_loss_info(self.accelerator, self._metrics)
            self.log_data(metrics, step=self.step)  # type: ignore[attr-defined]
            self._metrics = defaultdict(list)


class AGSMGRPOTrainer(AGSMTrainer, GRPOTrainer):
    """Flow-Factory's `GRPOTrainer` with AGSM."""


class AGSMNFTTrainer(AGSMTrainer, DiffusionNFTTrainer):
    """Flow-Factory's `DiffusionNFTTrainer` with AGSM."""


class AGSMDPOTrainer(AGSMTrainer, DPOTrainer):
    """Flow-Factory's `DPOTrainer` with AGSM on the chosen images of its pairs."""

    def agsm_images(self, samples: Sequence[Any]) -> list[Any]:
        """None yet: `optimize` forms the pairs first."""
        return []

    def _align_dpo_pairs_across_ranks(self, pairs: list[Any]) -> list[Any]:
        pairs = super()._align_dpo_pairs_across_ranks(pairs)
        self._images = [chosen for chosen, _ in pairs]
        return pairs


class _TrainerToo:
    """Called with a model adapter, a class of arguments makes its trainer."""

    trainer: type

    def __new__(cls, **kwargs: Any) -> Any:
        return cls.trainer(**kwargs) if "adapter" in kwargs else super().__new__(cls)


@dataclass
class AGSMGRPO(_TrainerToo, RolloutArguments, GRPOTrainingArguments):
    """`trainer_type` for GRPO with AGSM: Flow-Factory's arguments and AGSM's."""

    trainer = AGSMGRPOTrainer


@dataclass
class AGSMNFT(_TrainerToo, RolloutArguments, NFTTrainingArguments):
    """`trainer_type` for DiffusionNFT with AGSM: Flow-Factory's arguments and AGSM's."""

    trainer = AGSMNFTTrainer


@dataclass
class AGSMDPO(_TrainerToo, AGSMArguments, DPOTrainingArguments):
    """`trainer_type` for DPO with AGSM: Flow-Factory's arguments and AGSM's."""

    trainer = AGSMDPOTrainer
