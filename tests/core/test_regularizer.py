"""The regularizer on a small real denoiser with soft tokens."""

import itertools

import pytest
import torch
import workers
from torch import nn
from workers import run_ranks

from agsm_loss import (
    EMA,
    AdaptiveTemperature,
    AGSMLoss,
    AGSMRegularizer,
    SoftTokens,
    hard_candidates,
    in_batch_candidates,
)
from agsm_loss import functional as AF

B, D, W = 4, 6, 8
CAPTIONS = ["one", "two", "three", "four"]


class Denoiser(nn.Module):
    """x_t attends to [caption, soft tokens]; small, but with every part of the real thing."""

    def __init__(self):
        super().__init__()
        self.tokens = SoftTokens(W, num_tokens=2, std=0.5)
        self.query, self.out = nn.Linear(D + 1, W), nn.Linear(2 * W, D)
        self.calls = []

    def forward(self, noisy, timesteps, conditioning, bank, size=None):
        self.calls.append((bank.tolist(), torch.is_grad_enabled()))
        query = self.query(torch.cat([noisy, timesteps.reshape(-1, 1) / 1000], dim=1))
        text = torch.cat([conditioning["text"], self.tokens(timesteps, bank)], dim=1)
        mix = (query.unsqueeze(1) * text).sum(-1).softmax(1).unsqueeze(1) @ text
        out = self.out(torch.cat([query, mix.squeeze(1)], dim=1).tanh())
        return out if size is None else out * size.reshape(-1, 1)


def problem(seed=0, pool=B):
    torch.manual_seed(seed)
    net = Denoiser().double()
    x, target = torch.randn(B, D).double(), torch.randn(B, D).double()
    t = torch.tensor([10.0, 300.0, 600.0, 990.0]).double()
    cond = {"text": torch.randn(pool, 3, W).double(), "name": "kept"}
    return net, (x, t, target, cond)


def grads(net, loss):
    return torch.autograd.grad(loss, list(net.parameters()))


def by_hand(net, x, t, target, cond, candidates, loss, **image):
    """Loss on (B, K, D) predictions of every pair, made one pair at a time."""

    def predict():
        rows = []
        for i, row in enumerate(candidates.index.tolist()):
            for j, k in enumerate(row):
                bank = torch.tensor([int(j != candidates.positives[i])])
                sample = {"text": cond["text"][k : k + 1]}
                extra = {n: v[i : i + 1] for n, v in image.items()}
                rows.append(net(x[i : i + 1], t[i : i + 1], sample, bank, **extra))
        return torch.cat(rows).unflatten(0, candidates.index.shape)

    with torch.no_grad():
        ema_pred = predict()
    return loss.terms(predict(), ema_pred, target, candidates.positives, candidates.mask)


def close(ours, theirs, tolerance=1e-6):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_equals_the_loss_on_every_pair_at_step_0():
    """The EMA starts equal, so both passes can be made with the student."""
    net, batch = problem()
    loss = AGSMLoss(neg_scale=0.3)
    candidates = in_batch_candidates(["a", "b", "a", "c"], num_negatives=3)
    size = torch.rand(B).double()
    expected = by_hand(net, *batch, candidates, loss, size=size)
    agsm = AGSMRegularizer(net, EMA(net.parameters()), loss, weight=0.7)
    out = agsm(*batch, candidates=candidates, image_conditioning={"size": size})
    torch.testing.assert_close(out.loss, 0.7 * expected.loss)
    close(grads(net, out.loss), grads(net, 0.7 * expected.loss))
    for name in ("win_rate", "score_margin", "weight_entropy", "positive_weight", "guidance_norm"):
        torch.testing.assert_close(out.metrics[f"agsm/{name}"], getattr(expected, name))
    torch.testing.assert_close(out.metrics["agsm/loss"], expected.loss.detach())
    assert out.metrics["agsm/weight"] == 0.7
    assert not any(value.requires_grad for value in out.metrics.values())


def test_the_analytic_value_where_captions_do_not_matter():
    """Without conditioning all predictions agree: Δ = 0, and L is the plain error, twice."""
    layer = nn.Linear(D, D).double()
    _, (x, t, target, cond) = problem()
    agsm = AGSMRegularizer(lambda x, t, c, bank: layer(x), EMA(layer.parameters()))
    out = agsm(x, t, target, cond, captions=CAPTIONS)
    torch.testing.assert_close(out.loss, 2 * (layer(x) - target).square().mean())
    assert out.metrics["agsm/positive_weight"] == out.metrics["agsm/chance_weight"] == 0.25


def test_the_student_and_the_ema_pass():
    net, batch = problem()
    agsm = AGSMRegularizer(net, EMA(net.parameters()))
    agsm(*batch, captions=CAPTIONS)
    banks = [0, 1, 1, 1] * B
    assert net.calls == [(banks, False), (banks, True)]


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 16])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("immediate", [False, True])
def test_chunks_have_the_same_gradients(chunk_size, reuse, immediate):
    net, batch = problem()
    ema = EMA(net.parameters(), decay=0.5)
    with torch.no_grad():
        net.tokens.tokens.add_(0.3)
    ema.update()
    candidates = in_batch_candidates(["a", "b", "a", "c"], num_negatives=3)
    whole = AGSMRegularizer(net, ema, weight=0.7)(*batch, candidates=candidates).loss
    expected = grads(net, whole)

    x, t, _, cond = batch
    zeros = torch.zeros(B, dtype=torch.long)
    pred = net(x, t, {"text": cond["text"]}, zeros) if reuse else None
    agsm = AGSMRegularizer(net, ema, weight=0.7, chunk_size=chunk_size)
    net.calls.clear()
    backward = torch.Tensor.backward if immediate else None
    out = agsm(*batch, candidates=candidates, pred=pred, backward=backward)
    torch.testing.assert_close(out.loss.detach(), whole.detach())
    if out.loss.requires_grad:
        out.loss.backward()
    else:
        assert immediate and not reuse
    close([p.grad for p in net.parameters()], expected)
    assert max(len(bank) for bank, _ in net.calls) <= chunk_size


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("reuse", [False, True])
def test_the_negatives_leave_alone_what_all_captions_share(chunk_size, immediate, reuse):
    net, batch = problem()
    loss = AGSMLoss(neg_scale=0.3)
    candidates = in_batch_candidates(["a", "b", "a", "c"], num_negatives=3)
    terms = by_hand(net, *batch, candidates, loss)
    shared, tokens = [*net.query.parameters(), *net.out.parameters()], [*net.tokens.parameters()]
    expected = [
        *torch.autograd.grad(terms.positive_term, shared, retain_graph=True),
        *torch.autograd.grad(terms.loss, tokens),
    ]
    x, t, _, cond = batch
    pred = net(x, t, {"text": cond["text"]}, torch.zeros(B, dtype=torch.long)) if reuse else None
    ema = EMA(net.parameters())
    agsm = AGSMRegularizer(net, ema, loss, chunk_size=chunk_size, shared=shared)
    backward = torch.Tensor.backward if immediate else None
    out = agsm(*batch, candidates=candidates, pred=pred, backward=backward)
    torch.testing.assert_close(out.loss.detach(), terms.loss.detach())
    if out.loss.requires_grad:
        out.loss.backward()
    close([p.grad for p in [*shared, *tokens]], expected)
    assert all(p.requires_grad for p in net.parameters())


def test_shared_weights_are_trained_again_after_a_failed_pass():
    net, batch = problem()
    shared = [*net.query.parameters(), *net.out.parameters()]
    agsm = AGSMRegularizer(net, EMA(net.parameters()), AGSMLoss(neg_scale=0.3), shared=shared)

    def fails(noisy, timesteps, conditioning, bank):
        if torch.is_grad_enabled() and bank.any():
            assert not any(p.requires_grad for p in shared)
            raise RuntimeError("out of memory")
        return net(noisy, timesteps, conditioning, bank)

    agsm.denoiser = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        agsm(*batch, captions=CAPTIONS)
    assert all(p.requires_grad for p in shared)
    everything = list(net.parameters())
    with pytest.raises(ValueError, match="shared: expected some of the"):
        AGSMRegularizer(net, EMA(everything), AGSMLoss(neg_scale=0.3), shared=everything)
    AGSMRegularizer(net, EMA(everything), AGSMLoss(neg_scale=0.0), shared=everything)


def test_chunks_hold_fewer_tensors_for_backward():
    """What autograd keeps doesn't grow with the number of candidates when passes are chunked."""
    kept = {}
    for num_negatives, chunk_size in itertools.product((1, 3), (None, B)):
        net, batch = problem()
        agsm = AGSMRegularizer(net, EMA(net.parameters()), chunk_size=chunk_size)
        candidates = in_batch_candidates(CAPTIONS, num_negatives=num_negatives)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x
        ):
            agsm(*batch, candidates=candidates)
        kept[num_negatives, chunk_size] = sum(saved)
    assert kept[3, None] > 1.5 * kept[1, None]
    assert kept[3, B] < 0.5 * kept[3, None]


def test_the_hosts_prediction_is_not_run_again():
    net, batch = problem()
    x, t, _, cond = batch
    agsm = AGSMRegularizer(net, EMA(net.parameters()))
    pred = net(x, t, cond, torch.zeros(B, dtype=torch.long))
    net.calls.clear()
    agsm(*batch, captions=CAPTIONS, pred=pred)
    assert [bank for bank, trained in net.calls if trained] == [[1, 1, 1] * B]


def test_no_student_pass_for_negatives_without_their_term():
    net, batch = problem()
    agsm = AGSMRegularizer(net, EMA(net.parameters()), AGSMLoss(neg_scale=0.0))
    agsm(*batch, captions=CAPTIONS)
    assert [bank for bank, trained in net.calls if trained] == [[0] * B]


class FixedDraws(AGSMRegularizer):
    """Trains on a given subset of the negatives instead of drawing one."""

    def _coefficients(self, positive, valid, draws):
        chosen = torch.zeros_like(valid)
        for i, columns in enumerate(self.subset):
            chosen[i, list(columns)] = True
        return AF.loss_coefficients(
            positive,
            valid & (positive | chosen),
            neg_scale=self.loss.neg_scale,
            dtype=torch.float64,
        )


@pytest.mark.parametrize("size", [1, 2])
def test_a_subset_of_the_negatives_is_unbiased(size):
    """The mean gradient over every subset, enumerated, is the full gradient, weights untouched."""
    net, batch = problem()
    ema, candidates = EMA(net.parameters()), in_batch_candidates(CAPTIONS, num_negatives=3)
    full = AGSMRegularizer(net, ema)(*batch, candidates=candidates)
    expected = grads(net, full.loss)
    fixed = FixedDraws(net, ema)
    subsets = list(itertools.combinations((1, 2, 3), size))
    total, losses = [torch.zeros_like(g) for g in expected], []
    for subset in subsets:  # rows are independent, so the same subset in each row enumerates enough
        fixed.subset = [subset] * B
        out = fixed(*batch, candidates=candidates)
        losses.append(out.loss.detach())
        total = [a + g / len(subsets) for a, g in zip(total, grads(net, out.loss), strict=True)]
        torch.testing.assert_close(
            out.metrics["agsm/guidance_norm"], full.metrics["agsm/guidance_norm"]
        )
    close(total, expected, 1e-10)
    torch.testing.assert_close(torch.stack(losses).mean(), full.loss.detach())
    assert torch.stack(losses).std() > 1e-3


def test_drawn_subsets_are_uniform_and_of_the_asked_size():
    net, _ = problem()
    agsm = AGSMRegularizer(net, EMA(net.parameters()), train_negatives=2)
    positive = torch.tensor([[True, False, False, False], [False, False, True, False]])
    valid = torch.tensor([[True, True, True, True], [True, False, True, False]])
    counts = torch.zeros(2, 4)
    for _ in range(600):
        drawn = agsm._coefficients(positive, valid, agsm._draws()) > 0
        counts += drawn
        assert drawn[0].sum() == 3 and drawn[1].tolist() == [True, False, True, False]
    assert counts[0, 0] == 600
    assert ((counts[0, 1:] / 600 - 2 / 3).abs() < 0.07).all()


def test_subset_runs_fewer_student_passes_and_the_full_ema_pass():
    net, batch = problem()
    agsm = AGSMRegularizer(net, EMA(net.parameters()), train_negatives=1)
    agsm(*batch, captions=CAPTIONS)
    assert [len(bank) for bank, _ in net.calls] == [4 * B, 2 * B]


def test_weight_zero_runs_nothing_and_schedules_follow_the_step():
    net, batch = problem()
    agsm = AGSMRegularizer(net, EMA(net.parameters()), weight=lambda step: float(step))
    before = torch.get_rng_state()
    out = agsm(*batch, captions=CAPTIONS)
    assert out.loss == 0 and not out.loss.requires_grad and net.calls == []
    agsm.update_ema()
    agsm.update_ema()
    out = agsm(*batch, captions=CAPTIONS)
    assert out.metrics["agsm/weight"] == 2.0
    torch.testing.assert_close(out.loss.detach(), 2 * out.metrics["agsm/loss"])
    assert torch.equal(torch.get_rng_state(), before)  # the host's random stream is its own


def test_the_ema_is_what_makes_the_targets():
    net, batch = problem()
    agsm = AGSMRegularizer(net, EMA(net.parameters(), decay=0.0))
    candidates = in_batch_candidates(CAPTIONS)
    first = agsm(*batch, candidates=candidates).metrics["agsm/positive_weight"]
    with torch.no_grad():
        net.out.weight.mul_(-2)
    assert agsm(*batch, candidates=candidates).metrics["agsm/positive_weight"] == first
    agsm.update_ema()
    assert agsm(*batch, candidates=candidates).metrics["agsm/positive_weight"] != first


def test_hard_negatives_from_a_larger_pool():
    hard = [[f"{c} edited"] for c in CAPTIONS]
    net, batch = problem(pool=2 * B)
    candidates = hard_candidates(CAPTIONS, hard)
    expected = by_hand(net, *batch, candidates, AGSMLoss())
    out = AGSMRegularizer(net, EMA(net.parameters()))(*batch, candidates=candidates)
    torch.testing.assert_close(out.loss, expected.loss)


@pytest.mark.parametrize("captions", [["same"] * B, ["", *CAPTIONS[:1], *[""] * (B - 2)]])
def test_a_batch_without_negatives(captions):
    net, batch = problem()
    agsm = AGSMRegularizer(net, EMA(net.parameters()), allow_empty=True)
    x, t, target, cond = batch
    out = agsm(*batch, captions=captions)
    expected = (net(x, t, cond, torch.zeros(B, dtype=torch.long)) - target).square().mean()
    torch.testing.assert_close(out.loss, expected)
    assert all(value.isfinite() for value in out.metrics.values())


def test_reward_weight_gets_the_timesteps():
    net, batch = problem()
    candidates = in_batch_candidates(CAPTIONS)
    by_time = AGSMLoss(reward_weight=lambda t: 1 + t / 100)
    out = AGSMRegularizer(net, EMA(net.parameters()), by_time)(*batch, candidates=candidates)
    plain = AGSMRegularizer(net, EMA(net.parameters()))(*batch, candidates=candidates)
    assert out.metrics["agsm/weight_entropy"] < plain.metrics["agsm/weight_entropy"]


def test_resumes_exactly():
    def train(agsm, net, batch, steps):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            agsm(*batch, captions=CAPTIONS).loss.backward()
            optimizer.step()
            agsm.update_ema()

    def make():
        net, batch = problem()
        loss = AGSMLoss(temperature=AdaptiveTemperature())
        ema = EMA(net.parameters(), decay=0.9, warmup=True)
        return AGSMRegularizer(net, ema, loss, num_negatives=2, train_negatives=1), net, batch

    straight, net, batch = make()
    train(straight, net, batch, 6)
    first, half, batch = make()
    train(first, half, batch, 3)
    saved, weights = first.state_dict(), half.state_dict()
    second, resumed, batch = make()
    second.load_state_dict(saved)
    resumed.load_state_dict(weights)
    train(second, resumed, batch, 3)
    assert second.step == straight.step == 6
    for a, b in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(straight.ema.shadow, second.ema.shadow, strict=True):
        assert torch.equal(a, b)


def test_each_call_draws_from_the_seed_and_its_number():
    """So that the host's stream is left alone, and a rank resumes from another rank's state."""
    net, batch = problem()
    state = torch.get_rng_state()
    losses = {}
    for seed in (1, 2):
        agsm = AGSMRegularizer(net, EMA(net.parameters()), num_negatives=1, seed=seed)
        losses[seed] = [agsm(*batch, captions=CAPTIONS).loss.item() for _ in range(6)]
    assert len(set(losses[1])) > 2 and losses[1] != losses[2]
    again = AGSMRegularizer(net, EMA(net.parameters()), num_negatives=1, seed=1)
    again.calls = 3
    assert again(*batch, captions=CAPTIONS).loss.item() == losses[1][3]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("reuse", [False, True])
def test_one_autocast_around_it_all_changes_nothing(reuse):
    """The EMA differs from the student, and their cast weights are not exchanged."""
    net, batch = problem()
    net, batch = (
        net.float(),
        torch.utils._pytree.tree_map(
            lambda leaf: leaf.float() if isinstance(leaf, torch.Tensor) else leaf, batch
        ),
    )
    ema = EMA(net.parameters(), decay=0.5)
    for p in net.parameters():
        p.data += 0.3 * torch.randn_like(p)
    seen = {}
    for cached in (True, False):
        agsm = AGSMRegularizer(net, ema, AGSMLoss(neg_scale=0.5), seed=0)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            x, t, _, cond = batch
            pred = net(x, t, cond, torch.zeros(B, dtype=torch.long)) if reuse else None
            out = agsm(*batch, captions=CAPTIONS, pred=pred)
        seen[cached] = [out.loss.detach(), *grads(net, out.loss)]
    close(seen[True], seen[False])


def test_two_ranks():
    """Of other draws each, also after resuming; waiting for nobody; and of one mind about gradients."""
    ranks = run_ranks(workers.regularizer)
    for rank, told in ranks.items():
        assert told["seed"] == rank and told["calls"] == 1
        assert "backward: expected None" in told["refused"]
        assert told["steps"] == 2
    for ours, theirs in zip(*(told["weights"] for told in ranks.values()), strict=True):
        assert torch.equal(ours, theirs)


def test_training_lowers_the_loss():
    net, batch = problem()
    loss = AGSMLoss(temperature=AdaptiveTemperature(0.8))
    agsm = AGSMRegularizer(net, EMA(net.parameters(), decay=0.9), loss)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        out = agsm(*batch, captions=CAPTIONS)
        out.loss.backward()
        optimizer.step()
        agsm.update_ema()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
