"""Run by torchrun in the tests: a recipe, whose processes may find different pairs.

    two_processes.py RECIPE FOUND FOLDER flags...

FOUND: a letter a step: "b" both processes find SPO's pairs, "1" the second one alone, "n" none.
Each process leaves what it trained in FOLDER.
"""

import importlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

from common.trained_pipeline import TrainedPipeline
from world import task


def main():
    recipe, found, folder, *flags = sys.argv[1:]
    rank, scored, built = int(os.environ["RANK"]), [], []

    def score(pixels, prompts):
        """Once a rollout (of 3 steps, pairs from step 1 on), for a pair of states a prompt."""
        kind = found[len(scored)]
        scored.append(kind)
        bright = 100 * pixels.mean((1, 2, 3))
        return bright if kind == "b" or (kind == "1" and rank == 1) else 0 * bright

    load = TrainedPipeline.load

    def kept(*arguments):
        built.append(load(*arguments))
        return built[0]

    task.detector = score
    TrainedPipeline.load = kept
    importlib.import_module(recipe).main(["--output_dir", f"{folder}/run", *flags])
    assert len(scored) == len(found), (scored, found)
    torch.save([p.detach() for p in built[0].parameters], f"{folder}/rank_{rank}.pt")


if __name__ == "__main__":
    main()
