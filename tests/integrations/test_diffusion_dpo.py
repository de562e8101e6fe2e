"""Diffusion-DPO against an explicit restatement, and AGSM in its step."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from preference_setup import SCHEDULERS, Setup

from agsm_loss import EMA, Bank, InBatch
from agsm_loss.integrations.hosts.base import adapters_off
from agsm_loss.integrations.hosts.diffusion_dpo import diffusion_dpo_loss
from agsm_loss.integrations.noise import add_noise, regression_target


def restated(pred, ref, target, beta, kind):
    """One number, with explicit loops, in float64."""
    pairs, total, right = len(pred) // 2, 0.0, 0
    for i in range(pairs):
        gap = {}
        for role, row in (("w", i), ("l", pairs + i)):
            m = np.mean((pred[row] - target[row]) ** 2)
            f = np.mean((ref[row] - target[row]) ** 2)
            gap[role] = m - f
        inside = -(beta / 2) * (gap["w"] - gap["l"])
        right += inside > 0
        total += {
            "sigmoid": math.log1p(math.exp(-inside)),
            "hinge": max(0.0, 1 - inside),
            "ipo": (inside / beta - 1 / (2 * beta)) ** 2,
        }[kind]
    return total / pairs, right / pairs


@given(
    pairs=st.integers(1, 4),
    beta=st.floats(0.1, 20),
    kind=st.sampled_from(["sigmoid", "hinge", "ipo"]),
    seed=st.integers(0, 2**31),
)
def test_the_objective_is_the_published_one(pairs, beta, kind, seed):
    rng = np.random.default_rng(seed)
    pred, ref, target = rng.normal(size=(3, 2 * pairs, 2, 3))
    leaf = torch.tensor(pred, requires_grad=True)
    terms = diffusion_dpo_loss(leaf, torch.tensor(ref), torch.tensor(target), beta, kind)
    loss, right = restated(pred, ref, target, beta, kind)
    assert terms.loss.item() == pytest.approx(loss, rel=1e-12, abs=1e-14)
    assert terms.accuracy.item() == pytest.approx(right)
    terms.loss.backward()
    for index in ((0, 0, 0), (2 * pairs - 1, 1, 2)):
        step = np.zeros_like(pred)
        step[index] = 1e-6
        slope = restated(pred + step, ref, target, beta, kind)[0]
        slope -= restated(pred - step, ref, target, beta, kind)[0]
        assert leaf.grad[index].item() == pytest.approx(slope / 2e-6, rel=1e-4, abs=1e-6)


def test_a_model_that_is_its_reference_stands_at_log_2():
    pred, target = torch.randn(2, 6, 4)
    terms = diffusion_dpo_loss(pred, pred, target)
    assert terms.loss.item() == pytest.approx(math.log(2))
    assert terms.accuracy == 0 and (terms.margin == 0).all()


def test_half_precision_predictions_are_compared_in_float32():
    pred, ref, target = torch.randn(3, 4, 64).bfloat16()
    terms = diffusion_dpo_loss(pred, ref, target)
    assert terms.loss.dtype == torch.float32
    again = diffusion_dpo_loss(pred.float(), ref.float(), target.float())
    assert torch.equal(terms.loss, again.loss)


@pytest.mark.unchecked_shapes
def test_bad_input_is_refused():
    good = torch.randn(4, 3)
    for args in ((good[:3], good[:3], good[:3]), (good, good[:2], good), (good, good, good[:, :2])):
        with pytest.raises(ValueError, match="winners first"):
            diffusion_dpo_loss(*args)
    with pytest.raises(ValueError, match="beta: expected a positive"):
        diffusion_dpo_loss(good, good, good, 0.0)
    with pytest.raises(ValueError, match="loss_type: expected one of"):
        diffusion_dpo_loss(good, good, good, 1.0, "kto")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_reference_of_a_lora_is_the_base_model(name):
    it = Setup(name)
    seen = []
    it.denoiser.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    it.run(it.step())
    both, twice = torch.cat([it.winner, it.loser]), torch.cat([it.timesteps] * 2)
    noise = torch.cat([it.noise] * 2)
    noisy = add_noise(it.scheduler, both, noise, twice)
    doubled = {name: torch.cat([value] * 2) for name, value in it.conditioning.items()}
    text = {"encoder_hidden_states": doubled["prompt_embeds"]}
    if name == "sd3":
        text["pooled_projections"] = doubled["pooled_prompt_embeds"]
        base = it.plain(hidden_states=noisy, timestep=twice, **text).sample
    else:
        base = it.plain(noisy, twice, **text).sample
    assert torch.allclose(seen[0], base, atol=1e-12)
    assert not torch.allclose(seen[1], base, atol=1e-3)
    target = regression_target(it.scheduler, both, noise, twice)
    value = restated(*(x.numpy() for x in (seen[1], seen[0], target)), 5.0, "sigmoid")[0]
    assert it.run(it.step())[0].loss.item() == pytest.approx(value, rel=1e-10)


def test_adapters_come_back_as_they_were():
    it = Setup("unet")
    before = [(name, p.requires_grad) for name, p in it.model.named_parameters()]
    frozen = next(p for name, p in it.model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    with pytest.raises(RuntimeError, match="inside"), adapters_off(it.model):
        raise RuntimeError("inside")
    assert not frozen.requires_grad
    frozen.requires_grad_(True)
    assert before == [(name, p.requires_grad) for name, p in it.model.named_parameters()]
    with pytest.raises(ValueError, match=r"EMA\(denoiser, decay=1.0\)"), adapters_off(it.plain):
        pass


class Words(torch.nn.Sequential):
    """Embeds tokens and reads the embedding's weight itself, as tied layers do."""

    def __init__(self):
        super().__init__(*map(torch.nn.Linear, (4, 4, 4), (4, 4, 4)), torch.nn.Embedding(5, 4))

    def get_input_embeddings(self):
        return self[3]

    def forward(self, tokens):
        return self[2](self[1](self[0](self[3](tokens)))) @ self[3].weight.T


@pytest.mark.parametrize(
    "more",
    [{"modules_to_save": ["1", "2"]}, {"modules_to_save": ["3"]}, {"trainable_token_indices": [1]}],
)
def test_all_that_peft_trains_is_off(more):
    """Also modules that it trains whole, with adapters inside or outside, and single tokens."""
    torch.manual_seed(0)
    model, tokens = Words(), torch.tensor([[0, 1, 2]])
    base = model(tokens).detach()
    model = get_peft_model(model, LoraConfig(target_modules=["0", "2"], **more))
    with torch.no_grad():
        for one in model.parameters():
            one.add_(one.requires_grad * torch.randn_like(one))
    trained, flags = model(tokens), [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        with adapters_off(model):
            assert torch.equal(model(tokens), base)
        assert torch.equal(model(tokens), base)
        raise RuntimeError("inside")
    assert torch.equal(model(tokens), trained) and not torch.allclose(trained, base, atol=0.1)
    assert flags == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_have_no_switch(bias):
    model = get_peft_model(Words(), LoraConfig(target_modules=["0"], bias=bias))
    with pytest.raises(ValueError, match=f"got bias='{bias}'.*decay=1.0"), adapters_off(model):
        pass


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_weight_of_zero_is_the_host_bit_for_bit(name):
    it = Setup(name)
    host, host_grads = it.run(it.step())
    both, both_grads = it.run(it.step(agsm=it.agsm(weight=0.0)))
    assert torch.equal(host.loss, both.loss)
    assert all(torch.equal(a, b) for a, b in zip(host_grads, both_grads, strict=True))
    assert both.metrics.keys() >= host.metrics.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_agsm_adds_its_own_term_at_the_hosts_noise_and_timestep(name):
    it = Setup(name)
    host, host_grads = it.run(it.step())
    both, both_grads = it.run(it.step(agsm=it.agsm(weight=0.25)))
    noisy = add_noise(it.scheduler, it.winner, it.noise, it.timesteps)
    target = regression_target(it.scheduler, it.winner, it.noise, it.timesteps)
    term = it.agsm(weight=0.25)(
        noisy, it.timesteps, target, it.conditioning, it.captions
    )  # its own forward pass instead of the host's prediction
    grads = torch.autograd.grad(term.loss, it.trained, allow_unused=True)
    assert both.loss.item() == pytest.approx((host.loss + term.loss).item(), rel=1e-9)
    for total, alone, extra in zip(both_grads, host_grads, grads, strict=True):
        assert torch.allclose(total, alone + extra, atol=1e-9)
    tokens = [p is it.denoiser.tokens.tokens for p in it.trained].index(True)
    assert host_grads[tokens][0].abs().max() > 0 and host_grads[tokens][1].abs().max() == 0
    assert both_grads[tokens][1].abs().max() > 0  # psi- is AGSM's alone


def test_the_winners_prediction_is_not_computed_twice():
    it = Setup("unet")
    rows = []
    it.denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    it.run(it.step(agsm=it.agsm()))
    assert rows == [6, 6, 9, 6]  # reference, host, EMA on all 3·3, the student's negatives


def test_one_pair_has_no_negatives():
    it = Setup("unet", batch=1)
    with pytest.raises(ValueError, match="negative"):
        it.run(it.step(agsm=it.agsm()))
    out, _ = it.run(it.step(agsm=it.agsm(candidates=InBatch(allow_empty=True))))
    host, _ = it.run(it.step())
    own = it.denoiser(
        add_noise(it.scheduler, it.winner, it.noise, it.timesteps),
        it.timesteps,
        it.conditioning,
        torch.tensor([int(Bank.POSITIVE)]),
    )
    error = (own - it.noise).square().mean()
    assert (out.loss - host.loss).item() == pytest.approx(error.item(), rel=1e-6)


def test_full_fine_tuning_keeps_a_frozen_copy_of_what_it_trains():
    it = Setup("unet", lora=False)
    it.model.requires_grad_(True)
    start = EMA(it.model.parameters(), decay=1.0)
    step = it.step(reference=start.applied)
    optimizer = torch.optim.SGD(it.trained, lr=0.05)
    first = it.run(step)[0].metrics["dpo/error"]
    for _ in range(3):
        optimizer.zero_grad()
        out = step(it.winner, it.loser, it.conditioning, it.timesteps, it.noise)
        out.loss.backward()
        optimizer.step()
        step.update_ema()
        start.update()  # decay 1: it stays
    assert out.metrics["dpo/margin"] > 0 and out.metrics["dpo/accuracy"] > 0.5
    with start.applied():
        again = it.run(it.step(reference=nullcontext))[0].metrics["dpo/error"]
    assert torch.allclose(first, again)


def test_the_state_is_agsms():
    it = Setup("unet")
    step = it.step(agsm=it.agsm())
    it.run(step)
    step.update_ema()
    other = it.step(agsm=it.agsm())
    other.load_state_dict(step.state_dict())
    assert other.agsm.step == 1
    assert it.step().state_dict() == {}
    it.step().load_state_dict({})
