"""Dual soft tokens: what each sample gets."""

import pytest
import torch

from agsm_loss import Bank, SoftTokens


def test_a_token_is_its_bank_plus_its_time():
    tokens = SoftTokens(6, num_tokens=3, num_layers=2)
    out = tokens(torch.tensor([15, 999]), torch.tensor([Bank.NEGATIVE, Bank.POSITIVE]))
    time = tokens.time_tokens.weight[[1, 99]].reshape(2, 2, 1, 6)
    expected = torch.stack([tokens.tokens[1], tokens.tokens[0]]) + time
    assert out.shape == (2, 2, 3, 6)
    torch.testing.assert_close(out, expected)


def test_one_set_for_all_layers():
    tokens = SoftTokens(6, num_tokens=3)
    out = tokens(torch.tensor([0, 500]), Bank.NEGATIVE)
    assert out.shape == (2, 3, 6) and tokens.tokens.shape == (2, 3, 6)
    torch.testing.assert_close(out[1], tokens.tokens[1] + tokens.time_tokens.weight[50])


def test_the_published_sizes():
    sd3 = SoftTokens(1536, num_layers=5)
    assert sd3.tokens.shape == (2, 5, 4, 1536) and sd3.time_tokens.weight.shape == (100, 5 * 1536)
    assert abs(float(sd3.tokens.detach().std()) - 0.02) < 1e-3
    assert abs(float(sd3.time_tokens.weight.detach().std()) - 0.02) < 1e-3
    assert SoftTokens(768).tokens.shape == (2, 4, 768)


@pytest.mark.parametrize(
    ("timestep", "bucket"),
    [(0, 0), (9, 0), (9.99, 0), (10, 1), (10.5, 1), (999, 99), (1000, 99), (1e6, 99), (-3, 0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_buckets(timestep, bucket, dtype):
    tokens = SoftTokens(4)
    timesteps = torch.tensor([timestep]).to(dtype)
    before = timesteps.clone()
    assert tokens.bucket(timesteps).tolist() == [bucket]
    tokens(timesteps)
    assert torch.equal(timesteps, before)


def test_other_ranges_of_timesteps():
    tokens = SoftTokens(4, time_buckets=10, num_train_timesteps=50)
    assert tokens.bucket(torch.tensor([0, 4, 5, 49, 50])).tolist() == [0, 0, 1, 9, 9]


def test_scalar_timestep_serves_every_sample():
    tokens = SoftTokens(4)
    bank = torch.tensor([0, 1, 0])
    torch.testing.assert_close(tokens(20.0, bank), tokens(torch.full((3,), 20.0), bank))
    assert tokens(torch.tensor(20), bank).shape == (3, 4, 4)


def test_without_time_tokens():
    tokens = SoftTokens(4, time_buckets=None)
    out = tokens(None, torch.tensor([1, 0]))
    torch.testing.assert_close(out, tokens.tokens[[1, 0]])
    assert [name for name, _ in tokens.named_parameters()] == ["tokens"]


def test_without_time_tokens_there_is_a_row_for_each_sample():
    tokens, t = SoftTokens(4, num_layers=2, time_buckets=None), torch.tensor([0.0, 5.0, 9.0])
    for bank in (Bank.NEGATIVE, torch.tensor([1]), torch.tensor([1, 1, 1])):
        assert torch.equal(tokens(t, bank), tokens.tokens[[1, 1, 1]])
    assert tokens(None, Bank.NEGATIVE).shape == tokens(5.0, Bank.NEGATIVE).shape == (1, 2, 4, 4)
    tokens(t, Bank.NEGATIVE).sum().backward()
    assert (tokens.tokens.grad[1] == 3).all() and (tokens.tokens.grad[0] == 0).all()


def test_gradient_reaches_the_banks_that_were_used():
    tokens = SoftTokens(4, num_layers=2)
    tokens(torch.tensor([0.0, 0.0]), torch.tensor([0, 0])).sum().backward()
    assert (tokens.tokens.grad[0] != 0).all() and (tokens.tokens.grad[1] == 0).all()
    assert (tokens.time_tokens.weight.grad[0] != 0).all()
    assert (tokens.time_tokens.weight.grad[1:] == 0).all()


def test_shared_bank():
    tokens = SoftTokens(4, banks="shared")
    t = torch.zeros(1)
    assert tokens.tokens.shape == (1, 4, 4)
    assert torch.equal(tokens(t, Bank.POSITIVE), tokens(t, Bank.NEGATIVE))
    tokens(t, Bank.NEGATIVE).sum().backward()
    assert (tokens.tokens.grad != 0).all()


def test_positive_only():
    tokens = SoftTokens(4, banks="positive_only", time_buckets=None)
    initial = tokens(None, Bank.NEGATIVE).clone()
    tokens(None, torch.tensor([0, 1])).sum().backward()
    assert (tokens.tokens.grad != 0).all() and tokens.tokens.shape == (1, 4, 4)
    with torch.no_grad():
        tokens.tokens.add_(1.0)
    assert torch.equal(tokens(None, Bank.NEGATIVE), initial)
    assert set(tokens.state_dict()) == {"tokens", "frozen"}


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (2, 1, 3, 6), ()])
def test_init_is_broadcast_and_copied(shape):
    init = torch.randn(shape)
    tokens = SoftTokens(6, num_tokens=3, num_layers=2, init=init, time_buckets=None)
    assert torch.equal(tokens.tokens, init.expand(2, 2, 3, 6))
    with torch.no_grad():
        tokens.tokens.zero_()
    assert shape == () or not (init == 0).all()


@pytest.mark.parametrize("banks", ["dual", "shared", "positive_only"])
@pytest.mark.parametrize("num_layers", [None, 3])
def test_state_dict_round_trip(banks, num_layers):
    ours, theirs = (SoftTokens(4, num_layers=num_layers, banks=banks) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    t, bank = torch.tensor([3.0, 700.0]), torch.tensor([1, 0])
    assert torch.equal(ours(t, bank), theirs(t, bank))
