"""Compares ways of post-training one model: trains, sweeps the guidance scale, reports.

    python recipes/study.py --config recipes/configs/demo.yaml          the main job, `make demo`
    python recipes/study.py --config recipes/configs/study_flow.yaml    the study of the README

Every method is trained from the same seeds on the world's train prompts, by `train_agsm.py` or by the
recipe that it names (the base is not trained), gets the guidance scale at which it scores best on the
validation prompts, and is then scored once on held-out prompts, all on the same noise. Each (method, seed) is a process of
its own; what is done is kept, so a stopped study goes on. Writes report.md, report.html, curves.png,
images.png and results.json under `output`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from world.prompts import rows
from world.scene import TAGS

BASE = "base"
RECIPE, AFTER = "recipe", "after"


@dataclass(frozen=True)
class Plan:
    """A study's YAML file.

    methods: name -> options of its recipe over those of `common`, and beside them
        recipe: the script that trains it, without its ending (default train_agsm);
        after: a method before it, from whose model (of the same seed; a LoRA is merged) it starts; the
        method before trains no tokens, and is itself after none.
        The untrained base is always there, under the name "base".
    references: further pipelines (name -> folder) that are scored as they are, e.g. the ceiling.
    panels: title -> a metric of log.jsonl, each drawn as a curve and told at the end of training.
    frontier: a metric of log.jsonl against which the validation's overall score is drawn and told.
    baselines: methods that the others are compared with, image by image, as with the base.
    pairs: held-out preference pairs on which each method's implicit accuracy against the untrained
        model is measured, at `common`'s noise levels; 0: none.
    cfgs: guidance scales of the sweep; a single one is taken as it is. per_category,
        sweep_per_category: held-out and validation prompts a category. sampling_steps: of both.
    categories: of the world that are scored, counting among them; the overall score is their mean.
    """

    model: str
    output: str
    methods: dict[str, dict[str, Any]]
    common: dict[str, Any] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    panels: dict[str, str] = field(default_factory=dict)
    frontier: str = ""
    baselines: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    cfgs: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0, 3.0])
    sweep_per_category: int = 32
    per_category: int = 100
    sampling_steps: int = 20
    categories: list[str] = field(default_factory=lambda: list(TAGS))
    pairs: int = 0
    title: str = "Soft tokens on the embedded world"

    def prompts(self, fold: str, per_category: int) -> list[dict[str, Any]]:
        """GenEval rows of what is scored."""
        return rows(fold, per_category, tags=self.categories)


def read_plan(file: Path, output: str | None = None) -> Plan:
    """The plan of a YAML file; unknown keys are errors, also inside its methods."""
    import yaml

    values = yaml.safe_load(file.read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a table, got {values!r}")
    _refuse_unknown(f"{file}", values, [one.name for one in fields(Plan)])
    missing = sorted({"model", "output", "methods"} - set(values))
    if missing:
        raise ValueError(f"{file}: {missing} missing")
    for name, options in values["methods"].items():
        known = [one.name for one in fields(recipe_of(f"{file}: {name}", options).Options)]
        _refuse_unknown(f"{file}: {name}", options, [*known, RECIPE, AFTER])
        _refuse_unknown(f"{file}: common, for {name}", values.get("common", {}), known)
    _check_order(file, values)
    _refuse_unknown(f"{file}: baselines", values.get("baselines", []), list(values["methods"]))
    categories = values.get("categories", TAGS)
    if "counting" not in categories or not set(categories) <= set(TAGS):
        raise ValueError(
            f"{file}: categories: expected counting and others of {TAGS}, got {categories}"
        )
    if BASE in values["methods"] or BASE in values.get("references", {}):
        raise ValueError(f"{file}: {BASE!r} is the name of the untrained model")
    return Plan(**{**values, "output": output or values["output"]})


def recipe_of(where: str, options: dict[str, Any]) -> Any:
    """The module of a method's recipe: its `Options` (of `PostTrainingOptions`) and `main` are used.

    where: what an error's text begins with.
    """
    from common.trained import PostTrainingOptions

    name = options.get(RECIPE, "train_agsm")
    known = sorted(file.stem for file in Path(__file__).parent.glob("train_*.py"))
    if name not in known:
        raise ValueError(f"{where}: {RECIPE}: expected one of {known}, got {name!r}")
    module = importlib.import_module(name)
    if not issubclass(module.Options, PostTrainingOptions):
        raise ValueError(f"{where}: {RECIPE}: {name} does not train on a given pipeline")
    return module


def _check_order(file: Path, values: dict[str, Any]) -> None:
    """A method comes after one that stands before it, has no tokens, and is after none itself."""
    methods, common = values["methods"], values.get("common", {})
    for place, (name, options) in enumerate(methods.items()):
        if AFTER not in options:
            continue
        before = options[AFTER]
        if before not in list(methods)[:place] or AFTER in methods[before]:
            raise ValueError(
                f"{file}: {name}: {AFTER}: expected a method that stands before it and is after none, "
                f"got {before!r}"
            )
        chosen = {**common, **methods[before]}
        trained = chosen.get("lora_rank") or chosen.get("full")
        if not trained or chosen.get("num_tokens") != 0:
            raise ValueError(
                f"{file}: {name}: {AFTER}: expected a method with lora_rank or full, and num_tokens: 0, "
                f"as tokens cannot be merged, got {before!r}"
            )


def _refuse_unknown(where: str, values: Collection[str], known: list[str]) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{where}: unknown keys {unknown}; expected keys among {known}")


def folder_of(plan: Plan, method: str, seed: int) -> Path:
    return Path(plan.output) / "runs" / method.replace(" ", "_") / f"seed_{seed}"


def run_one(plan: Plan, method: str, seed: int) -> dict[str, Any]:
    """Trains, sweeps and scores one method with one seed; the result is also saved."""
    import numpy as np
    import torch

    from common.pairs import implicit_accuracy
    from common.pipeline import TextToImage
    from generate import sample
    from score_images import summarize_with_intervals
    from world.verdicts import verdicts

    folder = folder_of(plan, method, seed)
    folder.mkdir(parents=True, exist_ok=True)
    source, extras, seconds = Path(plan.references.get(method, plan.model)), ("", ""), 0.0
    options: dict[str, Any] = {}
    if method in plan.methods:
        options = {**plan.common, **plan.methods[method], "seed": seed, "model": plan.model}
        trained = folder / "train"
        options |= {"output": str(trained), "threads": torch.get_num_threads()}
        recipe, before = recipe_of(method, options), options.pop(AFTER, None)
        options.pop(RECIPE, None)
        if before is not None:
            earlier = folder_of(plan, before, seed) / "train"
            if (earlier / "pipeline").exists():
                options["model"] = str(earlier / "pipeline")
            else:
                options["merge_lora"] = str(earlier / "lora")
        began = time.time()
        recipe.main(["--resume", *_flags(options)])
        seconds = time.time() - began
        source = trained / "pipeline" if options.get("full") else Path(options["model"])
        extras = tuple(str(p) if p.exists() else "" for p in (trained / "tokens", trained / "lora"))
    model = TextToImage.load(str(source), torch.float32)
    if options.get("merge_lora") and not options.get("full"):
        model.merge_lora(options["merge_lora"])
    model.load_extras(*extras)

    def score(fold: str, number: int, cfg: float, key: str) -> tuple[Any, Any]:
        asked = plan.prompts(fold, number)
        images = sample(
            model.pipe,
            [row["prompt"] for row in asked],
            seeds=[(key, seed, i) for i in range(len(asked))],
            steps=plan.sampling_steps,
            cfg=cfg,
        )
        return images, verdicts(images, asked)

    sweep = {}
    for cfg in plan.cfgs if len(plan.cfgs) > 1 else ():
        _, judged = score("validation", plan.sweep_per_category, cfg, "sweep")
        sweep[str(cfg)] = summarize_with_intervals(judged)
    best = max(plan.cfgs, key=lambda cfg: sweep[str(cfg)]["overall"] if sweep else 0.0)
    images, judged = score("heldout", plan.per_category, best, "heldout")
    np.savez_compressed(folder / "images.npz", images=images)
    result = {
        "method": method,
        "seed": seed,
        "cfg": best,
        "train_seconds": round(seconds, 1),
        "sweep": sweep,
        "heldout": summarize_with_intervals(judged),
        "correct": [int(verdict.correct) for verdict in judged],
        "reasons": [verdict.reason for verdict in judged],
    }
    if plan.pairs and method in plan.methods:
        shares = {
            key: plan.common.get(f"timestep_{key}", at) for key, at in (("low", 0), ("high", 1))
        }
        base = TextToImage.load(plan.model, torch.float32)
        found = implicit_accuracy(model, base, plan.pairs, fold="heldout", seed=seed, **shares)
        result["implicit_accuracy"] = found
    part = folder / "result.part"
    part.write_text(json.dumps(result) + "\n")
    part.rename(folder / "result.json")
    return result


def _flags(options: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [
            f"--{flag}", str(value)
        ]  # fmt: skip
    return flags


def jobs_of(plan: Plan) -> list[tuple[str, int]]:
    """Seed by seed, so that a study that was stopped has whole seeds."""
    methods = [BASE, *plan.references, *plan.methods]
    return [(method, seed) for seed in plan.seeds for method in methods]


def run_all(config: Path, plan: Plan, jobs: int) -> None:
    """Every (method, seed) that has no result yet, `jobs` of them side by side."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    todo = [one for one in jobs_of(plan) if not (folder_of(plan, *one) / "result.json").exists()]
    started: dict[tuple[str, int], Future[None]] = {}

    def run(one: tuple[str, int]) -> None:
        method, seed = one
        before = plan.methods.get(method, {}).get(AFTER), seed
        if before in started:  # it was started earlier, so this ends
            started[before].result()
        folder = folder_of(plan, method, seed)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, "--config", str(config), "--output", plan.output]
        began = time.time()
        with (folder / "log.txt").open("w") as log:
            code = subprocess.call(
                [*command, "--only", method, "--seed", str(seed)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if code:
            tail = "\n".join((folder / "log.txt").read_text().splitlines()[-15:])
            raise RuntimeError(f"{method}, seed {seed}: exit {code}; {folder / 'log.txt'}:\n{tail}")
        result = json.loads((folder / "result.json").read_text())
        scores = result["heldout"]
        print(
            f"{method:24} seed {seed}  overall {scores['overall']:.3f}  counting "
            f"{scores['categories']['counting']['score']:.3f}  at CFG {result['cfg']}  "
            f"({time.time() - began:.0f} s)",
            flush=True,
        )

    print(f"{len(todo)} of {len(jobs_of(plan))} runs to do, {jobs} at a time", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        for one in todo:
            started[one] = pool.submit(run, one)
        for done in started.values():
            done.result()


def main(arguments: list[str] | None = None) -> None:
    """The whole study, or one run of it (`--only`, `--seed`: what the study starts)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="the plan, a YAML file")
    parser.add_argument("--output", help="instead of the plan's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--only", help="one method of the plan, or base")
    parser.add_argument("--seed", type=int, default=0, help="of the one run")
    given = parser.parse_args(arguments)
    plan = read_plan(given.config, given.output)
    if given.only is not None:
        run_one(plan, given.only, given.seed)
        return
    began = time.time()
    run_all(given.config, plan, max(1, given.jobs))

    from studies.report import write

    written = write(plan, given.config, seconds=time.time() - began)
    print(f"\n{written.read_text()}\nSee {written} and {written.with_suffix('.html')}")


if __name__ == "__main__":
    main()
