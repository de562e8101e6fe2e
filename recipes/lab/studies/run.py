"""Runs a study: each (method, seed) is trained, swept over the guidance scale and scored.

Each has a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.sources import check_source
from lab.studies.accuracy import held_scale, implicit_accuracy
from lab.studies.plan import (
    AFTER,
    OF,
    RECIPE,
    SETTINGS,
    STRENGTH,
    Plan,
    check_settings,
    folder_of,
    jobs_of,
    recipe_of,
    settings_of,
)
from lab.studies.progress import Progress
from lab.world.scene import GRID
from lab.world.score import verdicts
from lab.world.summary import summarize_with_intervals
from model.pipeline import TextToImage
from model.sampling import sample
from run.log import replace_text, say
from run.options import flags
from run.stop import PIPED, Stop

STUDY = Path(__file__).parents[2] / "study.py"


def run_one(plan: Plan, method: str, seed: int) -> dict[str, Any]:
    """Trains, sweeps and scores one method with one seed; the result is also saved."""
    folder = begin(plan, method, seed)
    seconds = 0.0
    if method in plan.methods:
        options = _options(plan, method, seed)
        began = time.time()
        recipe_of(method, plan.methods[method]).main(flags(options))
        seconds = time.time() - began
    sampled = plan.sampled.get(method, {})
    model = _load(plan, sampled.get(OF, method), seed)
    if STRENGTH in sampled:
        model.set_lora_scale(sampled[STRENGTH])
    scales = plan.scales(method)

    def score(fold: str, number: int, cfg: float, key: str) -> tuple[Any, Any]:
        asked = plan.prompts(fold, number)
        images = sample(
            model.pipe,
            [row["prompt"] for row in asked],
            seeds=[(key, seed, i) for i in range(len(asked))],
            num_inference_steps=plan.num_inference_steps,
            guidance_scale=cfg,
            arguments=model.arguments,
        )
        return images, verdicts(images, asked)

    sweep = {}
    for cfg in scales if len(scales) > 1 else ():
        _, judged = score("validation", plan.sweep_per_category, cfg, "sweep")
        sweep[str(cfg)] = summarize_with_intervals(judged)
    best = max(scales, key=lambda cfg: sweep[str(cfg)]["overall"] if sweep else 0.0)
    began = time.process_time()
    images, judged = score("heldout", plan.per_category, best, "heldout")
    sampling = (time.process_time() - began) / len(images)
    np.savez_compressed(folder / "images.npz", images=images)
    result = {
        "method": method,
        "seed": seed,
        "cfg": best,
        "train_seconds": round(seconds, 1),
        "seconds_per_image": round(sampling, 4),
        "sweep": sweep,
        "heldout": summarize_with_intervals(judged),
        "correct": [int(verdict.correct) for verdict in judged],
        "reasons": [verdict.reason for verdict in judged],
    }
    low = plan.common.get("timestep_low", 0.0)
    if plan.pairs and method in plan.methods:
        base = TextToImage.load(plan.model, torch.float32)
        found = implicit_accuracy(model, base, plan.pairs, seed=seed, low=low)
        result["implicit_accuracy"] = found
    if plan.scale_images and method not in plan.sampled:
        side = 2 if ":corner:" in plan.common.get("data", "") else GRID
        found = held_scale(model, plan.scale_images, seed=seed, low=low, side=side)
        result["held_scale"] = round(found, 4)
    replace_text(folder / "result.json", json.dumps(result) + "\n")
    return result


def _options(plan: Plan, method: str, seed: int) -> dict[str, Any]:
    """The options of a method's training."""
    output = folder_of(plan, method, seed) / "train"
    options = {**plan.common, **plan.methods[method], "seed": seed, "model": plan.model}
    options |= {"output_dir": str(output), "resume_from_checkpoint": "latest"}
    options.pop(RECIPE, None)
    before = options.pop(AFTER, None)
    if before is not None:
        earlier = folder_of(plan, before, seed) / "train"
        if (earlier / "pipeline").exists():
            options["model"] = str(earlier / "pipeline")
        else:
            options["merge_lora"] = str(earlier / "lora")
    return options


def _load(plan: Plan, method: str, seed: int) -> TextToImage:
    """The model of the base, a reference, or a trained method."""
    if method not in plan.methods:
        source, options, extras = plan.references.get(method, plan.model), {}, ("", "")
    else:
        options = _options(plan, method, seed)
        trained = Path(options["output_dir"])
        source = str(trained / "pipeline") if options.get("full") else options["model"]
        extras = tuple(str(p) if p.exists() else "" for p in (trained / "tokens", trained / "lora"))
    model = TextToImage.load(source, torch.float32)
    if options.get("merge_lora") and not options.get("full"):
        model.merge_lora(options["merge_lora"])
    model.load_extras(*extras)
    return model


def begin(plan: Plan, method: str, seed: int) -> Path:
    """The run's folder, with the settings that its result will be of."""
    check_settings(plan, [(method, seed)])
    folder = folder_of(plan, method, seed)
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / SETTINGS, json.dumps(settings_of(plan, method)) + "\n")
    return folder


def run_all(config: Path, plan: Plan, jobs: int) -> None:
    """Every (method, seed) that has no result yet, `jobs` of them side by side.

    Ctrl-C and SIGTERM end it: no run is started any more, and those under way save what they have.

    Raises:
        FileNotFoundError: a model of the plan that is not there.
        RuntimeError: a run has failed; the others were done first.
        SystemExit: it was asked to end, and its runs have ended.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), PIPED: "1"}
    for name, model in {"model": plan.model, **plan.references}.items():
        check_source(name, model)
    check_settings(plan, jobs_of(plan))
    todo = [one for one in jobs_of(plan) if not (folder_of(plan, *one) / "result.json").exists()]
    started: dict[tuple[str, int], Future[None]] = {}
    # The runs' standard input. It ends when this process closes it, or dies of whatever cause.
    theirs, ours = os.pipe()

    def run(one: tuple[str, int]) -> None:
        method, seed = one
        options = {**plan.methods, **plan.sampled}.get(method, {})
        before = options.get(AFTER, options.get(OF)), seed
        if before in started:  # it was started earlier, so this ends
            started[before].result()
        folder = folder_of(plan, method, seed)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(STUDY), "--config", str(config)]
        command += ["--output_dir", plan.output_dir]
        began = time.time()
        with (folder / "log.txt").open("w") as log:
            code = subprocess.call(
                [*command, "--only", method, "--seed", str(seed)],
                env=environment,
                stdin=theirs,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        if code:
            tail = "\n".join((folder / "log.txt").read_text().splitlines()[-15:])
            raise RuntimeError(f"{method}, seed {seed}: exit {code}; {folder / 'log.txt'}:\n{tail}")
        result = json.loads((folder / "result.json").read_text())
        scores = result["heldout"]
        say(
            f"{method:24} seed {seed}  overall {scores['overall']:.3f}  counting "
            f"{scores['categories']['counting']['score']:.3f}  at CFG {result['cfg']}  "
            f"({time.time() - began:.0f} s)"
        )

    print(f"{len(todo)} of {len(jobs_of(plan))} runs to do, {jobs} at a time", flush=True)
    pool = ThreadPoolExecutor(jobs)
    progress = Progress(plan, todo)
    with Stop("the study ends when its runs have saved what they have").watching() as stop:
        try:
            for one in todo:
                started[one] = pool.submit(run, one)
            while stop.signal is None and wait(started.values(), timeout=0.2).not_done:
                progress.show(
                    {run for run, future in started.items() if future.done()},
                    [run for run, future in started.items() if future.running()],
                )
        finally:
            os.close(ours)
            pool.shutdown(wait=True, cancel_futures=True)
            os.close(theirs)
            progress.bar.close()
    if stop.signal is not None:
        done = sum(
            one.done() and not one.cancelled() and not one.exception() for one in started.values()
        )
        print(f"Stopped with {len(todo) - done} runs to do. The same command goes on.", flush=True)
        raise stop.exit()
    for ended in started.values():
        ended.result()
