"""Laws of the guidance and the guided targets."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, problems

from agsm_loss import AGSMLoss
from agsm_loss import functional as AF


def weights_of(ema_pred, seed):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(ema_pred.shape[:2], generator=generator).double()).softmax(1)


def norms(x):
    return x.reshape(*x.shape[:2], -1).norm(dim=-1)


@given(problems(), SEEDS)
def test_the_weighted_sum_vanishes(problem, seed):
    ema_pred = problem[1]
    weights = weights_of(ema_pred, seed)
    guidance = AF.alignment_guidance(ema_pred, weights)
    total = (weights.reshape(*weights.shape, *[1] * (ema_pred.ndim - 2)) * guidance).sum(1)
    assert total.abs().max() <= 1e-12 * max(1.0, float(ema_pred.abs().max()))


@given(problems(), SEEDS)
def test_bounded_by_the_widest_gap(problem, seed):
    ema_pred = problem[1]
    guidance = AF.alignment_guidance(ema_pred, weights_of(ema_pred, seed))
    gaps = (ema_pred.unsqueeze(2) - ema_pred.unsqueeze(1)).flatten(0, 1)
    widest = norms(gaps).reshape(*ema_pred.shape[:2], -1).amax(-1)
    assert (norms(guidance) <= widest * (1 + 1e-12) + 1e-300).all()


@given(problems(min_candidates=2))
def test_vanishes_for_a_certain_winner(problem):
    _, ema_pred, target, _, _ = problem
    ema_pred = ema_pred.clone()
    ema_pred[:, 0] = target
    sizes = []
    for temperature in (1e3, 1.0, 1e-3, 1e-9):
        scale = temperature * float((ema_pred - target.unsqueeze(1)).square().mean())
        guided = AF.guide(ema_pred, target, neg_scale=1.0, temperature=scale)
        sizes.append(float(guided.guidance_norm[:, 0].max()))
    # Errors of random rows are distinct, so the winner's weight tends to one as T falls.
    assert sizes[-1] <= 1e-6 * max(sizes[0], 1e-300)


@given(problems(), st.floats(0.1, 10), st.floats(-5, 5), st.sampled_from([0.0, 0.1, 1.0]))
def test_equivariant_to_an_affine_map(problem, factor, shift, neg_scale):
    _, ema_pred, target, positives, mask = problem
    scale = max(1e-12, float((ema_pred - target.unsqueeze(1)).square().mean()))
    settings = {"neg_scale": neg_scale}
    plain = AF.guide(ema_pred, target, positives, mask, temperature=scale, **settings)
    mapped = AF.guide(
        factor * ema_pred + shift,
        factor * target + shift,
        positives,
        mask,
        temperature=scale * factor**2,
        **settings,
    )
    torch.testing.assert_close(mapped.weights, plain.weights, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(mapped.targets, factor * plain.targets + shift, atol=1e-6, rtol=1e-6)


@given(problems())
def test_guide_is_the_functions_in_the_papers_order(problem):
    _, ema_pred, target, positives, _ = problem
    reward = AF.implicit_reward(ema_pred, target, temperature=0.3)
    weights = AF.plackett_luce_weights(reward)
    guidance = AF.alignment_guidance(ema_pred, weights)
    targets = AF.guided_targets(target, guidance, positives, pos_scale=0.7, neg_scale=0.2)
    guided = AF.guide(ema_pred, target, positives, pos_scale=0.7, neg_scale=0.2, temperature=0.3)
    for ours, theirs in zip(
        (guided.rewards, guided.weights, guided.targets), (reward, weights, targets), strict=True
    ):
        assert torch.equal(ours, theirs)
    rms = guidance.reshape(*guidance.shape[:2], -1).square().mean(-1).sqrt()
    torch.testing.assert_close(guided.guidance_norm, rms)


@given(problems())
def test_targets_carry_no_gradient(problem):
    pred, ema_pred, target, positives, mask = (
        x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in problem
    )
    AGSMLoss(neg_scale=1.0)(pred, ema_pred, target, positives, mask).backward()
    assert pred.grad is not None and ema_pred.grad is None and target.grad is None
