"""The shadow of the trainable parameters."""

import pytest
import torch
from torch import nn

from agsm_loss import EMA


def net(dtype=torch.float32):
    layers = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)
    layers[0].requires_grad_(False)
    return layers


def step(module):
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))


def test_starts_equal_and_only_follows_the_trainable():
    module = net()
    ema = EMA(module.parameters())
    assert len(ema.shadow) == 2 and sum(s.numel() for s in ema.shadow) == 2 * 4 + 2
    x = torch.randn(5, 3)
    with ema.applied():
        inside = module(x)
    assert torch.equal(inside, module(x))


def test_a_module_or_its_parameters():
    module = net()
    of_module, of_parameters = EMA(module), EMA(module.parameters())
    for ours, theirs in zip(of_module.parameters, of_parameters.parameters, strict=True):
        assert ours is theirs
    step(module)
    for ema in (of_module, of_parameters):
        ema.update()
    for ours, theirs in zip(of_module.shadow, of_parameters.shadow, strict=True):
        assert torch.equal(ours, theirs)
    module[2].weight = nn.Parameter(torch.zeros(2, 4))  # another in its place
    with of_module.applied():
        assert module[2].weight.abs().max() > 0


def test_constant_decay():
    module = net()
    ema = EMA(module.parameters(), decay=0.9)
    expected = [p.detach().clone() for p in ema.parameters]
    for _ in range(7):
        step(module)
        ema.update()
        expected = [
            0.9 * e + 0.1 * p.detach() for e, p in zip(expected, ema.parameters, strict=True)
        ]
    for shadow, value in zip(ema.shadow, expected, strict=True):
        torch.testing.assert_close(shadow, value)


def test_warmup_starts_from_small_decays():
    ema = EMA(net().parameters(), decay=0.9999, warmup=True)
    decays = []
    for _ in range(100):
        ema.update()
        decays.append(ema.current_decay)
    assert decays[0] == pytest.approx(2 / 11) and decays[-1] == pytest.approx(101 / 110)
    ema.num_updates = 10**6
    assert ema.current_decay == 0.9999


def test_applied_exchanges_and_restores_also_after_an_error():
    module = net()
    ema = EMA(module.parameters(), decay=0.0)
    before = [p.detach().clone() for p in ema.parameters]
    ema.update()
    step(module)
    own = [p.detach().clone() for p in ema.parameters]
    pointers = [p.data_ptr() for p in ema.parameters]
    with pytest.raises(KeyError), ema.applied():
        assert all(torch.equal(p, b) for p, b in zip(ema.parameters, before, strict=True))
        raise KeyError
    assert all(torch.equal(p, o) for p, o in zip(ema.parameters, own, strict=True))
    assert pointers == [p.data_ptr() for p in ema.parameters]
    with ema.applied():
        pass


def test_nesting_and_updating_inside_are_refused():
    ema = EMA(net().parameters())
    with ema.applied():
        with pytest.raises(RuntimeError, match="inside itself"), ema.applied():
            pass
        with pytest.raises(RuntimeError, match="leave the context"):
            ema.update()
    ema.update()


def test_a_graph_from_before_survives():
    """The host's prediction is made before the EMA pass and run backward after it."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    ema = EMA(module.parameters(), decay=0.5)
    step(module)
    ema.update()
    x = torch.randn(5, 3)
    expected = torch.autograd.grad(module(x).sum(), list(module.parameters()))
    out = module(x)
    with torch.no_grad(), ema.applied():
        other = module(x)
    ours = torch.autograd.grad(out.sum(), list(module.parameters()))
    assert not torch.allclose(other, out)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_half_precision_students_have_a_float32_average():
    module = net(torch.bfloat16)
    ema = EMA(module.parameters(), decay=0.9999)
    assert all(s.dtype == torch.float32 for s in ema.shadow)
    with torch.no_grad():
        for p in ema.parameters:
            p.fill_(1.0)
    for shadow in ema.shadow:
        shadow.zero_()
    for _ in range(100):
        ema.update()
    assert all(s.min() > 0.0099 for s in ema.shadow)  # bfloat16 would have rounded each step away
    with ema.applied():
        assert all(p.dtype == torch.bfloat16 for p in ema.parameters)


def test_parameters_of_two_dtypes():
    ema = EMA([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).double())], decay=0.5)
    with torch.no_grad():
        for p in ema.parameters:
            p.zero_()
    ema.update()
    assert [s.tolist() for s in ema.shadow] == [[0.5, 0.5]] * 2


def test_state_dict_round_trip_and_mismatch():
    ours, theirs = net(), net()
    a, b = EMA(ours.parameters(), decay=0.9), EMA(theirs.parameters(), decay=0.9)
    step(ours)
    a.update()
    b.load_state_dict(a.state_dict())
    assert b.num_updates == 1
    assert all(torch.equal(x, y) for x, y in zip(a.shadow, b.shadow, strict=True))
    other = EMA(nn.Linear(3, 3).parameters())
    before = [s.clone() for s in other.shadow]
    with pytest.raises(ValueError, match="saved for other trainable parameters"):
        other.load_state_dict(a.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(other.shadow, before, strict=True))


@pytest.mark.parametrize("average_first", [False, True])
def test_autocast_takes_neither_model_for_the_other(average_first):
    """It keeps the cast weights by their parameter, whatever data that holds."""
    module, x = nn.Linear(8, 8), torch.randn(4, 8)
    ema = EMA(module.parameters())
    step(module)

    def own():
        return module(x)

    def average():
        with torch.no_grad(), ema.applied():
            return module(x)

    def alone(run):
        with torch.autocast("cpu", torch.bfloat16):
            return run()

    expected = {run: alone(run) for run in (own, average)}
    assert not torch.equal(expected[own], expected[average])
    with torch.autocast("cpu", torch.bfloat16):
        got = {run: run() for run in ((average, own) if average_first else (own, average))}
    for run, value in got.items():
        assert torch.equal(value, expected[run])
    got[own].sum().backward()
    assert module.weight.grad.abs().sum() > 0
