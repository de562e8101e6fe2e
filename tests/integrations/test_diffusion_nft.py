"""DiffusionNFT: its loss against an oracle, laws, a toy where rewards rise, and AGSM in it."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from preference_setup import Setup
from torch import nn

from agsm_loss import EMA, Bank
from agsm_loss.integrations.hosts.base import AGSMBatch, adapters_off, agsm_on, bank_of
from agsm_loss.integrations.hosts.diffusion_nft import (
    DiffusionNFT,
    diffusion_nft_loss,
    rising_decay,
)
from agsm_loss.integrations.hosts.rollouts import group_advantages
from agsm_loss.integrations.noise import add_noise, noise_levels, regression_target


def oracle(clean, old, latents, advantages, beta, clip):
    """(loss, its gradient to `clean`), by loops over images and pixels in float64."""
    clean, old, latents = (one.double().numpy().reshape(len(one), -1) for one in
                           (clean, old, latents))  # fmt: skip
    total, gradient = 0.0, np.zeros_like(clean)
    for i, a in enumerate(advantages.tolist()):
        r = min(max(a, -clip), clip) / (2 * clip) + 0.5
        for share, sign in ((r, 1), (1 - r, -1)):
            mixed = [(1 - sign * beta) * o + sign * beta * c
                     for c, o in zip(clean[i], old[i], strict=True)]  # fmt: skip
            size = sum(abs(m - x) for m, x in zip(mixed, latents[i], strict=True))
            size = max(size / len(mixed), 1e-5)
            for d, (m, x) in enumerate(zip(mixed, latents[i], strict=True)):
                scale = clip * share / beta / len(clean) / len(mixed) / size
                total += scale * (m - x) ** 2
                gradient[i, d] += scale * 2 * (m - x) * sign * beta
    return total, gradient


@pytest.mark.parametrize(("beta", "clip"), [(1.0, 5.0), (0.1, 5.0), (1.7, 0.5)])
def test_value_and_gradient_are_the_oracles(beta, clip):
    clean, old, latents = torch.randn(3, 4, 2, 3, 3).double()
    clean, advantages = clean.requires_grad_(), torch.tensor([-7.0, -0.4, 0.0, 2.0]).double()
    terms = diffusion_nft_loss(clean, old, latents, advantages, beta, clip)
    value, gradient = oracle(clean.detach(), old, latents, advantages, beta, clip)
    assert terms.loss.item() == pytest.approx(value, rel=1e-12)
    (3 * terms.loss).backward()  # one term among others
    np.testing.assert_allclose(clean.grad.flatten(1) / 3, gradient, rtol=1e-12)
    assert terms.positive.shape == terms.negative.shape == (4,)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_at_the_old_policy_the_gradient_is_the_advantage_times_that_of_denoising(beta):
    clean, latents = torch.randn(2, 3, 5).double()
    clean.requires_grad_()
    advantages = torch.tensor([2.0, -1.0, -9.0]).double()
    loss = diffusion_nft_loss(clean, clean.detach(), latents, advantages, beta).loss
    (found,) = torch.autograd.grad(loss, clean)
    error = (clean - latents).square().mean(1) / (clean - latents).abs().mean(1).detach()
    (expected,) = torch.autograd.grad((advantages.clamp(-5, 5) * error).mean(), clean)
    torch.testing.assert_close(found, expected)
    even = diffusion_nft_loss(clean, clean.detach(), latents, torch.zeros(3).double(), beta).loss
    (none,) = torch.autograd.grad(even, clean)
    assert even > 0 and none.abs().max() < 1e-15


def test_a_perfect_prediction_is_finite():
    latents = torch.randn(2, 4)
    clean = latents.clone().requires_grad_()
    terms = diffusion_nft_loss(clean, latents, latents, torch.tensor([1.0, -1.0]))
    terms.loss.backward()
    assert terms.loss == 0 and not clean.grad.any()


def test_half_precision_is_widened():
    clean, old, latents = torch.randn(3, 2, 4)
    advantages = torch.tensor([1.0, -1.0])
    half = diffusion_nft_loss(clean.bfloat16(), old.bfloat16(), latents, advantages).loss
    assert half.dtype == torch.float32
    exact = diffusion_nft_loss(clean, old, latents, advantages).loss
    torch.testing.assert_close(half, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"latents": torch.zeros(3, 4)}, "one shape"),
        ({"old_clean": torch.zeros(2, 5)}, "one shape"),
        ({"advantages": torch.zeros(3)}, "advantages"),
        ({"beta": 0.0}, "beta"),
        ({"clip": -1.0}, "clip"),
    ],
)
@pytest.mark.unchecked_shapes
def test_bad_input_is_named(change, named):
    given = {name: torch.zeros(2, 4) for name in ("clean", "old_clean", "latents")}
    given |= {"advantages": torch.zeros(2), **change}
    with pytest.raises(ValueError, match=named):
        diffusion_nft_loss(**given)


def test_the_old_policys_decays_are_the_published():
    assert [rising_decay()(i) for i in (0, 1, 499, 501, 9999)] == [0, 0.001, 0.499, 0.5, 0.5]
    late = rising_decay(0.0075, 0.999, start=75)
    assert [late(i) for i in (0, 75, 76, 9999)] == [0, 0, 0.0075, 0.999]
    assert rising_decay(0.0)(1000) == 0


class Gaussian(nn.Module):
    """The exact denoiser of x_0 ~ N(μ, 0.25), as what the scheduler's model predicts; μ trained."""

    def __init__(self, scheduler):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1).double())
        self.scheduler = scheduler

    def forward(self, noisy, timesteps, conditioning, bank):
        alpha, sigma = noise_levels(self.scheduler, timesteps, noisy)
        gain = 0.25 * alpha / (0.25 * alpha**2 + sigma**2)
        clean = self.mean + gain * (noisy - alpha * self.mean)
        noise = (noisy - alpha * clean) / sigma
        return regression_target(self.scheduler, clean, noise, timesteps)


KINDS = {
    "flow": FlowMatchEulerDiscreteScheduler,
    "epsilon": DDPMScheduler,
    "v_prediction": lambda: DDPMScheduler(prediction_type="v_prediction"),
    "sample": lambda: DDPMScheduler(prediction_type="sample"),
}


def steps_on(scheduler, reward, epochs=40, **settings):
    """The mean of a Gaussian after that many epochs, of two steps each, from 0."""
    torch.manual_seed(0)
    model = Gaussian(scheduler)
    step = DiffusionNFT(
        model, scheduler, old=EMA(model), reference=EMA(model, decay=1.0).applied,
        steps_per_epoch=2, **settings,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    for _ in range(epochs):
        with step.old.applied():
            latents = model.mean.detach() + 0.5 * torch.randn(64, 1).double()
        advantages = group_advantages(reward(latents[:, 0]), 8, global_std=True).double()
        for _ in range(2):
            timesteps, noise = torch.randint(100, 900, (64,)), torch.randn(64, 1).double()
            loss, _ = step(latents, advantages, None, timesteps, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step.update_ema()
    return model.mean.item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_of_a_gaussian_rises_whatever_is_predicted(kind):
    scheduler = KINDS[kind]()
    assert steps_on(scheduler, lambda x: x) > 1.5
    assert steps_on(scheduler, lambda x: -x) < -1.5
    assert steps_on(scheduler, lambda x: -(x - 1).square()) == pytest.approx(1.0, abs=0.15)
    assert abs(steps_on(scheduler, lambda x: torch.ones_like(x))) < 1e-9  # equal rewards


def test_the_reference_holds_the_model_back():
    free = steps_on(KINDS["flow"](), lambda x: x)
    held = steps_on(KINDS["flow"](), lambda x: x, kl_weight=3.0)
    assert 0 < held < 0.5 * free


def test_the_loss_is_the_same_whatever_is_predicted():
    """The same denoiser, said as ε, v or x_0 of one schedule."""
    losses = []
    for kind in ("epsilon", "v_prediction", "sample"):
        torch.manual_seed(0)
        model = Gaussian(KINDS[kind]())
        step = DiffusionNFT(
            model, model.scheduler, old=EMA(model), reference=nullcontext, kl_weight=0.0
        )
        model.mean.data += 0.3
        latents, noise = torch.randn(2, 4, 3).double()
        times, advantages = torch.tensor([5, 300, 600, 990]), torch.tensor([1, -1, 2, -2.0])
        loss, metrics = step(latents, advantages, None, times, noise)
        (gradient,) = torch.autograd.grad(loss, model.mean)
        assert "kl" not in metrics and metrics["nft/old_distance"] > 0
        losses.append(torch.stack([loss.detach(), gradient.squeeze()]))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def made(setup, **settings):
    kept = {"old": EMA(setup.trained), "reference": lambda: adapters_off(setup.model)}
    return DiffusionNFT(setup.denoiser, setup.scheduler, **(kept | settings))


def moved(setup):
    """The old policy stays where it was; the model is elsewhere."""
    with torch.no_grad():
        for number, one in enumerate(setup.trained):
            one += 0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(number))


def given(setup):
    advantages = torch.tensor([1.0, -0.5, 0.25])
    return setup.winner, advantages, setup.conditioning, setup.timesteps, setup.noise


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_old_policy_and_reference_are_the_model_as_it_was_and_as_it_was_given(name):
    setup = Setup(name)
    before = [one.detach().clone() for one in setup.trained]
    step = made(setup, kl_weight=0.5)
    positive, off = bank_of(Bank.POSITIVE, 3), bank_of(Bank.OFF, 3)
    noisy = add_noise(setup.scheduler, setup.winner, setup.noise, setup.timesteps)
    inputs = noisy, setup.timesteps, setup.conditioning
    with torch.no_grad():
        old = setup.denoiser(*inputs, positive)
        moved(setup)
        pred = setup.denoiser(*inputs, positive)
        with adapters_off(setup.model):
            ref = setup.denoiser(*inputs, off)
    out = step(*given(setup))
    torch.testing.assert_close(out.metrics["nft/old_distance"], (pred - old).square().mean())
    torch.testing.assert_close(out.metrics["kl"], (pred - ref).square().mean())
    torch.testing.assert_close(out.loss, out.metrics["nft/loss"] + 0.5 * out.metrics["kl"])
    assert all(torch.equal(a, b) for a, b in zip(before, step.old.shadow, strict=True))


def test_with_lambda_zero_it_is_the_host_bit_for_bit():
    grads = []
    for weight in (None, 0.0):
        setup = Setup("unet")
        agsm = None if weight is None else setup.agsm(weight=weight)
        step = made(setup, agsm=agsm)
        moved(setup)
        out = step(*given(setup), agsm_batch=None if agsm is None else images(setup))
        grads.append([out.loss, *torch.autograd.grad(out.loss, setup.trained, allow_unused=True)])
    pairs = list(zip(*grads, strict=True))
    assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    assert sum(a is not None and bool(a.any()) for a, _ in pairs) > 1


def images(setup):
    text = setup.conditioning
    return AGSMBatch(setup.loser, setup.timesteps.flip(0), setup.noise, text, setup.captions)


def test_agsm_is_added_and_wants_its_images():
    setup = Setup("unet")
    agsm = setup.agsm(weight=0.5)
    both, plain = made(setup, agsm=agsm), made(setup)
    term = agsm_on(images(setup), setup.agsm(weight=0.5), setup.scheduler)
    total = both(*given(setup), agsm_batch=images(setup))
    torch.testing.assert_close(total.loss, plain(*given(setup)).loss + term.loss)
    assert term.loss > 0 and "agsm/win_rate" in total.metrics
    with pytest.raises(ValueError, match="agsm_batch"):
        both(*given(setup))
    with pytest.raises(ValueError, match="agsm_batch"):
        plain(*given(setup), agsm_batch=images(setup))
    with pytest.raises(ValueError, match="an EMA of its own"):
        made(setup, agsm=agsm, old=agsm.ema)
    for wrong in ({"kl_weight": -1.0}, {"steps_per_epoch": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            made(setup, **wrong)


def test_the_old_policy_moves_once_an_epoch_and_is_kept_in_the_state():
    setup = Setup("unet")
    step = made(setup, agsm=setup.agsm(), steps_per_epoch=2, old_decay=lambda i: i / 8)
    before = [one.clone() for one in step.old.shadow]
    moved(setup)
    step.update_ema()
    assert all(torch.equal(a, b) for a, b in zip(before, step.old.shadow, strict=True))
    step.update_ema()
    for was, one, now in zip(before, step.old.shadow, setup.trained, strict=True):
        torch.testing.assert_close(one, 0.25 * was + 0.75 * now)
    assert step.agsm.ema.num_updates == 2 and step.old.num_updates == 1
    fresh = made(setup, agsm=setup.agsm(), steps_per_epoch=2)
    fresh.load_state_dict(step.state_dict())
    assert fresh.step == 2 and fresh.agsm.step == 2
    assert all(torch.equal(a, b) for a, b in zip(fresh.old.shadow, step.old.shadow, strict=True))
