"""What fine-tuning leaves of guidance that was trained in: a table and a chart of a study.

The new thing is a layout, everything in the lower left (`--data world:corner:N`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lab.studies.plan import OF, SCALES, STRENGTH, Plan, images_of, log_of
from lab.world.detect import in_corner
from lab.world.summary import markdown_table

Groups = Mapping[str, Sequence[Mapping[str, Any]]]


def kept_table(plan: Plan, groups: Groups, told: Callable[[Sequence[float]], str]) -> str:
    """Markdown; nothing where the plan measures none of it.

    told: values, one a seed -> their mean and interval as text.
    """
    if not plan.scale_images:
        return ""
    rows = []
    for name, group in groups.items():
        if name in plan.sampled and STRENGTH not in plan.sampled[name]:
            continue
        old = [one["heldout"]["overall"] for one in group]
        pictures = [images_of(plan, name, one["seed"]) for one in group]
        new = [float(np.mean([in_corner(one) for one in images])) for images in pictures]
        cells = [told(new), told(old), "", ""]
        if guided := _guided_entry(plan, name):
            best = [one["heldout"]["overall"] for one in groups[guided]]
            cells[2] = told([high - low for high, low in zip(best, old, strict=True)])
        if "held_scale" in group[0]:
            cells[3] = told([one["held_scale"] for one in group])
        rows.append([name, *cells])
    heads = ["", "in the new layout", "right", "what CFG adds", "held scale"]
    return markdown_table(heads, rows)


def kept_chart(plan: Plan, path: Path) -> None:
    """Right pictures against those in the new layout, a line a method over its validations."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for name in plan.methods:
        points: dict[int, list[tuple[float, float]]] = {}
        for seed in plan.seeds:
            for line in log_of(plan, name, seed):
                if "cornered" in line.get("scores", {}):
                    scores = line["scores"]
                    point = (scores["cornered"], scores["overall"])
                    points.setdefault(line["step"], []).append(point)
        if points:  # else it learns nothing new
            means = np.array([np.mean(points[step], axis=0) for step in sorted(points)])
            style = "o-" if len(axis.lines) < 10 else "s--"  # ten colours
            axis.plot(means[:, 0], means[:, 1], style, markersize=4, label=name)
    axis.set(
        title=plan.title,
        xlabel="pictures in the new layout (validation, no CFG)",
        ylabel="right pictures (validation, no CFG)",
    )
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def _guided_entry(plan: Plan, name: str) -> str:
    """The method's own entry under guidance, if there is one."""
    return next(
        (
            entry
            for entry, one in plan.sampled.items()
            if one[OF] == name and STRENGTH not in one and min(one[SCALES]) > 1
        ),
        "",
    )
