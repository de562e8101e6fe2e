"""One process that trains on what two processes see: a micro-step for each.

Data and draws are functions of (seed, micro-step, process). Here micro-step i is micro-step i // 2
of process i % 2, so that two micro-steps accumulated are one of both processes.
"""

from contextlib import contextmanager
from unittest import mock

from torch.utils.data import Dataset

from lab.world import task
from run import loop


class InTurn(Dataset):
    def __init__(self, kind, *arguments, rank, **settings):
        self.both = [kind(*arguments, rank=one, **settings) for one in (0, 1)]

    def __getitem__(self, index):
        return self.both[index % 2][index // 2]


@contextmanager
def joint():
    """Inside, run a recipe with `--gradient_accumulation_steps 2`."""
    draws, images, pairs = loop.draws, task.WorldBatches, task.WorldPairs

    def drawn(seed, index, rank, *key):
        assert rank == 0
        return draws(seed, index // 2, index % 2, *key)

    with (
        mock.patch.object(loop, "draws", drawn),
        mock.patch.object(task, "WorldBatches", lambda *a, **s: InTurn(images, *a, **s)),
        mock.patch.object(task, "WorldPairs", lambda *a, **s: InTurn(pairs, *a, **s)),
    ):
        yield
