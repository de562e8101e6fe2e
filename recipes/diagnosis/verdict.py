"""What the numbers mean for a training run: sentences, and the options that follow from them.

findings = verdict(numbers, chosen)
for one in findings:
    print(one.text)
options_of(findings)             # of train_agsm.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from agsm_loss import functional as AF
from diagnosis.levels import DEFAULT_TEMPERATURE, Levels, Numbers
from diagnosis.measure import KINDS, Measured

TOO_EASY = 0.95
"""Win rate from which a kind of competitor has little left to teach."""
MANY_EDITS = 0.5
"""Share of the images with an edited caption below which edits alone leave too many without."""
SAME_DIRECTION = 0.9
"""Cosine from which captions of the batch guide as the empty one does."""
UNCHANGED = 0.01
"""Share of the prediction below which captions do not change it."""
FALSE_NEGATIVES = 0.01
"""Share of suspected pairs that is worth a sentence."""
AT_CHANCE, SATURATED = 0.1, 0.9
"""Share of the way of w⁺ from chance to 1 below and above which T is wrong."""
LITTLE_LEFT = 0.4
"""Share of the guidance of equal weights below which those are better (study_cfg_free)."""
WEAK_SCALE = 1.2
"""Effective guidance scale below which the sampler's guidance is still needed."""


@dataclass(frozen=True)
class Finding:
    """A case of the verdict, its sentence, and the options of train_agsm.py that it asks for."""

    name: str
    text: str
    options: Mapping[str, Any] = field(default_factory=dict)


def options_of(findings: Sequence[Finding]) -> dict[str, Any]:
    """Of all findings together."""
    return {name: value for one in findings for name, value in one.options.items()}


def columns_of(options: Mapping[str, Any]) -> list[int]:
    """The measured columns of the competitors that the options ask for."""
    number = options["num_negatives"]
    edits = {"in_batch": 0, "hard": number, "mixed": -(-number // 2)}[options["candidates"]]
    columns = [*KINDS["edited"][:edits], *KINDS["in_batch"][: number - edits]]
    return [*columns, *(KINDS["empty"] if options["null_caption"] else ())]


def competitors(numbers: Numbers) -> list[Finding]:
    """Where captions decide, and which of them to train against."""
    where = numbers.decides
    if not where.any():
        return [_nothing_decides(numbers)]
    found = [_where(numbers)]
    edited, others, empty = (numbers.kinds[name] for name in ("edited", "in_batch", "empty"))
    hard, easy = _mean(edited.win_rate, where), _mean(others.win_rate, where)
    cosine = float(np.median(others.mean_toward_cfg[where]))
    has_edits = hard >= numbers.decided_from
    if easy >= TOO_EASY:
        remedy = "use edited ones" if has_edits else "they teach little"
        found.append(
            Finding("easy", f"In-batch captions are too easy (win rate {easy:.2f}): {remedy}.")
        )
    if hard < numbers.decided_from:
        found.append(
            Finding(
                "edits_at_chance",
                f"The model cannot tell edited captions apart (win rate {hard:.2f}, chance 0.5): "
                "guidance only strengthens what the model knows, so leave them out.",
            )
        )
    same = cosine >= SAME_DIRECTION
    if same:
        found.append(
            Finding(
                "same_direction",
                f"In-batch captions guide in the direction of the empty one (cosine {cosine:.2f}): "
                "the empty caption alone does the same for one pass.",
            )
        )
    null = _knows_empty(others, empty, where)
    if not null:
        found.append(
            Finding(
                "empty_unknown",
                "The empty caption does worse than a wrong one: the model was hardly trained "
                "without captions, so do not use --null_caption.",
            )
        )
    if has_edits and numbers.with_edits < MANY_EDITS:
        chosen: dict[str, Any] = {"candidates": "mixed", "num_negatives": 2}
        names = [f"an edit of the image's own ({numbers.with_edits:.0%} of the images have one)"]
        names += ["a caption of the batch"]
    elif has_edits:
        chosen, names = {"candidates": "hard", "num_negatives": 1}, ["an edit of the image's own"]
    elif null and (same or easy >= TOO_EASY or np.isnan(easy)):
        chosen, names = {"candidates": "in_batch", "num_negatives": 0}, []
    else:
        chosen = {"candidates": "in_batch", "num_negatives": 2}
        names = ["two captions of the batch"]
    names += ["the empty caption"] if null else []
    text = f"Competitors to start with: {', '.join(names)}."
    return [
        *found,
        Finding("competitors", text, {"objective": "agsm", **chosen, "null_caption": null}),
    ]


def verdict(
    numbers: Numbers, choice: Sequence[Finding], chosen: Levels, entropy: float
) -> list[Finding]:
    """The rest, where captions decide: T, false negatives, and how to sample afterwards.

    choice: of `competitors`. chosen: the numbers of the competitors that it chose. entropy: the
    target that `chosen` has its T for.
    """
    where = numbers.decides
    if not where.any():
        return []
    found, weight, strength = [], chosen.weight, chosen.strength
    mean = _mean(chosen.default_weight, where)
    share = (mean - chosen.chance) / (1 - chosen.chance)
    adaptive = {"target_entropy": entropy}
    at = f"w+ is {mean:.2f}, chance {chosen.chance:.2f}"
    use = f"use --target_entropy {entropy:g} (T = {chosen.one_temperature:.2g} here)"
    if share <= AT_CHANCE:
        text = f"At T = {DEFAULT_TEMPERATURE} the weights are at chance ({at}): {use}."
        found.append(Finding("at_chance", text, adaptive))
    elif share >= SATURATED:
        text = f"At T = {DEFAULT_TEMPERATURE} the weights are saturated ({at}): the guidance "
        text += f"vanishes; {use}."
        found.append(Finding("saturated", text, adaptive))
    else:
        weight, strength = chosen.default_weight, chosen.default_strength
        text = f"T = {DEFAULT_TEMPERATURE} ranks the captions ({at})."
        found.append(Finding("temperature", text, {"temperature": DEFAULT_TEMPERATURE}))
    left = _mean(strength, where) / (1 - chosen.chance)
    text = f"With one T for all noise levels w+ is {weight[where].min():.2f} to "
    text += f"{weight[where].max():.2f} by level, and the weights leave {left:.0%} of the guidance "
    text += "that equal ones would give."
    found.append(Finding("weights", text))
    null = options_of(choice)["null_caption"]
    if null and left < LITTLE_LEFT and share <= AT_CHANCE:
        text = (
            f"That is little: train against the empty caption alone, at T = {DEFAULT_TEMPERATURE} "
        )
        text += "and so with equal weights."
        equal = {"target_entropy": 0.0, "temperature": DEFAULT_TEMPERATURE}
        alone = {"candidates": "in_batch", "num_negatives": 0}
        found.append(Finding("equal_weights", text, {**equal, **alone}))
        strength = np.full_like(strength, 0.5)  # of two captions
    if len(numbers.suspects) >= FALSE_NEGATIVES * numbers.pairs > 0:
        text = (
            f"{len(numbers.suspects)} of {numbers.pairs} captions of other images mostly explain "
        )
        text += "the image better than its own: they may fit it too, or its own is wrong. If one "
        text += "image has several captions, put them as a list into one row."
        found.append(Finding("false_negatives", text))
    scale = AF.guidance_scale(torch.from_numpy(1 - strength[where])).numpy()
    low, middle, high = scale.min(), np.median(scale), scale.max()
    built_in = f"At its fixed point the model has guidance built in, of scale {middle:.1f} "
    built_in += f"({low:.1f} to {high:.1f} by noise level)"
    if not null:
        text = f"{built_in}, away from other captions and not from the empty one: sample as before."
        found.append(Finding("sample_as_before", text))
    elif middle < WEAK_SCALE:
        text = f"{built_in}: go on sampling with guidance, or take a larger --target_entropy."
        found.append(Finding("sample_with", text))
    else:
        text = f"{built_in}: sample without guidance, at half the cost."
        found.append(Finding("sample_without", text, {"validation_guidance_scale": 1.0}))
    return found


def cost(measured: Measured, options: Mapping[str, Any]) -> Finding:
    """What a step of AGSM costs against one of plain denoising, in passes, time and memory.

    A training pass (forward and backward) counts as three forward passes.
    """
    number = 1 + len(columns_of(options))
    seconds = measured.pass_seconds
    text = (
        f"A step makes {number} passes of the EMA (K = {number}) and, with gamma- = 0, one "
        f"training pass: about {(number + 3) / 3:.1f} times a step of plain denoising. A pass of "
        f"{measured.batch_size} images took {seconds:.2g} s here, so a step takes about "
        f"{(number + 3) * seconds:.2g} s. The EMA holds one more copy of what is trained (of all "
        f"weights: {measured.trainable * 4 / 2**20:.0f} MiB)."
    )
    if measured.peak_bytes:
        text += f" This measurement took {measured.peak_bytes / 2**20:.0f} MiB of GPU memory."
    return Finding("cost", text)


def _nothing_decides(numbers: Numbers) -> Finding:
    kinds = [numbers.kinds[name] for name in ("edited", "in_batch")]
    best = np.nanmax([kind.win_rate for kind in kinds])
    size = np.nanmax([kind.size for kind in kinds])
    text = "The matching caption has the smaller error no more often than by chance, at any noise "
    text += f"level (win rate {best:.2f} at most): AGSM has nothing to work with. "
    options = {"objective": "denoising"}
    if size < UNCHANGED:
        text += f"The model ignores its text: another caption changes at most {size:.1%} of its "
        return Finding("ignores_text", text + "prediction. Train it on captions first.", options)
    text += (
        "Captions change the prediction, so look at the data: they may not belong to the images."
    )
    return Finding("captions_do_not_fit", text, options)


def _where(numbers: Numbers) -> Finding:
    where = numbers.decides
    levels = np.flatnonzero(where)
    first, last = float(levels[0]) / len(where), float(levels[-1] + 1) / len(where)
    if where.all():
        return Finding("decides", "Captions decide at all noise levels.")
    if first == 0:
        return Finding(
            "decides_in_part", f"Captions decide below {last:.0%} of the noise schedule."
        )
    parts = f"above {first:.0%}" if last == 1 else f"between {first:.0%} and {last:.0%}"
    text = f"Captions decide {parts} of the noise schedule: use --timestep_low {first:g}."
    return Finding("decides_in_part", text, {"timestep_low": first})


def _knows_empty(others: Levels, empty: Levels, where: Any) -> bool:
    """An unconditional prediction has a smaller error than one under a wrong caption."""
    worst = _mean(others.excess, where)
    return bool(_mean(empty.win_rate, where) > 0.5 and not _mean(empty.excess, where) > worst)


def _mean(values: Any, where: Any) -> float:
    return float(np.mean(values[where]))
