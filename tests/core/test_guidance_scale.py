"""`guidance_scale=s`: the target, other names of the same loss, where training comes to rest."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS
from torch import nn
from torch.nn import functional as F

from agsm_loss import EMA, AGSMLoss, AGSMRegularizer, Hard, InBatch, Mixed, Passes
from agsm_loss import functional as AF

SCALES = st.sampled_from([1, 1.5, 2, 3, 4, 20.0])


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(SCALES, st.integers(2, 5), st.floats(1e-3, 1e3), SEEDS)
def test_the_target_is_moved_from_the_others_weighted_mean(scale, number, temperature, seed):
    """By 1 − 1/s, whatever the matching caption's own weight is."""
    teacher, target = randn(3, number, 4, seed=seed), randn(3, 4, seed=seed + 1)
    loss = AGSMLoss(guidance_scale=scale, temperature=temperature)
    guidance = loss.guide(teacher, target)
    errors = (teacher - target.unsqueeze(1)).square().mean(2)
    among = (-errors[:, 1:] / temperature).softmax(1)
    away = (among.unsqueeze(2) * teacher[:, 1:]).sum(1)
    expected = target + (1 - 1 / scale) * (teacher[:, 0] - away)
    torch.testing.assert_close(guidance.targets[:, 0], expected)
    pred = randn(3, number, 4, seed=seed + 2)
    value = (pred[:, 0] - expected).square().mean()
    torch.testing.assert_close(loss(pred, teacher, target), value)


def test_a_scale_of_1_is_plain_denoising_exactly():
    pred, target = randn(3, 4, 5).float().requires_grad_(), randn(3, 5, seed=1).float()
    loss = AGSMLoss(guidance_scale=1)(pred, randn(3, 4, 5, seed=2).float(), target)
    assert loss == AF.denoising_error(pred[:, :1], target).mean()


def test_rows_with_nothing_to_move_from_are_plain_denoising():
    """Masked, or matching themselves; and others' weights that underflow still have a mean."""
    teacher, target = randn(3, 3, 4), randn(3, 4, seed=1)
    mask = torch.tensor([[True, False, False], [True, True, True], [True, True, False]])
    positive = torch.tensor([[True, False, False], [True, True, True], [True, False, False]])
    targets = AF.guide(teacher, target, positive, mask, guidance_scale=3).targets
    assert torch.equal(targets[0, 0], target[0])
    assert torch.equal(targets[1], target[1].expand(3, 4))
    torch.testing.assert_close(targets[2, 0], target[2] + 2 / 3 * (teacher[2, 0] - teacher[2, 1]))
    far = torch.cat([target.unsqueeze(1), target.unsqueeze(1) + 1e3], dim=1)
    moved = AF.guide(far, target, guidance_scale=2).targets[:, 0]
    torch.testing.assert_close(moved, target - 500)


@given(SCALES, SEEDS)
def test_other_names_of_the_same_loss(scale, seed):
    """Value and gradient, with the student as its own teacher and one competitor u."""
    v = randn(2, 6, seed=seed).requires_grad_()
    u, target = randn(2, 6, seed=seed + 1), randn(2, 6, seed=seed + 2)

    def both(loss):
        return loss.detach(), torch.autograd.grad(loss, v)[0]

    pred = torch.stack([v, u], dim=1)
    value, grad = both(AGSMLoss(guidance_scale=scale)(pred, pred.detach(), target))
    model_guidance = (v - target - (1 - 1 / scale) * (v.detach() - u)).square().mean()
    guidance_free = ((v + (scale - 1) * u) / scale - target).square().mean()
    towards_guided = (v - (u + scale * (target - u))).square().mean()
    for other, times, times_grad in (
        (model_guidance, 1, 1),
        (guidance_free, 1, 1 / scale),
        (towards_guided, scale**2, scale),
    ):
        torch.testing.assert_close(both(other), (times * value, times_grad * grad))


@given(SCALES, SEEDS)
def test_the_prediction_moves_in_place_of_the_target(scale, seed):
    """Value and gradient, also under a weighting; and guidance makes the prediction again."""
    v = randn(2, 6, seed=seed).requires_grad_()
    u, target = randn(2, 6, seed=seed + 1), randn(2, 6, seed=seed + 2)
    unguided = AF.undo_guidance(v, u, scale)
    torch.testing.assert_close(u + scale * (unguided - u), v)
    guidance = AGSMLoss(guidance_scale=scale).guide(torch.stack([v, u], dim=1), target)
    weight = randn(2, 6, seed=seed + 3).square()
    moved = (weight * (unguided - target) ** 2).mean()
    expected = (weight * (v - guidance.targets[:, 0]) ** 2).mean()
    torch.testing.assert_close(moved, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one, v)[0] for one in (moved, expected)))


@pytest.mark.unchecked_shapes
def test_undone_guidance_is_float32_and_at_scale_1_the_prediction_itself():
    pred, null_pred = randn(2, 3).bfloat16(), randn(2, 3, seed=1).bfloat16()
    assert AF.undo_guidance(pred, null_pred, 1) is pred
    assert AF.undo_guidance(pred, null_pred, 2).dtype == torch.float32
    with pytest.raises(ValueError, match=r"null_pred: .*\(2, 3\), got \(1, 3\)"):
        AF.undo_guidance(pred, null_pred[:1], 2)
    with pytest.raises(ValueError, match="guidance_scale: expected"):
        AF.undo_guidance(pred, null_pred, 0.5)


@given(SCALES, SEEDS)
def test_other_names_hold_for_several_competitors(scale, seed):
    """With u the others' weighted mean."""
    v = randn(2, 6, seed=seed).requires_grad_()
    others, target = randn(2, 3, 6, seed=seed + 1), randn(2, 6, seed=seed + 2)
    pred = torch.cat([v.unsqueeze(1), others], dim=1)
    loss = AGSMLoss(guidance_scale=scale, temperature=0.7)
    w = (-(others - target.unsqueeze(1)).square().mean(2) / 0.7).softmax(1)
    u = (w.unsqueeze(2) * others).sum(1)
    same = ((v + (scale - 1) * u) / scale - target).square().mean()
    torch.testing.assert_close(loss(pred, pred.detach(), target), same)


def test_the_published_form_is_the_same_where_its_strength_is():
    """γ⁺(1 − w_y) = 1 − 1/s: equal weights and one competitor, γ⁺ = 2(1 − 1/s)."""
    pred, teacher, target = randn(3, 2, 5), randn(3, 2, 5, seed=1), randn(3, 5, seed=2)
    published = AGSMLoss(pos_scale=4 / 3, temperature=1e12)(pred, teacher, target)
    torch.testing.assert_close(AGSMLoss(guidance_scale=3)(pred, teacher, target), published)


@pytest.mark.parametrize("kind", ["epsilon", "v", "flow"])
def test_parametrisations_agree(kind):
    """ε, v and flow targets of one x_t: each prediction is an affine map of the clean image."""
    x0, noise = randn(3, 5), randn(3, 5, seed=1)
    a, b = {"epsilon": (0.8, 0.6), "v": (0.8, 0.6), "flow": (0.7, 0.3)}[kind]
    noisy = a * x0 + b * noise

    def of(clean):
        implied = (noisy - a * clean) / b
        return {"epsilon": implied, "v": a * implied - b * clean, "flow": implied - clean}[kind]

    student = x0.unsqueeze(1) + randn(3, 3, 5, seed=2)
    # The same weights, as errors differ by a constant factor: T absorbs it.
    factor = ((of(x0) - of(x0 + 1)) ** 2).mean().item()
    loss = AGSMLoss(guidance_scale=3, temperature=factor)
    preds = torch.stack([of(one) for one in student.unbind(1)], dim=1)
    targets = loss.guide(preds, of(x0)).targets[:, 0]
    clean = AGSMLoss(guidance_scale=3, temperature=1.0).guide(student, x0).targets[:, 0]
    torch.testing.assert_close(targets, of(clean))


@given(SCALES, SEEDS)
def test_training_comes_to_rest_at_guidance_of_this_scale(scale, seed):
    """Each round takes the distance to the fixed point times 1 − 1/s, for any s."""
    others, target = randn(2, 2, 3, seed=seed), randn(2, 3, seed=seed + 1)
    loss = AGSMLoss(guidance_scale=scale)
    w = AF.plackett_luce_weights(AF.implicit_reward(others, target))
    away = (w.unsqueeze(2) * others).sum(1)
    rest = away + scale * (target - away)
    own = randn(2, 3, seed=seed + 2)
    for _ in range(3):
        before = own - rest
        own = loss.guide(torch.cat([own.unsqueeze(1), others], 1), target).targets[:, 0]
        torch.testing.assert_close(own - rest, (1 - 1 / scale) * before)


@given(SCALES, SEEDS)
def test_a_frozen_teacher_rests_at_the_same_scale(scale, seed):
    """It predicts the mean of the targets; the student rests at its guided target."""
    mean, away = randn(2, 1, 3, seed=seed), randn(2, 1, 3, seed=seed + 1)
    loss = AGSMLoss(guidance_scale=scale, frozen_teacher=True)
    rest = loss.guide(torch.cat([mean, away], 1), mean.squeeze(1)).targets[:, :1]
    torch.testing.assert_close(rest, away + scale * (mean - away))


@pytest.mark.parametrize(("weight", "trained_in"), [(1.0, 1.5), (4.0, 15 / 7)])
def test_added_to_a_denoising_loss_it_trains_less_in(weight, trained_in):
    """λ/(1 + λ) of 1 − 1/s: at this scale's prediction the two gradients cancel."""
    target, null = randn(2, 3, seed=1), randn(2, 3, seed=2)
    pred = (null + trained_in * (target - null)).requires_grad_()
    both = torch.stack([pred, null], dim=1)
    loss = AGSMLoss(guidance_scale=3)(both, both.detach(), target)
    (F.mse_loss(pred, target) + weight * loss).backward()
    torch.testing.assert_close(pred.grad, torch.zeros(2, 3).double())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 4, dtype=torch.float64)
        self.samples = []

    def forward(self, noisy, timesteps, text, bank):
        self.samples.append((len(noisy), torch.is_grad_enabled()))
        return self.layer(torch.cat([noisy, text], dim=1)).tanh()


CAPTIONS = ["a dog", "a cat", "two dogs"]


def problem():
    torch.manual_seed(0)
    batch = randn(3, 4), torch.tensor([10, 400, 900]), randn(3, 4, seed=1), randn(3, 3, seed=2)
    return Net(), batch, randn(1, 3, seed=3)


def gradient_of(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()))


@pytest.mark.parametrize("with_pred", [False, True])
def test_the_student_is_its_own_teacher(with_pred):
    """Equal to the formula by hand, and to an EMA that is equal to the student; the passes."""
    net, batch, empty = problem()
    noisy, timesteps, target, text = batch
    agsm = AGSMRegularizer(net, loss=AGSMLoss(guidance_scale=3))
    pred = net(noisy, timesteps, text, None) if with_pred else None
    loss, metrics = agsm(*batch, CAPTIONS, null=empty, pred=pred)
    assert net.samples == [(3, True), (3, False)]  # own captions, the empty one
    v = net(noisy, timesteps, text, None)
    u = net(noisy, timesteps, empty.expand(3, 3), None)
    by_hand = (v - target - 2 / 3 * (v - u).detach()).square().mean()
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(gradient_of(net, loss), gradient_of(net, by_hand))
    ema = AGSMRegularizer(net, EMA(net), AGSMLoss(guidance_scale=3))
    torch.testing.assert_close(ema(*batch, CAPTIONS, null=empty).loss, by_hand)
    assert metrics["agsm/chance_weight"] == 0.5


@pytest.mark.parametrize("settings", [{"chunk_size": 2}, {"backward": torch.Tensor.backward}])
def test_it_is_so_in_chunks_too(settings):
    net, batch, empty = problem()
    whole = AGSMRegularizer(net, loss=AGSMLoss(guidance_scale=3))(*batch, CAPTIONS, null=empty)
    expected = gradient_of(net, whole.loss)
    agsm = AGSMRegularizer(net, loss=AGSMLoss(guidance_scale=3), passes=Passes(**settings))
    loss = agsm(*batch, CAPTIONS, null=empty).loss
    if "backward" not in settings:
        loss.backward()
    torch.testing.assert_close(loss.detach(), whole.loss.detach())
    torch.testing.assert_close(tuple(p.grad for p in net.parameters()), expected)


def test_autocast_does_not_serve_a_weight_without_gradient_to_the_next_pass():
    net = nn.Linear(7, 4)

    def denoiser(noisy, timesteps, text, bank):
        return net(torch.cat([noisy, text], dim=1))

    batch = torch.randn(2, 4), torch.zeros(2), torch.randn(2, 4), torch.randn(2, 3)
    agsm = AGSMRegularizer(denoiser, loss=AGSMLoss(guidance_scale=2), passes=Passes(chunk_size=2))
    with torch.autocast("cpu", torch.bfloat16):
        agsm(*batch, CAPTIONS[:2], null=torch.zeros(1, 3)).loss.backward()
    assert net.weight.grad is not None and net.weight.grad.any()


def test_the_empty_caption_is_an_argument_in_any_structure():
    """One row or one an image; a dict as of a pipeline; beside edited and other captions."""
    net, (noisy, timesteps, target, text), empty = problem()
    agsm = AGSMRegularizer(net, loss=AGSMLoss(guidance_scale=3))
    one = agsm(noisy, timesteps, target, text, CAPTIONS, null=empty).loss
    each = agsm(noisy, timesteps, target, text, CAPTIONS, null=empty.expand(3, 3)).loss
    assert one == each

    def of_dict(noisy, timesteps, conditioning, bank):
        return net(noisy, timesteps, conditioning["text"][0], bank)

    nested = AGSMRegularizer(of_dict, loss=AGSMLoss(guidance_scale=3))
    given_dict = ({"text": [text, None]}, CAPTIONS)
    null = {"text": [empty, None]}
    assert nested(noisy, timesteps, target, *given_dict, null=null).loss == one
    for rule, hard, number in (
        (InBatch(2), None, 4),
        (Hard(), [["a fox"], [], []], 3),
        (Mixed(1), [["a fox"], [], []], 4),
    ):
        agsm = AGSMRegularizer(net, loss=AGSMLoss(guidance_scale=3), candidates=rule)
        rows = torch.cat([text, text[:1] + 1]) if hard else text
        out = agsm(noisy, timesteps, target, rows, CAPTIONS, hard_negatives=hard, null=empty)
        assert out.loss > 0
        assert net.samples[-1][0] <= 3 * (number - 1)


def test_a_dropped_caption_is_left_to_plain_denoising():
    net, batch, empty = problem()
    agsm = AGSMRegularizer(net, loss=AGSMLoss(guidance_scale=3))
    agsm(*batch, ["a dog", "", "a cat"], null=empty)
    assert net.samples[-1] == (2, False)
    with pytest.warns(UserWarning, match="got 2 empty ones of 3"):
        agsm(*batch, ["a dog", "", ""], null=empty)
    agsm(*batch, ["a dog", "", ""], null=empty)  # said once


def test_what_would_train_nothing_is_said():
    net, batch, empty = problem()
    loss = AGSMLoss(guidance_scale=3)
    agsm = AGSMRegularizer(net, loss=loss)
    with pytest.raises(ValueError, match=r'null: .*null=encode\(""\)'):
        agsm(*batch, CAPTIONS)
    with pytest.raises(ValueError, match="tensor without gradient"):
        agsm(*batch, CAPTIONS, null=empty, pred=torch.zeros(3, 4, dtype=torch.float64))
    with pytest.warns(UserWarning, match="the loss trains nothing"):
        loss(randn(1, 2, 3), randn(1, 2, 3), randn(1, 3))
    with pytest.raises(ValueError, match="EMA of this denoiser"):
        AGSMRegularizer(net, EMA(copy.deepcopy(net)), loss)
    with pytest.raises(ValueError, match="decay"):
        AGSMRegularizer(net, EMA(net, decay=1.0), loss)
    AGSMRegularizer(net, EMA(net, decay=1.0), AGSMLoss(guidance_scale=3, frozen_teacher=True))
    with pytest.raises(ValueError, match="expected decay 1"):
        AGSMRegularizer(net, loss=AGSMLoss(guidance_scale=3, frozen_teacher=True))
    with pytest.raises(ValueError, match="expected an EMA with neg_scale"):
        AGSMRegularizer(net, loss=AGSMLoss(neg_scale=0.1))


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda net, loss: AGSMRegularizer(net, loss), "Name the others"),
        (lambda net, loss: AGSMRegularizer(net), "Pass loss="),
        (lambda net, loss: AGSMRegularizer(net, loss=nn.MSELoss()), "got MSELoss"),
        (lambda net, loss: AGSMRegularizer(net, loss=loss, candidates="in_batch"), "InBatch"),
    ],
)
def test_parts_of_another_kind_are_named(make, words):
    with pytest.raises(TypeError, match=words):
        make(Net(), AGSMLoss(guidance_scale=3))


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"conditioning": None}, TypeError, "no tensor"),
        ({"conditioning": torch.zeros(4, 3)}, ValueError, "null="),
        ({"conditioning": torch.zeros(3, 3).numpy()}, TypeError, "ndarray"),
        ({"null": {"text": torch.zeros(1, 3)}}, ValueError, "structure"),
        ({"null": torch.zeros(1, 5)}, ValueError, "one length"),
        ({"null": torch.zeros(2, 3)}, ValueError, "one row"),
    ],
)
def test_bad_conditioning_is_named(changed, error, words):
    net, (noisy, timesteps, target, text), empty = problem()
    given_ = {"conditioning": text, "null": empty} | changed
    agsm = AGSMRegularizer(net, loss=AGSMLoss(guidance_scale=3))
    with pytest.raises(error, match=words):
        agsm(noisy, timesteps, target, captions=CAPTIONS, **given_)


def test_a_forgotten_update_is_said_once():
    net, batch, empty = problem()
    agsm = AGSMRegularizer(net, EMA(net), AGSMLoss(guidance_scale=3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for update in (True, True, False):
        for _ in range(2):  # accumulated: two calls a step
            agsm(*batch, CAPTIONS, null=empty).loss.backward()
        optimizer.step()
        if update:
            agsm.update_ema()
    with pytest.warns(UserWarning, match="update_ema"):
        agsm(*batch, CAPTIONS, null=empty)
    agsm(*batch, CAPTIONS, null=empty)


def test_its_state_is_kept_with_its_teacher():
    net, batch, empty = problem()
    own = AGSMRegularizer(net, loss=AGSMLoss(guidance_scale=3))
    own(*batch, CAPTIONS, null=empty)
    other = AGSMRegularizer(net, loss=AGSMLoss(guidance_scale=3))
    other.load_state_dict(own.state_dict())
    assert other.calls == 1
    with pytest.raises(ValueError, match="no EMA"):
        AGSMRegularizer(net, EMA(net), AGSMLoss(guidance_scale=3)).load_state_dict(own.state_dict())


def test_a_batch_in_which_nothing_competes_is_told_of_once():
    net, batch, _ = problem()
    rule = InBatch(2, allow_empty=True)
    agsm = AGSMRegularizer(net, loss=AGSMLoss(guidance_scale=3), candidates=rule)
    with pytest.warns(UserWarning, match="none for any image"):
        agsm(*batch, ["a dog"] * 3)
    agsm(*batch, ["a dog"] * 3)


def test_weights_and_temperatures_of_your_own_are_checked():
    pred, target = randn(2, 3, 4), randn(2, 4)
    with pytest.raises(ValueError, match="temperature: expected finite and > 0"):
        AF.guide(pred, target, guidance_scale=2, temperature=lambda errors, mask: -1.0)
    with pytest.raises(ValueError, match="reward_weight: expected finite numbers"):
        AF.guide(pred, target, guidance_scale=2, reward_weight=torch.tensor([1.0, -1.0]))
