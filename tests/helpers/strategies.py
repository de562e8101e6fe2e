"""Random problems for the property tests."""

import torch
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def problems(draw, dtype=torch.float64, min_candidates=1, max_candidates=5):
    """(pred, ema_pred, target, positives or None, mask or None) of random shape and scale."""
    generator = torch.Generator().manual_seed(draw(SEEDS))
    batch = draw(st.integers(1, 4))
    num = draw(st.integers(min_candidates, max_candidates))
    trailing = draw(st.sampled_from([(), (1,), (6,), (2, 3), (2, 2, 2), (1, 2, 2, 3)]))
    scale = 10.0 ** draw(st.integers(-3, 3))

    def randn(*shape):
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    pred, ema_pred = randn(batch, num, *trailing), randn(batch, num, *trailing)
    target = randn(batch, *trailing)
    kind = draw(st.sampled_from(["first", "columns", "several"]))
    columns = torch.randint(num, (batch,), generator=generator)
    own = torch.zeros(batch, num, dtype=torch.bool)
    positives = None
    if kind == "first":
        own[:, 0] = True
    else:
        own[torch.arange(batch), columns] = True
        positives = columns
        if kind == "several":
            positives = own = own | (torch.rand(batch, num, generator=generator) < 0.3)
    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, num, generator=generator) < 0.6
        keep = positives if kind != "several" else own.int().argmax(1)
        mask[torch.arange(batch), 0 if keep is None else keep] = True
    return pred, ema_pred, target, positives, mask


@st.composite
def rewards(draw, min_candidates=1, max_candidates=8, spread=50.0):
    """float64 (B, K)."""
    shape = draw(st.integers(1, 4)), draw(st.integers(min_candidates, max_candidates))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    scale = draw(st.floats(0, spread))
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def errors_of(seed, batch=64, num=4, scale=1.0):
    """float64 (B, K) between 0 and `scale`."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.rand(batch, num, generator=generator, dtype=torch.float64)
