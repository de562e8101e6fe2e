"""The studies in one plot: what AGSM adds to its control, with the interval.

    python -m recipes.lab.studies.forest

It reads the differences in results/*/report.md and draws results/forest.png, a row for each of
forest.yaml's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import yaml
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[1] / "results"
GROUPS: dict[str, list[tuple[str, str, str]]] = yaml.safe_load(
    Path(__file__).with_suffix(".yaml").read_text()
)  # -> study, method and control


class Difference(NamedTuple):
    """Of overall scores: its mean, and half of its 95 % interval."""

    mean: float
    half: float


def differences(report: str) -> dict[tuple[str, str], Difference]:
    """The differences in overall that a report's text has, by method and control."""
    found = {}
    sections = re.split(r"^## ", report, flags=re.MULTILINE)
    for section in sections:
        control = re.match(r"Against (.+), on the same prompts and noise\n", section)
        if control:
            for row in re.finditer(
                r"^\| (.+?) \| ([+-][\d.]+) ± ([\d.]+) \|", section, flags=re.MULTILINE
            ):
                found[row[1], control[1]] = Difference(float(row[2]), float(row[3]))
    return found


def draw(path: Path, results: Path = RESULTS) -> None:
    """A line for each of GROUPS: the difference in overall to the control, with its interval."""
    number = sum(len(rows) + 1 for rows in GROUPS.values())
    figure = Figure(figsize=(9, 0.26 * number + 0.8), layout="constrained")
    axis = figure.subplots()
    labels: list[str] = []
    for group, rows in GROUPS.items():
        labels.append(group)
        for study, method, control in rows:
            report = (results / study / "report.md").read_text()
            mean, half = differences(report)[method, control]
            axis.errorbar(mean, len(labels), xerr=half, fmt="o", color=_colour(mean, half))
            label = f"{study.removeprefix('study_')}: {method} vs. {control}"
            labels.append(label.replace("lambda", "λ"))
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    for label in axis.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in GROUPS else "normal")
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xlabel("difference in overall, 95 % interval over prompts", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)


def _colour(mean: float, half: float) -> str:
    """Grey where the interval has 0 in it."""
    return "grey" if abs(mean) <= half else "tab:green" if mean > 0 else "tab:red"


if __name__ == "__main__":
    draw(RESULTS / "forest.png")
