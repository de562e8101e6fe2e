"""The verdict, the recommended config, the numbers and the plot of one measurement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
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
from diagnosis.measure import Measured, Numbers, Suspect, summarize
from diagnosis.verdict import options_of, verdict

SHOWN = 6
"""Suspected false negatives that are listed and shown; diagnosis.json has all of them."""
NAMES = {
    "empty": "than under the empty caption",
    "in_batch": "than under another image's caption",
    "edited": "than under its caption with one word changed",
}
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
    for kind, name in NAMES.items():
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
