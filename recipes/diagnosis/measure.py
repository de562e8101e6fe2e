"""The errors of a frozen model on captioned images, by noise level, and the numbers from them.

    measured = measure(model, task.images(16, EDITS), batches=16, seed=0)
    numbers = summarize(measured)
    numbers.win_rate["empty"]     # (L,): one number a noise level, from clean to noise
    numbers.start("empty")        # the share of the schedule from which captions decide

The schedule is cut into ten equal parts, the noise levels. Every image is noised once in each of
them and denoised under its own caption, two edits of it, two captions of its batch and the empty
one, all on the same noise. What is kept are the errors of these predictions p against the training
target τ, and how the caption changes the clean image x that a prediction stands for: the guidance
x_own − x_empty, which AGSM and a guided sampler amplify.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import trange

from agsm_loss import Bank, Mixed, caption_pool
from agsm_loss._random import draws
from agsm_loss.candidates import with_null
from agsm_loss.integrations.denoisers import PlainDenoiser
from agsm_loss.integrations.noise import (
    add_noise,
    clean_and_noise,
    prediction_type,
    regression_target,
)
from data.batches import Batch
from model.pipeline import TextToImage

EDITS = OTHERS = 2  # captions of each of these kinds an image
KINDS = {"empty": (5,), "in_batch": (3, 4), "edited": (1, 2)}
"""Columns of each kind of competitor; column 0 is the image's own caption."""
EMPTY = 5
CHANGED = 0.02
"""Share of the predicted image by which a caption has to change it: our studies trained there."""
CLEAR, MOSTLY = 0.8, 0.6  # of suspected false negatives: win rate of a level, share of the levels

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """I images at L noise levels under K captions. Every mean is over a prediction's elements."""

    errors: Tensor
    """(I, L, K): mean of (p − τ)²; anything where an image has no such caption."""
    guidance: Tensor
    """(I, L): mean of (x_own − x_empty)²."""
    along: Tensor
    """(I, L): mean of (x_own − x_empty)(x_0 − x_own); x_0 is the image."""
    away: Tensor
    """(I, L): mean of (x_0 − x_own)²."""
    power: Tensor
    """(I, L): mean of x_own²."""
    mask: Tensor
    """(I, K): False where an image has no such caption."""
    captions: list[list[str]]
    """The K captions of each image."""
    image_ids: list[int]
    guidance_input: float | None = None
    """The distilled guidance scale that the model was given; None: it has no such input."""


@torch.no_grad()
def measure(
    model: TextToImage, images: Dataset[Batch], *, batches: int, seed: int, levels: int = 10
) -> Measured:
    """Runs the model on the first batches of `images`, which have up to `EDITS` edited captions.

    The draws are a function of (seed, batch). One forward pass a caption, noise level and batch.
    """
    denoiser = PlainDenoiser(model.denoiser)
    found, masks, captions, ids = [], [], [], []
    for index in trange(batches, unit="batch", disable=None):
        batch, generator = images[index], draws(seed, index)
        own = batch.captions
        # An image's own caption fills the columns of its missing edits: it does not compete.
        edits = [[*few, *[text] * EDITS][:EDITS] for few, text in zip(batch.hard, own, strict=True)]
        drawn = with_null(
            Mixed(OTHERS, allow_empty=True)(
                own, hard_negatives=edits, image_ids=batch.image_ids, generator=generator
            ),
            [text == "" for text in own],
        )
        pool = [*map(str, caption_pool(own, edits)), *[""] * len(own)]
        texts = [[pool[row] for row in rows] for rows in drawn.index.tolist()]
        image = model.image_conditioning(batch.pixels)
        by_level = []
        for noisy, timesteps, target in _noisings(model, batch, levels, generator):
            preds: list[Tensor] = []
            for column, shown in zip(zip(*texts, strict=True), drawn.mask.T, strict=True):
                if not shown.any():  # no image has this caption
                    preds.append(preds[0])
                    continue
                text = model.encode_prompts(column)
                pred = denoiser(noisy, timesteps, text, Bank.OFF, **image)
                preds.append(pred.float())
            errors = [(pred - target).square().flatten(1).mean(1) for pred in preds]
            clean = [
                clean_and_noise(model.pipe.scheduler, noisy, one, timesteps)[0]
                for one in (target, preds[0], preds[EMPTY])
            ]
            by_level.append([torch.stack(errors, dim=1).cpu(), *_moments(*clean)])
        found.append([torch.stack(kind, dim=1) for kind in zip(*by_level, strict=True)])
        masks.append(drawn.mask)
        captions += texts
        ids += batch.image_ids
    errors, guidance, along, away, power = (
        torch.cat(kind).double() for kind in zip(*found, strict=True)
    )
    given = model.guidance if "guidance" in image else None
    return Measured(errors, guidance, along, away, power, torch.cat(masks), captions, ids, given)


def _noisings(
    model: TextToImage, batch: Batch, levels: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(noisy, timesteps, target) at each level, t uniform inside it."""
    latents, scheduler = model.encode_images(batch.pixels, generator), model.pipe.scheduler
    steps = scheduler.config.num_train_timesteps
    for level in range(levels):
        share = torch.rand(len(latents), generator=generator)
        timesteps = ((level + share) / levels * steps).to(model.device)
        if prediction_type(scheduler) != "flow":
            timesteps = timesteps.long().clamp(max=steps - 1)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        noisy = add_noise(scheduler, latents, noise, timesteps)
        yield noisy, timesteps, regression_target(scheduler, latents, noise, timesteps)


def _moments(image: Tensor, own: Tensor, empty: Tensor) -> list[Tensor]:
    """guidance, along, away and power (B,) of `Measured`; all are clean images (B, *D)."""
    guidance, rest = own - empty, image - own
    kept = (guidance.square(), guidance * rest, rest.square(), own.square())
    return [one.flatten(1).mean(1).cpu() for one in kept]


@dataclass(frozen=True)
class Suspect:
    """A caption of another image that mostly explains an image better than its own does.

    image: which of the measured ones. row: its row of the data. gain: by how much the error is
    smaller over all levels that were compared, as a share of the own caption's.
    """

    image: int
    row: int
    own: str
    other: str
    gain: float


@dataclass(frozen=True)
class Numbers:
    """Everything that the verdict is about. Arrays (L,) have a number a noise level."""

    images: int
    """How many were measured."""
    pairs: int
    """(image, caption of another image) that were compared."""
    win_rate: dict[str, Floats]
    """By the kind of competitor: the share of (image, competitor) in which the image's own caption
    has the smaller error. Ties are half a win, chance is 0.5; nan where there are none."""
    empty_wins: Floats
    """The same for the empty caption in place of the own one, against captions of other images."""
    size: Floats
    """RMS of the guidance x_own − x_empty, as a share of the predicted image's."""
    cosine: Floats
    """Of the guidance with x_0 − x_own, from the prediction to the image; nan where it is zero."""
    held: float
    """The guidance scale that the own prediction holds: 1 / (1 + <g, x_0 − x_own> / |g|²) over all
    levels, g the guidance. Where s was trained in it rests s times as far from x_empty as the data
    are (`agsm_loss.functional`), so that this is s; it is 1 where the data alone were learnt."""
    suspects: list[Suspect]
    guidance_input: float | None = None
    """As `Measured` has it."""

    @property
    def decided_from(self) -> float:
        """The win rate from which captions decide: 0.6, or what chance stays below (95 %)."""
        return 0.5 + max(0.1, 1 / math.sqrt(self.images))

    def decides(self, kind: str, changed: bool | None = None) -> npt.NDArray[np.bool_]:
        """(L,): where the own caption decides against such competitors.

        changed: whether it has to change the predicted image by `CHANGED` too, from that without
        words. Left out: where the empty caption competes.
        """
        found = np.nan_to_num(self.win_rate[kind]) >= self.decided_from
        wanted = kind == "empty" if changed is None else changed
        return found & (self.size >= CHANGED) if wanted else found

    def start(self, kind: str, changed: bool | None = None) -> float | None:
        """Where the longest part of the schedule begins in which all levels decide; None: none."""
        decides = self.decides(kind, changed)
        places = groupby(range(len(decides)), decides.__getitem__)
        parts = [list(part) for decided, part in places if decided]
        return max(parts, key=len)[0] / len(decides) if parts else None


def summarize(measured: Measured) -> Numbers:
    """The numbers.

    Raises:
        ValueError: no image has a caption, or predictions are not finite.
    """
    if not measured.mask[:, EMPTY].any():
        raise ValueError(
            f"data: expected captions, got none in {len(measured.mask)} images. Look at "
            "--caption_column."
        )
    if not all(one.isfinite().all() for one in (measured.errors, measured.power)):
        raise ValueError("dtype: expected finite predictions. Take --dtype float32 or bfloat16.")
    others = KINDS["in_batch"]
    win_rate = {kind: _win_rate(measured, 0, columns) for kind, columns in KINDS.items()}
    guided = measured.mask[:, EMPTY]  # not the images whose own caption is empty
    guidance, along, away, power = (
        one[guided].mean(0)
        for one in (measured.guidance, measured.along, measured.away, measured.power)
    )
    return Numbers(
        images=len(measured.mask),
        pairs=int(measured.mask[:, others].sum()),
        win_rate=win_rate,
        empty_wins=_win_rate(measured, EMPTY, others),
        size=(guidance / power).sqrt().numpy(),
        cosine=(along / (guidance * away).sqrt()).numpy(),
        held=held(float(along.sum()), float(guidance.sum())),
        suspects=_suspects(measured, win_rate["in_batch"]),
        guidance_input=measured.guidance_input,
    )


def held(along: float, guidance: float) -> float:
    """`Numbers.held` of the sums; inf where the prediction is all guidance, or beyond."""
    rest = 1 + along / guidance if guidance else 1.0
    return 1 / rest if rest > 0 else math.inf


def _win_rate(measured: Measured, first: int, columns: Sequence[int]) -> Floats:
    """(L,): how often the caption of column `first` has a smaller error than those of `columns`."""
    compared = (measured.mask[:, columns] & measured.mask[:, [first]]).double()
    gaps = measured.errors[..., columns] - measured.errors[..., [first]]
    won = (1 + gaps.sign()) / 2
    rate: Tensor = torch.einsum("ilk,ik->l", won, compared) / compared.sum()
    return rate.numpy()


def _suspects(measured: Measured, win_rate: Floats) -> list[Suspect]:
    """Captions of other images with the smaller error at most of the levels, widest gain first.

    win_rate: (L,), against such captions. Levels below `CLEAR` are left out, and with fewer than
    three levels nothing is suspected: chance would name some.
    """
    clear = win_rate >= CLEAR
    if clear.sum() < 3:
        return []
    errors = measured.errors[:, torch.from_numpy(clear)]
    found = []
    for column in KINDS["in_batch"]:
        better = (errors[..., column] < errors[..., 0]).double().mean(1) >= MOSTLY
        gain = 1 - errors[..., column].sum(1) / errors[..., 0].sum(1)
        for i in (better & measured.mask[:, column]).nonzero().flatten().tolist():
            own, other = measured.captions[i][0], measured.captions[i][column]
            found.append(Suspect(i, measured.image_ids[i], own, other, float(gain[i])))
    return sorted(found, key=lambda one: -one.gain)
