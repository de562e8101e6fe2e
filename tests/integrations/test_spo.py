"""SPO: log-probabilities, pairs, its loss against a restatement, and its step."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from preference_setup import Setup

from agsm_loss import Bank
from agsm_loss.integrations.hosts.base import (
    AGSMBatch,
    adapters_off,
    best_rows,
    best_samples,
    mean_log_prob,
)
from agsm_loss.integrations.hosts.spo import (
    SPO,
    StatePairs,
    choose_pairs,
    classifier_free_guidance,
    ddim_gaussian,
    sample_pairs,
    spo_loss,
)
from agsm_loss.integrations.noise import add_noise


def scheduler_of(kind="epsilon"):
    return DDIMScheduler(
        prediction_type=kind, clip_sample=False, beta_schedule="scaled_linear", steps_offset=1
    )


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_the_gaussian_is_diffusers_ddim_step(kind, eta):
    scheduler = scheduler_of(kind)
    scheduler.set_timesteps(20)
    x, pred, noise = torch.randn(3, 4, 3, 2, dtype=torch.float64)
    for place in (0, 7, 18):
        t, before = scheduler.timesteps[place], scheduler.timesteps[place + 1]
        mean, std = ddim_gaussian(
            scheduler, pred, x, t.expand(4).long(), before.expand(4).long(), eta
        )
        step = scheduler.step(pred, t, x, eta=eta, variance_noise=noise if eta else None)
        assert torch.allclose(mean + std * noise, step.prev_sample, atol=1e-6)


def test_the_log_probability_is_torchs_normal_averaged():
    x, mean = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    std = torch.rand(5, 1, 1, dtype=torch.float64) + 0.1
    wanted = torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2))
    assert torch.equal(mean_log_prob(x, mean, std), wanted)


@given(
    st.integers(1, 5), st.floats(0.5, 20), st.floats(0.05, 0.5), st.integers(0, 2**31),
    st.floats(0.01, 1),
)  # fmt: skip
def test_the_loss_is_the_published_one(pairs, beta, clip, seed, size):
    rng = np.random.default_rng(seed)
    values = size * rng.normal(size=(4, pairs))  # winner, loser; model, reference

    def restated(winner, loser):
        total = 0.0
        for i in range(pairs):
            ratio = [
                min(max(math.exp(ours - theirs), 1 - clip), 1 + clip)
                for ours, theirs in ((winner[i], values[2, i]), (loser[i], values[3, i]))
            ]
            inside = beta * (math.log(ratio[0]) - math.log(ratio[1]))
            total += math.log1p(math.exp(-inside))
        return total / pairs

    winner, loser = (torch.tensor(values[i], requires_grad=True) for i in (0, 1))
    loss, inside = spo_loss(
        (winner, loser), (torch.tensor(values[2]), torch.tensor(values[3])), beta, clip
    )
    assert loss.item() == pytest.approx(restated(values[0], values[1]), rel=1e-12)
    assert inside.shape == (pairs,)
    loss.backward()
    ratio = np.exp(values[:2] - values[2:])
    for leaf, row in ((winner, 0), (loser, 1)):
        away = np.minimum(abs(ratio[row] - 1 - clip), abs(ratio[row] - 1 + clip)) > 1e-4
        for i in np.nonzero(away)[0]:
            moved = [values[0].copy(), values[1].copy()]
            moved[row][i] += 1e-6
            up = restated(*moved)
            moved[row][i] -= 2e-6
            slope = (up - restated(*moved)) / 2e-6
            assert leaf.grad[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_a_ratio_out_of_the_range_has_no_gradient():
    winner, loser = (torch.tensor([0.5, 0.0], requires_grad=True) for _ in range(2))
    spo_loss((winner, loser), (torch.zeros(2), torch.zeros(2)))[0].backward()
    assert winner.grad[0] == 0 and winner.grad[1] != 0 and loser.grad[0] == 0


def test_pairs_are_the_ends_where_they_differ_enough():
    scores = torch.tensor([[1.0, 3, 2], [0.0, 0.1, 0.2], [5.0, 5, 5], [0.0, -4, 0.0]])
    best, worst, keep = choose_pairs(scores, threshold=0.3)
    assert best[[0, 1, 3]].tolist() == [1, 2, 0] and worst[[0, 1, 3]].tolist() == [0, 0, 1]
    assert keep.tolist() == [True, False, False, True]
    difference = math.tanh((3 - 1) / 2)  # softmax of two numbers
    assert choose_pairs(scores[:1], difference - 1e-6)[2].item()
    assert not choose_pairs(scores[:1], difference + 1e-6)[2].item()


def test_the_best_rows_are_the_share_with_the_best_scores():
    scores = torch.tensor([0.3, math.nan, 2.0, 0.3, -1.0])
    assert best_rows(scores, 0.4).tolist() == [0, 2]
    assert best_rows(scores, 0.41).tolist() == [0, 2, 3]
    assert best_rows(scores, 0.01).tolist() == [2]
    assert best_rows(scores, 1.0).tolist() == [0, 2, 3, 4]  # never the NaN
    assert best_rows(scores[:1]).tolist() == [0]


def test_the_best_rows_are_at_least_so_many():
    scores = torch.tensor([0.3, math.nan, 2.0, 0.3, -1.0])
    assert best_rows(scores, 0.1, at_least=2).tolist() == [0, 2]
    assert best_rows(scores, 0.6, at_least=2).tolist() == [0, 2, 3]
    assert best_rows(scores, 0.1, at_least=9).tolist() == [0, 2, 3, 4]


def test_a_share_is_not_rounded_up_by_a_rounding_error():
    """0.07 * 100 and 7 / 25 * 25 are above 7."""
    assert len(best_rows(torch.rand(100), 0.07)) == 7
    assert len(best_rows(torch.rand(25), 0.1, at_least=7)) == 7
    assert len(best_rows(torch.rand(3), 1e-12)) == 1


@pytest.mark.parametrize(("share", "each"), [(0.1, 3), (0.5, 2), (1.0, 4), (0.2, 40)])
def test_best_samples_are_copies_of_the_best_rows(share, each):
    rewards, latents = torch.randn(10), torch.randn(10, 2)
    samples = [(str(row), {"x": one}) for row, one in enumerate(latents)]
    found = best_samples(rewards, samples, share, each=each)
    rows = best_rows(rewards, share, at_least=each).tolist()
    assert [text for text, _ in found] == [str(row) for row in rows]
    assert all(torch.equal(one["x"], latents[int(text)]) for text, one in found)
    assert all(one["x"].untyped_storage().nbytes() == 8 for _, one in found)  # what is pickled


@pytest.mark.unchecked_shapes
def test_best_rows_of_nothing_or_by_no_share_are_refused():
    scores = torch.zeros(3)
    for wrong, share in ((scores[:0], 0.5), (scores, 0.0), (scores, 1.1), (scores[None], 0.5)):
        with pytest.raises(ValueError, match=r"share in \(0, 1\]"):
            best_rows(wrong, share)
    with pytest.raises(ValueError, match="got NaN for all 3 images"):
        best_rows(scores * math.nan, 0.5)


def rollout(score, batch=3, **settings):
    scheduler, seen = scheduler_of(), []

    def denoise(x, times, rows):
        seen.append((len(x), int(times[0])))
        return 0.3 * x + rows.reshape(-1, 1)

    noise = torch.randn(batch, 2, generator=torch.Generator().manual_seed(1)).double()
    generator = torch.Generator().manual_seed(2)
    return scheduler, seen, sample_pairs(
        denoise, scheduler, noise, score, generator=generator, **settings
    )  # fmt: skip


def test_a_rollout_collects_the_best_and_worst_of_what_it_draws():
    asked = []

    def score(clean, rows, times):
        asked.append((clean, rows, times))
        return 10 * clean[:, 0]

    scheduler, seen, out = rollout(score, num_candidates=3)
    levels = scheduler.timesteps.tolist()
    assert len(asked) == 20 - 1 - 4 and seen[:4] == [(3, t) for t in levels[:4]]
    assert seen[4:6] == [(3, levels[4]), (9, levels[5])] and seen[-1] == (3, levels[-1])
    assert all(rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] for _, rows, _ in asked)
    pairs = out.pairs
    assert 0 < len(pairs.noisy) <= 45 and out.last.shape == (3, 2)
    assert set(pairs.rows.tolist()) == {0, 1, 2}
    assert ((pairs.timesteps - pairs.previous) == 50).all()

    # Asked again about the pair, the preference model says the same.
    def judged(states):
        squared = scheduler.alphas_cumprod[pairs.previous].reshape(-1, 1).double()
        pred = 0.3 * states + pairs.rows.reshape(-1, 1)
        clean = (states - (1 - squared).sqrt() * pred) / squared.sqrt()
        return 10 * clean[:, 0]

    winner, loser = judged(pairs.winner), judged(pairs.loser)
    assert (torch.tanh((winner - loser) / 2) > 0.3).all()


def test_a_rollout_is_seeded_and_may_find_nothing():
    def flat(clean, rows, times):
        return torch.zeros(len(clean))

    _, _, out = rollout(flat)
    assert all(len(part) == 0 for part in out.pairs) and out.last.isfinite().all()
    _, _, one = rollout(lambda clean, rows, times: clean[:, 0] * 9)
    _, _, two = rollout(lambda clean, rows, times: clean[:, 0] * 9)
    assert torch.equal(one.pairs.winner, two.pairs.winner) and torch.equal(one.last, two.last)


def test_bad_rollouts_are_refused():
    def score(clean, rows, times):
        return clean

    with pytest.raises(ValueError, match=r"score: expected \(12,\)"):
        rollout(score)
    for settings in ({"eta": 0.0}, {"num_candidates": 1}):
        with pytest.raises(ValueError, match="at least 2 candidates"):
            rollout(score, **settings)
    for settings in ({"first_step": 19}, {"num_steps": 5}, {"first_step": -1}):
        with pytest.raises(ValueError, match=r"first_step: expected a step of 0\.\..*no pairs"):
            rollout(lambda clean, rows, times: clean[:, 0], **settings)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"score: expected finite numbers, got .{bad}"):
            rollout(lambda clean, rows, times, bad=bad: bad * torch.ones(len(clean)))
    flow = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        sample_pairs(lambda x, t, r: x, flow, torch.zeros(1, 2), score)
    with pytest.raises(ValueError, match="beta > 0"):
        spo_loss((torch.zeros(1),) * 2, (torch.zeros(1),) * 2, 0.0)


class SPOSetup(Setup):
    def __init__(self):
        super().__init__("unet")
        self.scheduler = scheduler_of()
        self.empty = {"prompt_embeds": torch.randn_like(self.conditioning["prompt_embeds"])}
        noisy, winner, loser = torch.randn(3, 4, 4, 8, 8).double()
        times = torch.tensor([901, 451, 451, 51])
        # Near the reference's mean, where the ratios are not clipped.
        self.pairs = StatePairs(noisy, winner, loser, times, times - 50, torch.tensor([0, 2, 1, 2]))
        with torch.no_grad(), adapters_off(self.model):
            given = self.conditioning, self.empty, 2.0, Bank.OFF
            pred = classifier_free_guidance(self.denoiser, *given)(noisy, times, self.pairs.rows)
        mean, std = ddim_gaussian(self.scheduler, pred, noisy, times, times - 50)
        self.pairs = self.pairs._replace(winner=mean + std * winner, loser=mean + std * loser)

    def step(self, **settings):
        settings = {"guidance_scale": 2.0, "clip": 0.9} | settings
        return SPO(
            self.denoiser, self.scheduler, reference=lambda: adapters_off(self.model), **settings
        )

    def agsm_batch(self):
        return AGSMBatch(self.winner, self.timesteps, self.noise, self.conditioning, self.captions)

    def grads(self, loss):
        found = torch.autograd.grad(loss, self.trained, allow_unused=True)
        pairs = zip(self.trained, found, strict=True)
        return [torch.zeros_like(p) if g is None else g for p, g in pairs]


def test_the_step_compares_guided_likelihoods():
    it = SPOSetup()
    out = it.step()(it.pairs, it.conditioning, it.empty)
    total = 0.0
    for i in range(4):
        row = int(it.pairs.rows[i])
        log_prob = {}
        for who, bank in (("ours", Bank.POSITIVE), ("reference", Bank.OFF)):
            pred = {}
            for kind, text in (("with", it.conditioning), ("without", it.empty)):
                args = (
                    it.pairs.noisy[i : i + 1],
                    it.pairs.timesteps[i : i + 1],
                    {"prompt_embeds": text["prompt_embeds"][row : row + 1]},
                    torch.tensor([int(bank)]),
                )
                with torch.no_grad():
                    if who == "reference":
                        with adapters_off(it.model):
                            pred[kind] = it.denoiser(*args)
                    else:
                        pred[kind] = it.denoiser(*args)
            both = pred["without"] + 2.0 * (pred["with"] - pred["without"])
            here, there = (int(x[i]) for x in (it.pairs.timesteps, it.pairs.previous))
            it.scheduler.set_timesteps(20)
            mean = it.scheduler.step(
                both, here, args[0], eta=1.0, variance_noise=torch.zeros_like(both)
            ).prev_sample
            std = it.scheduler._get_variance(here, there) ** 0.5
            for side in ("winner", "loser"):
                normal = torch.distributions.Normal(mean, std.double())
                log_prob[who, side] = normal.log_prob(getattr(it.pairs, side)[i : i + 1]).mean()
        ratios = [
            (log_prob["ours", side] - log_prob["reference", side]).exp().clamp(0.1, 1.9).log()
            for side in ("winner", "loser")
        ]
        total += math.log1p(math.exp(-10.0 * float(ratios[0] - ratios[1]))) / 4
    assert out.loss.item() == pytest.approx(total, rel=1e-4)
    assert any(g.abs().max() > 0 for g in it.grads(out.loss))


def test_a_weight_of_zero_is_the_host_bit_for_bit():
    it = SPOSetup()
    host = it.step()(it.pairs, it.conditioning, it.empty)
    idle = it.step(agsm=it.agsm(weight=0.0))
    both = idle(it.pairs, it.conditioning, it.empty, agsm_batch=it.agsm_batch())
    assert torch.equal(host.loss, both.loss)
    for one, other in zip(it.grads(host.loss), it.grads(both.loss), strict=True):
        assert torch.equal(one, other)


def test_agsm_trains_on_its_own_clean_images():
    it = SPOSetup()
    host = it.step()(it.pairs, it.conditioning, it.empty)
    both = it.step(agsm=it.agsm(weight=0.5))(
        it.pairs, it.conditioning, it.empty, agsm_batch=it.agsm_batch()
    )
    alone = it.agsm(weight=0.5)(
        add_noise(it.scheduler, it.winner, it.noise, it.timesteps),
        it.timesteps,
        it.noise,
        it.conditioning,
        it.captions,
    )
    assert both.loss.item() == pytest.approx((host.loss + alone.loss).item(), rel=1e-9)
    for name in ("agsm_batch", "agsm"):
        step = it.step(agsm=it.agsm() if name == "agsm_batch" else None)
        with pytest.raises(ValueError, match="agsm_batch: expected it with agsm"):
            step(
                it.pairs,
                it.conditioning,
                it.empty,
                agsm_batch=it.agsm_batch() if name == "agsm" else None,
            )


def test_no_pair_is_no_loss():
    it = SPOSetup()
    none = StatePairs(*(part[:0] for part in it.pairs))
    out = it.step()(none, it.conditioning, it.empty)
    assert out.loss == 0 and out.metrics["spo/pairs"] == 0
    out = it.step(agsm=it.agsm())(none, it.conditioning, it.empty, agsm_batch=it.agsm_batch())
    assert out.loss > 0
    out.loss.backward()
