"""A figure of three panels by noise level."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from diagnosis.levels import Numbers

NAMES = {
    "empty": "than under the empty caption",
    "in_batch": "than under another image's caption",
    "edited": "than under its caption with one word changed",
}


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
