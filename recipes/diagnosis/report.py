"""The verdict, the recommended config, the numbers and the plot of one measurement."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from matplotlib.ticker import PercentFormatter
from torch.utils.data import Dataset

from data.batches import Batch
from data.pictures import sheet, to_uint8
from data.sources import is_world
from diagnosis.measure import CHANGED, Measured, Numbers, Suspect, summarize

SHOWN = 6
"""Suspected false negatives that are listed and shown; diagnosis.json has all of them."""
LINES = {
    "empty": "than under the empty caption",
    "in_batch": "than under another image's caption",
    "edited": "than under its caption with one word changed",
}
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
OF_DATA = ("split", "caption_column", "image_column", "resolution")


def report(measured: Measured, images: Dataset[Batch], options: Any) -> list[str]:
    """Writes what diagnose.py names under its `output_dir`; returns the lines of verdict.txt.

    images: that were measured, for pictures. options: of diagnose.py.
    """
    folder, numbers = Path(options.output_dir), summarize(measured)
    findings = verdict(numbers)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{options.model} on {numbers.images} images of {options.data}:"]
    for finding in findings:
        lines.append(f"- {finding.text}")
        if finding.name == "false_negatives":
            shown = numbers.suspects[:SHOWN]
            _pictures(shown, images, options.batch_size, folder / "suspects.png")
            lines += [f"  row {one.row}: {one.other!r} beats {one.own!r}" for one in shown]
    config, advice = folder / "config.yaml", options_of(findings)
    lines.append(f"Train a LoRA: python recipes/train_agsm.py --config {config}")
    (folder / "verdict.txt").write_text("\n".join(lines) + "\n")
    named = () if is_world(options.data) else OF_DATA
    given = {name: getattr(options, name) for name in ("model", "data", *named)}
    table = given | advice | {"train_batch_size": options.batch_size}
    config.write_text(
        "# Recommended by diagnose.py. A LoRA is trained; --full trains all weights.\n"
        + yaml.safe_dump({k: v for k, v in table.items() if v is not None}, sort_keys=False)
    )
    plain = json.dumps(asdict(numbers), indent=1, default=_plain)
    (folder / "diagnosis.json").write_text(plain + "\n")
    draw(numbers, advice.get("timestep_low"), lines[0].rstrip(":"), folder / "diagnosis.png")
    return lines


def _pictures(shown: Sequence[Suspect], images: Any, batch_size: int, file: Path) -> None:
    pixels = [images[one.image // batch_size].pixels[one.image % batch_size] for one in shown]
    told = [{"prompt": f"own: {one.own}; other: {one.other}"} for one in shown]
    grid = to_uint8(torch.stack(pixels)).permute(0, 2, 3, 1).cpu().numpy()
    sheet(grid, told, None, file, columns=len(shown), side=240)


def _plain(values: Any) -> Any:
    """An array as a JSON value; null for nan."""
    return np.where(np.isfinite(values), values, None).tolist()


def draw(numbers: Numbers, start: float | None, title: str, file: Path) -> None:
    """Saves the figure; the part of the schedule from `start` on, to train on, is green."""
    figure, (win, size, cosine) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    number = len(numbers.size)
    middle = (np.arange(number) + 0.5) / number
    for kind, name in LINES.items():
        win.plot(middle, numbers.win_rate[kind], marker=".", label=name)
    size.plot(middle, numbers.size, marker=".")
    cosine.plot(middle, numbers.cosine, marker=".")
    win.axhline(0.5, color="grey", linestyle=":", label="chance")
    cosine.axhline(0, color="grey", linestyle=":")
    size.set_ylim(bottom=0)
    for axis, text in (
        (win, "How often an image is denoised better\nunder its own caption"),
        (size, "How far the caption moves the predicted image\n(from that without words, % of it)"),
        (cosine, "Whether it moves towards the true image\n(cosine; 1: to it, -1: away from it)"),
    ):
        axis.set_title(text, fontsize=11)
        axis.grid(alpha=0.3)
        axis.set_xlim(0, 1)
        axis.xaxis.set_major_formatter(PercentFormatter(1))
        axis.set_xlabel("place in the noise schedule (0%: clean image, 100%: noise)")
        if start is not None:
            axis.axvspan(start, 1, color="green", alpha=0.08, lw=0, label="to train on")
    for axis in (win, size):
        axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    win.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=100)
    plt.close(figure)


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
        f"{(3 + PASSES[kind]) / 3:.2g} times as long as one of plain denoising. "
    )
    options: dict[str, Any] = {"agsm_guidance_scale": scale, "candidates": CANDIDATES[kind]}
    if (given := numbers.guidance_input) is None:
        text += (
            "Then sample without guidance (--guidance_scale 1): one pass a step in place of two."
        )
    else:
        text += f"Train and sample with the model's own guidance input at {given:g}, as here."
        options["validation_guidance_scale"] = given
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
