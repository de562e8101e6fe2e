"""A study's results -> report.md, report.html, curves.png, images.png and results.json."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from markdown_it import MarkdownIt
from scipy.stats import t
from torch import Tensor

from lab.studies.figures import curves, frontier, pictures
from lab.studies.plan import BASE, OF, Plan, folder_of, images_of, jobs_of, log_of
from lab.world.detect import palette_error
from lab.world.prompts import specs
from rewards.rewards import load

Floats = npt.NDArray[np.float64]


def write(plan: Plan, config: Path) -> Path:
    """Writes everything under the plan's output; returns the path of report.md."""
    output = Path(plan.output_dir)
    results = _results(plan)
    (output / "results.json").write_text(json.dumps(results) + "\n")
    curves(plan, output / "curves.png")
    pictures(plan, output / "images.png")
    text = markdown(plan, results, config)
    (output / "report.md").write_text(text)
    (output / "report.html").write_text(html_page(plan.title, text, output))
    return output / "report.md"


def _results(plan: Plan) -> list[dict[str, Any]]:
    files = [folder_of(plan, method, seed) / "result.json" for method, seed in jobs_of(plan)]
    return [json.loads(file.read_text()) for file in files]


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
    gaps = one - other
    _, cluster = np.unique(prompts, return_inverse=True)
    sums = np.bincount(cluster, gaps - gaps.mean())
    if len(sums) < 2:
        return float(gaps.mean()), float("nan")
    error = (len(sums) / (len(sums) - 1) * (sums**2).sum()) ** 0.5 / len(gaps)
    return float(gaps.mean()), float(t.ppf(0.975, len(sums) - 1) * error)


def markdown(plan: Plan, results: list[dict[str, Any]], config: Path) -> str:
    """The report's text."""
    methods = list(dict.fromkeys(result["method"] for result in results))
    by_method = {name: [r for r in results if r["method"] == name] for name in methods}
    several = len(plan.seeds) > 1
    interval = (
        f"mean ± half of the 95 % interval over {len(plan.seeds)} seeds (Student's t)"
        if several
        else "score [95 % interval: Wilson's; overall: the categories' put together]"
    )
    chosen = _scales_told(plan)
    lines = [
        f"# {_plain(plan.title)}",
        "",
        in_short(plan, by_method),
        "",
        (
            f"Model: `{plan.model}`. Seeds {plan.seeds}, {plan.per_category} held-out prompts a "
            f"category, {plan.num_inference_steps} sampling steps, the same noise for every "
            f"method. {chosen} Cells: {interval}. Different held-out prompts: "
            + ", ".join(
                f"{tag.replace('_', ' ')} {len(specs(tag, 'heldout'))}" for tag in plan.categories
            )
            + "; each is drawn many times, and the intervals of this table leave that out."
        ),
        "",
        "| | CFG | overall | "
        + " | ".join(tag.replace("_", " ") for tag in plan.categories)
        + " |",
        "| --- |" + " --- |" * (len(plan.categories) + 2),
    ]
    for name, group in by_method.items():
        cells = [", ".join(dict.fromkeys(f"{result['cfg']:g}" for result in group))]
        cells.append(_cell([result["heldout"] for result in group], "overall"))
        for tag in plan.categories:
            cells.append(_cell([r["heldout"]["categories"][tag] for r in group], "score"))
        lines.append(f"| {_plain(name)} | " + " | ".join(cells) + " |")
    lines += ["", *_by_guidance(plan, by_method), *_preferences(plan, by_method)]
    lines += _differences(plan, by_method)
    lines += _recovered(plan, by_method)
    lines += [*_mistakes(by_method), "", *_cleanness(plan, by_method)]
    lines += _rewards(plan, by_method)
    lines += [
        "## Training",
        "",
        "![curves](curves.png)",
        "",
        (
            "Loss of each method (of other objectives: not to be compared), and the validation "
            f"prompts' scores at CFG {plan.common.get('validation_guidance_scale', 3.0):g} as "
            "training goes on."
        ),
        "",
        *_final_metrics(plan),
        *frontier_table(plan),
        "## Pictures",
        "",
        (
            f"Held-out prompts, seed {plan.seeds[0]}, the first of each category and more of "
            "counting; every row of methods on the same noise."
        ),
        "",
        "![images](images.png)",
        "",
        (
            f"Made by `python recipes/study.py --config {config}`. Its trainings took "
            f"{sum(result['train_seconds'] for result in results) / 60:.0f} minutes in all, by the "
            "clock (of a resumed run its last part)."
        ),
        "",
    ]
    return "\n".join(lines)


def in_short(plan: Plan, by_method: Mapping[str, list[dict[str, Any]]]) -> str:
    """Two sentences: which share of the pictures is right, and what guidance would cost."""

    def share(name: str) -> str:
        return f"{np.mean([result['heldout']['overall'] for result in by_method[name]]):.0%}"

    shares = [f"{_plain(name)} {share(name)}" for name in by_method if name not in plan.sampled]
    text = f"Right pictures, of the held-out ones: {'; '.join(shares)}."
    if guided := _guided(plan):
        scales = {result["cfg"] for result in by_method[guided]}
        told = "twice the cost a picture" if min(scales) > 1 else "up to twice the cost a picture"
        text += f" Classifier-free guidance brings the base to {share(guided)}, at {told}."
    return text


def _guided(plan: Plan) -> str:
    """The entry of the base under guidance, if there is one."""
    return next((name for name, one in plan.sampled.items() if one[OF] == BASE), "")


def _scales_told(plan: Plan) -> str:
    """One sentence on the guidance scale that each method is sampled at."""
    best = f"the guidance scale (CFG) that was best on {plan.sweep_per_category} validation prompts"
    if len(plan.guidance_scales) > 1:
        return f"Each at {best} a category, of {plan.guidance_scales}."
    told = f"All at guidance scale (CFG) {plan.guidance_scales[0]:g}"
    others: dict[str, list[str]] = {}
    for name in plan.sampled:
        scales = plan.scales(name)
        one = f"{scales[0]:g}" if len(scales) == 1 else f"{best} a category, of {scales}"
        others.setdefault(one, []).append(_plain(name))
    told += "".join(f", but {'; '.join(names)} at {one}" for one, names in others.items())
    return f"{told}."


def _cell(summaries: Sequence[Mapping[str, Any]], key: str) -> str:
    if len(summaries) == 1:
        one = summaries[0]
        return f"{one[key]:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
    mean, half = spread([one[key] for one in summaries])
    return f"{mean:.3f} ± {half:.3f}"


def _by_guidance(plan: Plan, by_method: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """The sweep: what each method scores at every guidance scale, mean over the seeds."""
    swept = {name: plan.scales(name) for name in by_method if len(plan.scales(name)) > 1}
    if not swept:
        return []
    every = sorted({cfg for scales in swept.values() for cfg in scales})
    lines = [
        "## By guidance scale",
        "",
        (
            f"Overall and counting on the sweep's validation prompts ({plan.sweep_per_category} a "
            "category); the mean over seeds."
        ),
        "",
        "| | " + " | ".join(f"CFG {cfg:g}" for cfg in every) + " |",
        "| --- |" + " --- |" * len(every),
    ]
    for name, scales in swept.items():
        cells = []
        for cfg in every:
            found = [result["sweep"][str(cfg)] for result in by_method[name] if cfg in scales]
            overall = [one["overall"] for one in found]
            counting = [one["categories"]["counting"]["score"] for one in found]
            cells.append(f"{np.mean(overall):.3f}, {np.mean(counting):.3f}" if found else "")
        lines.append(f"| {_plain(name)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _preferences(plan: Plan, by_method: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Each method's implicit accuracy on held-out pairs, if the plan asks for it."""
    if not plan.pairs:
        return []
    lines = [
        "## Preference accuracy",
        "",
        (
            f"Share of {plan.pairs} held-out pairs a seed (the caption's scene and one an edit "
            "away, the same noise) in which the method, more than the base, denoises the right "
            "one better. Chance: 0.5."
        ),
        "",
        "| | implicit accuracy |",
        "| --- | --- |",
    ]
    for name in plan.methods:
        mean, half = spread([one["implicit_accuracy"] for one in by_method[name]])
        lines.append(f"| {_plain(name)} | {_told(mean, half)} |")
    return [*lines, ""]


def _told(mean: float, half: float, digits: int = 3) -> str:
    return f"{mean:.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}")


def _differences(plan: Plan, by_method: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Against the base and the plan's baselines, image by image on the same noise."""
    asked = plan.prompts("heldout", plan.per_category)
    prompts = np.tile([row["prompt"] for row in asked], len(plan.seeds))
    right = {name: np.concatenate([r["correct"] for r in g]) for name, g in by_method.items()}
    counting = np.tile([row["tag"] == "counting" for row in asked], len(plan.seeds))
    lines = []
    for baseline in (BASE, *plan.baselines):
        other = "the base" if baseline == BASE else _plain(baseline)
        lines += [
            f"## Against {other}, on the same prompts and noise",
            "",
            (
                "Mean of the differences ± half of its 95 % interval over prompts (clusters of "
                "images; the draw of the training seed is not in it)."
            ),
            "",
            "| | overall | counting | counting, as a ratio |",
            "| --- | --- | --- | --- |",
        ]
        for name in by_method:
            if name in (BASE, baseline):
                continue
            # Categories have equal numbers, so the mean over images is the mean of the categories.
            all_mean, all_half = paired(right[name], right[baseline], prompts)
            mean, half = paired(right[name][counting], right[baseline][counting], prompts[counting])
            before = right[baseline][counting].mean()
            ratio = f"{right[name][counting].mean() / before:.2f}" if before else ""
            lines.append(
                f"| {_plain(name)} | {all_mean:+.3f} ± {all_half:.3f} | "
                f"{mean:+.3f} ± {half:.3f} | {ratio} |"
            )
        lines.append("")
    return lines


def _recovered(plan: Plan, by_method: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """What each method has of the gain that guidance brings the base, and at which cost."""
    of = _guided(plan)
    if not of:
        return []
    lines = [
        "## What guidance gains the base, and who has it",
        "",
        (
            f"Share of the difference between the base and {_plain(of)} that a method has; the "
            "mean over seeds of both. Passes of the denoiser and seconds of one thread a picture."
        ),
        "",
        "| | overall | counting | passes | seconds |",
        "| --- | --- | --- | --- | --- |",
    ]

    def mean(name: str, key: str | None) -> float:
        scores = [result["heldout"] for result in by_method[name]]
        found = [s["overall"] if key is None else s["categories"][key]["score"] for s in scores]
        return float(np.mean(found))

    for name, group in by_method.items():
        cells = []
        for key in (None, "counting"):
            gain = mean(of, key) - mean(BASE, key)
            share = (mean(name, key) - mean(BASE, key)) / gain if gain > 0 else float("nan")
            cells.append(f"{share:.0%}" if gain > 0 else "no gain")
        passes = [plan.num_inference_steps * (1 + (result["cfg"] > 1)) for result in group]
        cells.append(", ".join(f"{one}" for one in dict.fromkeys(passes)))
        cells.append(f"{np.median([result['seconds_per_image'] for result in group]):.3f}")
        lines.append(f"| {_plain(name)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _mistakes(by_method: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "## What went wrong in counting",
        "",
        "| | too many | too few | mean count error |",
        "| --- | --- | --- | --- |",
    ]
    for name, group in by_method.items():
        counting = [result["heldout"]["categories"]["counting"] for result in group]
        cells = [
            f"{np.mean([one[key] for one in counting]):.3f}"
            for key in ("over", "under", "count_error")
        ]
        lines.append(f"| {_plain(name)} | " + " | ".join(cells) + " |")
    return lines


def _cleanness(plan: Plan, by_method: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Pictures that count right can be dirty: the detector reads through what this measures."""
    lines = [
        "## How clean the pictures are",
        "",
        (
            "Root mean square distance of their pixels to the nearest colour of the world's "
            "palette, of 0 to 255, mean over the held-out pictures. A rendered scene has 0."
        ),
        "",
        "| | palette error |",
        "| --- | --- |",
    ]
    for name, group in by_method.items():
        errors = [palette_error(images_of(plan, name, r["seed"])).mean() for r in group]
        lines.append(f"| {_plain(name)} | {_told(*spread(errors), digits=2)} |")
    return [*lines, ""]


def _rewards(plan: Plan, by_method: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """Of the held-out pictures, where the methods train on a reward that ignores the prompt."""
    name = plan.common.get("reward", "")
    if name not in ("jpeg_compressibility", "jpeg_incompressibility", "redness"):
        return []
    score = load(name)
    lines = [
        "## Reward",
        "",
        f"{name} of the held-out pictures, beside the share of right ones.",
        "",
        f"| | {name} | overall | palette error |",
        "| --- | --- | --- | --- |",
    ]
    for method, group in by_method.items():
        images = [images_of(plan, method, result["seed"]) for result in group]
        rewards = [float(score(_pixels(one), []).mean()) for one in images]
        cells = [
            _told(*spread(rewards)),
            _told(*spread([result["heldout"]["overall"] for result in group])),
            _told(*spread([palette_error(one).mean() for one in images]), digits=2),
        ]
        lines.append(f"| {_plain(method)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _pixels(images: npt.NDArray[np.uint8]) -> Tensor:
    """(N, H, W, 3) of 0..255 as rewards take it, (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1


def _final_metrics(plan: Plan) -> list[str]:
    """The plan's panels as a table: the last value in the log, over the seeds."""
    if not plan.panels:
        return []
    lines = [
        "| at the end of training | " + " | ".join(map(_plain, plan.panels)) + " |",
        "| --- |" + " --- |" * len(plan.panels),
    ]
    for name in plan.methods:
        cells = []
        for metric in plan.panels.values():
            logs = [log_of(plan, name, seed) for seed in plan.seeds]
            last = [[line[metric] for line in log if metric in line][-1:] for log in logs]
            values = [value for one in last for value in one]
            cells.append(_told(*spread(values)) if values else "")
        lines.append(f"| {_plain(name)} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def frontier_table(plan: Plan) -> list[str]:
    if not plan.frontier:
        return []
    shown = _plain(plan.frontier)
    lines = [
        (
            f"Validation score (overall), {shown} since the validation before (its mean), and the "
            "seconds since training began, by the clock (where the log has them):"
        ),
        "",
    ]
    by_method = {name: frontier(plan, name) for name in plan.methods}
    steps = sorted({point.step for points in by_method.values() for point in points})
    lines += ["| | " + " | ".join(f"step {step}" for step in steps) + " |"]
    lines += ["| --- |" + " --- |" * len(steps)]
    for name, points in by_method.items():
        at = {
            step: f"{score:.3f} at {metric:.3f}" + ("" if isnan(time) else f", {time:.0f} s")
            for step, metric, score, time in points
        }
        lines.append(f"| {_plain(name)} | " + " | ".join(at.get(step, "") for step in steps) + " |")
    return [*lines, ""]


def _plain(text: str) -> str:
    """For Markdown's text and table cells: no HTML, no other column, no other line."""
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "&#124;")


def html_page(title: str, text: str, folder: Path) -> str:
    """A page in one file: the folder's pictures are inside it."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    for file in folder.glob("*.png"):
        data = base64.b64encode(file.read_bytes()).decode()
        body = body.replace(f'src="{file.name}"', f'src="data:image/png;base64,{data}"')
    style = (
        "body{font:15px/1.5 sans-serif;max-width:1200px;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.3em .6em}"
        "img{max-width:100%}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style><body>{body}</body></html>\n"
    )
