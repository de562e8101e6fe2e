"""What each process does in the recipes' tests with two (importable by the forked ones)."""

import importlib
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

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


def best(rank, flags):
    """NFT whose second process has the better rewards: what is trained, rollouts, AGSM's images.

    And SPO's samples, dealt out by scores; then by scores of which all but one are NaN.
    """
    sys.path.insert(0, RECIPES)
    from data.batches import Batch
    from rewards import rewards, rollout

    redness, samples, batch = rewards.redness, rollout.OnPolicy.best, rollout.OnPolicy.agsm_batch
    own, shown = [], []

    def sampled(self, latents, *given):
        own.append(latents)
        return samples(self, latents, *given)

    def made(self, *given):
        shown.append(batch(self, *given))
        return shown[-1]

    rewards.redness = lambda *given: redness(*given) + 9 * rank
    rollout.OnPolicy.best, rollout.OnPolicy.agsm_batch = sampled, made
    here = SimpleNamespace(num_processes=2, process_index=rank)
    captions = [f"{one} of {rank}" for one in "abcd"]
    texts = Batch(torch.zeros(4, 3, 2, 2), captions, [5, 6, 7, 8], [[one] for one in captions])
    latents = 10 * rank + torch.arange(4.0).unsqueeze(1)
    dealt = []
    for scores in ([[0, 6, 0, 5], [1, 9, 7, 8]], [[math.nan] * 4, [math.nan] * 3 + [1]]):
        few = torch.tensor(scores[rank]).float()
        taken, clean, kept, few = rollout.dealt(here, texts, latents, few, 0.5)
        assert taken.hard == [[one] for one in taken.captions]
        dealt.append((taken.captions, taken.image_ids, clean[kept].flatten(), few))
    trained = paired(rank, "train_nft", "", flags)
    return trained, own, [one.latents for one in shown], dealt
