"""What the numbers mean for a training run: sentences, and the options that follow from them.

findings = verdict(numbers)
for one in findings:
    print(one.text)
options_of(findings)             # of train_agsm.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diagnosis.measure import CHANGED, Numbers

GUIDANCE_SCALE = 3.0
"""Where the sampled scale was best in our studies, and train_agsm.py's own default."""
HELD = 1.25
"""Of the scale that a model holds: ours with no guidance trained in hold 0.9 to 1.0."""
MOST = 10.0
"""A scale that is recommended."""
FALSE_NEGATIVES = 0.01
"""Share of suspected pairs that is worth a sentence."""
NAMES = {"empty": "the empty one", "in_batch": "those of other images"}
CANDIDATES = {"empty": "empty", "in_batch": "in_batch:3"}
PASSES = {"empty": 1, "in_batch": 3}
"""Forward passes of such competitors a step; a training pass takes as long as three."""


@dataclass(frozen=True)
class Finding:
    """A case of the verdict, its sentence, and the options of train_agsm.py that it asks for."""

    name: str
    text: str
    options: Mapping[str, Any] = field(default_factory=dict)


def options_of(findings: Sequence[Finding]) -> dict[str, Any]:
    """Of all findings together."""
    return {name: value for one in findings for name, value in one.options.items()}


def verdict(numbers: Numbers) -> list[Finding]:
    """Which captions compete, where in the schedule they decide, and what to train."""
    found, kind = [], "empty"
    others = numbers.win_rate["in_batch"] >= numbers.decided_from
    if others.any() and numbers.empty_wins[others].mean() < 0.5:
        kind = "in_batch"
        text = (
            "Images are denoised worse under the empty caption than under those of other images: "
            "the model was hardly trained without captions. Those of other images take its place; "
            "in our studies they gained less."
        )
        found.append(Finding("empty_unknown", text))
    judge, scale = kind, GUIDANCE_SCALE  # judge: whom the own caption has to beat
    inside = kind == "empty" and numbers.held >= HELD
    if inside:
        judge, scale = "in_batch", round(min(numbers.held, MOST), 1)
        text = (
            f"Guidance is in the model already, as after distillation: its predictions hold a "
            f"scale of {scale:g}. Plain training takes it out; AGSM at that scale keeps it."
        )
        found.append(Finding("guidance_inside", text))
    elif numbers.start(kind) is None and numbers.start("in_batch") is not None:
        judge = "in_batch"
        text = (
            "At no noise level would guidance away from the empty caption help: many captions may "
            "be partly wrong."
        )
        found.append(Finding("empty_wins", text))
    start = numbers.start(judge, changed=inside or None)
    if start is None:
        return [_nothing_decides(numbers)]
    rate, decided = numbers.win_rate[judge], numbers.decides(judge, changed=inside or None)
    first = round(start * len(rate))
    number = f"{decided[first:].sum()} of {len(rate)}"
    where = f"{number} noise levels, from {start:.0%} of the schedule on"
    text = (
        f"Images are denoised better under their own caption than under {NAMES[judge]} at "
        f"{'all noise levels' if decided.all() else where} (at best in {rate[first:].max():.0%} of "
        "the comparisons; chance: 50%)."
    )
    if (rate[:first] >= numbers.decided_from).any() and (judge == "empty" or inside):
        text += f" Below, captions change the predicted image by less than {CHANGED:.0%}."
    if start:
        text += f" Train there alone: --timestep_low {start:g}."
    found.append(Finding("decides", text, {"timestep_low": start}))
    text = (
        f"{'Keep it' if inside else f'Train a guidance scale of {scale:g} into the model'}: "
        f"--agsm_guidance_scale {scale:g} --candidates {CANDIDATES[kind]}. A step takes about "
        f"{(3 + PASSES[kind]) / 3:.2g} times as long as one of plain denoising. Then sample "
        "without guidance (--guidance_scale 1): one pass a step in place of two."
    )
    options = {"agsm_guidance_scale": scale, "candidates": CANDIDATES[kind]}
    found.append(Finding("scale", text, {"objective": "agsm", **options}))
    edited = numbers.win_rate["edited"][first:].mean()
    if edited >= numbers.decided_from:
        text = (
            f"The model tells captions with one word changed apart, too ({edited:.0%}): "
            f"--candidates {CANDIDATES[kind]},hard:1 adds one, for one more pass. In our studies "
            "this gained nothing."
        )
        found.append(Finding("edits", text))
    if len(numbers.suspects) >= FALSE_NEGATIVES * numbers.pairs > 0:
        text = (
            f"{len(numbers.suspects)} of {numbers.pairs} captions of other images mostly fit an "
            "image better than its own, which may be wrong."
        )
        found.append(Finding("false_negatives", text))
    return found


def _nothing_decides(numbers: Numbers) -> Finding:
    size, best = numbers.size.max(), numbers.win_rate["empty"].max()
    text = (
        "At no noise level would guidance away from the empty caption help (at best the own one is "
        f"better in {best:.0%} of the comparisons; chance: 50%): AGSM has nothing to work with. "
    )
    options = {"objective": "denoising"}
    if size < CHANGED:
        text += f"The model ignores its text, which changes images by {size:.1%} at most: "
        return Finding("ignores_text", f"{text}train it on captions first.", options)
    text += "Captions change its predictions, so look at the data: they may not fit the images."
    return Finding("captions_do_not_fit", text, options)
