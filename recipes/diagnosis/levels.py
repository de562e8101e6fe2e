"""Numbers by noise level from what `measure` kept: win rates, T, weights, guidance.

numbers = summarize(measured, entropy=0.7)
numbers.kinds["in_batch"].win_rate     # (L,): one number a noise level, from clean to noise
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agsm_loss import AdaptiveTemperature
from agsm_loss import functional as AF
from diagnosis.measure import EMPTY, KINDS, Measured

DEFAULT_TEMPERATURE = 0.1  # of AGSMLoss and of the recipes
CLEAR, MOSTLY = 0.8, 0.6  # of suspected false negatives: win rate of a level, share of the levels
TIE = 1e-9  # of the own error: nearer ones differ by rounding

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Levels:
    """What one set of competitors does. Arrays (L,) have a number a noise level, nan where there
    are no competitors.
    """

    win_rate: Floats
    """Share of (image, competitor) pairs in which the own caption has the smaller error; ties are
    half a win, and chance is 0.5."""
    excess: Floats
    """Mean error of the competitors less that of the own caption."""
    spread: Floats
    """Standard deviation of an image's errors over own caption and competitors, mean of images."""
    temperature: Floats
    """T at which this level alone has the chosen entropy."""
    weight: Floats
    """w⁺: mean weight of the own caption at `one_temperature`."""
    default_weight: Floats
    """The same at T = 0.1."""
    size: Floats
    """RMS of Δ, as a share of the prediction's."""
    toward_cfg: Floats
    """Cosine of Δ with p_own − p_empty, the direction of classifier-free guidance."""
    toward_target: Floats
    """Cosine of Δ with τ − p_own: above 0, Δ points to this image."""
    strength: Floats
    """g: what is left of p_own − p̄ in Δ, with p̄ the competitors' mean, in the least-squares sense.
    1 − w⁺ if all weights are alike; less where the weights are largest on the images whose
    captions differ most. A model at its fixed point has guidance of scale 1/(1 − g) built in."""
    default_strength: Floats
    """The same at T = 0.1."""
    mean_toward_cfg: Floats
    """Cosine of the mean guidance of many such captions, equally weighted, with CFG's direction."""
    one_temperature: float
    """T at which all levels together have the chosen entropy."""
    chance: float
    """What w⁺ is under equal weights."""


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
    """Everything that the verdict is about.

    images: how many were measured. with_edits: the share of them whose caption has an edit. kinds:
    edited, in_batch, empty. pairs: (image, caption of another image) that were compared.
    """

    images: int
    with_edits: float
    kinds: dict[str, Levels]
    suspects: list[Suspect]
    pairs: int

    @property
    def decided_from(self) -> float:
        """The win rate from which captions decide: 0.6, or what chance stays below (95 %)."""
        return 0.5 + max(0.1, 1 / math.sqrt(self.images))

    @property
    def decides(self) -> npt.NDArray[np.bool_]:
        """(L,): where the own caption wins against captions of other images, or against edits."""
        rates = [self.kinds[name].win_rate for name in ("edited", "in_batch")]
        return np.nan_to_num(rates, nan=0.0).max(0) >= self.decided_from


def summarize(measured: Measured, *, entropy: float) -> Numbers:
    """The numbers of each kind of competitor; entropy: as of `against`."""
    kinds = {name: against(measured, places, entropy=entropy) for name, places in KINDS.items()}
    pairs = int(measured.mask[:, KINDS["in_batch"]].sum())
    if not pairs and not measured.mask[:, KINDS["edited"]].any():
        raise ValueError(
            "data: expected images with different captions, got none with a competitor. Take a "
            "larger --batch_size, or look at --caption_column."
        )
    found = suspects(measured, kinds["in_batch"].win_rate)
    with_edits = float(measured.mask[:, KINDS["edited"]].any(1).double().mean())
    return Numbers(len(measured.mask), with_edits, kinds, found, pairs)


def against(
    measured: Measured, columns: Sequence[int], *, entropy: float, first: int = 0
) -> Levels:
    """How the own caption does against the competitors in some columns.

    entropy: mean entropy that T is chosen for, as a share of log(number of candidates).
    first: `one_temperature` is chosen on the levels from this one on.
    """
    kept = [0, *columns]
    rows = measured.mask[:, columns].any(1)
    number = measured.gram.shape[1]
    if not rows.any():
        return Levels(*[np.full(number, np.nan)] * 12, math.nan, math.nan)
    gram, power, mask = measured.gram[rows], measured.power[rows], measured.mask[rows][:, kept]
    errors = gram.diagonal(dim1=-2, dim2=-1)[..., kept]
    wide = mask[:, None].expand(errors.shape)
    one = _temperature(errors[:, first:], wide[:, first:], entropy)
    weights, default = _weights(errors, wide, one), _weights(errors, wide, DEFAULT_TEMPERATURE)
    competes = mask[:, None, 1:].double()
    gaps = (errors[..., 1:] - errors[..., :1]) * competes
    won = (1 + gaps.sign() * (gaps.abs() > TIE * errors[..., :1])) / 2 * competes

    # Each is a sum Σ_k c_k (p_k − τ): Δ and CFG's direction because their c sum to 0.
    def away_from(shares: Tensor) -> Tensor:
        """p_own − Σ_k shares_k p_k."""
        found = torch.zeros(gram.shape[:3], dtype=gram.dtype)
        found[..., kept] = -shares
        found[..., 0] += 1
        return found

    nobody = torch.zeros_like(competes[..., :1])
    equal = torch.cat([nobody, competes / competes.sum(-1, keepdim=True)], dim=-1)
    delta, others = away_from(weights), away_from(equal)
    cfg, target = torch.zeros_like(delta), torch.zeros_like(delta)
    cfg[measured.mask[rows, EMPTY], :, 0] = 1
    cfg[..., EMPTY] = -cfg[..., 0]
    target[..., 0] = -1
    return Levels(
        win_rate=(won.sum((0, 2)) / competes.sum((0, 2))).numpy(),
        excess=(gaps.sum((0, 2)) / competes.sum((0, 2))).numpy(),
        spread=_deviation(errors, competes).mean(0).numpy(),
        temperature=np.array(
            [_temperature(errors[:, [i]], wide[:, [i]], entropy) for i in range(number)]
        ),
        weight=weights[..., 0].mean(0).numpy(),
        default_weight=default[..., 0].mean(0).numpy(),
        size=(_inner(delta, gram, delta).sum(0) / power.sum(0)).clamp(min=0).sqrt().numpy(),
        toward_cfg=_cosine(delta, cfg, gram),
        toward_target=_cosine(delta, target, gram),
        strength=_strength(delta, others, gram),
        default_strength=_strength(away_from(default), others, gram),
        mean_toward_cfg=_mean_toward_cfg(measured, columns),
        one_temperature=one,
        chance=float((1 / mask.sum(1)).mean()),
    )


def suspects(measured: Measured, win_rate: Floats) -> list[Suspect]:
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


def _temperature(errors: Tensor, mask: Tensor, entropy: float) -> float:
    flat = errors.flatten(0, 1), mask.flatten(0, 1)
    return float(AdaptiveTemperature(entropy, momentum=0.0)(*flat))


def _weights(errors: Tensor, mask: Tensor, temperature: float) -> Tensor:
    flat = (-errors / temperature).flatten(0, 1), mask.flatten(0, 1)
    return AF.plackett_luce_weights(*flat).reshape(errors.shape)


def _deviation(errors: Tensor, competes: Tensor) -> Tensor:
    """(I, L): standard deviation over the own caption and the competitors."""
    valid = torch.cat([torch.ones_like(competes[..., :1]), competes], dim=-1)
    number = valid.sum(-1)
    middle = (errors * valid).sum(-1) / number
    return (((errors - middle[..., None]) ** 2 * valid).sum(-1) / number).sqrt()


def _inner(one: Tensor, gram: Tensor, other: Tensor) -> Tensor:
    """(I, L): inner products of two combinations of residuals (I, L, K)."""
    return torch.einsum("ilk,ilkm,ilm->il", one, gram, other)


def _cosine(one: Tensor, other: Tensor, gram: Tensor) -> Floats:
    """(L,), of all images that have both, together."""
    both = one.any(-1) & other.any(-1)
    inner, first, second = (
        (_inner(a, gram, b) * both).sum(0) for a, b in ((one, other), (one, one), (other, other))
    )
    return (inner / (first * second).clamp(min=0).sqrt()).numpy()


def _strength(delta: Tensor, others: Tensor, gram: Tensor) -> Floats:
    """(L,): the multiple of `others` that is nearest to `delta`, of all images together; 0 where
    captions change nothing."""
    along, length = (_inner(one, gram, others).sum(0) for one in (delta, others))
    return torch.where(length > 0, along / length, 0.0).numpy()


def _mean_toward_cfg(measured: Measured, columns: Sequence[int]) -> Floats:
    """(L,): cosine of E[p_own − p_k] with p_own − p_empty.

    The square of the mean's length is the inner product of two captions' directions, which were
    drawn independently; a single caption's own square would count its noise.
    """
    number = measured.gram.shape[1]
    pair = [column for column in columns if column != EMPTY][:2]
    if not pair:
        return np.ones(number)
    rows = measured.mask[:, [*pair, EMPTY]].all(1)
    if len(pair) < 2 or not rows.any():
        return np.full(number, np.nan)
    gram = measured.gram[rows]

    def between(a: int, b: int) -> Tensor:
        """Inner product of p_own − p_a and p_own − p_b, by level."""
        of_all = gram[..., 0, 0] - gram[..., 0, b] - gram[..., a, 0] + gram[..., a, b]
        return of_all.sum(0)

    along = (between(pair[0], EMPTY) + between(pair[1], EMPTY)) / 2
    length = (between(*pair) * between(EMPTY, EMPTY)).clamp(min=0).sqrt()
    return (along / length).clamp(-1, 1).numpy()
