"""InPO: DDIM inversion, the noise it implies, and its step."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from preference_setup import Setup

from agsm_loss.integrations.hosts.base import AGSMBatch, adapters_off, agsm_on
from agsm_loss.integrations.hosts.diffusion_dpo import diffusion_dpo_loss
from agsm_loss.integrations.hosts.inpo import InPO, ddim_invert, implied_noise
from agsm_loss.integrations.noise import add_noise, clean_and_noise, regression_target

SETTINGS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def scheduler_of(kind="epsilon"):
    return DDIMScheduler(prediction_type=kind, clip_sample=False, **SETTINGS)


def ideal(scheduler, mean=0.3, std=0.5):
    """The exact prediction where x_0 ~ N(mean, std²): E[ε | x_t], or v."""

    def denoise(x, times):
        squared = scheduler.alphas_cumprod[times].reshape(-1, 1).to(x)
        alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
        noise = sigma * (x - alpha * mean) / (squared * std**2 + sigma**2)
        if scheduler.config.prediction_type == "epsilon":
            return noise
        return alpha * noise - sigma * (x - sigma * noise) / alpha

    return denoise


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_inverting_and_denoising_comes_back(kind):
    scheduler = scheduler_of(kind)
    x_0 = 0.3 + 0.5 * torch.randn(64, 2, dtype=torch.float64)
    denoise, errors = ideal(scheduler), []
    for steps in (10, 40, 200):
        x = ddim_invert(denoise, scheduler, x_0, 800, num_steps=steps)
        # Samples of the ideal model's prior at t = 800, not noise of any kind.
        alpha = scheduler.alphas_cumprod[800] ** 0.5
        wanted = (alpha**2 * 0.25 + 1 - alpha**2) ** 0.5
        assert ((x - alpha * 0.3) / wanted - (x_0 - 0.3) / 0.5).abs().max() < 6 / steps
        scheduler.set_timesteps(steps)
        levels = [*range(0, 800, 1000 // steps), 800]
        for here, there in zip(levels[:0:-1], levels[-2::-1], strict=True):
            times = torch.full((64,), here)
            clean, noise = clean_and_noise(scheduler, x, denoise(x, times), times)
            x = add_noise(scheduler, clean, noise, torch.full((64,), there))
        errors.append((x - x_0).abs().max().item())
    assert errors[0] < 0.5 and errors[1] < errors[0] / 2.5 and errors[2] < errors[1] / 2.5, errors


def test_the_levels_below_t_are_those_of_diffusers_inverse_scheduler():
    scheduler, inverse = scheduler_of(), DDIMInverseScheduler(clip_sample=False, **SETTINGS)
    inverse.set_timesteps(10)
    x_0, asked = torch.randn(4, 3, dtype=torch.float64), []

    def denoise(x, times):
        asked.append(int(times[0]))
        return ideal(scheduler)(x, times)

    ours, theirs = ddim_invert(denoise, scheduler, x_0, 300), x_0
    assert asked == [0, 100, 200, 300]
    for time in asked:
        pred = ideal(scheduler)(theirs, torch.full((4,), time))
        theirs = inverse.step(pred, time, theirs).prev_sample
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_implied_noise_reproduces_x_t():
    scheduler = scheduler_of()
    x_0, x_t = torch.randn(2, 4, 3, dtype=torch.float64)
    times = torch.tensor([0, 17, 500, 999])
    noise = implied_noise(scheduler, x_0, x_t, times)
    assert torch.allclose(add_noise(scheduler, x_0, noise, times), x_t, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_a_prediction_is_taken_apart_into_what_made_it(kind):
    scheduler = FlowMatchEulerDiscreteScheduler() if kind == "flow" else scheduler_of(kind)
    x_0, noise = torch.randn(2, 4, 3, dtype=torch.float64)
    times = torch.tensor([1, 17, 500, 980])
    x_t = add_noise(scheduler, x_0, noise, times)
    pred = regression_target(scheduler, x_0, noise, times)
    clean, found = clean_and_noise(scheduler, x_t, pred, times)
    assert torch.allclose(clean, x_0, atol=1e-9) and torch.allclose(found, noise, atol=1e-9)


def test_eta_adds_ddims_noise_and_is_seeded():
    scheduler, x_0 = scheduler_of(), torch.zeros(20_000, 1, dtype=torch.float64)

    def run(eta, seed=0):
        generator = torch.Generator().manual_seed(seed)
        still = torch.zeros_like
        return ddim_invert(lambda x, t: still(x), scheduler, x_0, 100, eta=eta, generator=generator)

    assert torch.equal(run(0.5), run(0.5)) and not torch.equal(run(0.5), run(0.5, 1))
    assert (run(0.0) == 0).all()
    scheduler.set_timesteps(10)
    variance = scheduler._get_variance(100, 0)
    assert run(0.5).std().item() == pytest.approx(0.5 * float(variance) ** 0.5, rel=0.03)


@pytest.mark.parametrize("agsm", [False, True])
def test_the_step_is_dpo_at_the_inverted_noise(agsm):
    it = Setup("unet")
    settings = {"reference": lambda: adapters_off(it.model), "beta": 5.0, "eta": 0.0}
    step = InPO(it.denoiser, it.scheduler, **settings, agsm=it.agsm() if agsm else None)
    seen = []
    it.denoiser.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    out = step(it.winner, it.loser, it.conditioning, 250, captions=it.captions)
    assert [int(args[1][0]) for args, _ in seen[:6]] == [0, 100, 200, 250, 250, 250]
    assert len(seen) == (8 if agsm else 6)
    (args, ref_pred), (again, pred) = seen[4:6]
    assert torch.equal(args[0], again[0])  # one x_t for both models
    times = torch.full((6,), 250)
    noise = implied_noise(it.scheduler, torch.cat([it.winner, it.loser]), args[0], times)
    terms = diffusion_dpo_loss(pred, ref_pred, noise, 5.0)
    extra = out.metrics["agsm/loss"] if agsm else 0.0
    assert out.loss.item() == pytest.approx((terms.loss + extra).item(), rel=1e-6)
    out.loss.backward()
    grad = it.denoiser.tokens.tokens.grad
    assert grad[0].abs().max() > 0 and bool(grad[1].abs().max() > 0) == agsm


def test_agsm_on_images_of_its_own_noise_is_the_host_plus_that_term():
    it = Setup("unet")
    settings = {"reference": lambda: adapters_off(it.model), "beta": 5.0, "eta": 0.0}
    pairs = (it.winner, it.loser, it.conditioning, 250)
    times = torch.tensor([40, 500, 900])
    noise = torch.randn(it.winner.shape, generator=torch.Generator().manual_seed(3))
    batch = AGSMBatch(it.winner, times, noise, it.conditioning, it.captions)

    alone = InPO(it.denoiser, it.scheduler, **settings)(*pairs)
    step = InPO(it.denoiser, it.scheduler, **settings, agsm=it.agsm())
    out = step(*pairs, agsm_batch=batch)
    term = agsm_on(batch, it.agsm(), it.scheduler)
    assert out.loss.item() == pytest.approx((alone.loss + term.loss).item(), rel=1e-5)
    with pytest.raises(ValueError, match="agsm_batch: expected it without captions"):
        step(*pairs, agsm_batch=batch, captions=it.captions)
    inverted = step(*pairs, captions=it.captions)
    assert inverted.metrics["agsm/loss"].item() != pytest.approx(out.metrics["agsm/loss"].item())


def test_what_has_no_inversion_is_refused():
    x_0 = torch.zeros(2, 3)
    for scheduler in (FlowMatchEulerDiscreteScheduler(), scheduler_of("sample")):
        with pytest.raises(ValueError, match="Use DiffusionDPO"):
            ddim_invert(lambda x, t: x, scheduler, x_0, 10)
    for bad in ({"timestep": 1000}, {"timestep": -1}, {"timestep": 5, "num_steps": 0}):
        with pytest.raises(ValueError, match=r"expected timestep in 0\.\.999"):
            ddim_invert(lambda x, t: x, scheduler_of(), x_0, **bad)
