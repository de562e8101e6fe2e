"""The studies in one plot: what AGSM adds to its control, with the interval.

    python -m recipes.lab.studies.forest

It reads the differences in results/*/report.md and draws results/forest.png.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parents[1] / "results"
GROUPS: dict[str, list[tuple[str, str, str]]] = {  # -> study, method and control
    "Alone, sampled with guidance": [
        ("study_epsilon", "AGSM", "the base"),
        ("study_flow", "AGSM", "the base"),
    ],
    "Alone, sampled without guidance": [
        ("study_cfg_free", "AGSM, empty", "denoising"),
        ("study_cfg_free", "constant weights, empty", "denoising"),
        ("study_cfg_free_flow", "AGSM, empty", "denoising"),
        ("study_cfg_free_flow", "constant weights, empty", "denoising"),
    ],
    "Preference training": [
        ("study_dpo_epsilon", "DPO + AGSM", "DPO"),
        ("study_dpo_epsilon", "DPO + AGSM", "DPO + denoising"),
        ("study_dpo", "DPO + AGSM", "DPO"),
        ("study_inpo", "InPO + AGSM", "InPO"),
        ("study_spo", "SPO + AGSM", "SPO"),
    ],
    "The reward ignores the prompt": [
        ("study_ddpo", "DDPO + AGSM", "DDPO, lower learning rate"),
        ("study_ddpo", "DDPO + AGSM", "DDPO + denoising"),
        ("study_nft", "NFT + AGSM, equal weights", "NFT + denoising"),
        ("study_nft_epsilon", "NFT + AGSM", "NFT + denoising"),
        ("study_flow_grpo", "Flow-GRPO + AGSM, lambda 0.1", "Flow-GRPO + denoising, lambda 0.1"),
    ],
    "The reward is alignment": [
        ("study_flow_grpo_detector", "Flow-GRPO + AGSM", "Flow-GRPO + denoising"),
        ("study_nft_detector", "NFT + AGSM", "NFT + denoising"),
        ("study_nft_detector_long", "NFT + AGSM", "NFT + denoising"),
        ("study_nft_epsilon_detector", "NFT + AGSM", "NFT + denoising"),
    ],
    "The same, AGSM on the host's best samples (no data)": [
        (
            "study_flow_grpo_detector",
            "Flow-GRPO + AGSM on its best samples",
            "Flow-GRPO + denoising",
        ),
        ("study_nft_detector", "NFT + AGSM on its best samples", "NFT + denoising"),
        ("study_nft_detector_long", "NFT + AGSM on its best samples", "NFT + denoising"),
        ("study_nft_epsilon_detector", "NFT + AGSM on its best samples", "NFT + denoising"),
    ],
}
SHORT = {"constant weights, empty": "Model-guidance", "AGSM, empty": "AGSM", "lambda": "λ"}


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
    figure, axis = plt.subplots(figsize=(9, 0.26 * number + 0.8), layout="constrained")
    labels: list[str] = []
    for group, rows in GROUPS.items():
        labels.append(group)
        for study, method, control in rows:
            report = (results / study / "report.md").read_text()
            mean, half = differences(report)[method, control]
            axis.errorbar(mean, len(labels), xerr=half, fmt="o", color=_colour(mean, half))
            labels.append(f"{study.removeprefix('study_')}: {_named(method)} vs. {_named(control)}")
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(labels)), labels, fontsize=9)
    for label in axis.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() in GROUPS else "normal")
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.set_xlabel("difference in overall, 95 % interval over prompts", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _colour(mean: float, half: float) -> str:
    """Grey where the interval has 0 in it."""
    return "grey" if abs(mean) <= half else "tab:green" if mean > 0 else "tab:red"


def _named(text: str) -> str:
    for long, short in SHORT.items():
        text = text.replace(long, short)
    return text


if __name__ == "__main__":
    draw(RESULTS / "forest.png")
