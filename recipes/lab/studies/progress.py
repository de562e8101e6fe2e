"""How far a study is: a bar over its runs with the time that is left.

progress = Progress(plan, runs)
progress.show(done={("AGSM", 0)}, under_way=[("AGSM", 1)])     as often as you like
progress.bar.close()
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Sequence

from tqdm.auto import tqdm

from lab.studies.plan import Plan, folder_of, recipe_of
from run.log import lines_of

TRAINING = 0.8
"""Share of a run's time that its training is taken to be; the rest is sampling."""


class Progress:
    """The bar. It is drawn every second in a terminal, and every half minute elsewhere."""

    def __init__(self, plan: Plan, runs: Sequence[tuple[str, int]]) -> None:
        self.plan = plan
        self.pause = 1.0 if sys.stderr.isatty() else 30.0
        self.drawn = time.time()
        self.bar = tqdm(
            total=len(runs),
            disable=not runs,
            bar_format="{l_bar}{bar}| {n:.1f} of {total} runs [{elapsed}<{remaining}]{postfix}",
        )

    def show(
        self, done: Collection[tuple[str, int]], under_way: Collection[tuple[str, int]]
    ) -> None:
        """Draws it anew, if it is time."""
        if time.time() < self.drawn + self.pause:
            return
        self.drawn = time.time()
        steps = {run: steps_of(self.plan, *run) for run in under_way}
        self.bar.n = len(done) + sum(TRAINING * at / of for at, of in steps.values() if of)
        told = [
            f"{method} {seed}: " + (f"step {at} of {of}" if at < of else "sampling")
            for (method, seed), (at, of) in steps.items()
        ]
        self.bar.set_postfix_str("; ".join(told), refresh=True)


def steps_of(plan: Plan, method: str, seed: int) -> tuple[int, int]:
    """Steps that a run has logged, and those it has to do; 0 of 0 where nothing is trained."""
    if method not in plan.methods:
        return 0, 0
    options = {**plan.common, **plan.methods[method]}
    default = recipe_of(method, options).OPTIONS.defaults.get("max_train_steps", 0)  # not of trl's
    lines = lines_of(folder_of(plan, method, seed) / "train" / "log.jsonl")
    step = json.loads(lines[-1])["step"] if lines else 0
    number = int(options.get("max_train_steps", default))
    return (min(step, number), number) if number else (0, 0)
