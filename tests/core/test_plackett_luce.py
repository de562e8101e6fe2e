"""Laws of the Plackett–Luce weights and of the implicit reward under them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, problems, rewards

from agsm_loss import functional as AF

MANY = st.sampled_from([1e-30, 1e-15, 1e-5, 1.0, 1e5, 1e15, 1e30])


@given(rewards(), SEEDS)
def test_a_distribution_over_the_unmasked(reward, seed):
    mask = torch.rand(reward.shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, 0] = True
    weights = AF.plackett_luce_weights(reward, mask)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights), dtype=torch.float64))
    assert (weights[~mask] == 0).all()
    for row in range(len(reward)):
        alone = AF.plackett_luce_weights(reward[row : row + 1, mask[row]])
        torch.testing.assert_close(weights[row, mask[row]], alone[0])


@given(rewards(), SEEDS)
def test_permuting_candidates_permutes_weights(reward, seed):
    order = torch.randperm(reward.shape[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        AF.plackett_luce_weights(reward)[:, order], AF.plackett_luce_weights(reward[:, order])
    )


@given(rewards(), st.floats(-100, 100))
def test_a_constant_reward_changes_nothing(reward, constant):
    torch.testing.assert_close(
        AF.plackett_luce_weights(reward + constant), AF.plackett_luce_weights(reward)
    )


@given(rewards(min_candidates=3, spread=5.0), st.floats(-5, 5))
def test_odds_of_two_depend_on_their_own_rewards(reward, changed):
    before = AF.plackett_luce_weights(reward)
    other = reward.clone()
    other[:, 2] = changed
    after = AF.plackett_luce_weights(other)
    torch.testing.assert_close(before[:, 0] / before[:, 1], after[:, 0] / after[:, 1])
    torch.testing.assert_close(
        (before[:, 0] / before[:, 1]).log(), reward[:, 0] - reward[:, 1], atol=1e-9, rtol=1e-9
    )


@given(problems(min_candidates=2), st.integers(0, 3))
def test_a_smaller_error_has_a_larger_weight(problem, column):
    _, ema_pred, target, _, _ = problem
    column %= ema_pred.shape[1]
    scale = float((ema_pred - target.unsqueeze(1)).square().mean())
    better = ema_pred.clone()
    better[:, column] = target + 0.9 * (ema_pred[:, column] - target)
    before, after = (
        AF.plackett_luce_weights(AF.implicit_reward(x, target, temperature=scale))
        for x in (ema_pred, better)
    )
    assert (after[:, column] > before[:, column]).all()


@given(rewards(min_candidates=2, spread=3.0))
def test_limits_of_the_temperature(reward):
    num = reward.shape[1]
    hot = AF.plackett_luce_weights(reward / 1e12)
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / num), atol=1e-9, rtol=0)
    reward = torch.arange(num).double().flip(0) + 0 * reward  # distinct, the first one best
    cold = AF.plackett_luce_weights(reward / 1e-6)
    assert (cold[:, 0] == 1).all() and (cold[:, 1:] == 0).all()


@given(rewards(min_candidates=2, max_candidates=2))
def test_two_candidates_are_bradley_terry(reward):
    torch.testing.assert_close(
        AF.plackett_luce_weights(reward)[:, 0], torch.sigmoid(reward[:, 0] - reward[:, 1])
    )


@given(rewards(max_candidates=1))
def test_one_candidate_has_weight_one(reward):
    assert (AF.plackett_luce_weights(reward) == 1).all()


@given(st.lists(MANY, min_size=1, max_size=5), st.sampled_from([1e-30, 0.1, 1e30]))
def test_extreme_errors_stay_finite(errors, temperature):
    ema_pred = torch.tensor(errors).sqrt().reshape(1, -1, 1).expand(1, -1, 4)
    reward = AF.implicit_reward(ema_pred, torch.zeros(1, 4), temperature=temperature)
    weights = AF.plackett_luce_weights(reward)
    assert reward.isfinite().all() and weights.isfinite().all()
    assert math.isclose(float(weights.sum()), 1, rel_tol=1e-6)
    best = errors.index(min(errors))
    assert weights[0, best] >= weights.max() * (1 - 1e-6)


def test_the_published_exponentials_would_have_failed():
    error = torch.tensor([[20.0, 21.0]])
    published = torch.exp(-error / 0.1) / torch.exp(-error / 0.1).sum(1, keepdim=True)
    assert published.isnan().all()
    ours = AF.plackett_luce_weights(-error / 0.1)
    torch.testing.assert_close(ours[0, 0], torch.sigmoid(torch.tensor(10.0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_weighed_in_float32(dtype):
    limit = float(torch.finfo(torch.float16).max)
    ema_pred = torch.tensor([[[1e-4, limit], [0.0, -limit]]], dtype=dtype)
    reward = AF.implicit_reward(ema_pred, torch.zeros(1, 2, dtype=dtype))
    weights = AF.plackett_luce_weights(reward)
    assert reward.dtype == weights.dtype == torch.float32
    assert reward.isfinite().all() and weights.isfinite().all()


@given(SEEDS)
def test_weights_agree_across_parametrisations(seed):
    """ε, v and x_0 predictions of one model, with the A(t) that makes their errors equal.

    With x_t = αx_0 + σε: v = αε − σx_0 = (ε − σx_t)/α and x_0 = (x_t − σε)/α, so an error in ε
    counts 1/α² in v and (σ/α)² in x_0.
    """
    generator = torch.Generator().manual_seed(seed)
    x_0, eps = (torch.randn(3, 5, generator=generator).double() for _ in range(2))
    alpha = torch.tensor([0.95, 0.6, 0.2]).double()
    sigma = (1 - alpha**2).sqrt()
    a, s = alpha.reshape(3, 1), sigma.reshape(3, 1)
    x_t = a * x_0 + s * eps
    eps_pred = eps.unsqueeze(1) + 0.3 * torch.randn(3, 4, 5, generator=generator).double()
    ak, sk, xk = a.unsqueeze(1), s.unsqueeze(1), x_t.unsqueeze(1)
    views = {
        "epsilon": (eps_pred, eps, torch.ones(3).double()),
        "v_prediction": ((eps_pred - sk * xk) / ak, a * eps - s * x_0, alpha**2),
        "sample": ((xk - sk * eps_pred) / ak, x_0, (alpha / sigma) ** 2),
    }
    as_eps = {
        "epsilon": lambda p: p,
        "v_prediction": lambda p: ak * p + sk * xk,
        "sample": lambda p: (xk - ak * p) / sk,
    }
    guided = {n: AF.guide(p, t, neg_scale=1.0, reward_weight=w) for n, (p, t, w) in views.items()}
    for name, result in guided.items():
        torch.testing.assert_close(result.weights, guided["epsilon"].weights)
        torch.testing.assert_close(as_eps[name](result.targets), guided["epsilon"].targets)
    unweighted = AF.guide(*views["v_prediction"][:2], neg_scale=1.0)
    assert (unweighted.weights - guided["epsilon"].weights).abs().max() > 1e-2
