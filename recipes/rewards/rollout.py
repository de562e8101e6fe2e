"""What the reward-driven recipes share: prompts, rewards, AGSM's images, names in the log, sheets.

    own = OnPolicy(options, accelerator, trained, prompts=16)
    step = FlowGRPO(..., agsm=own.agsm)

    def loss(batch, index):                                 # batch: a `PromptBatch`
        captions = own.grouped(batch.captions)              # each prompt `group_size` times
        text, image = own.conditioning(captions)
        ...                                                 # sample latents of the captions
        rewards = own.rewards(latents, captions, index)
        advantages = own.advantages(rewards)
        best = own.best(latents, captions, rewards)         # of all processes
        out = step(..., agsm_batch=own.agsm_batch(batch, index, best))
        return out.loss, {**out.metrics, **own.logged}

Prompts are the data set's captions, or those of `--sampling_prompts`. AGSM trains on the data
set's images, or on the samples of all processes with the best rewards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset

from agsm_loss import Bank
from agsm_loss._random import draws
from agsm_loss.integrations.hosts.base import (
    AGSMBatch,
    bank_of,
    best_samples,
    of_all_processes,
    share_of,
)
from agsm_loss.integrations.hosts.rollouts import group_advantages
from data.batches import Batch
from data.pictures import sheet, to_uint8
from data.prompts import read_prompts
from data.sources import is_world
from data.task import Captions, Task
from model.agsm import Competitors, check_competitors
from model.pipeline import TextToImage
from model.trained import TrainedModel
from rewards.rewards import Reward, load
from run.options import option

AT_ONCE = 8
"""Images to decode and score at a time: a VAE needs gigabytes for one of 1024 pixels."""
SHOWN = 32
"""Images on a sheet of samples."""

BestSample = tuple[str, Tensor]
"""A caption and its image's latents, on the CPU."""


@dataclass(frozen=True)
class RewardOptions:
    """Of recipes in which the model's own samples are scored."""

    _argument_group_name = "rewards"
    reward: str = option(
        "detector",
        "What scores the samples, larger is better: detector (for --data world), "
        "jpeg_compressibility, jpeg_incompressibility, redness, pickscore, clipscore, hpsv2, "
        "vqascore, imagereward, ocr, geneval; a CLIP model like PickScore, or a chat model for "
        "vqascore, as a folder or a hub id; or package.module:function, which is called with "
        "pixels (N, 3, H, W) in [-1, 1] and N prompts and returns (N,). Several are added, each "
        "times its weight: pickscore:0.5,redness:1.",
    )
    agsm_images: Literal["data", "best"] = option(
        "data", "Images that AGSM trains on: the data set's, or the samples with the best rewards."
    )
    agsm_best: float = option(
        0.25,
        "Share of all processes' samples that AGSM trains on, best reward first (for --agsm_images "
        "best).",
        above=0,
        at_most=1,
    )
    agsm_batch: int = option(8, "Images of AGSM per process and micro-step.", at_least=2)


@dataclass(frozen=True)
class PromptOptions:
    """Options of the recipes that sample prompts of their own."""

    sampling_prompts: str = option(
        "",
        "File of prompts to sample, one per line or GenEval's jsonl, in place of the data set's "
        "captions.",
    )


@dataclass(frozen=True)
class GroupOptions:
    """Options of the hosts that compare the rewards of a prompt's samples."""

    group_size: int = option(
        4, "Images per prompt, whose rewards are compared with each other.", at_least=2
    )
    num_inference_steps: int = option(10, "Sampling steps per image.", at_least=2)
    kl_weight: float = option(
        0.0,
        "Weight of the KL divergence to the reference (the model as it was given); 0: none.",
        at_least=0,
    )


@dataclass(frozen=True)
class PromptBatch:
    """The prompts to sample, and AGSM's images where it trains on the data's."""

    captions: list[str]
    images: Batch | None = None


class PromptBatches(Dataset[PromptBatch]):
    """Item i: what micro-step i trains on, a function of (seed, i, process).

    Args:
        options, task: where prompts and images come from.
        number: prompts a rollout.
        micro_steps: micro-steps a rollout, which all have the same prompts.
        images: AGSM's images per item; 0: none.
    """

    def __init__(
        self, options: Any, task: Task, number: int, micro_steps: int, images: int
    ) -> None:
        self.options, self.task = options, task
        self.number, self.micro_steps = number, micro_steps
        self.images = on_policy_images(options, task, images) if images else None

    def about(self) -> str:
        """For a run's summary."""
        return f"prompts of {self.options.sampling_prompts or self.options.data}"

    @cached_property
    def fingerprint(self) -> str:
        """Of the prompts and the images, in their order; "" of the world's, which are drawn."""
        return fingerprint_of(self.texts) + getattr(self.images, "fingerprint", "")

    @cached_property
    def texts(self) -> Captions | list[str]:
        """Opened in the process that reads it."""
        return prompts_of(self.options, self.task)

    def __getitem__(self, index: int) -> PromptBatch:
        rollout = index // self.micro_steps
        generator = draws(self.options.seed, rollout, self.task.rank, "prompts")
        rows = torch.randint(len(self.texts), (self.number,), generator=generator)
        captions = [self.texts[int(row)] for row in rows]
        return PromptBatch(captions, None if self.images is None else self.images[index])


class OnPolicy:
    """Prompts, rewards and AGSM's images of a recipe that samples in groups on the shared loop.

    Args:
        options, accelerator, trained: the recipe's.
        prompts: to sample a rollout and process.
        micro_steps: micro-steps a rollout.
        at_once: images to decode and score at a time.

    Attributes:
        agsm: the regularizer; None where its weight is 0.
        batches: the loop's items.
        logged: of the last rollout's rewards on all processes, for the log; of a sum also each
            part's mean.
        differences: ends a run whose rewards never differ within a group.

    Raises:
        ValueError: AGSM on the best samples with edited captions; a prompt that the reward cannot
            judge.
    """

    def __init__(
        self,
        options: Any,
        accelerator: Accelerator,
        trained: TrainedModel,
        *,
        prompts: int,
        micro_steps: int = 1,
        at_once: int = AT_ONCE,
    ) -> None:
        if options.agsm_weight and options.agsm_images == "best":
            check_best(options)
        self.options, self.accelerator, self.trained = options, accelerator, trained
        self.micro_steps, self.at_once = micro_steps, at_once
        self.logged: dict[str, Tensor] = {}
        self.differences = Findings(
            "rewards that differ between the images of a prompt",
            "Every advantage was 0. Take a larger --group_size, other prompts or another --reward.",
        )
        self.agsm = trained.agsm_in_step(options.agsm_batch)
        on_data = self.agsm is not None and options.agsm_images == "data"
        task = trained.task
        self.batches = PromptBatches(
            options, task, prompts, micro_steps, options.agsm_batch if on_data else 0
        )
        self._reward = load(options.reward, accelerator.device)
        check_prompts(self._reward, options, task)
        side = task.size
        if options.sampling_prompts and is_world(options.data):  # no images of the world's size
            side = options.resolution or trained.pipeline.side
            trained.pipeline.check_side(side)
        self._blank = torch.zeros(1, 3, side, side)
        self._shape = trained.pipeline.encode_images(self._blank, draws(options.seed)).shape[1:]

    def grouped(self, prompts: Sequence[str]) -> list[str]:
        """Each prompt `group_size` times, in consecutive rows."""
        return [text for text in prompts for _ in range(self.options.group_size)]

    def conditioning(self, captions: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What belongs to the captions, and what to their images."""
        model = self.trained.pipeline
        blank = self._blank.expand(len(captions), -1, -1, -1)
        return model.encode_prompts(captions), model.image_conditioning(blank)

    def noise(self, number: int, generator: torch.Generator) -> Tensor:
        """N(0, 1) in the shape of so many images' latents."""
        drawn = torch.randn(number, *self._shape, generator=generator)
        return drawn.to(self.accelerator.device)

    def levels(self, steps: int) -> dict[str, Any]:
        """What a rollout is called with for the noise levels of the pipeline's call."""
        return self.trained.pipeline.levels(self._shape, steps)

    def denoise(self, text: Any, image: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """The model in training with ψ⁺, as rollouts call it."""

        def run(x: Tensor, timesteps: Tensor) -> Tensor:
            own = bank_of(Bank.POSITIVE, len(x))
            # The denoiser alone runs in the options' precision: it is accelerate's.
            pred: Tensor = self.trained.denoiser(x, timesteps, text, own, **image)
            return pred.float()

        return run

    def rewards(self, latents: Tensor, captions: Sequence[str], index: int) -> Tensor:
        """(N,) of a rollout's images; a sheet of them where a validation is due in it.

        index: of the rollout's first micro-step.
        """
        scores, pixels = decoded_scores(
            self.trained.pipeline, self._reward, latents, captions, self.at_once
        )
        rewards = self._reward.total(scores)
        parts = scores if len(scores) > 1 else {}
        every = self.accelerator.gather(
            torch.stack([rewards, *parts.values()], 1).to(self.accelerator.device)
        )
        self.logged = {
            "reward/mean": every[:, 0].mean(),
            "reward/std": every[:, 0].std(unbiased=False),
            **{f"reward/{name}": every[:, i].mean() for i, name in enumerate(parts, 1)},
        }
        options, a_step = self.options, self.options.gradient_accumulation_steps
        last = -(-(index + self.micro_steps) // a_step)
        due = [
            step
            for step in range(index // a_step + 1, last + 1)
            if step % options.validation_steps == 0 or step == options.max_train_steps
        ]
        if due and self.accelerator.is_main_process:
            file = Path(options.output_dir) / "sheets" / f"samples_{due[-1]:06d}.png"
            samples_sheet(pixels, captions, rewards, file)
        return rewards.to(latents.device)

    def advantages(self, rewards: Tensor, *, global_std: bool = False) -> Tensor:
        """(N,) of this process's images (`group_advantages` of all processes' rewards)."""
        every = group_advantages(
            self.accelerator.gather(rewards.to(self.accelerator.device)),
            self.options.group_size,
            global_std=global_std,
        )
        self.differences.saw(int(every.count_nonzero()))
        own = every.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        return own.to(rewards.device)

    def best(self, latents: Tensor, captions: Sequence[str], rewards: Tensor) -> list[BestSample]:
        """All processes' best samples of a rollout; none where AGSM does not train on them.

        latents, captions, rewards: this process's, all of them. Every process calls it.
        """
        options = self.options
        if self.agsm is None or options.agsm_images != "best":
            return []
        samples = list(zip(captions, latents, strict=True))
        return best_samples(rewards, samples, options.agsm_best, each=options.agsm_batch)

    def agsm_batch(
        self, batch: PromptBatch, index: int, best: Sequence[BestSample]
    ) -> AGSMBatch | None:
        """AGSM's images of a micro-step: the data's, or some of a rollout's best; None without it.

        best: the rollout's (`OnPolicy.best`).
        """
        if self.agsm is None:
            return None
        # Draws of its own: the host's are what they are without AGSM.
        draw = draws(self.options.seed, index, self.accelerator.process_index, "agsm")
        if batch.images is not None:
            clean = self.trained.pipeline.encode_images(batch.images.pixels, draw)
            return self.trained.agsm_batch(batch.images, clean, draw)
        rows = torch.randperm(len(best), generator=draw)[: self.options.agsm_batch].tolist()
        captions, latents = zip(*(best[row] for row in rows), strict=True)
        blank = self._blank.expand(len(rows), -1, -1, -1)
        shown = Batch(blank, list(captions), rows, [[] for _ in rows])
        clean = torch.stack(latents).to(self.accelerator.device)
        return self.trained.agsm_batch(shown, clean, draw)


def decoded_scores(
    pipeline: TextToImage,
    reward: Reward,
    latents: Tensor,
    captions: Sequence[str],
    at_once: int = AT_ONCE,
) -> tuple[dict[str, Tensor], Tensor]:
    """The reward's scores of all images (N,), and the first of their pixels, on the CPU.

    latents: (N, C, h, w), as the denoiser takes them.
    """
    found: list[dict[str, Tensor]] = []
    shown: list[Tensor] = []
    for first in range(0, len(captions), at_once):
        pixels = pipeline.decode_latents(latents[first : first + at_once])
        found.append(reward.scores(pixels, captions[first : first + at_once]))
        if first < SHOWN:
            shown.append(pixels.cpu())
    scores = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    return scores, torch.cat(shown)[:SHOWN]


class Findings:
    """Ends a run that has nothing to train on: for so many rollouts from its start, or at all.

    what: is looked for. remedy: what to do where there is none.
    """

    MOST = 50

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy
        self.rollouts, self.found = 0, False

    def saw(self, number: int) -> None:
        """So many in a rollout, on all processes together; ValueError after `MOST` of none."""
        self.rollouts, self.found = self.rollouts + 1, self.found or number > 0
        if self.rollouts == self.MOST:
            self.check()

    def check(self) -> None:
        """ValueError where none of the rollouts so far had any: call it before saving."""
        if self.rollouts and not self.found:
            raise ValueError(
                f"reward: expected {self.what}, got none in {self.rollouts:,} rollouts, so that "
                f"nothing was trained. {self.remedy}"
            )


def check_prompts(reward: Reward, options: Any, task: Task) -> None:
    """ValueError where the reward cannot judge a prompt that may be sampled."""
    texts = prompts_of(options, task)
    reward.check(task.every_caption() if isinstance(texts, Captions) else texts)


def check_best(options: Any) -> None:
    """ValueError where the best samples should have edited captions: only a data set has them."""
    if Competitors.read(options.candidates).hard:
        raise ValueError(
            f"agsm_images: best has no edited captions; expected candidates empty or in_batch:N, "
            f"got {options.candidates}. Take --agsm_images data, or --candidates empty."
        )


def on_policy_images(options: Any, task: Task, batch_size: int) -> Dataset[Batch]:
    """The data set's images, with edited captions where AGSM is on."""
    hard = check_competitors(options, task) if options.agsm_weight else 0
    return task.images(batch_size, hard, options.image_column)


def dealt(
    accelerator: Accelerator, batch: Batch, latents: Tensor, scores: Tensor, share: float
) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """The samples of all processes, dealt out so that each gets as many of those with best scores.

    Every process calls it, with samples of its own and as many as the others. Of one process its
    batch is as it was.

    Args:
        batch: the samples' captions.
        latents, scores: the samples (B, *D), and one a sample (B,).
        share: of the samples to take, in (0, 1].

    Returns:
        The process's B captions; its samples, zero but for the best; the rows of these, and their
        scores.
    """
    number, rank = accelerator.num_processes, accelerator.process_index
    texts = [
        (caption, image_id * number + rank, hard)
        for caption, image_id, hard in zip(batch.captions, batch.image_ids, batch.hard, strict=True)
    ]
    every = [one for few in of_all_processes(texts) for one in few]
    places = range(rank * len(texts), (rank + 1) * len(texts))
    best = best_samples(
        scores,
        list(zip(places, latents, scores, strict=True)),
        share,
        each=share_of(share, len(texts)),
    )
    others = sorted({*range(len(every))} - {place for place, _, _ in best})
    # Where almost all scores are NaN, there may be fewer than processes.
    own = {place: kept for place, *kept in best[rank % len(best) :: number]}
    rows = sorted([*own, *others[rank::number]])
    captions, image_ids, hard = zip(*(every[row] for row in rows), strict=True)
    shown = replace(batch, captions=list(captions), image_ids=list(image_ids), hard=list(hard))
    kept = torch.tensor([rows.index(place) for place in own])
    moved = latents.new_zeros(len(rows), *latents.shape[1:])
    moved[kept.to(moved.device)] = torch.stack([one for one, _ in own.values()]).to(moved)
    return shown, moved, kept, torch.stack([score for _, score in own.values()])


def prompts_of(options: Any, task: Task) -> Captions | list[str]:
    """The prompts of `--sampling_prompts`, or the data set's captions."""
    if not getattr(options, "sampling_prompts", ""):  # SPO has the data set's alone
        return task.captions()
    return [row["prompt"] for row in read_prompts(options.sampling_prompts)]


def fingerprint_of(prompts: Captions | list[str]) -> str:
    """A hash of them in their order; "" of the world's, which are drawn."""
    if isinstance(prompts, Captions):
        return prompts.fingerprint
    return xxhash.xxh3_128_hexdigest(json.dumps(prompts).encode())


def samples_sheet(pixels: Tensor, prompts: Sequence[str], rewards: Tensor, path: Path) -> None:
    """The first images (N, 3, H, W) in [-1, 1] of a rollout, each with its reward and prompt."""
    told = [
        {"prompt": f"{float(reward):.3f} {prompt}"}
        for prompt, reward in zip(prompts, rewards, strict=True)
    ]
    shown = to_uint8(pixels[:SHOWN].float()).permute(0, 2, 3, 1).cpu().numpy()
    sheet(shown, told[:SHOWN], None, path, side=96)
