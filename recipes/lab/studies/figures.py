"""A study's curves.png and images.png, and what they are drawn from."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from lab.studies.plan import BASE, OF, Plan, images_of, log_of
from lab.world.detect import detect
from lab.world.score import judge


def curves(plan: Plan, path: Path) -> None:
    """Loss, validation scores and the plan's own panels against steps: mean over seeds, band from
    least to most."""
    panels: list[tuple[str, Callable[[dict[str, Any]], float | None]]] = [
        ("training loss", _logged("loss")),
        ("validation: overall", lambda line: _score(line, "overall")),
        ("validation: counting", lambda line: _score(line, "counting", "score")),
        ("validation: share with too many", lambda line: _score(line, "counting", "over")),
        *((title, _logged(metric)) for title, metric in plan.panels.items()),
    ]
    found = {name: frontier(plan, name) for name in plan.methods if plan.frontier}
    against = {_plain(plan.frontier): "metric"} if found else {}
    if any(not np.isnan(point.seconds) for points in found.values() for point in points):
        against["seconds of training"] = "seconds"
    number = len(panels) + len(against)
    height = -(-number // 4)
    figure = Figure(figsize=(16, 3.6 * height), layout="constrained")
    axes = figure.subplots(height, 4).flatten()
    for axis in axes[number:]:
        axis.set_axis_off()
    for axis, (title, read) in zip(axes, panels, strict=False):
        for name in plan.methods:
            by_step: dict[int, list[float]] = {}
            for seed in plan.seeds:
                for line in log_of(plan, name, seed):
                    value = read(line)
                    if value is not None:
                        by_step.setdefault(line["step"], []).append(value)
            steps = sorted(by_step)
            values = [by_step[step] for step in steps]
            middle = [np.mean(v) for v in values]
            (drawn,) = axis.plot(steps, middle, marker=".", label=_plain(name))
            least, most = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(steps, least, most, alpha=0.15, color=drawn.get_color())
        axis.set(title=_plain(title), xlabel="optimizer step")
        axis.grid(alpha=0.3)
    for axis, (shown, field) in zip(axes[len(panels) :], against.items(), strict=False):
        for name, points in found.items():
            across = [getattr(point, field) for point in points]
            axis.plot(across, [point.score for point in points], "o-", label=_plain(name))
        axis.set(title=f"overall, against {shown}", xlabel=shown)
        axis.grid(alpha=0.3)
    if axes[0].dataLim.y0 > 0:  # a policy gradient's loss has either sign
        axes[0].set_yscale("log")
    axes[3].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def chart(plan: Plan, scores: Mapping[str, Sequence[float]], path: Path) -> None:
    """Overall scores against the guidance scale: the mean over seeds, bars from least to most.

    scores: an entry's, one a seed.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for (name, points), style in zip(plan.chart.items(), ("s--", "o-", "^:", "d-."), strict=False):
        means = np.array([np.mean(scores[one]) for one in points.values()])
        least, most = ([f(scores[one]) for one in points.values()] for f in (min, max))
        axis.errorbar(
            list(points), means, [means - least, most - means], fmt=style, capsize=3, label=name
        )
    axis.set(title=plan.title, xlabel="guidance scale s", ylabel="right pictures (overall)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center")
    figure.savefig(path, dpi=110)


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


def pictures(plan: Plan, path: Path) -> None:
    """The same prompts and noise, a row an entry: green frames are right, red ones wrong.

    The first held-out prompt of each category, and four of counting.
    """
    wanted = plan.prompts("heldout", plan.per_category)
    first = {tag: i for i, tag in reversed(list(enumerate(row["tag"] for row in wanted)))}
    several = range(first["counting"], first["counting"] + min(4, plan.per_category))
    shown = sorted({*first.values(), *several})
    guided = [name for name, one in plan.sampled.items() if one[OF] == BASE]
    entries = plan.shown or [BASE, *guided[:1], *plan.methods]
    size = (1.4 * len(shown) + 0.4, 1.45 * len(entries) + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(entries), len(shown), squeeze=False)
    for axis, i in zip(grid[0], shown, strict=True):
        axis.set_title("\n".join(textwrap.wrap(wanted[i]["prompt"], 18)), fontsize=8)
    for name, axes in zip(entries, grid, strict=True):
        images = images_of(plan, name, plan.seeds[0])[shown]
        for axis, image, i in zip(axes, images, shown, strict=True):
            axis.imshow(image, interpolation="nearest")
            right = judge(detect(image), wanted[i]).correct
            axis.spines[:].set(color="tab:green" if right else "tab:red", linewidth=3)
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel("\n".join(textwrap.wrap(_plain(name), 16)), fontsize=9)
    figure.savefig(path, dpi=90)


class Point(NamedTuple):
    """A validation: means over the seeds."""

    step: int
    metric: float  # the frontier's, since the validation before
    score: float  # overall
    seconds: float  # since training began, with the validations; nan: not in the log


def frontier(plan: Plan, method: str) -> list[Point]:
    """The validations of a method."""
    points: dict[int, list[tuple[float, float, float]]] = {}
    for seed in plan.seeds:
        since: list[float] = []
        for line in log_of(plan, method, seed):
            since += [line[plan.frontier]] if plan.frontier in line else []
            score = _score(line, "overall")
            if score is not None and since:
                point = (float(np.mean(since)), score, line.get("seconds", np.nan))
                points.setdefault(line["step"], []).append(point)
                since = []
    return [Point(step, *np.mean(points[step], axis=0).tolist()) for step in sorted(points)]


def _plain(text: str) -> str:
    """Without matplotlib's formulas."""
    return text.replace("$", r"\$")


def _score(line: Mapping[str, Any], name: str, key: str | None = None) -> float | None:
    scores = line.get("scores")
    if not scores:
        return None
    return float(scores[name] if key is None else scores["categories"][name][key])


def _logged(metric: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda line: line.get(metric)
