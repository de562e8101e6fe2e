"""Bounded negative guidance: negatives are drawn to a finite place, alone and in closed loop."""

import itertools

import pytest
import torch
from closed_loop import distances, worst_growth
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, problems

from agsm_loss import AGSMLoss, SoftREPALoss
from agsm_loss import functional as AF


@given(problems(min_candidates=2), st.floats(0.01, 1))
def test_the_minimum_is_the_guided_target(problem, neg_scale):
    pred, ema_pred, target, positives, mask = problem
    loss = AGSMLoss(neg_scale=neg_scale)
    goal = loss.guide(ema_pred, target, positives, mask).targets.requires_grad_()
    at_goal = loss(goal, ema_pred, target, positives, mask)
    at_goal.backward()
    assert at_goal == 0 and (goal.grad == 0).all()
    assert loss(pred, ema_pred, target, positives, mask) >= 0


@given(problems(min_candidates=2), st.floats(1.0, 1e6))
def test_the_gradient_is_linear_in_the_prediction(problem, factor):
    pred, ema_pred, target, positives, mask = problem
    loss = AGSMLoss(neg_scale=1.0)
    goal = loss.guide(ema_pred, target, positives, mask).targets

    def grad(away):
        leaf = (goal + away).requires_grad_()
        return torch.autograd.grad(loss(leaf, ema_pred, target, positives, mask), leaf)[0]

    away = pred - goal
    torch.testing.assert_close(grad(factor * away), factor * grad(away), rtol=1e-6, atol=1e-6)
    per_element = 2 * away.abs() / target[0].numel() / len(target)
    assert (grad(away).abs() <= per_element * (1 + 1e-6) + 1e-9).all()


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("num", [2, 3, 8])
@pytest.mark.parametrize("neg_scale", [0.1, 1.0])
@pytest.mark.parametrize("temperature", [1e-3, 1.0])
def test_never_grows_inside_the_safe_region(num, neg_scale, temperature):
    """D + N of `agsm_loss.functional`'s proof, with the EMA right behind the student."""
    growth = worst_growth(num, 1.0, neg_scale, decay=0.0, temperature=temperature, steps=150)
    assert growth <= 1 + 1e-9


@given(st.integers(2, 8), st.floats(0, 1), st.floats(0, 1), SEEDS)
def test_one_step_of_the_proof_for_any_weights(num, pos_scale, neg_scale, seed):
    """The same inequality for weights that no temperature need give, and any partial step."""
    generator = torch.Generator().manual_seed(seed)
    ema_pred = torch.randn(1, num, 3, generator=generator).double()
    ema_pred *= 10 ** (4 * torch.rand(1, num, 1, generator=generator).double() - 2)
    weights = (9 * torch.randn(1, num, generator=generator).double()).softmax(1)
    target = torch.zeros(1, 3).double()
    goal = AF.guided_targets(
        target, AF.alignment_guidance(ema_pred, weights), pos_scale=pos_scale, neg_scale=neg_scale
    )
    step = float(torch.rand((), generator=generator)) / (1 + neg_scale)
    after = torch.lerp(ema_pred, goal, step)

    def total(x):
        norm = x[0].norm(dim=-1)
        return norm[0] + norm[1:].max()

    assert total(after) <= total(ema_pred) * (1 + 1e-12)


@pytest.mark.slow
@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("neg_scale", [0.1, 1.0])
def test_stays_in_a_ball_for_a_thousand_steps(neg_scale):
    """With an EMA that lags, at the published (γ⁺, γ⁻) and K: within twice the start."""
    assert worst_growth(4, 1.0, neg_scale, decay=0.99, starts=8, steps=1000) <= 2.0


def test_two_candidates_contract_at_the_derived_rate():
    """K = 2, the EMA right behind: the gap d is multiplied by 1 − rate·(1 − γ⁺w_n + γ⁻w_y)."""
    start = torch.tensor([[[0.5], [-0.2]]]).double()
    target, rate = torch.zeros(1, 1).double(), 0.25
    weights = AF.guide(start, target, neg_scale=0.3).weights[0]
    after = start.clone().requires_grad_()
    loss = AGSMLoss(pos_scale=1.0, neg_scale=0.3)(after, start, target)
    (grad,) = torch.autograd.grad(loss, after)
    moved = start - rate * grad / 2
    gap = (moved[0, 0] - moved[0, 1]) / (start[0, 0] - start[0, 1])
    torch.testing.assert_close(gap[0], 1 - rate * (1 - weights[1] + 0.3 * weights[0]))


def test_runs_away_outside():
    """γ⁺ = 2 from a start where the match is the worse one."""
    start = torch.tensor([[[1.0], [0.0]]]).double()
    target = torch.zeros(1, 1).double()
    for pos_scale, runs in ((1.0, False), (2.0, True)):
        path = distances(start, target, steps=100, decay=0.0, pos_scale=pos_scale, neg_scale=0.0)
        assert (path[-1].max() > 1e6) == runs
        assert path.isfinite().all()


@pytest.mark.slow
@pytest.mark.unchecked_shapes
def test_softrepa_has_no_fixed_point():
    """The same free predictions under SoftREPA: the negative's error has one direction, up."""
    start = torch.tensor([0.1, 0.2]).double().reshape(1, 2, 1).expand(1, 2, 4)
    target = torch.zeros(1, 4).double()
    pred, loss, errors = start.clone().requires_grad_(), SoftREPALoss(), [0.2**2]
    for _ in range(1000):
        (grad,) = torch.autograd.grad(loss(pred, target), pred)
        assert (grad[0, 1] * pred[0, 1]).sum() < 0  # descent moves the negative outwards, always
        with torch.no_grad():
            pred -= 0.05 * grad
        errors.append(float(AF.denoising_error(pred, target)[0, 1].detach()))
    assert all(later > earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] > 5 * errors[0]
    ours = distances(start, target, steps=1000, neg_scale=1.0)[:, 0]
    assert ours.sum(1).max() <= ours[0].sum() * (1 + 1e-9)
    assert ours[-1, 1] < ours[0, 1]
