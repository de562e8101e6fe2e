"""A temperature that follows the scale of the errors."""

import math

import pytest
import torch
import workers
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from strategies import SEEDS, errors_of

from agsm_loss import AdaptiveTemperature, AGSMLoss


def entropy_share(errors, temperature):
    weights = (-errors / temperature).softmax(1)
    return float(-torch.xlogy(weights, weights).sum(1).mean() / math.log(errors.shape[1]))


@given(SEEDS, st.floats(0.1, 0.95), st.integers(2, 8), st.integers(-12, 12))
def test_one_batch_meets_the_entropy_at_any_scale(seed, entropy, num, power):
    errors = errors_of(seed, num=num, scale=10.0**power)
    temperature = AdaptiveTemperature(entropy)(errors)
    assert entropy_share(errors, temperature) == pytest.approx(entropy, abs=0.01)


@given(SEEDS, st.floats(1e-6, 1e6), st.floats(0, 10))
def test_follows_the_scale_and_ignores_the_level(seed, scale, level):
    errors = errors_of(seed)
    plain, moved = (AdaptiveTemperature()(x) for x in (errors, scale * (errors + level)))
    torch.testing.assert_close(moved, scale * plain, rtol=1e-4, atol=0)


def test_where_the_published_temperature_fails():
    """Gaps of 1e-3 leave T = 0.1 at chance; the adaptive one still ranks."""
    target = torch.zeros(32, 16)
    ema_pred = (0.04 * torch.rand(32, 4, 1)).sqrt() * torch.ones(16)
    ema_pred = ema_pred * 0.2
    published = AGSMLoss(neg_scale=1.0).terms(ema_pred, ema_pred, target)
    follows = AGSMLoss(neg_scale=1.0, temperature=AdaptiveTemperature(0.7)).terms(
        ema_pred, ema_pred, target
    )
    assert published.weight_entropy > 0.999 * math.log(4)
    assert follows.weight_entropy.item() == pytest.approx(0.7 * math.log(4), abs=0.02)


def test_a_running_mean_in_training_and_fixed_in_evaluation():
    temperature = AdaptiveTemperature(momentum=0.9)
    first = float(temperature(errors_of(0)))
    for _ in range(200):
        value = float(temperature(errors_of(1, scale=100.0)))
    assert value == pytest.approx(first * 100, rel=0.1)
    temperature.eval()
    assert float(temperature(errors_of(2, scale=1e-6))) == value
    again = AdaptiveTemperature().eval()
    again.load_state_dict(temperature.state_dict())
    assert float(again(errors_of(0))) == value


def test_the_start_is_not_biased():
    """The first estimates are averaged evenly: no memory of the initial 0.1."""
    temperature = AdaptiveTemperature(momentum=0.99)
    logs = []
    for seed in range(5):
        alone = AdaptiveTemperature(momentum=0.0)
        logs.append(float(alone(errors_of(seed, scale=1e3)).log()))
        value = float(temperature(errors_of(seed, scale=1e3)).log())
        assert value == pytest.approx(sum(logs) / len(logs), abs=1e-5)


def test_rows_that_say_nothing_are_left_out():
    temperature = AdaptiveTemperature()
    assert float(temperature(torch.ones(4, 3))) == pytest.approx(0.1)
    assert float(temperature(torch.rand(4, 1))) == pytest.approx(0.1)
    assert int(temperature.updates) == 0
    errors = errors_of(0)
    padded = torch.cat([errors, torch.full((64, 2), torch.nan)], dim=1)
    mask = torch.cat([torch.ones(64, 4), torch.zeros(64, 2)], dim=1).bool()
    quiet = torch.cat([padded, torch.ones(9, 6)])
    masks = torch.cat([mask, torch.ones(9, 6, dtype=torch.bool)])
    expected = AdaptiveTemperature()(errors)
    torch.testing.assert_close(AdaptiveTemperature()(padded, mask), expected)
    torch.testing.assert_close(AdaptiveTemperature()(quiet, masks), expected)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_overflow_does_not_last(bad):
    """As fp16's, which a GradScaler skips: the row says nothing, and a batch of them nothing."""
    good = errors_of(0)
    broken = torch.cat([good, good[:1]])
    broken[-1, 1] = bad
    assert AdaptiveTemperature()(broken) == AdaptiveTemperature()(good)
    temperature = AdaptiveTemperature()
    first = temperature(good)
    assert temperature(torch.full_like(good, bad)) == first and temperature.updates == 1


def test_it_follows_in_a_module_in_half_precision():
    """bfloat16 has steps of 0.008 at log T = -2.3: a momentum of 0.99 would round away."""
    plain, half = AdaptiveTemperature(), AdaptiveTemperature().to(torch.bfloat16)
    for seed in range(60):
        for one in (plain, half):
            one(errors_of(seed, scale=1.0 + seed))
    assert half.log_temperature == plain.log_temperature
    assert half.log_temperature.dtype == torch.float32
    assert AdaptiveTemperature().to("meta").half().log_temperature.is_meta


def test_a_saved_state_is_a_copy():
    loss = AGSMLoss(neg_scale=1.0, temperature=AdaptiveTemperature())
    loss.temperature(errors_of(0))
    state = loss.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    loss.temperature(errors_of(1, scale=100.0))
    assert state == before != loss.state_dict()


@pytest.mark.slow
def test_ranks_agree_on_what_one_process_finds_of_all_their_rows():
    values = run_ranks(workers.adaptive_temperature)
    joint = torch.cat([errors_of(0), 30 * errors_of(0)[:24]])
    expected = [float(AdaptiveTemperature()(errors)) for errors in (joint, errors_of(0))]
    assert values[0] == values[1] == pytest.approx(expected)
