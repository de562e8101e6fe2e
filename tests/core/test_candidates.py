"""Which captions compete: never a false negative, never twice, reproducible."""

from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

from agsm_loss import Candidates, Grid, Hard, InBatch, Mixed, caption_pool
from agsm_loss.candidates import own_alone, with_null

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
        return InBatch(num_negatives, allow_empty=True)(
            captions, image_ids=image_ids, generator=torch.Generator().manual_seed(seed)
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
    candidates = Mixed(num_negatives, allow_empty=True)(
        captions,
        hard_negatives=hard,
        image_ids=image_ids,
        generator=torch.Generator().manual_seed(seed),
    )
    check(candidates, captions, image_ids, caption_pool(captions, hard))
    assert candidates.index.shape[1] == 1 + max(map(len, hard)) + num_negatives
    # the edited caption is the first hard negative, but for dropped captions
    assert candidates.mask[:, 1].tolist() == [bool(c) for c in captions]


@given(BATCHES)
def test_grid(rows):
    captions, image_ids = zip(*rows, strict=True)
    candidates = Grid(allow_empty=True)(captions, image_ids=image_ids)
    check(candidates, captions, image_ids, captions)
    assert torch.equal(candidates.positives, torch.arange(len(rows)))
    assert candidates.index.shape == (len(rows), len(rows))


def test_the_published_case_by_hand():
    candidates = InBatch(3)(["a", "b", "c", "d"])
    assert candidates.index[:, 0].tolist() == [0, 1, 2, 3]
    assert [sorted(row) for row in candidates.index.tolist()] == [[0, 1, 2, 3]] * 4
    assert candidates.mask.all() and candidates.positives.tolist() == [0, 0, 0, 0]


def test_a_dropped_caption_stands_alone():
    captions, hard = ["a", "", "b"], [["c", ""], ["d"], []]
    candidates = Mixed(2)(captions, hard_negatives=hard)
    assert candidates.index.tolist() == [[0, 3, 0, 2, 0], [1] * 5, [2, 2, 2, 0, 2]]
    assert candidates.mask.sum(1).tolist() == [3, 1, 2]
    assert Grid()(captions).mask.sum(1).tolist() == [2, 1, 2]


@given(BATCHES, st.integers(0, 3), SEEDS)
def test_null_adds_the_empty_caption_to_what_would_compete_without_it(rows, num_negatives, seed):
    captions, image_ids = zip(*rows, strict=True)
    hard = [[f"{c}+", ""][: i % 3] for i, c in enumerate(captions)]
    plain = Mixed(num_negatives, allow_empty=True)(
        captions,
        hard_negatives=hard,
        image_ids=image_ids,
        generator=torch.Generator().manual_seed(seed),
    )
    more = with_null(plain, [c == "" for c in captions])
    assert more.pool_size == plain.pool_size + len(captions)
    assert torch.equal(more.index[:, :-1], plain.index)
    assert torch.equal(more.mask[:, :-1], plain.mask)
    # it competes once, for the images that have a caption
    assert more.mask[:, -1].tolist() == [bool(c) for c in captions]
    for i, caption in enumerate(captions):
        assert more.index[i, -1] == (plain.pool_size + i if caption else i)


def test_the_empty_caption_can_compete_alone():
    """Also where all captions of the batch are the same."""
    candidates = with_null(own_alone(["a", "a"]))
    assert candidates.index.tolist() == [[0, 2], [1, 3]] and candidates.mask.all()
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        InBatch(0)


def test_ids_serve_as_captions():
    by_text = InBatch()(["a", "b", "a", "c"], generator=torch.Generator().manual_seed(1))
    by_id = InBatch()(torch.tensor([5, 6, 5, 7]), generator=torch.Generator().manual_seed(1))
    assert torch.equal(by_text.index, by_id.index)
    assert by_text.mask.sum(1).tolist() == [3, 3, 3, 3]


def test_draws_are_uniform():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(3000):
        drawn = InBatch(1)(list("abcd"), generator=generator)
        counts[drawn.index[0, 1]] += 1
    assert counts[0] == 0
    assert ((counts[1:] / 3000 - 1 / 3).abs() < 0.04).all()


def test_hard_negatives_are_in_order_and_ragged():
    candidates = Hard()(["a", "b"], hard_negatives=[["a2", "a3"], ["b2"]])
    assert candidates.index.tolist() == [[0, 2, 3], [1, 4, 1]]
    assert candidates.mask.tolist() == [[True, True, True], [True, True, False]]


def test_a_batch_without_negatives_can_be_allowed():
    candidates = InBatch(allow_empty=True)(["a", "a"])
    assert candidates.mask.tolist() == [[True, False, False, False]] * 2
    with pytest.raises(ValueError, match="larger batch"):
        InBatch()(["a", "a"])
    alone = Hard(allow_empty=True)(["a", "b"], hard_negatives=[[], []])
    assert alone.index.tolist() == [[0], [1]] and alone.mask.all()


@given(BATCHES, st.integers(1, 4), SEEDS)
def test_the_rules_are_mixtures(rows, num_negatives, seed):
    """`Mixed` without hard negatives is `InBatch`, and without captions of the batch `Hard`."""
    captions, image_ids = zip(*rows, strict=True)
    hard = [[f"{c}+", "a"][: i % 3] for i, c in enumerate(captions)]
    none = [[]] * len(rows)

    def choose(rule, hard):
        generator = torch.Generator().manual_seed(seed)
        return rule(captions, hard_negatives=hard, image_ids=image_ids, generator=generator)

    pairs = (
        (
            InBatch(num_negatives, allow_empty=True),
            None,
            Mixed(num_negatives, allow_empty=True),
            none,
        ),
        (Hard(allow_empty=True), hard, Mixed(0, allow_empty=True), hard),
    )
    for rule, given_to_it, mixed, given_to_mixed in pairs:
        ours, theirs = choose(rule, given_to_it), choose(mixed, given_to_mixed)
        assert torch.equal(ours.index, theirs.index) and torch.equal(ours.mask, theirs.mask)
        assert ours.pool_size == theirs.pool_size


def test_rules_are_values():
    """So that one can be a default, be compared and be printed."""
    assert InBatch(3) == InBatch() != InBatch(2)
    assert repr(Mixed(2)) == "Mixed(num_negatives=2, allow_empty=False)"
    with pytest.raises(AttributeError):
        InBatch().num_negatives = 5


@pytest.mark.unchecked_shapes  # of any type
def test_ids_are_compared_by_their_value():
    """A tensor equals no other by its hash, and NaN not even itself."""
    ids = [torch.tensor(5), torch.tensor(6), torch.tensor(5)]
    assert InBatch()(ids).mask.sum(1).tolist() == [2, 2, 2]
    rows = [torch.tensor([1, 2]), np.array([3, 4]), torch.tensor([1, 2])]
    for alike in (rows, [list(map(int, row)) for row in rows]):
        assert InBatch()(alike).mask.sum(1).tolist() == [2, 2, 2]
    hard = torch.tensor([[1, 3], [4, 2]])
    assert Hard()(torch.tensor([1, 2]), hard_negatives=hard).mask.sum(1).tolist() == [2, 2]
    alike = InBatch(allow_empty=True)(["a", "b"], image_ids=[torch.tensor([7, 1])] * 2)
    assert alike.mask.sum(1).tolist() == [1, 1]


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("rule", [InBatch(3), Hard(), Grid(), own_alone])
def test_an_iterator_is_read_once(rule):
    texts = ["a", "", "b", "a"]
    hard = {"hard_negatives": [["c"], [], [], ["d"]]} if rule == Hard() else {}
    listed, read = (rule(one, **hard) for one in (texts, iter(texts)))
    assert torch.equal(read.mask.sum(1), listed.mask.sum(1))


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    "nan",
    [float("nan"), np.float32("nan"), Decimal("nan"), (1, float("nan")), torch.tensor(torch.nan)],
)
def test_nan_is_no_id(nan):
    with pytest.raises(ValueError, match="got NaN"):
        InBatch()([1.0, nan])
    with pytest.raises(ValueError, match="got NaN"):
        Hard()([1.0, 2.0], hard_negatives=[[nan], [3.0]])
    with pytest.raises(ValueError, match="got NaN"):
        InBatch()(torch.tensor([1.0, torch.nan]))


def test_positives_are_columns():
    index = torch.arange(2).repeat(2, 1)
    with pytest.raises(ValueError, match="positives: expected columns of 2 candidates, got"):
        Candidates(index, torch.tensor([0, 2]), torch.ones_like(index).bool(), 2)
