"""Advantages within groups, and clean images by any of the schedulers' solvers."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from agsm_loss.integrations.hosts.rollouts import group_advantages, sample_latents
from agsm_loss.integrations.noise import noise_levels, prediction_type

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' own


def test_advantages_are_standardised_within_a_prompt():
    rewards = torch.tensor([1.0, 3.0, 10.0, 10.0])
    found = group_advantages(rewards, 2)
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    found = group_advantages(rewards, 2, global_std=True)
    spread = rewards.std(unbiased=False)
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, 0.0, 0.0]) / spread)
    for wrong in ((torch.ones(3), 2), (torch.ones(4), 1), (torch.ones(2, 2), 2)):
        with pytest.raises((ValueError, TypeError), match=r"groups|rewards"):
            group_advantages(*wrong)


@pytest.mark.parametrize("global_std", [False, True])
def test_equal_rewards_have_no_advantage_of_any_size(global_std):
    """Their mean is off by a rounding error, and so is their standard deviation."""
    for group in range(2, 25):
        for reward in (0.3, 26.0912, 100.1, -812.345, 3e30, 1e-30):
            found = group_advantages(torch.full((2 * group,), reward), group, global_std=global_std)
            assert not found.any()
    found = group_advantages(torch.tensor([100.1] * 7 + [0.1] * 6 + [0.2]), 7, global_std=True)
    assert not found[:7].any() and found[7:].all()
    for big in (3e38, 1e300):
        equal = torch.full((4,), big, dtype=torch.float64)
        assert not group_advantages(equal, 2, global_std=global_std).any()
    found = group_advantages(torch.tensor([3e38, -3e38]), 2, global_std=global_std)
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="differences are finite"):
        group_advantages(torch.tensor([1.7e308, -1.7e308], dtype=torch.float64), 2)
    with pytest.raises(ValueError, match=r"rewards: expected finite numbers, got \[nan\]"):
        group_advantages(torch.tensor([1.0, math.nan]), 2)


SOLVERS = [
    DDIMScheduler(),
    DDIMScheduler(prediction_type="v_prediction"),
    DPMSolverMultistepScheduler(),
    UniPCMultistepScheduler(),
    FlowMatchEulerDiscreteScheduler(shift=2.0),
]


@pytest.mark.parametrize("scheduler", SOLVERS, ids=lambda one: type(one).__name__)
def test_a_perfect_denoiser_is_sampled_to_its_image(scheduler):
    """With one image in the data its denoiser is known, whatever it predicts."""
    image, noise = torch.rand(3, 4, 8, 8) * 2 - 1, torch.randn(3, 4, 8, 8)
    kind = prediction_type(scheduler)
    seen = []

    def denoise(x, timesteps):
        seen.append(timesteps)
        alpha, sigma = noise_levels(scheduler, timesteps, x)
        epsilon = (x - alpha * image) / sigma
        return {"epsilon": epsilon, "v_prediction": alpha * epsilon - sigma * image,
                "flow": epsilon - image}[kind]  # fmt: skip

    found = sample_latents(denoise, scheduler, noise, num_steps=8)
    torch.testing.assert_close(found, image, atol=0.05, rtol=0.02)
    assert len(seen) == 8 and all(times.shape == (3,) for times in seen)
    assert found.dtype == torch.float32


def test_what_a_solver_scales_and_draws_is_followed():
    """Euler's states have σ up to 15; DDPM draws noise in each step."""
    sizes = []

    def denoise(x, timesteps):
        sizes.append(x.std().item())
        return x

    sample_latents(denoise, EulerDiscreteScheduler(), torch.randn(2, 4, 16, 16), num_steps=4)
    assert max(sizes) < 2
    drawn = [
        sample_latents(
            denoise,
            DDPMScheduler(),
            torch.ones(2, 4),
            num_steps=4,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
