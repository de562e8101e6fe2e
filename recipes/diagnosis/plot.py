"""A figure of six panels by noise level."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from agsm_loss import functional as AF
from diagnosis.levels import DEFAULT_TEMPERATURE, Numbers

NAMES = {"edited": "edited captions", "in_batch": "captions of the batch", "empty": "empty caption"}


def draw(numbers: Numbers, title: str, file: Path) -> None:
    """Saves the figure; a kind of competitor is a colour, and levels where captions do not decide
    are grey."""
    figure, grid = plt.subplots(2, 3, figsize=(15, 8), layout="constrained", sharex=True)
    win, temperature, weight, size, direction, scale = grid.flatten()
    number = len(numbers.decides)
    middle = (np.arange(number) + 0.5) / number
    for place, (kind, name) in enumerate(NAMES.items()):
        levels, colour = numbers.kinds[kind], f"C{place}"

        def line(
            axis: Any, values: Any, style: str = "-", label: str = name, c: str = colour
        ) -> None:
            axis.plot(middle, values, style, marker=".", color=c, label=label)

        line(win, levels.win_rate)
        line(temperature, levels.temperature)
        temperature.axhline(levels.one_temperature, color=colour, linestyle=":", linewidth=1)
        line(weight, levels.weight)
        line(weight, levels.default_weight, "--", f"{name}, T = {DEFAULT_TEMPERATURE}")
        weight.axhline(levels.chance, color=colour, linestyle=":", linewidth=1)
        line(size, 100 * levels.size)
        if kind != "empty":
            line(direction, levels.toward_cfg, label=f"{name}, CFG's")
        line(direction, levels.toward_target, "--", f"{name}, the image's")
        line(scale, AF.guidance_scale(torch.from_numpy(1 - levels.strength)))
    win.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    temperature.axhline(DEFAULT_TEMPERATURE, color="grey", linewidth=1)
    direction.axhline(0, color="grey", linewidth=1)
    for axis, text in (
        (win, "win rate of the own caption (dotted: chance)"),
        (temperature, "T for the entropy (dotted: all levels; grey: 0.1)"),
        (weight, "weight w+ at that T (dotted: chance)"),
        (size, "guidance: RMS, % of the prediction"),
        (direction, "guidance: cosine with a direction"),
        (scale, "effective guidance scale at the fixed point"),
    ):
        axis.set_title(text, fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_xlim(0, 1)
        for level in np.flatnonzero(~numbers.decides):
            axis.axvspan(level / number, (level + 1) / number, color="black", alpha=0.08, lw=0)
    temperature.set_yscale("log")
    size.set_ylim(bottom=0)
    for axis in (win, weight, direction):
        axis.legend(fontsize=7)
    for axis in grid[1]:
        axis.set_xlabel("share of the noise schedule (0: clean, 1: noise)")
    figure.suptitle(title)
    figure.savefig(file, dpi=100)
    plt.close(figure)
