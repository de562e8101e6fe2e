"""Noise, targets and A(t), by the scheduler's config."""

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from agsm_loss import AGSMLoss
from agsm_loss import functional as AF
from agsm_loss.integrations.noise import (
    add_noise,
    noise_levels,
    prediction_type,
    regression_target,
    reward_weight,
)

KINDS = ("epsilon", "v_prediction", "sample", "flow")


def scheduler_of(kind):
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDPMScheduler(prediction_type=kind, beta_schedule="scaled_linear")


@pytest.mark.parametrize("kind", KINDS)
def test_noise_levels_in_half_precision_are_those_of_float32(kind):
    """SD's σ at t = 0 is 0.03; √(1 − ᾱ) in bfloat16 is 0."""
    scheduler, t = scheduler_of(kind), torch.tensor([0, 1, 2, 999])
    half = torch.randn(4, 2, 3, 3).bfloat16()
    for ours, exact in zip(
        noise_levels(scheduler, t, half), noise_levels(scheduler, t, half.double()), strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)
    noise = torch.randn_like(half)
    for function in (add_noise, regression_target):
        exact = function(scheduler, half.double(), noise.double(), t)
        assert torch.equal(function(scheduler, half, noise, t), exact.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_target_agree_with_the_library(kind):
    scheduler = scheduler_of(kind)
    x_0, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    t = torch.tensor([3, 400, 900])
    assert prediction_type(scheduler) == kind
    noisy, target = (f(scheduler, x_0, noise, t) for f in (add_noise, regression_target))
    if kind == "flow":
        chosen = scheduler.timesteps[[5, 400, 900]]
        expected = scheduler.scale_noise(x_0, chosen, noise)
        torch.testing.assert_close(add_noise(scheduler, x_0, noise, chosen), expected)
        assert torch.equal(target, noise - x_0)
        add_noise(scheduler, x_0, noise, torch.tensor([3.5, 400.2, 900.9]))
        return
    torch.testing.assert_close(noisy, scheduler.add_noise(x_0, noise, t))
    velocity = scheduler.get_velocity(x_0, noise, t)
    expected = {"epsilon": noise, "sample": x_0, "v_prediction": velocity}[kind]
    torch.testing.assert_close(target, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_reward_weight_turns_errors_into_those_of_epsilon(kind):
    """A prediction off by δ in ε, said in each parametrisation at the same x_t."""
    scheduler = scheduler_of(kind)
    x_0, noise = torch.randn(3, 5).double(), torch.randn(3, 5).double()
    t = torch.tensor([50, 400, 900])
    noisy = add_noise(scheduler, x_0, noise, t)
    off = noise.unsqueeze(1) + 0.3 * torch.randn(3, 4, 5).double()
    # The x_0 that explains the same x_t under a wrong ε, then that pair's own target.
    if kind == "flow":
        sigma = (t / 1000).double().reshape(3, 1, 1)
        alpha = 1 - sigma
    else:
        level = scheduler.alphas_cumprod.double()[t].reshape(3, 1, 1)
        alpha, sigma = level.sqrt(), (1 - level).sqrt()
    implied = (noisy.unsqueeze(1) - sigma * off) / alpha
    pred = torch.stack(
        [regression_target(scheduler, implied[:, j], off[:, j], t) for j in range(4)], dim=1
    )
    guided = AGSMLoss(neg_scale=1.0, reward_weight=reward_weight(scheduler)).guide(
        pred, regression_target(scheduler, x_0, noise, t), timesteps=t
    )
    expected = AF.guide(off, noise, neg_scale=1.0).weights
    torch.testing.assert_close(guided.weights, expected, rtol=1e-4, atol=1e-5)


def test_unknown_parametrisations_and_fractional_timesteps_are_refused():
    scheduler = scheduler_of("epsilon")
    with pytest.raises(ValueError, match=r"whole numbers in 0\.\.999"):
        add_noise(scheduler, torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0.5]))
    scheduler.register_to_config(prediction_type="other")
    with pytest.raises(ValueError, match="got 'other' of DDPMScheduler"):
        prediction_type(scheduler)


@pytest.mark.parametrize(
    "scheduler",
    [
        EDMEulerScheduler(),  # Playground v2.5's
        EDMDPMSolverMultistepScheduler(),
        EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous"),
        UniPCMultistepScheduler(use_flow_sigmas=True),
    ],
    ids=lambda one: type(one).__name__,
)
def test_noise_levels_that_are_not_known_are_refused(scheduler):
    with pytest.raises(ValueError, match=f"got {type(scheduler).__name__} with other noise levels"):
        add_noise(scheduler, torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([5]))


@pytest.mark.parametrize(
    ("scheduler", "timestep"),
    [(DDPMScheduler(), -1), (DDPMScheduler(), 1000), (FlowMatchEulerDiscreteScheduler(), 1001.0)],
)
def test_a_timestep_that_there_is_not_is_refused(scheduler, timestep):
    """An index below 0 would count from the end."""
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="timesteps: expected 0"):
        add_noise(scheduler, x, x, torch.tensor([0, timestep]))
