"""Compares ways of post-training one model: trains, sweeps the guidance scale, reports.

    python recipes/study.py --config recipes/configs/demo.yaml          the main job, `make demo`
    python recipes/study.py --config recipes/lab/configs/study_flow.yaml    three seeds

Every method is trained from the same seeds on the world's train prompts, by `train_agsm.py` or by
the recipe that it names (the base is not trained), gets the guidance scale at which it scores best
on the validation prompts, and is then scored once on held-out prompts, all on the same noise. Each
(method, seed) is a process of its own; what is done is kept with its settings, so a stopped study
goes on, and one whose plan was edited says what differs and stops. Writes report.md, report.html,
curves.png, images.png and results.json under `output_dir`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from run.cli import command
from run.stop import end_with_parent


def main(arguments: list[str] | None = None) -> None:
    """The whole study, or one run of it (`--only`, `--seed`: what the study starts)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, help="The plan: a YAML file.")
    parser.add_argument(
        "--output_dir", "--output-dir", help="Folder for the study, in place of the plan's."
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Runs at a time.")
    parser.add_argument("--only", help="Run this method of the plan alone, or base.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the one run.")
    given = parser.parse_args(arguments)
    end_with_parent()

    from run.log import quiet_libraries

    quiet_libraries()  # before the imports that print

    from lab.studies.plan import read_plan
    from lab.studies.report import write
    from lab.studies.run import run_all, run_one

    plan = read_plan(given.config, given.output_dir)
    if given.only is not None:
        run_one(plan, given.only, given.seed)
        return
    run_all(given.config, plan, max(1, given.jobs))
    written = write(plan, given.config)
    print(f"\n{written.read_text()}\nSee {written} and {written.with_suffix('.html')}")


if __name__ == "__main__":
    command(main)
