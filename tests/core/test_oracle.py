"""Value and gradient against an independent float64 restatement with explicit loops."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import problems

from agsm_loss import AGSMLoss, SoftREPALoss
from agsm_loss import functional as AF

SCALES = st.sampled_from([0.0, 0.1, 1.0, 2.5])
TEMPERATURES = st.sampled_from([1e-3, 0.1, 1.0, 50.0])


def close(ours, theirs, tolerance):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs)
    scale = max(1.0, float(np.abs(theirs).max()))
    np.testing.assert_allclose(ours / scale, theirs / scale, rtol=tolerance, atol=tolerance)


@given(problems(), SCALES, SCALES, TEMPERATURES)
def test_float64_loss_and_gradient_to_1e_12(problem, pos_scale, neg_scale, temperature):
    pred, ema_pred, target, positives, mask = problem
    pred.requires_grad_()
    settings = {"pos_scale": pos_scale, "neg_scale": neg_scale, "temperature": temperature}
    terms = AGSMLoss(**settings).terms(pred, ema_pred, target, positives, mask)
    (3.0 * terms.loss).backward()  # ours is always one term among others
    loss, grad, weights = oracle.agsm(pred.detach(), ema_pred, target, positives, mask, **settings)
    close(terms.loss.item(), loss, 1e-12)
    close(pred.grad, 3.0 * grad, 1e-12)
    close(terms.weights, weights, 1e-12)
    close(terms.per_image.mean().item(), loss, 1e-12)
    close((terms.positive_term + terms.negative_term).item(), loss, 1e-12)


@given(problems(dtype=torch.float32), SCALES, SCALES)
def test_float32_to_1e_5(problem, pos_scale, neg_scale):
    pred, ema_pred, target, positives, mask = problem
    pred.requires_grad_()
    # A temperature on the errors' own scale: with one far below, the weights' condition number
    # magnifies the rounding of float32 inputs beyond any fixed tolerance.
    temperature = max(0.1, float((ema_pred - target.unsqueeze(1)).square().mean()))
    settings = {"pos_scale": pos_scale, "neg_scale": neg_scale, "temperature": temperature}
    loss = AGSMLoss(**settings)(pred, ema_pred, target, positives, mask)
    assert loss.dtype == torch.float32
    (0.5 * loss).backward()
    expected, grad, _ = oracle.agsm(pred.detach(), ema_pred, target, positives, mask, **settings)
    close(loss.item(), expected, 1e-5)
    close(pred.grad, 0.5 * grad, 1e-5)


def test_temperature_and_reward_weight_by_image():
    pred, ema_pred = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    target = torch.randn(2, 4, 5).double()
    temperature, weight = torch.tensor([0.3, 2.0]).double(), torch.tensor([0.5, 4.0]).double()
    loss = AF.agsm_loss(
        pred, ema_pred, target, neg_scale=1.0, temperature=temperature, reward_weight=weight
    )
    expected, _, _ = oracle.agsm(
        pred, ema_pred, target, temperature=temperature.numpy(), reward_weight=weight.numpy()
    )
    close(loss.item(), expected, 1e-12)
    by_time = AGSMLoss(neg_scale=1.0, temperature=temperature, reward_weight=lambda t: weight[t])
    assert by_time(pred, ema_pred, target, timesteps=torch.tensor([0, 1])) == loss


@given(
    problems(min_candidates=2),
    st.sampled_from([0.0, 1.0, 4.0]),
    st.sampled_from([0.07, 5.0]),
    st.sampled_from([0.0, 0.3]),
)
def test_softrepa(problem, logit_scale, temperature, denoising_weight):
    pred, _, target, _, _ = problem
    pred = (pred / pred.abs().max()).requires_grad_()
    target = target / target.abs().max()
    positives = torch.arange(pred.shape[0]) % pred.shape[1]
    settings = {
        "logit_scale": logit_scale,
        "temperature": temperature,
        "denoising_weight": denoising_weight,
    }
    loss = SoftREPALoss(**settings)(pred, target, positives)
    (2.0 * loss).backward()
    expected, grad = oracle.softrepa(pred.detach(), target, positives, **settings)
    close(loss.item(), expected, 1e-12)
    close(pred.grad, 2.0 * grad, 1e-12)


def test_the_oracle_can_disagree():
    pred, ema_pred, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 4)
    wrong, _, _ = oracle.agsm(pred, ema_pred, target, neg_scale=0.9)
    with pytest.raises(AssertionError):
        close(AGSMLoss(neg_scale=1.0)(pred, ema_pred, target).item(), wrong, 1e-5)
