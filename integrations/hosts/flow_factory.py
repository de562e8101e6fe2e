"""Flow-Factory's GRPO, DiffusionNFT and DPO trainers (X-GenGroup/Flow-Factory) with AGSM.

In its YAML file, name a class of this module as `trainer_type`; options of AGSM stand beside it:

    train:
      trainer_type: agsm_loss.integrations.hosts.flow_factory.AGSMNFT
      agsm_weight: 1.0
      agsm_null_caption: true

Flow-Factory imports `trainer_type` twice: as the class of the training arguments, and as what it
calls for a trainer. The classes here are both.

>>> from flow_factory.hparams import Arguments
>>> path = "agsm_loss.integrations.hosts.flow_factory.AGSMNFT"
>>> arguments = Arguments.from_dict({"train": {"trainer_type": path, "agsm_weight": 0.5}})
>>> arguments.training_args.agsm_weight, arguments.training_args.nft_beta
(0.5, 1.0)

Nothing of Flow-Factory is copied. While its `optimize` runs, λ·AGSM is added to what it gives to
`accelerator.backward`, and each `optimizer.step` moves AGSM's EMA. AGSM's images are the rollout's
samples with the best advantages, or DPO's chosen ones: it takes these for true matches of their
prompts, and so repeats the reward's mistakes.
"""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, InBatch, draws
from agsm_loss.integrations.hosts.base import AGSMBatch, agsm_on, best_rows
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


@dataclass
class AGSMArguments:
    """AGSM's options, under `train:` in Flow-Factory's YAML file.

    Args:
        agsm_weight: λ; with 0 the trained weights are those of Flow-Factory's trainer, bit for bit.
        agsm_warmup_steps: first optimizer steps, in which λ rises from 0.
        agsm_batch: images of AGSM in a process and micro-step (a forward and backward pass).
        agsm_best: share of a process's samples that AGSM trains on, best advantage first, in
            (0, 1]; of no effect in DPO, whose chosen images are taken.
        agsm_num_negatives: prompts of other images that compete with an image's own.
        agsm_null_caption: the empty caption competes too.
        agsm_pos_scale, agsm_temperature: γ⁺ and T of `AGSMLoss`; γ⁻ is 0, as weights are trained.
        agsm_ema_decay: decay of AGSM's own EMA per optimizer step.

    Raises:
        ValueError: a value that is out of range.
    """

    agsm_weight: float = 1.0
    agsm_warmup_steps: int = 0
    agsm_batch: int = 8
    agsm_best: float = 0.25
    agsm_num_negatives: int = 3
    agsm_null_caption: bool = False
    agsm_pos_scale: float = 1.0
    agsm_temperature: float = 0.1
    agsm_ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # Flow-Factory's, of the classes below
        for name, at_least in (
            ("agsm_weight", 0),
            ("agsm_warmup_steps", 0),
            ("agsm_num_negatives", 0 if self.agsm_null_caption else 1),
            ("agsm_batch", 2 if self.agsm_num_negatives else 1),
        ):
            if getattr(self, name) < at_least:
                raise ValueError(
                    f"{name}: expected at least {at_least}, got {getattr(self, name)}."
                )
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
        self._adapter = (adapter,)  # in a tuple, as it is no part of what is trained
        parameters = inspect.signature(adapter.forward).parameters
        self.names = [
            name
            for name, one in parameters.items()
            if "prompt" in name and one.default is one.empty
        ]
        needed = {name for name, one in parameters.items() if one.default is one.empty}
        more = sorted(needed - {"t", "latents", *self.names})
        if more:
            raise ValueError(
                "model_type: expected a model whose forward needs latents and prompts alone, as "
                f"sd3-5, got a {type(adapter).__name__}, which needs {more} too."
            )

    def forward(
        self, noisy: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor], bank: Tensor
    ) -> Tensor:
        (adapter,) = self._adapter
        output = adapter.forward(
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
        self.agsm = AGSMRegularizer(
            self._denoiser,
            EMA(self._denoiser, decay=options.agsm_ema_decay),
            AGSMLoss(
                pos_scale=options.agsm_pos_scale,
                neg_scale=0,
                temperature=options.agsm_temperature,
            ),
            weight=weight,
            candidates=InBatch(
                options.agsm_num_negatives, allow_empty=True, null=options.agsm_null_caption
            ),
        )
        self._null = self._encoded_null() if options.agsm_null_caption else {}
        self._images: list[Any] = []
        self._metrics: dict[str, list[Tensor]] = defaultdict(list)
        self._load_agsm(resume_path)

    def agsm_images(self, samples: Sequence[Any]) -> list[Any]:
        """The samples that AGSM trains on: those with the best advantages, in this process."""
        options = self.training_args
        advantages = torch.tensor([float(one.extra_kwargs["advantage"]) for one in samples])
        share = max(options.agsm_best, min(1.0, options.agsm_batch / len(samples)))
        return [samples[int(row)] for row in best_rows(advantages, share)]

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
        """Flow-Factory's checkpoint, with AGSM's state in it: of one kind or the other."""
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
        shown = [self._images[int(row)] for row in rows[: self.training_args.agsm_batch]]
        device = self.accelerator.device
        latents = torch.stack([one.all_latents[-1] for one in shown]).to(device, torch.float32)
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.rand(len(shown), generator=generator)
        text = {
            name: torch.stack([getattr(one, name) for one in shown]).to(device)
            for name in self._denoiser.names
        }
        for name, row in self._null.items():
            text[name] = torch.cat([text[name], row.to(text[name])])
        return AGSMBatch(
            latents,
            times.to(device) * self.adapter.scheduler.config.num_train_timesteps,
            noise.to(device),
            text,
            [one.prompt for one in shown],
        )

    @torch.no_grad()
    def _encoded_null(self) -> dict[str, Tensor]:
        """The empty caption as the prompts are encoded, a row each; the encoders' place is kept."""
        adapter, modules = self.adapter, self.adapter.preprocessing_modules
        adapter.on_load_components(modules, self.accelerator.device)
        options = {**self.training_args, "guidance_scale": 1.0}
        row = adapter.preprocess_func([""], **options)
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
class AGSMGRPO(_TrainerToo, AGSMArguments, GRPOTrainingArguments):
    """`trainer_type` for GRPO with AGSM: Flow-Factory's arguments and AGSM's."""

    trainer = AGSMGRPOTrainer


@dataclass
class AGSMNFT(_TrainerToo, AGSMArguments, NFTTrainingArguments):
    """`trainer_type` for DiffusionNFT with AGSM: Flow-Factory's arguments and AGSM's."""

    trainer = AGSMNFTTrainer


@dataclass
class AGSMDPO(_TrainerToo, AGSMArguments, DPOTrainingArguments):
    """`trainer_type` for DPO with AGSM: Flow-Factory's arguments and AGSM's."""

    trainer = AGSMDPOTrainer
