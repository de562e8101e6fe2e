"""Draws that depend on a key alone."""

import itertools

import torch

from agsm_loss._random import draws


def first(*key):
    return torch.rand(4, generator=draws(*key))


def test_the_same_key_draws_the_same_and_another_key_does_not():
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), ("0",), (0, 1, "agsm"), (2**40,)]
    for one, other in itertools.product(keys, keys):
        assert torch.equal(first(*one), first(*other)) == (one == other)


def test_the_draws_are_known():
    """What recipes have drawn stays what they draw."""
    seeds = [draws(*key).initial_seed() for key in ((), (0, 1), (7, 3, "candidates"))]
    assert seeds == [2599917437774673966, 3584192610069039781, 2835260422610225395]


def test_torchs_own_stream_is_left_alone():
    before = torch.get_rng_state()
    first(0)
    assert torch.equal(torch.get_rng_state(), before)
