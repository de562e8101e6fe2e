"""The fixed list for every loss: smoke, dtype, degenerate cases, gradcheck, compile, equality."""

import inspect
import itertools
import math
from functools import partial

import compile_check
import fresh
import pytest
import torch
from hypothesis import given
from strategies import SEEDS, problems

from agsm_loss import AGSMLoss, SoftREPALoss
from agsm_loss import functional as AF


def batch(shape=(2, 3, 4), dtype=torch.float64):
    pred, ema_pred = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    return pred.requires_grad_(), ema_pred, torch.randn(shape[0], *shape[2:]).to(dtype)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 7), (2, 3, 4, 8, 8), (1, 2, 3, 4, 5, 6)])
def test_any_number_of_trailing_axes(shape):
    loss = AGSMLoss(neg_scale=1.0)(*batch(shape))
    assert loss.shape == () and loss.isfinite()


def test_module_and_function_have_the_same_settings_and_defaults():
    for module, called, function in (
        (AGSMLoss, AGSMLoss.guide, AF.guide),
        (SoftREPALoss, SoftREPALoss.forward, AF.softrepa_loss),
    ):
        made = inspect.signature(module).parameters
        plain = inspect.signature(function).parameters
        keyword = {n for n, p in plain.items() if p.kind is p.KEYWORD_ONLY}
        assert set(made) == keyword
        assert all(made[n].default == plain[n].default for n in made)
        positional = [n for n, p in plain.items() if p.kind is not p.KEYWORD_ONLY]
        given = inspect.signature(called).parameters
        assert [n for n in given if n not in {"self", "timesteps"}] == positional
    whole = inspect.signature(AF.agsm_loss).parameters
    assert [*map(str, whole.values())][1:] == [
        *map(str, inspect.signature(AF.guide).parameters.values())
    ]
    positional = [n for n, p in whole.items() if p.kind is not p.KEYWORD_ONLY]
    for method in (AGSMLoss.forward, AGSMLoss.terms):
        given = inspect.signature(method).parameters
        assert [n for n in given if n not in {"self", "timesteps"}] == positional


def test_the_function_passes_every_setting_on():
    pred, ema_pred, target = batch()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    settings = {
        "positives": torch.tensor([1, 0]),
        "mask": mask,
        "pos_scale": 0.7,
        "neg_scale": 0.3,
        "temperature": 0.2,
        "reward_weight": torch.tensor([0.5, 2.0]),
    }
    guidance = AF.guide(ema_pred, target, **settings)
    assert AF.agsm_loss(pred, ema_pred, target, **settings) == AF.agsm_terms(pred, guidance).loss
    needed = {"neg_scale": 0.3}
    for name in settings.keys() - needed.keys():
        without = {n: value for n, value in settings.items() if n != name}
        plain = AF.agsm_loss(pred, ema_pred, target, **without)
        assert plain != AF.agsm_loss(pred, ema_pred, target, **settings), name


def test_a_scale_is_chosen():
    """The guidance scale, or the published form's."""
    problem = batch()
    for call in (AGSMLoss, partial(AF.agsm_loss, *problem), partial(AF.guide, *problem[1:])):
        for settings, words in (
            ({}, "expected the scale that you would sample with"),
            ({"guidance_scale": 2, "pos_scale": 1}, "expected no pos_scale"),
            ({"guidance_scale": 2, "neg_scale": 0.1}, "expected no pos_scale"),
            ({"guidance_scale": 0.5}, "finite number ≥ 1"),
            ({"frozen_teacher": True, "pos_scale": 1}, "expected a guidance_scale with it"),
        ):
            with pytest.raises(ValueError, match=words):
                call(**settings)


def test_the_loss_is_its_parts():
    pred, ema_pred, target = batch()
    guidance = AF.guide(ema_pred, target, neg_scale=0.3)
    whole = AF.agsm_loss(pred, ema_pred, target, neg_scale=0.3)
    assert AF.agsm_terms(pred, guidance).loss == whole
    columns = [AF.denoising_error(pred[:, [j]], guidance.targets[:, [j]]) for j in range(3)]
    errors = torch.cat(columns, dim=1) * guidance.coefficients
    assert AF.terms_from_errors(errors, guidance).loss == whole


@given(problems())
def test_module_equals_function(problem):
    settings = {"pos_scale": 0.7, "neg_scale": 0.3, "temperature": 0.2}
    assert AGSMLoss(**settings)(*problem) == AF.agsm_loss(*problem, **settings)


@given(problems())
def test_ways_to_name_the_positives_agree(problem):
    pred, ema_pred, target, _, mask = problem
    columns = torch.zeros(len(target), dtype=torch.long)
    if mask is not None:
        columns = mask.int().argmax(1)
    grid = columns.unsqueeze(1) == torch.arange(pred.shape[1])
    by_column = AGSMLoss(neg_scale=1.0)(pred, ema_pred, target, columns, mask)
    assert by_column == AGSMLoss(neg_scale=1.0)(pred, ema_pred, target, grid, mask)
    if (columns == 0).all():
        assert by_column == AGSMLoss(neg_scale=1.0)(pred, ema_pred, target, None, mask)


@given(problems(min_candidates=2), SEEDS)
def test_permuting_candidates_changes_nothing(problem, seed):
    pred, ema_pred, target, _, _ = problem
    order = torch.randperm(pred.shape[1], generator=torch.Generator().manual_seed(seed))
    where = torch.full((len(target),), int((order == 0).nonzero()))
    torch.testing.assert_close(
        AGSMLoss(neg_scale=1.0)(pred[:, order], ema_pred[:, order], target, where),
        AGSMLoss(neg_scale=1.0)(pred, ema_pred, target),
    )


@given(problems())
def test_the_batch_is_the_mean_of_its_images(problem):
    pred, ema_pred, target, positives, mask = problem
    alone = [
        AGSMLoss(neg_scale=1.0)(*(x if x is None else x[i : i + 1] for x in problem))
        for i in range(len(pred))
    ]
    whole = AGSMLoss(neg_scale=1.0).terms(pred, ema_pred, target, positives, mask)
    torch.testing.assert_close(torch.stack(alone).mean(), whole.loss)
    torch.testing.assert_close(torch.stack(alone), whole.per_image)


def test_masked_places_are_never_read():
    pred, ema_pred, target = batch()
    mask = torch.tensor([[True, True, False], [True, False, True]])
    clean = AGSMLoss(neg_scale=1.0)(pred, ema_pred, target, mask=mask)
    (slope,) = torch.autograd.grad(clean, pred)
    dirty = pred.detach().masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    loss = AGSMLoss(neg_scale=1.0)(
        dirty, ema_pred.masked_fill(~mask.unsqueeze(-1), torch.inf), target, mask=mask
    )
    loss.backward()
    assert loss == clean
    assert torch.equal(dirty.grad, slope) and (slope[~mask] == 0).all()
    first = torch.zeros(2, dtype=torch.long)
    clean = SoftREPALoss()(pred, target, first, mask)
    assert SoftREPALoss()(dirty, target, first, mask) == clean
    alone = torch.tensor([[True, False, False]] * 2)
    assert SoftREPALoss()(dirty, target, first, alone) == 0


def plain_score_matching(pred, target):
    return (pred - target).square().mean()


def test_degenerate_rows_are_plain_score_matching():
    pred, ema_pred, target = batch()
    first = plain_score_matching(pred[:, 0], target)
    one = AGSMLoss(neg_scale=1.0)(pred[:, :1], ema_pred[:, :1], target)
    torch.testing.assert_close(one, first)
    mask = torch.tensor([[True, False, False]] * 2)
    torch.testing.assert_close(AGSMLoss(neg_scale=1.0)(pred, ema_pred, target, mask=mask), first)
    terms = AGSMLoss(neg_scale=1.0).terms(pred, ema_pred, target, mask=mask)
    assert terms.win_rate == 0 and terms.score_margin == 0 and terms.chance_weight == 1
    assert all(value.isfinite().all() for value in terms)


def test_no_negative_scale_drops_the_negative_term():
    pred, ema_pred, target = batch()
    terms = AGSMLoss(neg_scale=0.0).terms(pred, ema_pred, target)
    assert terms.negative_term == 0 and terms.loss == terms.positive_term
    terms.loss.backward()
    assert (pred.grad[:, 1:] == 0).all() and (pred.grad[:, 0] != 0).all()
    off = AGSMLoss(pos_scale=0.0, neg_scale=0.0)(pred, ema_pred, target)
    torch.testing.assert_close(off, plain_score_matching(pred[:, 0], target))


def test_equal_predictions_give_the_plain_error_twice():
    pred, _, target = batch()
    same = pred[:, :1].expand_as(pred)
    torch.testing.assert_close(
        AGSMLoss(neg_scale=1.0)(same, same, target), 2 * plain_score_matching(pred[:, 0], target)
    )


def test_the_win_rate_does_not_depend_on_the_temperature():
    """Where it is so large that the weights are equal in float32, too."""
    ema_pred, target = torch.rand(16, 3, 5), torch.zeros(16, 5)
    rates = []
    for temperature in (1e-3, 0.1, 1e6):
        terms = AGSMLoss(neg_scale=0, temperature=temperature).terms(ema_pred, ema_pred, target)
        rates.append(terms.win_rate.item())
    assert terms.weight_entropy.item() == pytest.approx(math.log(3))
    errors = ema_pred.square().mean(-1)
    expected = (errors[:, 0] < errors[:, 1:].amin(1)).float().mean().item()
    assert rates == [expected] * 3 and 0 < expected < 1


def test_diagnostics_by_hand():
    ema_pred = torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]], [[0.0], [0.0]]])
    target, mask = torch.zeros(3, 1), torch.tensor([[True, True], [True, True], [True, False]])
    terms = AGSMLoss(neg_scale=1.0, temperature=1.0).terms(ema_pred, ema_pred, target, mask=mask)
    first, second = 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(9))
    assert terms.win_rate.item() == pytest.approx(1 / 2)
    assert terms.score_margin.item() == pytest.approx((2 * first - 1 + 2 * second - 1) / 2)
    assert terms.positive_weight.item() == pytest.approx((first + second + 1) / 3)
    assert terms.chance_weight.item() == pytest.approx((0.5 + 0.5 + 1) / 3)
    entropy = sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in (first, second)) / 3
    assert terms.weight_entropy.item() == pytest.approx(entropy, rel=1e-5)
    # |Δ_1| = (1 − w_1)·|p̂_1 − p̂_2| for two candidates, and Δ = 0 for one.
    norm = (1 - first) * 1 + first * 1 + (1 - second) * 3 + second * 3
    assert terms.guidance_norm.item() == pytest.approx(norm / 5, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    pred, ema_pred, target = (x.detach() for x in batch(dtype=dtype))
    pred.requires_grad_()
    wide = AGSMLoss(neg_scale=1.0)(pred.float(), ema_pred.float(), target.float())
    loss = AGSMLoss(neg_scale=1.0)(pred, ema_pred, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = AGSMLoss(neg_scale=1.0)(pred, ema_pred, target)
    assert loss.dtype == cast.dtype == torch.float32
    assert loss == wide and cast == wide
    loss.backward()
    assert pred.grad.dtype == dtype


def test_gradcheck_and_double_backward():
    pred, ema_pred, target = batch()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    several = torch.tensor([[True, True, False], [False, True, False]])
    for positives in (None, torch.tensor([1, 0]), several):
        run = partial(
            AGSMLoss(neg_scale=0.3),
            ema_pred=ema_pred,
            target=target,
            positives=positives,
            mask=mask,
        )
        assert torch.autograd.gradcheck(run, pred)
        assert torch.autograd.gradgradcheck(run, pred)
    assert torch.autograd.gradcheck(
        lambda p: SoftREPALoss(denoising_weight=0.1)(p, target, torch.tensor([1, 2])), pred
    )


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    """In a fresh process, because executed shape annotations cannot be traced."""
    assert fresh.run(compile_check.main).told.split() == [
        "AGSMLoss",
        "AdaptiveTemperature",
        "SoftREPALoss",
    ]


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("settings", [{"guidance_scale": 3}, {"neg_scale": 0.1}])
@pytest.mark.parametrize("batched", [(0, 1, 2), (0,), (1,), (2,), (3,), (4,), (0, 1, 2, 3, 4)])
def test_vmap_and_its_gradient_are_those_of_a_loop(settings, batched):
    number = 3
    given = [torch.randn(number, 2, 3, 4), torch.randn(number, 2, 3, 4), torch.randn(number, 2, 4)]
    columns = torch.tensor([[0, 1], [2, 1], [1, 0]])
    mask = (torch.rand(number, 2, 3) < 0.5).scatter(2, columns.unsqueeze(2), True)
    if 4 not in batched:
        mask[:] = True
    elif 3 not in batched:
        mask = mask.scatter(2, columns[:1].expand(number, 2).unsqueeze(2), True)
    every = [*given, columns, mask]
    arguments = [one if i in batched else one[0] for i, one in enumerate(every)]
    axes = tuple(0 if i in batched else None for i in range(5))
    loss = AGSMLoss(**settings)
    for function in (loss, torch.func.grad(loss)):
        found = torch.func.vmap(function, in_dims=axes)(*arguments)
        looped = [
            function(*(one[n] if i in batched else one for i, one in enumerate(arguments)))
            for n in range(number)
        ]
        torch.testing.assert_close(found, torch.stack(looped))
    with pytest.raises(ValueError, match=r"positives: expected column indices in 0\.\.2"):
        torch.func.grad(loss)(*(one[0] for one in given), torch.tensor([0, 3]))


def test_loss_moves_down_a_free_prediction():
    pred, ema_pred, target = batch()
    optimizer, loss = torch.optim.SGD([pred], lr=1.0), AGSMLoss(neg_scale=1.0)
    values = []
    for _ in range(50):
        value = loss(pred, ema_pred, target)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert all(b < a for a, b in itertools.pairwise(values)) and values[-1] < 1e-3
