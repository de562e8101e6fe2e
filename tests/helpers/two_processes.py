"""What each process does in the recipes' tests with two (importable by the forked ones)."""

import importlib
import os
import sys
from pathlib import Path

RECIPES = str(Path(__file__).parents[2] / "recipes")


def recipe(rank, name, flags):
    """A recipe's run."""
    sys.path.insert(0, RECIPES)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    importlib.import_module(name).main(flags)


def paired(rank, name, found, flags):
    """A recipe's run, whose processes may find different pairs; what it trained.

    found: a letter a step: "b" both processes find SPO's pairs, "1" the second one alone, "n" none.
    """
    sys.path.insert(0, RECIPES)
    from lab.world import detector_reward
    from model.session import Session

    scored, built = [], []

    def score(pixels, prompts):
        """Once a rollout (of 3 steps, pairs from step 1 on), for a pair of states a prompt."""
        kind = found[len(scored)]
        scored.append(kind)
        bright = 100 * pixels.mean((1, 2, 3))
        return bright if kind == "b" or (kind == "1" and rank == 1) else 0 * bright

    make = Session.__init__

    def kept(self, *arguments, **settings):
        make(self, *arguments, **settings)
        built.append(self)

    detector_reward.detector = score
    Session.__init__ = kept
    recipe(rank, name, flags)
    assert len(scored) == len(found), (scored, found)
    return [p.detach() for p in built[0].parameters]
