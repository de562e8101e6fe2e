"""Flow-GRPO: its steps' marginals and likelihoods, the clipped loss, and AGSM in it."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline
from pipelines_tiny import speaking_pipeline
from preference_setup import Setup

from agsm_loss import Bank
from agsm_loss.integrations.hosts.base import AGSMBatch, adapters_off, agsm_on, bank_of
from agsm_loss.integrations.hosts.dynamics import Dynamics, cps_gaussian, sde_gaussian
from agsm_loss.integrations.hosts.flow_grpo import FlowGRPO, clipped_policy_loss
from agsm_loss.integrations.hosts.rollouts import sample_sde


@pytest.mark.parametrize("noise_level", [0.0, 0.7, 1.5])
def test_the_sde_has_the_marginals_of_the_flow(noise_level):
    """For x_0 ~ N(0, 4) the velocity is known, every step is linear, and the variance ends at 4."""
    steps, variance = 4000, torch.tensor(1.0).double()
    sigmas = torch.linspace(1, 0, steps + 1).double()
    for i in range(steps):
        sigma, following = sigmas[i : i + 1], sigmas[i + 1 : i + 2]
        x = torch.ones(1, 1).double()
        total = 4 * (1 - sigma) ** 2 + sigma**2
        velocity = ((sigma - 4 * (1 - sigma)) / total) * x
        mean, std = sde_gaussian(velocity, x, sigma, following, noise_level, largest=0.999)
        variance = mean.squeeze() ** 2 * variance + std.squeeze() ** 2
    assert variance.item() == pytest.approx(4.0, rel=0.02)


def test_the_mean_and_deviation_are_the_papers():
    pred, x = torch.randn(2, 3, 4).double()
    sigma, following = (
        torch.tensor([0.9, 0.5, 0.99]).double(),
        torch.tensor([0.8, 0.4, 0.9]).double(),
    )
    mean, std = sde_gaussian(pred, x, sigma, following, 0.7)
    for row in range(3):
        t, dt = float(sigma[row]), float(following[row] - sigma[row])
        s = 0.7 * (t / (1 - min(t, 0.96))) ** 0.5
        expected = x[row] + (pred[row] + s**2 / (2 * t) * (x[row] + (1 - t) * pred[row])) * dt
        torch.testing.assert_close(mean[row], expected)
        assert std[row].item() == pytest.approx(s * (-dt) ** 0.5)


def test_flow_cps_draws_a_part_of_the_noise_anew():
    pred, x = torch.randn(2, 3, 4).double()
    sigma = torch.tensor([1.0, 0.5, 0.1]).double()
    following = torch.tensor([0.8, 0.4, 0.0]).double()
    mean, std = cps_gaussian(pred, x, sigma, following, 0.8)
    for row in range(3):
        t, after = float(sigma[row]), float(following[row])
        s = after * math.sin(0.8 * math.pi / 2)
        x_0, epsilon = x[row] - t * pred[row], x[row] + (1 - t) * pred[row]
        expected = (1 - after) * x_0 + (after**2 - s**2) ** 0.5 * epsilon
        torch.testing.assert_close(mean[row], expected)
        assert std[row].item() == pytest.approx(s)
    euler, _ = cps_gaussian(pred, x, sigma, following, 0.0)
    torch.testing.assert_close(euler, x + (following - sigma)[:, None] * pred)
    anew, _ = cps_gaussian(pred, x, sigma, following, 1.0)
    torch.testing.assert_close(anew, (1 - following)[:, None] * (x - sigma[:, None] * pred))


def noise_of_the_states(sde_type):
    """Of each level but the last, over what it should be.

    With one image in the data the velocity is known, and x − (1 − σ)·image is the noise.
    """
    image, noise = torch.rand(4, 8, 8) * 2 - 1, torch.randn(400, 4, 8, 8)
    trajectory = sample_sde(
        lambda x, t: (x - image) / (t[0] / 1000),
        FlowMatchEulerDiscreteScheduler(),
        noise,
        sde_type=sde_type,
    )
    torch.testing.assert_close(trajectory.last, image.expand_as(noise), atol=1e-4, rtol=0)
    return [
        ((state - (1 - sigma) * image).std() / sigma).item()
        for state, sigma in zip(trajectory.states[:-1], trajectory.sigmas[:-1], strict=True)
    ]


def test_states_of_flow_cps_have_the_noise_of_their_level():
    assert noise_of_the_states("cps") == pytest.approx([1.0] * 10, abs=0.01)


def test_states_of_few_steps_of_the_sde_have_more():
    """A model takes the noise of their level off, and leaves the rest in the image."""
    assert noise_of_the_states("sde")[-1] > 1.1


def rollout(setup, scheduler, seed=0, **steps):
    text = setup.conditioning
    own = bank_of(Bank.POSITIVE, len(setup.noise))
    return sample_sde(
        lambda x, t: setup.denoiser(x, t, text, own),
        scheduler,
        setup.noise,
        num_steps=4,
        generator=torch.Generator().manual_seed(seed),
        **steps,
    )


@pytest.mark.parametrize(
    ("given", "dynamics"),
    [
        ({}, Dynamics("sde", 0.7)),
        ({"noise_level": 0.4}, Dynamics("sde", 0.4)),
        ({"sde_type": "cps"}, Dynamics("cps", 0.8)),
    ],
)
def test_what_was_sampled_has_ratio_one_and_the_gradient_of_the_likelihoods(given, dynamics):
    setup, scheduler = Setup("sd3"), FlowMatchEulerDiscreteScheduler()
    trajectory = rollout(setup, scheduler, **given)
    assert trajectory.dynamics == dynamics
    assert trajectory.states.shape == (5, 3, 4, 8, 8)
    assert torch.equal(trajectory.last, trajectory.states[4])
    advantages = torch.tensor([1.0, -0.5, 0.25]).double()
    out = FlowGRPO(setup.denoiser, scheduler)(trajectory, advantages, setup.conditioning)
    assert out.metrics["grpo/approx_kl"] < 1e-20
    assert out.loss.item() == pytest.approx(-advantages.mean().item())
    grads = torch.autograd.grad(out.loss, setup.trained)
    expected = 0.0
    for step in range(3):  # REINFORCE: the ratio's gradient at 1 is the log-likelihood's
        sigma, below = trajectory.sigmas[step : step + 2]
        x, following = trajectory.states[step : step + 2]
        pred = setup.denoiser(
            x, (sigma * 1000).expand(3), setup.conditioning, bank_of(Bank.POSITIVE, 3)
        )
        mean, std = dynamics.gaussian(pred, x, sigma.expand(3), below.expand(3))
        log_prob = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(following)
        if dynamics.sde_type == "cps":  # its paper leaves the variance out
            log_prob = log_prob * 2 * std**2
        expected = expected - (advantages * log_prob.flatten(1).mean(1)).mean() / 3
    for one, other in zip(grads, torch.autograd.grad(expected, setup.trained), strict=True):
        torch.testing.assert_close(one, other)


def test_the_ratio_is_one_where_the_size_of_a_batch_has_a_say():
    """As in half precision, whose kernels differ by the size; here by much."""
    setup, scheduler = Setup("sd3"), FlowMatchEulerDiscreteScheduler()
    plain = setup.denoiser

    def sized(x, *rest):
        return plain(x, *rest) + 0.01 * len(x)

    setup.denoiser = sized
    trajectory = rollout(setup, scheduler)
    out = FlowGRPO(sized, scheduler)(trajectory, torch.ones(3).double(), setup.conditioning)
    assert out.metrics["grpo/approx_kl"] == 0


def test_agsm_is_added_and_absent_without_it():
    setup, scheduler = Setup("sd3"), FlowMatchEulerDiscreteScheduler()
    trajectory, advantages = rollout(setup, scheduler), torch.ones(3).double()
    batch = AGSMBatch(
        setup.winner,
        torch.tensor([300.0, 700.0, 950.0]),
        setup.noise,
        setup.conditioning,
        setup.captions,
    )
    plain = FlowGRPO(setup.denoiser, scheduler)
    agsm = setup.agsm(weight=0.5)
    both = FlowGRPO(setup.denoiser, scheduler, agsm=agsm)
    given = trajectory, advantages, setup.conditioning
    term = agsm_on(batch, setup.agsm(weight=0.5), scheduler)
    total = both(*given, agsm_batch=batch)
    torch.testing.assert_close(total.loss, plain(*given).loss + term.loss)
    assert term.loss > 0 and "agsm/win_rate" in total.metrics
    with pytest.raises(ValueError, match="agsm_batch"):
        both(*given)
    both.update_ema()
    assert agsm.ema.num_updates == 1


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_the_divergence_to_the_reference_is_that_of_the_steps_gaussians(sde_type):
    setup, scheduler = Setup("sd3"), FlowMatchEulerDiscreteScheduler()
    trajectory = rollout(setup, scheduler, sde_type=sde_type)
    advantages = torch.ones(3).double()
    given = trajectory, advantages, setup.conditioning, torch.tensor([1])
    kept = {"reference": lambda: adapters_off(setup.model), "kl_weight": 0.25}
    plain = FlowGRPO(setup.denoiser, scheduler)(*given)
    out = FlowGRPO(setup.denoiser, scheduler, **kept)(*given)
    sigma, below = trajectory.sigmas[1:3]
    x, times = trajectory.states[1], (sigma * 1000).expand(3)
    with torch.no_grad():
        pred = setup.denoiser(x, times, setup.conditioning, bank_of(Bank.POSITIVE, 3))
        with adapters_off(setup.model):
            ref = setup.denoiser(x, times, setup.conditioning, bank_of(Bank.OFF, 3))
    ours, its = (
        torch.distributions.Normal(mean, std.expand_as(mean))
        for mean, std in (
            trajectory.dynamics.gaussian(v, x, sigma.expand(3), below.expand(3))
            for v in (pred, ref)
        )
    )
    kl = torch.distributions.kl_divergence(ours, its)
    kl = (kl * (2 * ours.scale**2 if sde_type == "cps" else 1)).mean()
    torch.testing.assert_close(out.metrics["kl"], kl)
    torch.testing.assert_close(out.loss, plain.loss + 0.25 * kl)
    grads = torch.autograd.grad(out.loss - plain.loss, setup.trained, allow_unused=True)
    assert sum(g.abs().sum() for g in grads if g is not None) > 0
    for wrong in ({"kl_weight": 0.1}, {**kept, "kl_weight": -1.0}):
        with pytest.raises(ValueError, match="kl_weight"):
            FlowGRPO(setup.denoiser, scheduler, **wrong)


def test_dynamic_shifting_is_that_of_the_pipeline(tmp_path):
    pipe = FluxPipeline.from_pretrained(speaking_pipeline("flux", tmp_path))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=9.0)
    side = 16 * pipe.vae_scale_factor
    pipe("a", height=side, width=side, num_inference_steps=4, output_type="latent")
    wanted, noise = pipe.scheduler.sigmas.clone(), torch.randn(1, 1, 16, 16)

    def sigmas(**mu):
        return sample_sde(lambda x, t: x, pipe.scheduler, noise, num_steps=4, **mu).sigmas

    torch.testing.assert_close(sigmas(), wanted)
    assert (sigmas(mu=2.0)[1:-1] > wanted[1:-1]).all()
    with pytest.raises(ValueError, match="mu"):
        sample_sde(lambda x, t: x, FlowMatchEulerDiscreteScheduler(), noise, mu=1.0)


def test_a_ratio_that_has_left_the_range_the_right_way_has_no_gradient():
    log_prob = torch.tensor([0.5, 0.5, -0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0])
    clipped_policy_loss(log_prob, torch.zeros(4), advantages, 0.1).backward()
    assert (log_prob.grad != 0).tolist() == [False, True, True, False]


def test_what_has_no_likelihood_is_refused():
    setup, scheduler = Setup("sd3"), FlowMatchEulerDiscreteScheduler()
    trajectory = rollout(setup, scheduler)
    step = FlowGRPO(setup.denoiser, scheduler)
    with pytest.raises(ValueError, match="no likelihood"):
        step(trajectory, torch.ones(3), setup.conditioning, torch.tensor([3]))
    for wrong, steps, told in (
        (DDIMScheduler(), {}, "flow-matching"),
        (scheduler, {"num_steps": 1}, "2 steps"),
        (scheduler, {"noise_level": 0.0}, "noise_level: expected above 0 for sde"),
        (scheduler, {"noise_level": 1.1, "sde_type": "cps"}, "at most 1 for cps"),
        (scheduler, {"sde_type": "ode"}, "sde_type"),
    ):
        with pytest.raises((ValueError, TypeError), match=told):
            sample_sde(lambda x, t: x, wrong, setup.noise, **steps)
