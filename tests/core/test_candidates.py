"""Which captions compete: never a false negative, never twice, reproducible."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from agsm_loss import (
    caption_pool,
    grid_candidates,
    hard_candidates,
    in_batch_candidates,
    mixed_candidates,
)

BATCHES = st.lists(
    st.tuples(st.sampled_from(["", *"abcdef"]), st.integers(0, 4)), min_size=1, max_size=9
)


def check(candidates, captions, image_ids, pool):
    """The laws that every kind of candidates obeys."""
    batch = len(captions)
    assert candidates.pool_size == len(pool)
    assert candidates.index.shape == candidates.mask.shape
    for i in range(batch):
        own = {c for c, image in zip(captions, image_ids, strict=True) if image == image_ids[i]}
        y = int(candidates.positives[i])
        assert candidates.mask[i, y] and pool[candidates.index[i, y]] == captions[i]
        texts = [
            pool[candidates.index[i, j]]
            for j in range(candidates.index.shape[1])
            if candidates.mask[i, j] and j != y
        ]
        assert len(set(texts)) == len(texts) and not (own | {""}) & set(texts)
        assert captions[i] or not texts
        assert (candidates.index[i][~candidates.mask[i]] == i).all()


@given(BATCHES, st.integers(1, 5), SEEDS)
def test_in_batch(rows, num_negatives, seed):
    captions, image_ids = zip(*rows, strict=True)

    def draw():
        return in_batch_candidates(
            captions,
            num_negatives=num_negatives,
            image_ids=image_ids,
            generator=torch.Generator().manual_seed(seed),
            allow_empty=True,
        )

    candidates = draw()
    assert candidates.index.shape == (len(rows), 1 + num_negatives)
    check(candidates, captions, image_ids, captions)
    for i in range(len(rows)):
        own = {c for c, image in rows if image == image_ids[i]}
        available = len(set(captions) - own - {""}) if captions[i] else 0
        assert int(candidates.mask[i].sum()) == 1 + min(num_negatives, available)
    again = draw()
    assert torch.equal(candidates.index, again.index) and torch.equal(candidates.mask, again.mask)


@given(BATCHES, st.integers(0, 3), SEEDS)
def test_mixed(rows, num_negatives, seed):
    captions, image_ids = zip(*rows, strict=True)
    hard = [[f"{c}+", c, "a", f"{c}-"][: 1 + i % 4] for i, c in enumerate(captions)]
    candidates = mixed_candidates(
        captions,
        hard,
        num_negatives=num_negatives,
        image_ids=image_ids,
        generator=torch.Generator().manual_seed(seed),
        allow_empty=True,
    )
    check(candidates, captions, image_ids, caption_pool(captions, hard))
    assert candidates.index.shape[1] == 1 + max(map(len, hard)) + num_negatives
    # the edited caption is the first hard negative, but for dropped captions
    assert candidates.mask[:, 1].tolist() == [bool(c) for c in captions]


@given(BATCHES)
def test_grid(rows):
    captions, image_ids = zip(*rows, strict=True)
    candidates = grid_candidates(captions, image_ids=image_ids, allow_empty=True)
    check(candidates, captions, image_ids, captions)
    assert torch.equal(candidates.positives, torch.arange(len(rows)))
    assert candidates.index.shape == (len(rows), len(rows))


def test_the_published_case_by_hand():
    candidates = in_batch_candidates(["a", "b", "c", "d"], num_negatives=3)
    assert candidates.index[:, 0].tolist() == [0, 1, 2, 3]
    assert [sorted(row) for row in candidates.index.tolist()] == [[0, 1, 2, 3]] * 4
    assert candidates.mask.all() and candidates.positives.tolist() == [0, 0, 0, 0]


def test_a_dropped_caption_stands_alone():
    captions, hard = ["a", "", "b"], [["c", ""], ["d"], []]
    candidates = mixed_candidates(captions, hard, num_negatives=2)
    assert candidates.index.tolist() == [[0, 3, 0, 2, 0], [1] * 5, [2, 2, 2, 0, 2]]
    assert candidates.mask.sum(1).tolist() == [3, 1, 2]
    assert grid_candidates(captions).mask.sum(1).tolist() == [2, 1, 2]


def test_ids_serve_as_captions():
    by_text = in_batch_candidates(["a", "b", "a", "c"], generator=torch.Generator().manual_seed(1))
    by_id = in_batch_candidates(
        torch.tensor([5, 6, 5, 7]), generator=torch.Generator().manual_seed(1)
    )
    assert torch.equal(by_text.index, by_id.index)
    assert by_text.mask.sum(1).tolist() == [3, 3, 3, 3]


def test_draws_are_uniform():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(3000):
        drawn = in_batch_candidates(list("abcd"), num_negatives=1, generator=generator)
        counts[drawn.index[0, 1]] += 1
    assert counts[0] == 0
    assert ((counts[1:] / 3000 - 1 / 3).abs() < 0.04).all()


def test_hard_negatives_are_in_order_and_ragged():
    candidates = hard_candidates(["a", "b"], [["a2", "a3"], ["b2"]])
    assert candidates.index.tolist() == [[0, 2, 3], [1, 4, 1]]
    assert candidates.mask.tolist() == [[True, True, True], [True, True, False]]


def test_a_batch_without_negatives_can_be_allowed():
    candidates = in_batch_candidates(["a", "a"], allow_empty=True)
    assert candidates.mask.tolist() == [[True, False, False, False]] * 2
    with pytest.raises(ValueError, match="larger batch"):
        in_batch_candidates(["a", "a"])
