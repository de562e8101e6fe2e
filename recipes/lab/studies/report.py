"""A study's results -> report.md, report.html, curves.png, images.png and results.json.

The report's text is in report.md.j2; here are its numbers.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import torch
from markdown_it import MarkdownIt
from scipy.stats import t

from lab.studies.figures import chart, curves, frontier, kept_chart, pictures
from lab.studies.plan import (
    BASE,
    OF,
    SCALES,
    STRENGTH,
    Plan,
    folder_of,
    images_of,
    jobs_of,
    log_of,
)
from lab.world.detect import in_corner, palette_error
from lab.world.prompts import specs
from lab.world.summary import markdown_table, plain
from rewards.metrics import pooled_with_interval
from rewards.rewards import load

Floats = npt.NDArray[np.float64]
Groups = Mapping[str, Sequence[Mapping[str, Any]]]
"""Method -> its results, one a seed."""
PROMPTLESS = ("jpeg_compressibility", "jpeg_incompressibility", "redness")
"""Rewards of the pictures alone."""

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    trim_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
)
TEMPLATES.filters["plain"] = plain


def write(plan: Plan, config: Path) -> Path:
    """Writes everything under the plan's output; returns the path of report.md."""
    output = Path(plan.output_dir)
    files = [folder_of(plan, method, seed) / "result.json" for method, seed in jobs_of(plan)]
    results = [json.loads(file.read_text()) for file in files]
    (output / "results.json").write_text(json.dumps(results) + "\n")
    curves(plan, output / "curves.png")
    pictures(plan, output / "images.png")
    if plan.chart:
        chart(plan, overall(results), output / "chart.png")
    if plan.scale_images:
        kept_chart(plan, output / "kept.png")
    text = markdown(plan, results, config)
    (output / "report.md").write_text(text)
    (output / "report.html").write_text(html_page(plan.title, text, output))
    return output / "report.md"


def overall(results: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Entry -> its overall scores, one a seed."""
    found: dict[str, list[float]] = {}
    for one in results:
        found.setdefault(one["method"], []).append(one["heldout"]["overall"])
    return found


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval over seeds (Student's t); nan for a single seed."""
    array = np.asarray(values, dtype=float)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    half = t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5
    return float(array.mean()), float(half)


def paired(one: Floats, other: Floats, prompts: npt.NDArray[Any]) -> tuple[float, float]:
    """Mean of one - other over the same images, and half of its 95 % interval over prompts.

    Images of one prompt are right or wrong together, so prompts are what was drawn: the
    cluster-robust standard error of a mean, with Student's t (Cameron & Miller 2015, section II).
    One prompt: nan.
    """
    found = pooled_with_interval((one - other).tolist(), prompts.tolist())
    return found["score"], found.get("high", float("nan")) - found["score"]


def markdown(plan: Plan, results: list[dict[str, Any]], config: Path) -> str:
    """The report's text."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["method"], []).append(result)
    prompts = [f"{tag.replace('_', ' ')} {len(specs(tag, 'heldout'))}" for tag in plan.categories]
    baselines = [BASE, *plan.baselines]
    return TEMPLATES.get_template("report.md.j2").render(
        plan=plan,
        config=config,
        minutes=sum(result["train_seconds"] for result in results) / 60,
        in_short=in_short(plan, groups),
        guided=_guided(plan, groups),
        scales=_scales_told(plan),
        prompts=", ".join(prompts),
        heldout=_heldout(plan, groups),
        kept=_kept(plan, groups),
        sweep=_sweep(plan, groups),
        preferences=_preferences(plan, groups),
        differences={one: _differences(plan, groups, one) for one in baselines},
        recovered=_recovered(plan, groups),
        mistakes=_mistakes(groups),
        cleanness=_cleanness(plan, groups),
        rewards=rewards_table(plan, groups),
        metrics=_last_metrics(plan),
        frontier=frontier_table(plan),
    )


def in_short(plan: Plan, groups: Groups) -> str:
    """A sentence or two: which share of the pictures is right, and what guidance would cost."""
    if plan.opening:
        told = {name: f"{_mean(group, 'overall'):.3f}" for name, group in groups.items()}
        return plan.opening.format_map(told)
    share = {name: f"{_mean(group, 'overall'):.0%}" for name, group in groups.items()}
    shares = [f"{plain(name)} {share[name]}" for name in groups if name not in plan.sampled]
    text = f"Right pictures, of the held-out ones: {'; '.join(shares)}."
    if guided := _guided(plan, groups):
        up_to = "" if min(result["cfg"] for result in groups[guided]) > 1 else "up to "
        text += f" Classifier-free guidance brings the base to {share[guided]}, at {up_to}twice "
        text += "the cost a picture."
    return text


def _guided(plan: Plan, groups: Groups) -> str:
    """The base's best entry under guidance, if there is one."""
    of_base = [name for name, one in plan.sampled.items() if one[OF] == BASE]
    entries = [name for name in of_base if max(plan.scales(name)) > 1]
    return max(entries, key=lambda name: _mean(groups[name], "overall"), default="")


def _scales_told(plan: Plan) -> str:
    """One sentence on the guidance scale that each method is sampled at."""
    best = f"the guidance scale (CFG) that was best on {plan.sweep_per_category} validation prompts"
    if len(plan.guidance_scales) > 1:
        return f"Each at {best} a category, of {plan.guidance_scales}."
    told = f"All at guidance scale (CFG) {plan.guidance_scales[0]:g}"
    others = {name: plan.scales(name) for name in plan.sampled}
    if any(scales != plan.guidance_scales for scales in others.values()):
        told += ", but where the column CFG has another"
    swept: dict[str, list[str]] = {}
    for name, scales in others.items():
        if len(scales) > 1:
            swept.setdefault(f"{best} a category, of {scales}", []).append(plain(name))
    apart = [f"{'; '.join(names)} at {one}" for one, names in swept.items()]
    return f"{told}{': ' if apart else ''}{', '.join(apart)}."


def _mean(group: Sequence[Mapping[str, Any]], key: str) -> float:
    """Of a held-out score over the seeds: overall, or a category's."""
    scores = [result["heldout"] for result in group]
    found = [s[key] if key == "overall" else s["categories"][key]["score"] for s in scores]
    return float(np.mean(found))


def _told(values: Sequence[float], digits: int = 3) -> str:
    """Mean and interval over seeds."""
    mean, half = spread(values)
    return f"{mean:.{digits}f}" + ("" if isnan(half) else f" ± {half:.{digits}f}")


def _once(values: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _heldout(plan: Plan, groups: Groups) -> str:
    def cell(scores: Sequence[Mapping[str, Any]], key: str) -> str:
        if len(scores) > 1:
            return _told([one[key] for one in scores])
        return f"{scores[0][key]:.3f} [{scores[0]['low']:.3f}, {scores[0]['high']:.3f}]"

    rows = []
    for name, group in groups.items():
        scores = [result["heldout"] for result in group]
        cells = [_once([f"{result['cfg']:g}" for result in group]), cell(scores, "overall")]
        for tag in plan.categories:
            cells.append(cell([one["categories"][tag] for one in scores], "score"))
        rows.append([name, *cells])
    for column, key in enumerate(["overall", *plan.categories], 2):
        best = max(range(len(rows)), key=lambda i: _mean([*groups.values()][i], key))
        rows[best][column] = f"**{rows[best][column]}**"
    return markdown_table(["", "CFG", "overall", *plan.categories], rows)


def _kept(plan: Plan, groups: Groups) -> str:
    """What fine-tuning on a new layout (`--data world:corner:N`) leaves of guidance."""
    if not plan.scale_images:
        return ""
    rows = []
    for name, group in groups.items():
        if name in plan.sampled and STRENGTH not in plan.sampled[name]:
            continue
        old = [one["heldout"]["overall"] for one in group]
        shown = [images_of(plan, name, one["seed"]) for one in group]
        new = [float(np.mean([in_corner(one) for one in images])) for images in shown]
        cells = [_told(new), _told(old), "", ""]
        if guided := _guided_entry(plan, name):
            best = [one["heldout"]["overall"] for one in groups[guided]]
            cells[2] = _told([high - low for high, low in zip(best, old, strict=True)])
        if "held_scale" in group[0]:
            cells[3] = _told([one["held_scale"] for one in group])
        rows.append([name, *cells])
    heads = ["", "in the new layout", "right", "what CFG adds", "held scale"]
    return markdown_table(heads, rows)


def _guided_entry(plan: Plan, name: str) -> str:
    """The method's own entry under guidance, if there is one."""
    of_it = {entry: one for entry, one in plan.sampled.items() if one[OF] == name}
    guided = [entry for entry, one in of_it.items() if STRENGTH not in one and min(one[SCALES]) > 1]
    return guided[0] if guided else ""


def _sweep(plan: Plan, groups: Groups) -> str:
    """What each method scores at every guidance scale, mean over the seeds."""
    swept = {name: plan.scales(name) for name in groups if len(plan.scales(name)) > 1}
    every = sorted({cfg for scales in swept.values() for cfg in scales})

    def cell(name: str, cfg: float) -> str:
        if cfg not in swept[name]:
            return ""
        found = [{"heldout": result["sweep"][str(cfg)]} for result in groups[name]]
        return f"{_mean(found, 'overall'):.3f}, {_mean(found, 'counting'):.3f}"

    rows = [[name, *(cell(name, cfg) for cfg in every)] for name in swept]
    return markdown_table(["", *(f"CFG {cfg:g}" for cfg in every)], rows)


def _preferences(plan: Plan, groups: Groups) -> str:
    """Each method's implicit accuracy on held-out pairs, if the plan asks for it."""
    asked = plan.methods if plan.pairs else []
    rows = [[name, _told([one["implicit_accuracy"] for one in groups[name]])] for name in asked]
    return markdown_table(["", "implicit accuracy"], rows)


def _differences(plan: Plan, groups: Groups, baseline: str) -> str:
    """To a baseline, image by image on the same noise."""
    rows = []
    control = [one["heldout"]["overall"] for one in groups[baseline]]
    for name, *parts, ratio in _gaps(plan, groups, baseline):
        own = [one["heldout"]["overall"] for one in groups[name]]
        _, half = spread(np.subtract(own, control).tolist())
        gaps = [f"{mean:+.3f} ± {half:.3f}" for mean, half in parts]
        over = [] if isnan(half) else [f"± {half:.3f}"]
        rows.append([name, gaps[0], *over, gaps[1], ratio])
    seeds = ["over seeds"] if len(plan.seeds) > 1 else []
    return markdown_table(["", "overall", *seeds, "counting", "counting, as a ratio"], rows)


def _gaps(plan: Plan, groups: Groups, baseline: str) -> list[Any]:
    """Each entry's name, its differences in overall and counting, the ratio in counting."""
    asked = plan.prompts("heldout", plan.per_category)
    prompts = np.tile([row["prompt"] for row in asked], len(plan.seeds))
    counting = np.tile([row["tag"] == "counting" for row in asked], len(plan.seeds))
    right = {name: np.concatenate([r["correct"] for r in group]) for name, group in groups.items()}
    other, rows = right[baseline], []
    for name in (one for one in groups if one not in (BASE, baseline)):
        # Categories have equal numbers, so the mean over images is the mean of the categories.
        parts = [paired(right[name], other, prompts)]
        parts += [paired(right[name][counting], other[counting], prompts[counting])]
        before = other[counting].mean()
        ratio = f"{right[name][counting].mean() / before:.2f}" if before else ""
        rows.append([name, *parts, ratio])
    return rows


def _recovered(plan: Plan, groups: Groups) -> str:
    """What each method has of the gain that guidance brings the base, and at which cost."""
    if not (guided := _guided(plan, groups)):
        return ""

    gains = {row[0]: row[1:3] for row in _gaps(plan, groups, BASE)}[guided]
    if any(mean <= half or isnan(half) for mean, half in gains):
        return ""  # a share of what may be nothing says nothing

    def share(group: Sequence[Mapping[str, Any]], key: str) -> str:
        base, top = _mean(groups[BASE], key), _mean(groups[guided], key)
        return f"{(_mean(group, key) - base) / (top - base):.0%}"

    rows = []
    for name, group in groups.items():
        passes = [f"{plan.num_inference_steps * (1 + (one['cfg'] > 1))}" for one in group]
        seconds = np.median([one["seconds_per_image"] for one in group])
        shares = [share(group, key) for key in ("overall", "counting")]
        rows.append([name, *shares, _once(passes), f"{seconds:.3f}"])
    return markdown_table(["", "overall", "counting", "passes", "seconds"], rows)


def _mistakes(groups: Groups) -> str:
    rows = []
    for name, group in groups.items():
        counting = [result["heldout"]["categories"]["counting"] for result in group]
        keys = ("over", "under", "count_error")
        rows.append([name, *(f"{np.mean([one[key] for one in counting]):.3f}" for key in keys)])
    return markdown_table(["", "too many", "too few", "mean count error"], rows)


def _palette(plan: Plan, name: str, group: Sequence[Mapping[str, Any]]) -> str:
    """Pictures that count right can be dirty: the detector reads through what this measures."""
    errors = [palette_error(images_of(plan, name, one["seed"])).mean() for one in group]
    return _told(errors, digits=2)


def _cleanness(plan: Plan, groups: Groups) -> str:
    rows = [[name, _palette(plan, name, group)] for name, group in groups.items()]
    return markdown_table(["", "palette error"], rows)


def rewards_table(plan: Plan, groups: Groups) -> str:
    """Of the held-out pictures, where the methods train on a reward that ignores the prompt."""
    reward = plan.common.get("reward", "")
    if reward not in PROMPTLESS:
        return ""
    score = load(reward)
    rows = []
    for name, group in groups.items():
        # (N, H, W, 3) of 0..255, as rewards take it: (N, 3, H, W) in [-1, 1].
        images = [torch.from_numpy(images_of(plan, name, one["seed"])) for one in group]
        pixels = [image.permute(0, 3, 1, 2) / 127.5 - 1 for image in images]
        found = [float(score(one, [""] * len(one)).mean()) for one in pixels]
        right = _told([one["heldout"]["overall"] for one in group])
        rows.append([name, _told(found), right, _palette(plan, name, group)])
    return markdown_table(["", reward, "overall", "palette error"], rows)


def _last_metrics(plan: Plan) -> str:
    """The plan's panels as a table: the last value in the log, over the seeds."""

    def cell(name: str, metric: str) -> str:
        logs = [log_of(plan, name, seed) for seed in plan.seeds]
        values = [v for log in logs for v in [line[metric] for line in log if metric in line][-1:]]
        return _told(values) if values else ""

    asked = plan.methods if plan.panels else []
    rows = [[name, *(cell(name, metric) for metric in plan.panels.values())] for name in asked]
    return markdown_table(["at the end of training", *plan.panels], rows)


def frontier_table(plan: Plan) -> str:
    """Each method's validations against the plan's frontier metric, if it names one."""
    asked = plan.methods if plan.frontier else []
    found = {name: {point.step: point for point in frontier(plan, name)} for name in asked}
    steps = sorted({step for points in found.values() for step in points})

    def cell(name: str, step: int) -> str:
        if step not in found[name]:
            return ""
        _, metric, score, seconds = found[name][step]
        return f"{score:.3f} at {metric:.3f}" + ("" if isnan(seconds) else f", {seconds:.0f} s")

    rows = [[name, *(cell(name, step) for step in steps)] for name in found]
    return markdown_table(["", *(f"step {step}" for step in steps)], rows)


def html_page(title: str, text: str, folder: Path) -> str:
    """A page in one file: the folder's pictures are inside it."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for file in folder.glob("*.png"):
        data = base64.b64encode(file.read_bytes()).decode()
        body = body.replace(f'src="{file.name}"', f'src="data:image/png;base64,{data}"')
    return TEMPLATES.get_template("report.html.j2").render(title=title, body=body)
