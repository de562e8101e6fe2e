"""The regularizer on a small real denoiser with soft tokens."""

import copy
import itertools
import math
import weakref
from functools import partial

import pytest
import torch
import workers
from ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

from agsm_loss import (
    EMA,
    AdaptiveTemperature,
    AGSMLoss,
    AGSMRegularizer,
    Candidates,
    Grid,
    Hard,
    InBatch,
    Mixed,
    Passes,
    SoftTokens,
)
from agsm_loss._random import draws

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


def regularizer(net, loss=None, *, decay=0.9999, ema=None, **settings):
    """Over all of the net, with negatives that train all of it, unless the settings say else."""
    ema = EMA(net.parameters(), decay=decay) if ema is None else ema
    settings = {"negatives_train": ema.parameters, **settings}
    return AGSMRegularizer(net, ema, AGSMLoss(neg_scale=1.0) if loss is None else loss, **settings)


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
    candidates = InBatch(3)(["a", "b", "a", "c"])
    size = torch.rand(B).double()
    expected = by_hand(net, *batch, candidates, loss, size=size)
    agsm = regularizer(net, loss, weight=0.7)
    out = agsm(*batch, candidates, image_conditioning={"size": size})
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
    agsm = regularizer(lambda x, t, c, bank: layer(x), ema=EMA(layer.parameters()))
    out = agsm(x, t, target, cond, CAPTIONS)
    torch.testing.assert_close(out.loss, 2 * (layer(x) - target).square().mean())
    assert out.metrics["agsm/positive_weight"] == out.metrics["agsm/chance_weight"] == 0.25


def test_the_student_and_the_ema_pass():
    net, batch = problem()
    agsm = regularizer(net)
    agsm(*batch, CAPTIONS)
    banks = [0, 1, 1, 1] * B
    assert net.calls == [(banks, False), (banks, True)]


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 16])
@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("ema_chunk_size", [None, 2])
def test_chunks_have_the_same_gradients(chunk_size, reuse, immediate, ema_chunk_size):
    net, batch = problem()
    ema = EMA(net.parameters(), decay=0.5)
    with torch.no_grad():
        net.tokens.tokens.add_(0.3)
    ema.update()
    candidates = InBatch(3)(["a", "b", "a", "c"])
    whole = regularizer(net, ema=ema, weight=0.7)(*batch, candidates).loss
    expected = grads(net, whole)

    x, t, _, cond = batch
    zeros = torch.zeros(B, dtype=torch.long)
    pred = net(x, t, {"text": cond["text"]}, zeros) if reuse else None
    backward = torch.Tensor.backward if immediate else None
    passes = Passes(chunk_size, backward=backward, ema_chunk_size=ema_chunk_size)
    agsm = regularizer(net, ema=ema, weight=0.7, passes=passes)
    net.calls.clear()
    out = agsm(*batch, candidates, pred=pred)
    torch.testing.assert_close(out.loss.detach(), whole.detach())
    if out.loss.requires_grad:
        out.loss.backward()
    else:
        assert immediate and not reuse
    close([p.grad for p in net.parameters()], expected)
    trained = [len(bank) for bank, with_gradient in net.calls if with_gradient]
    ema_passes = [len(bank) for bank, with_gradient in net.calls if not with_gradient]
    assert max(trained) <= chunk_size
    assert max(ema_passes) <= (ema_chunk_size or 4 * chunk_size)
    cells = int(candidates.mask.sum()) - (B if reuse else 0)
    again = 0 if immediate else (cells - 1) // chunk_size * chunk_size  # all but the last
    assert sum(trained) == cells + again


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("immediate", [False, True])
@pytest.mark.parametrize("reuse", [False, True])
def test_the_negatives_leave_alone_what_all_captions_share(chunk_size, immediate, reuse):
    net, batch = problem()
    loss = AGSMLoss(neg_scale=0.3)
    candidates = InBatch(3)(["a", "b", "a", "c"])
    terms = by_hand(net, *batch, candidates, loss)
    shared, tokens = [*net.query.parameters(), *net.out.parameters()], [*net.tokens.parameters()]
    expected = [
        *torch.autograd.grad(terms.positive_term, shared, retain_graph=True),
        *torch.autograd.grad(terms.loss, tokens),
    ]
    x, t, _, cond = batch
    pred = net(x, t, {"text": cond["text"]}, torch.zeros(B, dtype=torch.long)) if reuse else None
    backward = torch.Tensor.backward if immediate else None
    passes = Passes(chunk_size=chunk_size, backward=backward)
    agsm = regularizer(net, loss, passes=passes, negatives_train=None)
    out = agsm(*batch, candidates, pred=pred)
    torch.testing.assert_close(out.loss.detach(), terms.loss.detach())
    if out.loss.requires_grad:
        out.loss.backward()
    close([p.grad for p in [*shared, *tokens]], expected)
    assert all(p.requires_grad for p in net.parameters())


def test_the_negatives_train_what_they_are_given():
    net, batch = problem()
    loss, candidates = AGSMLoss(neg_scale=0.3), InBatch(3)(CAPTIONS)
    terms = by_hand(net, *batch, candidates, loss)
    reached = [*net.tokens.parameters(), net.out.bias]
    others = [p for p in net.parameters() if not any(p is one for one in reached)]
    expected = [
        *torch.autograd.grad(terms.loss, reached, retain_graph=True),
        *torch.autograd.grad(terms.positive_term, others),
    ]
    out = regularizer(net, loss, negatives_train=iter(reached))(*batch, candidates)
    close(torch.autograd.grad(out.loss, [*reached, *others]), expected)


def test_the_default_is_one_pass_where_tokens_alone_are_trained():
    net, batch = problem()
    for part in (net.query, net.out):
        part.requires_grad_(False)
    loss, candidates = AGSMLoss(neg_scale=0.3), InBatch(3)(CAPTIONS)
    tokens = list(net.tokens.parameters())
    expected = torch.autograd.grad(by_hand(net, *batch, candidates, loss).loss, tokens)
    net.calls.clear()
    out = AGSMRegularizer(net, EMA(tokens), loss)(*batch, candidates)
    close(torch.autograd.grad(out.loss, tokens), expected)
    assert [len(bank) for bank, _ in net.calls] == [4 * B, 4 * B]


def test_what_the_ema_leaves_out_is_spared_too():
    net, batch = problem()
    ema, loss = EMA(net.tokens.parameters()), AGSMLoss(neg_scale=0.3)
    spared = [*net.query.parameters(), *net.out.parameters()]
    candidates = InBatch(3)(CAPTIONS)
    terms = by_hand(net, *batch, candidates, loss)
    expected = torch.autograd.grad(terms.positive_term, spared)
    out = AGSMRegularizer(net, ema, loss)(*batch, candidates)
    close(torch.autograd.grad(out.loss, spared), expected)


def test_negatives_without_anything_to_train_are_refused():
    layer, (net, _) = nn.Linear(D, D), problem()
    net.tokens.requires_grad_(False)
    for denoiser, trained in (
        (layer, layer),  # a LoRA, or all of the denoiser
        (net, net),  # its tokens are frozen
        (lambda *_: None, SoftTokens(W)),  # tokens that cannot be found
    ):
        ema = EMA(trained.parameters())
        with pytest.raises(ValueError, match=r"neg_scale=0\.1.*Take neg_scale=0 .*ema\.parameters"):
            AGSMRegularizer(denoiser, ema, AGSMLoss(neg_scale=0.1))
        AGSMRegularizer(denoiser, ema, AGSMLoss(neg_scale=0))
        AGSMRegularizer(denoiser, ema, AGSMLoss(neg_scale=0.1), negatives_train=ema.parameters)
    with pytest.raises(ValueError, match="negatives_train"):
        AGSMRegularizer(net, ema, AGSMLoss(neg_scale=0.1), negatives_train=[])


def test_spared_weights_are_trained_again_after_a_failed_pass():
    net, batch = problem()
    spared = [*net.query.parameters(), *net.out.parameters()]
    agsm = regularizer(net, AGSMLoss(neg_scale=0.3), negatives_train=None)

    def fails(noisy, timesteps, conditioning, bank):
        if torch.is_grad_enabled() and bank.any():
            assert not any(p.requires_grad for p in spared)
            raise RuntimeError("out of memory")
        return net(noisy, timesteps, conditioning, bank)

    agsm.denoiser = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        agsm(*batch, CAPTIONS)
    assert all(p.requires_grad for p in spared)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_is_refused_where_the_negatives_spare_weights(reentrant):
    """It would run the pass again with the spared weights trained."""
    net, batch = problem()

    def denoiser(noisy, timesteps, conditioning, bank):
        text = conditioning["text"].clone().requires_grad_()

        def run(text):
            return net(noisy, timesteps, {"text": text}, bank)

        return checkpoint(run, text, use_reentrant=reentrant)

    def loss(**settings):
        ema = EMA(net.parameters())
        agsm = AGSMRegularizer(denoiser, ema, AGSMLoss(neg_scale=0.3), **settings)
        return agsm(*batch, CAPTIONS).loss

    if reentrant:
        with pytest.raises(ValueError, match="no reentrant checkpointing inside the denoiser"):
            loss(negatives_train=net.tokens.parameters())
    else:
        with pytest.raises(CheckpointError):
            loss(negatives_train=net.tokens.parameters()).backward()
    loss(negatives_train=net.parameters()).backward()
    agsm = AGSMRegularizer(denoiser, EMA(net.parameters()), AGSMLoss(neg_scale=0))
    agsm(*batch, CAPTIONS).loss.backward()


def test_a_single_chunk_is_run_once():
    net, batch = problem()
    regularizer(net, passes=Passes(chunk_size=4 * B))(*batch, CAPTIONS).loss.backward()
    assert [len(bank) for bank, _ in net.calls] == [4 * B, 4 * B]


def test_without_chunks_no_pass_is_run_again_where_weights_are_spared():
    net, batch = problem()
    agsm = regularizer(net, negatives_train=net.tokens.parameters())
    loss = agsm(*batch, CAPTIONS).loss
    before = len(net.calls)
    loss.backward()
    assert len(net.calls) == before == 3  # the EMA's, the matching captions', the negatives'


def test_chunks_that_are_run_again_keep_no_copies_of_their_rows():
    net, batch = problem()
    given = []

    def denoiser(noisy, timesteps, conditioning, bank):
        given.extend([weakref.ref(noisy), weakref.ref(conditioning["text"])])
        return net(noisy, timesteps, conditioning, bank)

    passes = Passes(chunk_size=B, ema_chunk_size=B)
    agsm = regularizer(denoiser, ema=EMA(net.parameters()), passes=passes)
    out = agsm(*batch, CAPTIONS)
    kept = [one() is not None for one in given]
    assert len(kept) == 2 * 8 and not any(kept[:-2])
    out.loss.backward()


def test_chunks_hold_fewer_tensors_for_backward():
    """What autograd keeps doesn't grow with the number of candidates when passes are chunked."""
    kept = {}
    for num_negatives, chunk_size in itertools.product((1, 3), (None, B)):
        net, batch = problem()
        agsm = regularizer(net, passes=Passes(chunk_size=chunk_size))
        candidates = InBatch(num_negatives)(CAPTIONS)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x
        ):
            agsm(*batch, candidates)
        kept[num_negatives, chunk_size] = sum(saved)
    assert kept[3, None] > 1.5 * kept[1, None]
    assert kept[3, B] < 0.5 * kept[3, None]


def test_the_hosts_prediction_is_not_run_again():
    net, batch = problem()
    x, t, _, cond = batch
    agsm = regularizer(net)
    pred = net(x, t, cond, torch.zeros(B, dtype=torch.long))
    net.calls.clear()
    agsm(*batch, CAPTIONS, pred=pred)
    assert [bank for bank, trained in net.calls if trained] == [[1, 1, 1] * B]


def test_no_student_pass_for_negatives_without_their_term():
    net, batch = problem()
    agsm = regularizer(net, AGSMLoss(neg_scale=0.0))
    agsm(*batch, CAPTIONS)
    assert [bank for bank, trained in net.calls if trained] == [[0] * B]


@pytest.mark.parametrize("size", [1, 2])
def test_a_subset_of_the_negatives_is_unbiased(size):
    """The mean gradient over every subset of one image's three is the full gradient."""
    net, (x, t, target, cond) = problem()
    batch = x[:1], t[:1], target[:1], cond
    candidates = Candidates(
        torch.arange(4).reshape(1, 4), torch.tensor([0]), torch.ones(1, 4).bool(), pool_size=4
    )
    full = regularizer(net)(*batch, candidates)
    expected = grads(net, full.loss)
    agsm = regularizer(net, seed=0, passes=Passes(negatives_per_step=size))
    found = {}
    for _ in range(40):
        out = agsm(*batch, candidates)
        found[round(out.loss.item(), 9)] = grads(net, out.loss)
        torch.testing.assert_close(
            out.metrics["agsm/guidance_norm"], full.metrics["agsm/guidance_norm"]
        )
    assert len(found) == 3  # three choose `size`
    close([sum(parts) / 3 for parts in zip(*found.values(), strict=True)], expected, 1e-10)
    assert sum(found) / 3 == pytest.approx(full.loss.item())
    assert max(found) - min(found) > 1e-3


@pytest.mark.slow
def test_drawn_subsets_are_uniform_and_of_the_asked_size():
    weight = nn.Parameter(torch.ones(()))
    trained = torch.zeros(2, 4)

    def denoiser(noisy, timesteps, conditioning, bank):
        if torch.is_grad_enabled():
            trained.index_put_((noisy[:, 0].long(), conditioning), torch.ones(()), accumulate=True)
        return weight * noisy

    candidates = Candidates(
        index=torch.tensor([[0, 1, 2, 3], [0, 1, 1, 1]]),
        positives=torch.tensor([0, 1]),
        mask=torch.tensor([[True, True, True, True], [True, True, False, False]]),
        pool_size=4,
    )
    agsm = regularizer(denoiser, ema=EMA([weight]), passes=Passes(negatives_per_step=2), seed=0)
    images = torch.tensor([[0.0], [1.0]])
    for _ in range(300):
        before = trained.clone()
        agsm(images, torch.zeros(2), images, torch.arange(4), candidates)
        assert (trained - before).sum(1).tolist() == [3, 2]
    assert trained[0, 0] == 300 and trained[1].tolist() == [300, 300, 0, 0]
    assert ((trained[0, 1:] / 300 - 2 / 3).abs() < 0.1).all()


def test_subset_runs_fewer_student_passes_and_the_full_ema_pass():
    net, batch = problem()
    agsm = regularizer(net, passes=Passes(negatives_per_step=1))
    agsm(*batch, CAPTIONS)
    assert [len(bank) for bank, _ in net.calls] == [4 * B, 2 * B]


def test_weight_zero_runs_nothing_and_schedules_follow_the_step():
    net, batch = problem()
    agsm = regularizer(net, weight=lambda step: float(step))
    before = torch.get_rng_state()
    out = agsm(*batch, CAPTIONS)
    assert out.loss == 0 and not out.loss.requires_grad and net.calls == []
    agsm.update_ema()
    agsm.update_ema()
    out = agsm(*batch, CAPTIONS)
    assert out.metrics["agsm/weight"] == 2.0
    torch.testing.assert_close(out.loss.detach(), 2 * out.metrics["agsm/loss"])
    assert torch.equal(torch.get_rng_state(), before)  # the host's random stream is its own


def test_the_ema_is_what_makes_the_targets():
    net, batch = problem()
    agsm = regularizer(net, decay=0.0)
    candidates = InBatch()(CAPTIONS)
    first = agsm(*batch, candidates).metrics["agsm/positive_weight"]
    with torch.no_grad():
        net.out.weight.mul_(-2)
    assert agsm(*batch, candidates).metrics["agsm/positive_weight"] == first
    agsm.update_ema()
    assert agsm(*batch, candidates).metrics["agsm/positive_weight"] != first


def test_hard_negatives_from_a_larger_pool():
    hard = [[f"{c} edited"] for c in CAPTIONS]
    net, batch = problem(pool=2 * B)
    candidates = Hard()(CAPTIONS, hard_negatives=hard)
    expected = by_hand(net, *batch, candidates, AGSMLoss(neg_scale=1.0))
    out = regularizer(net)(*batch, candidates)
    torch.testing.assert_close(out.loss, expected.loss)


@pytest.mark.parametrize(
    ("rule", "hard"),
    [
        (InBatch(2), None),
        (Hard(), [["a", "b"], ["c"], [], ["d"]]),
        (Mixed(1), [["a", "b"], ["c"], [], ["d"]]),
        (Grid(), None),
    ],
)
def test_the_rule_chooses_from_the_call(rule, hard):
    """The same as its choice, made outside with the call's draws."""
    net, batch = problem(pool=B + sum(map(len, hard or [])))
    ids, seed = [0, 0, 1, 2], 3
    chosen = rule(CAPTIONS, hard_negatives=hard, image_ids=ids, generator=draws(seed, 1))
    expected = regularizer(net)(*batch, chosen)
    agsm = regularizer(net, candidates=rule, seed=seed)
    out = agsm(*batch, CAPTIONS, hard_negatives=hard, image_ids=ids)
    assert out.loss == expected.loss
    assert agsm(*batch, chosen).loss == expected.loss


@pytest.mark.parametrize("captions", [["same"] * B, ["", *CAPTIONS[:1], *[""] * (B - 2)]])
def test_a_batch_without_negatives(captions):
    net, batch = problem()
    agsm = regularizer(net, candidates=InBatch(allow_empty=True))
    x, t, target, cond = batch
    out = agsm(*batch, captions)
    expected = (net(x, t, cond, torch.zeros(B, dtype=torch.long)) - target).square().mean()
    torch.testing.assert_close(out.loss, expected)
    assert all(value.isfinite() for value in out.metrics.values())


def test_reward_weight_gets_the_timesteps():
    net, batch = problem()
    candidates = InBatch()(CAPTIONS)
    by_time = AGSMLoss(neg_scale=1.0, reward_weight=lambda t: 1 + t / 100)
    out = regularizer(net, by_time)(*batch, candidates)
    plain = regularizer(net)(*batch, candidates)
    assert out.metrics["agsm/weight_entropy"] < plain.metrics["agsm/weight_entropy"]


def test_resumes_exactly():
    def train(agsm, net, batch, steps):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for _ in range(steps):
            optimizer.zero_grad()
            agsm(*batch, CAPTIONS).loss.backward()
            optimizer.step()
            agsm.update_ema()

    def make():
        net, batch = problem()
        loss = AGSMLoss(neg_scale=1.0, temperature=AdaptiveTemperature())
        ema = EMA(net.parameters(), decay=0.9, warmup=True)
        passes = Passes(negatives_per_step=1)
        return regularizer(net, loss, ema=ema, candidates=InBatch(2), passes=passes), net, batch

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
        agsm = regularizer(net, candidates=InBatch(1), seed=seed)
        losses[seed] = [agsm(*batch, CAPTIONS).loss.item() for _ in range(6)]
    assert len(set(losses[1])) > 2 and losses[1] != losses[2]
    again = regularizer(net, candidates=InBatch(1), seed=1)
    again.calls = 3
    assert again(*batch, CAPTIONS).loss.item() == losses[1][3]
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
        agsm = regularizer(net, AGSMLoss(neg_scale=0.5), ema=ema, seed=0)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            x, t, _, cond = batch
            pred = net(x, t, cond, torch.zeros(B, dtype=torch.long)) if reuse else None
            out = agsm(*batch, CAPTIONS, pred=pred)
        seen[cached] = [out.loss.detach(), *grads(net, out.loss)]
    close(seen[True], seen[False])


@pytest.mark.slow
def test_two_ranks():
    """Each has draws of its own, also after resuming; none waits; their gradients agree."""
    ranks = run_ranks(workers.regularizer)
    for rank, told in ranks.items():
        assert told["seed"] == rank and told["calls"] == 1
        assert "pred: expected None" in told["refused"]
        assert told["steps"] == 2
    for ours, theirs in zip(*(told["weights"] for told in ranks.values()), strict=True):
        assert torch.equal(ours, theirs)


def test_training_lowers_the_loss():
    net, batch = problem()
    loss = AGSMLoss(neg_scale=1.0, temperature=AdaptiveTemperature(0.8))
    agsm = regularizer(net, loss, decay=0.9)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        out = agsm(*batch, CAPTIONS)
        out.loss.backward()
        optimizer.step()
        agsm.update_ema()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("settings", [{"neg_scale": 1.0}, {"guidance_scale": 3}])
def test_the_empty_caption_never_competes_with_an_empty_one(settings):
    """Also where the texts are not known: with `Candidates` or ids, by what is encoded."""
    net, (x, t, target, cond) = problem()
    null = {"text": torch.randn(1, 3, W).double(), "name": "kept"}
    cond["text"][1] = null["text"][0]
    texts = ["one", "", "three", "four"]
    known = regularizer(net, AGSMLoss(**settings), candidates=InBatch(2))
    loss = known(x, t, target, cond, texts, null=null).loss
    rule = InBatch(2)(texts, generator=draws(known.seed, 1))
    given = regularizer(net, AGSMLoss(**settings))(x, t, target, cond, rule, null=null)
    torch.testing.assert_close(given.loss, loss)
    alone = regularizer(net, AGSMLoss(guidance_scale=3))
    torch.testing.assert_close(
        alone(x, t, target, cond, torch.arange(4), null=null).loss,
        alone(x, t, target, cond, texts, null=null).loss,
    )


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("rule", [None, InBatch(2), lambda captions, **_: InBatch(2)(captions)])
def test_an_iterator_of_captions_is_read_once(rule):
    """By the rule, and by what looks for empty ones."""
    net, batch = problem()
    null = {"text": torch.zeros(1, 3, W).double(), "name": "kept"}
    texts, agsm = ["one", "", "three", "four"], AGSMLoss(guidance_scale=3)
    listed, read = (
        AGSMRegularizer(net, loss=agsm, candidates=rule, seed=0)(*batch, one, null=null).metrics
        for one in (texts, iter(texts))
    )
    assert read["agsm/chance_weight"] == listed["agsm/chance_weight"]
    with pytest.raises(TypeError, match="got None for one"):
        AGSMRegularizer(net, loss=agsm, candidates=rule)(*batch, [None, *texts[1:]], null=null)


def test_an_ema_of_a_copy_with_one_own_parameter_is_refused():
    net, _ = problem()
    mixed = torch.nn.ModuleList(
        [copy.deepcopy(net), torch.nn.ParameterList([next(net.parameters())])]
    )
    for denoiser in (net, net.forward, partial(net.forward)):
        for ema in (EMA(mixed), EMA(copy.deepcopy(net))):
            with pytest.raises(ValueError, match="an EMA of this denoiser's parameters"):
                AGSMRegularizer(denoiser, ema, AGSMLoss(guidance_scale=3))


def test_a_module_in_a_denoiser_is_not_taken_for_it():
    """One by the name that a partial's function has."""

    class Around(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.func, self.scale = problem()[0], torch.nn.Parameter(torch.ones(()))

    around = Around()
    assert AGSMRegularizer(around, EMA(around), AGSMLoss(guidance_scale=3)).denoiser is around


class Constant(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.register_buffer("value", torch.tensor(value))

    def forward(self, errors, mask=None):
        return self.value


def test_a_modules_temperature_is_checked_and_saved_as_a_copy():
    net, batch = problem()
    for wrong in (-0.1, 0.0, math.inf, math.nan):
        loss = AGSMLoss(guidance_scale=3, temperature=Constant(wrong))
        with pytest.raises(ValueError, match="temperature"):
            regularizer(net, loss)(*batch, InBatch(2)(CAPTIONS))
    agsm = regularizer(net, AGSMLoss(guidance_scale=3, temperature=Constant(0.2)))
    saved = agsm.state_dict()
    agsm.loss.temperature.value.fill_(9.0)
    assert [one.item() for one in saved["loss"].values()] == [pytest.approx(0.2)]


def test_null_has_what_conditioning_has_beside_tensors():
    net, (x, t, target, cond) = problem()
    agsm = AGSMRegularizer(net, loss=AGSMLoss(guidance_scale=3))
    null = {"text": torch.zeros(1, 3, W).double(), "name": "kept"}
    assert agsm(x, t, target, cond, CAPTIONS, null=null).loss.isfinite()
    for other in ("other", None, torch.zeros(1)):
        with pytest.raises(ValueError, match="null: expected what conditioning has beside tensors"):
            agsm(x, t, target, cond, CAPTIONS, null=null | {"name": other})
