"""A study's plan, and where each of its runs is kept."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from lab.world.prompts import rows
from lab.world.scene import TAGS
from run.options import did_you_mean

BASE = "base"
RECIPE, AFTER = "recipe", "after"
OF, SCALES, STRENGTH = "of", "guidance_scales", "lora_scale"
SETTINGS = "settings.json"
RIVALS = "lab.train_rivals"


@dataclass(frozen=True)
class Plan:
    """A study's YAML file.

    methods: name -> options of its recipe over those of `common`, and besides them
        recipe: the script that trains it, without its ending (default train_agsm), or
            lab.train_rivals;
        after: a method before it, from whose model of the same seed it starts (a LoRA is merged);
        that method trains no tokens, and is itself after none.
        The untrained base is always there, under the name "base".
    references: further pipelines (name -> folder) that are scored as they are, e.g. the ceiling.
    sampled: name -> {of, guidance_scales, lora_scale}: the model of the base, a reference or a
        method (of), sampled at other guidance scales, its LoRA at another strength (left out: 1).
        An entry of the base shows what guidance gains it.
    opening: the report's first sentence; {name} in it is an entry's overall score.
    names: entry -> what it is, in words.
    chart: curve -> {guidance scale: entry}: overall scores against the scale, drawn as chart.png.
    shown: entries whose pictures are shown; left out: the base, its guided entry and all methods.
    panels: title -> a metric of log.jsonl, each drawn as a curve and told at the end of training.
    frontier: a metric of log.jsonl against which the validation's overall score is drawn and told.
    baselines: methods that the others are compared with, image by image, as with the base.
    pairs: held-out preference pairs on which each method's implicit accuracy against the untrained
        model is measured, at `common`'s noise levels; 0: none.
    scale_images: held-out images on which the guidance scale is measured that each method's
        predictions hold (`held_scale`); 0: none.
    guidance_scales: of the sweep; a single one is taken as it is. per_category,
        sweep_per_category: held-out and validation prompts a category.
    num_inference_steps: sampling steps of both.
    categories: of the world that are scored, counting among them; the overall score is their mean.
    """

    model: str
    output_dir: str
    methods: dict[str, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    sampled: dict[str, dict[str, Any]] = field(default_factory=dict)
    opening: str = ""
    names: dict[str, str] = field(default_factory=dict)
    chart: dict[str, dict[float, str]] = field(default_factory=dict)
    shown: list[str] = field(default_factory=list)
    panels: dict[str, str] = field(default_factory=dict)
    frontier: str = ""
    baselines: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0, 3.0])
    sweep_per_category: int = 32
    per_category: int = 100
    num_inference_steps: int = 20
    categories: list[str] = field(default_factory=lambda: list(TAGS))
    pairs: int = 0
    scale_images: int = 0
    title: str = "Soft tokens on the embedded world"

    def scales(self, method: str) -> list[float]:
        """The guidance scales that a method is sampled at."""
        own: list[float] = self.sampled.get(method, {}).get(SCALES, self.guidance_scales)
        return own

    def prompts(self, fold: str, per_category: int) -> list[dict[str, Any]]:
        """GenEval rows of what is scored."""
        return rows(fold, per_category, tags=self.categories)


def read_plan(file: Path, output_dir: str | None = None) -> Plan:
    """The plan of a YAML file; unknown keys are errors, also inside its methods."""
    values = yaml.safe_load(file.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a table, got {values!r}")
    _refuse_unknown(f"{file}", values, [one.name for one in fields(Plan)])
    missing = sorted({"model", "output_dir", "methods"} - set(values))
    if missing:
        raise ValueError(f"{file}: {missing} missing")
    models = [BASE, *values.get("references", {}), *values["methods"]]
    sampled = values.get("sampled", {})
    _check_names(file, [*models, *sampled])
    for name, options in sampled.items():
        if not isinstance(options, dict) or {*options} - {STRENGTH} != {OF, SCALES}:
            raise ValueError(
                f"{file}: sampled: {name}: expected the keys {OF}, {SCALES} and perhaps "
                f"{STRENGTH}, got {options!r}"
            )
        if options[OF] not in models or not options[SCALES]:
            raise ValueError(
                f"{file}: sampled: {name}: expected {OF} one of {models} and a scale at least, got "
                f"{options!r}"
            )
    for name, options in values["methods"].items():
        known = list(recipe_of(f"{file}: {name}", options).OPTIONS.defaults)
        _refuse_unknown(f"{file}: {name}", options, [*known, RECIPE, AFTER])
        _refuse_unknown(f"{file}: common, for {name}", values.get("common", {}), known)
    _check_order(file, values)
    _refuse_unknown(f"{file}: baselines", values.get("baselines", []), list(values["methods"]))
    entries = [*models, *sampled]
    charted = [name for points in values.get("chart", {}).values() for name in points.values()]
    _refuse_unknown(f"{file}: chart, shown, names", {*charted, *values.get("shown", []),
                    *values.get("names", {})}, entries)  # fmt: skip
    categories = values.get("categories", TAGS)
    if "counting" not in categories or not set(categories) <= set(TAGS):
        raise ValueError(
            f"{file}: categories: expected counting and others of {TAGS}, got {categories}"
        )
    return Plan(**{**values, "output_dir": output_dir or values["output_dir"]})


def recipe_of(where: str, options: dict[str, Any]) -> Any:
    """The module of a method's recipe: its `OPTIONS` and `main` are used.

    where: what an error's text begins with.
    """
    name = options.get(RECIPE, "train_agsm")
    top = Path(__file__).parents[2]
    known = [*sorted(file.stem for file in top.glob("train_*.py")), RIVALS]
    if name not in known:
        raise ValueError(f"{where}: {RECIPE}: expected one of {known}, got {name!r}")
    return importlib.import_module(name)


def _check_names(file: Path, names: list[Any]) -> None:
    """Each is a folder of its own, and can be given to `--only`."""
    owners: dict[str, str] = {}
    for name in names:
        if (
            not isinstance(name, str)
            or not re.fullmatch(r"[^/\\\0-\x1f]+", name)
            or name.strip() in ("", ".", "..")
            or name.startswith("-")
        ):
            raise ValueError(
                f"{file}: expected a method's name that can name a folder (text without / and \\, "
                f"not '.' or '..', not starting with '-'), got {name!r}. Rename the method."
            )
        folder = _folder_name(name).casefold()
        if folder in owners:
            told = f"; {BASE!r} is the name of the untrained model" if folder == BASE else ""
            raise ValueError(
                f"{file}: {owners[folder]!r} and {name!r} would share one folder{told}. "
                "Rename a method."
            )
        owners[folder] = name


def _check_order(file: Path, values: dict[str, Any]) -> None:
    """A method comes after one that stands before it, has no tokens, and is after none itself."""
    methods, common = values["methods"], values.get("common", {})
    for place, (name, options) in enumerate(methods.items()):
        if AFTER not in options:
            continue
        before = options[AFTER]
        if before not in list(methods)[:place] or AFTER in methods[before]:
            raise ValueError(
                f"{file}: {name}: {AFTER}: expected a method that stands before it and is after "
                f"none, got {before!r}"
            )
        chosen = {**common, **methods[before]}
        trained = chosen.get("rank") or chosen.get("full")
        if not trained or chosen.get("num_tokens", 0) != 0:
            raise ValueError(
                f"{file}: {name}: {AFTER}: expected a method with rank or full, and num_tokens: 0, "
                f"as tokens cannot be merged, got {before!r}"
            )


def _refuse_unknown(where: str, values: Collection[str], known: list[str]) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        like = "".join(did_you_mean(name, known) for name in unknown)
        raise ValueError(f"{where}: unknown keys {unknown}{like or f'; expected some of {known}'}")


def _folder_name(method: str) -> str:
    return method.replace(" ", "_")


def folder_of(plan: Plan, method: str, seed: int) -> Path:
    return Path(plan.output_dir) / "runs" / _folder_name(method) / f"seed_{seed}"


def jobs_of(plan: Plan) -> list[tuple[str, int]]:
    """Seed by seed, so that a study that was stopped has whole seeds."""
    methods = [BASE, *plan.references, *plan.methods, *plan.sampled]
    return [(method, seed) for seed in plan.seeds for method in methods]


# What says which runs there are, where they are kept and how they are shown, and not what one does.
_NOT_OF_A_RUN = {"methods", "common", "references", "sampled", "seeds", "output_dir", "baselines"}
_NOT_OF_A_RUN |= {"title", "panels", "frontier", "opening", "names", "chart", "shown"}


def settings_of(plan: Plan, method: str) -> dict[str, Any]:
    """What the result of a method's runs depends on besides the seed, as JSON gives it back."""
    if method in plan.sampled:
        of = settings_of(plan, plan.sampled[method][OF])
        return {**of, **plan.sampled[method]}
    names = [one.name for one in fields(Plan) if one.name not in _NOT_OF_A_RUN]
    settings = {name: getattr(plan, name) for name in names}
    if method in plan.references:
        settings["model"] = plan.references[method]
    if method in plan.methods:
        options = {**plan.common, **plan.methods[method]}
        settings |= {f"options.{name}": value for name, value in options.items()}
        if AFTER in options:
            before = {**plan.common, **plan.methods[options[AFTER]]}
            settings |= {f"{AFTER}.{name}": value for name, value in before.items()}
    else:
        del settings["pairs"]
    if not plan.scale_images:  # runs that were done before it was measured have none
        del settings["scale_images"]
    return dict(json.loads(json.dumps(settings, default=str)))


def check_settings(plan: Plan, jobs: Collection[tuple[str, int]]) -> None:
    """No run in the plan's output was begun with other settings than the plan has now."""
    lines, folders = [], []
    for method, seed in jobs:
        folder, now = folder_of(plan, method, seed), settings_of(plan, method)
        if (folder / SETTINGS).exists():
            kept = json.loads((folder / SETTINGS).read_text())
            changed = [
                f"{name}: {kept.get(name)} in the run, {now.get(name)} in the plan"
                for name in sorted({*kept, *now})
                if kept.get(name) != now.get(name)
            ]
        else:
            begun = (folder / "result.json").exists() or (folder / "train").exists()
            changed = [f"no {SETTINGS} tells its settings"] if begun else []
        if changed:
            lines.append(f"  {method}, seed {seed}: {'; '.join(changed)}")
            folders.append(str(folder))
    if lines:
        raise ValueError(
            "expected runs with the plan's settings, got others:\n"
            + "\n".join(lines)
            + "\nName another --output_dir, or delete what should be done again: "
            + " ".join(folders)
        )


def log_of(plan: Plan, method: str, seed: int) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl."""
    text = (folder_of(plan, method, seed) / "train" / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def images_of(plan: Plan, method: str, seed: int) -> npt.NDArray[np.uint8]:
    """A run's held-out pictures (N, H, W, 3)."""
    with np.load(folder_of(plan, method, seed) / "images.npz") as file:
        return np.asarray(file["images"])
