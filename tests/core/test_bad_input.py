"""What an error says: expected, got, remedy."""

import pytest
import torch

from agsm_loss import (
    EMA,
    AdaptiveTemperature,
    AGSMLoss,
    AGSMRegularizer,
    Passes,
    SoftREPALoss,
    SoftTokens,
)
from agsm_loss import candidates as C
from agsm_loss import functional as AF

pytestmark = pytest.mark.unchecked_shapes

P, Q, T = torch.zeros(2, 3, 4), torch.ones(2, 3, 4), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((P[:, 0], Q, T), ValueError, r"expected \(B, K, \*D\) with one axis more .* \(2, 4\)"),
        ((P[:, :, :3], Q, T), ValueError, r"pred: expected \(2, 3, 4\) to match .* \(2, 3, 3\)"),
        ((P[:1], Q, T), ValueError, r"pred: expected \(2, 3, 4\) to match target"),
        ((P, Q[:, :2], T), ValueError, r"ema_pred: expected the shape of pred \(2, 3, 4\)"),
        ((P[:, :0], Q[:, :0], T), ValueError, "at least one image, one candidate"),
        ((P.long(), Q, T), TypeError, r"pred: expected a floating-point tensor, got torch.int64"),
        ((P, Q, T.int()), TypeError, r"target: .*target\.float\(\)"),
        ((P, None, T), TypeError, "ema_pred: expected a torch.Tensor, got NoneType"),
        ((P, Q, T, torch.tensor([0, 3])), ValueError, r"in 0\.\.2, got values from 0 to 3"),
        ((P, Q, T, torch.tensor([-1, 0])), ValueError, "got values from -1 to 0"),
        ((P, Q, T, torch.tensor([0])), ValueError, r"shape \(2,\), got \(1,\)"),
        ((P, Q, T, torch.tensor([0.0, 1.0])), TypeError, "integer column indices or a bool"),
        ((P, Q, T, [0, 1]), TypeError, "positives: expected None .* got list"),
        ((P, Q, T, torch.zeros(2, 3, dtype=torch.bool)), ValueError, r"row\(s\) 0, 1 have no"),
        ((P, Q, T, torch.zeros(3, dtype=torch.bool)), ValueError, r"\(B, K\) = \(2, 3\)"),
        ((P, Q, T, None, torch.ones(2, 3)), TypeError, "mask: expected a bool tensor, got torch.f"),
        ((P, Q, T, None, torch.ones(2, 2).bool()), ValueError, r"mask: expected shape .*\(2, 2\)"),
        (
            (P, Q, T, None, torch.zeros(2, 3).bool()),
            ValueError,
            r"every candidate of row\(s\) 0, 1",
        ),
        (
            (P, Q, T, torch.tensor([0, 1]), torch.tensor([[1, 1, 1], [1, 0, 1]]).bool()),
            ValueError,
            r"row\(s\) 1 have no unmasked matching caption",
        ),
    ],
)
def test_loss_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        AGSMLoss(neg_scale=1.0)(*arguments)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"pos_scale": -1.0}, "pos_scale: expected a finite number ≥ 0, got -1.0"),
        ({"neg_scale": float("nan")}, "neg_scale: .* got nan"),
        ({"temperature": 0.0}, "temperature: expected finite and > 0, got 0.0.*0.1"),
        ({"temperature": float("inf")}, "got inf"),
        ({"temperature": float("nan")}, "AdaptiveTemperature"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "expected finite and > 0"),
    ],
)
def test_loss_settings(settings, text):
    settings = {"neg_scale": 1.0, **settings}
    with pytest.raises(ValueError, match=text):
        AGSMLoss(**settings)
    with pytest.raises(ValueError, match=text):
        AF.agsm_loss(P, Q, T, **settings)


def test_reward_weight():
    with pytest.raises(TypeError, match=r"reward_weight: expected a function .* got Tensor"):
        AGSMLoss(neg_scale=1.0, reward_weight=torch.ones(2))
    with pytest.raises(ValueError, match=r"reward_weight: expected a scalar or .*\(2,\).*\(3,\)"):
        AF.agsm_loss(P, Q, T, neg_scale=1.0, reward_weight=torch.ones(3))
    with pytest.raises(ValueError, match="has no reward_weight function"):
        AGSMLoss(neg_scale=1.0)(P, Q, T, timesteps=torch.zeros(2))
    with pytest.raises(ValueError, match="timesteps: expected"):
        AGSMLoss(neg_scale=1.0, reward_weight=torch.exp)(P, Q, T)
    with pytest.raises(ValueError, match=r"temperature: expected a scalar .*\(3,\)"):
        AGSMLoss(neg_scale=1.0, temperature=torch.ones(3))(P, Q, T)


def test_functions():
    with pytest.raises(ValueError, match=r"weights: expected \(B, K\) = \(2, 3\)"):
        AF.alignment_guidance(P, torch.ones(2, 2))
    with pytest.raises(TypeError, match="reward: expected a floating-point"):
        AF.plackett_luce_weights(torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="guidance: expected"):
        AF.guided_targets(T, T, neg_scale=1.0)
    with pytest.raises(ValueError, match=r"pred: expected the shape of the guided .* \(2, 3, 4\)"):
        AF.agsm_terms(P[:, :2], AF.guide(Q, T, neg_scale=1.0))


def test_softrepa():
    for settings in ({"logit_scale": -1.0}, {"temperature": 0.0}, {"denoising_weight": -1.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            SoftREPALoss(**settings)
        with pytest.raises(ValueError, match=next(iter(settings))):
            AF.softrepa_loss(P, T, **settings)
    several = torch.tensor([[True, True, False], [True, False, False]])
    for loss in (SoftREPALoss(), AF.softrepa_loss):
        with pytest.raises(TypeError, match=r"one positive an image; got a bool .*argmax\(1\)"):
            loss(P, T, several)


def test_adaptive_temperature():
    with pytest.raises(ValueError, match="entropy: expected a share strictly between"):
        AdaptiveTemperature(1.0)
    with pytest.raises(ValueError, match="momentum"):
        AdaptiveTemperature(momentum=1.0)


def test_candidates():
    with pytest.raises(ValueError, match=r"1 image\(s\) with 1 distinct.*allow_empty=True"):
        C.InBatch()(["a dog"])
    with pytest.raises(
        ValueError, match=r"3 image\(s\) with 1 distinct caption\(s\) besides the empty"
    ):
        C.InBatch()(["a dog", "", ""])
    with pytest.raises(ValueError, match=r"3 image\(s\) with 1 distinct caption"):
        C.InBatch()(["a", "a", "a"])
    with pytest.raises(ValueError, match=r"1 distinct image id"):
        C.Grid()(["a", "b"], image_ids=[7, 7])
    with pytest.raises(ValueError, match="image_ids: expected one for each of the 2"):
        C.InBatch()(["a", "b"], image_ids=[1])
    with pytest.raises(ValueError, match="num_negatives: expected at least 0"):
        C.Mixed(-1)
    with pytest.raises(ValueError, match="num_negatives: expected at least 1"):
        C.InBatch(0)
    with pytest.raises(TypeError, match="got one text"):
        C.InBatch()("a dog")
    for rule in (C.InBatch(), C.Grid(), C.own_alone):
        with pytest.raises(TypeError, match=r'got None for one\. A dropped caption is ""'):
            rule(["a dog", None, "a cat", ""])
    with pytest.raises(TypeError, match="got None for one"):
        C.InBatch()(["a", "b"], image_ids=[7, None])
    with pytest.raises(TypeError, match="got None for one"):
        C.Hard()(["a", "b"], hard_negatives=[["x"], [None]])
    with pytest.raises(TypeError, match="got a single text"):
        C.Hard()(["a", "b"], hard_negatives=["x", "y"])
    with pytest.raises(ValueError, match="one sequence of captions for each of the 2"):
        C.Hard()(["a", "b"], hard_negatives=[["x"]])
    with pytest.raises(ValueError, match=r"2 image\(s\) with 2 distinct.*add hard negatives"):
        C.Hard()(["a", "b"], hard_negatives=[[], []])
    for rule in (C.Hard(), C.Mixed(1)):
        with pytest.raises(
            ValueError, match=r"hard_negatives: expected a sequence .* take InBatch"
        ):
            rule(["a", "b"])
    for rule in (C.InBatch(), C.Grid()):
        with pytest.raises(ValueError, match=r"expected None\. Take Hard\(\) or Mixed\(n\)"):
            rule(["a", "b"], hard_negatives=[["x"], ["y"]])
    with pytest.raises(ValueError, match=r"ids of shape \(B,\)"):
        C.InBatch()(torch.zeros(2, 2, dtype=torch.long))
    index = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="rows of a pool of 2, got values from 5"):
        C.Candidates(index + 5, index[:, 0], index.bool(), 2)
    with pytest.raises(ValueError, match=r"expected mask \(B, K\)"):
        C.Candidates(index, index[:, 0], index[:, :1].bool(), 2)
    with pytest.raises(ValueError, match="index: expected an integer tensor"):
        C.Candidates(index.float(), index[:, 0], index.bool(), 2)


def test_soft_tokens():
    with pytest.raises(ValueError, match="num_tokens: expected at least 1, got 0"):
        SoftTokens(8, num_tokens=0)
    with pytest.raises(ValueError, match='banks: expected "dual"'):
        SoftTokens(8, banks="both")
    with pytest.raises(ValueError, match=r"init: expected a shape .*\(2, 4, 8\), got \(7,\)"):
        SoftTokens(8, init=torch.zeros(7))
    tokens = SoftTokens(8)
    with pytest.raises(ValueError, match=r"bank: expected 0 \(ψ⁺\) or 1"):
        tokens(torch.zeros(2), torch.tensor([0, 2]))
    with pytest.raises(TypeError, match="bank: expected integers"):
        tokens(torch.zeros(2), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="as many as there are timesteps"):
        tokens(torch.zeros(2), torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="timesteps: expected a tensor"):
        tokens(None)
    with pytest.raises(ValueError, match="no time tokens"):
        SoftTokens(8, time_buckets=None).bucket(torch.zeros(1))


def test_ema():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="decay"):
        EMA(layer.parameters(), decay=1.5)
    with pytest.raises(ValueError, match="none is trainable"):
        EMA(layer.requires_grad_(False).parameters())


def test_schedules():
    from agsm_loss.schedule import every, linear_warmup

    with pytest.raises(ValueError, match="steps"):
        linear_warmup(1.0, 0)
    with pytest.raises(ValueError, match="interval"):
        every(0, 1.0)


def test_regularizer():
    layer = torch.nn.Linear(4, 4)
    ema, loss = EMA(layer.parameters()), AGSMLoss(neg_scale=0)
    with pytest.raises(ValueError, match="chunk_size: expected None or at least 1, got 0"):
        Passes(chunk_size=0)
    with pytest.raises(ValueError, match="negatives_per_step"):
        Passes(negatives_per_step=0)

    def denoiser(noisy, timesteps, conditioning, bank):
        return layer(noisy)[:, :width]

    width = 4
    agsm = AGSMRegularizer(denoiser, ema, loss)
    x, t, names = torch.zeros(2, 4), torch.zeros(2), ["a", "b"]
    with pytest.raises(ValueError, match=r"target: expected the shape of noisy \(2, 4\)"):
        agsm(x, t, x[:1], x, names)
    with pytest.raises(ValueError, match="pred: expected the shape of noisy"):
        agsm(x, t, x, x, names, pred=x[:1])
    with pytest.raises(ValueError, match=r"timesteps: expected \(2,\) or a scalar"):
        agsm(x, torch.zeros(3), x, x, names)
    with pytest.raises(ValueError, match=r"conditioning: expected 2 rows .* pool"):
        agsm(x, t, x, {"text": torch.zeros(3, 4)}, names)
    with pytest.raises(ValueError, match="image_conditioning: expected 2 rows"):
        agsm(x, t, x, x, names, image_conditioning={"time_ids": torch.zeros(3, 4)})
    with pytest.raises(ValueError, match="one for each of the 2 images, got 3"):
        agsm(x, t, x, x, ["a", "b", "c"])
    chosen = C.InBatch(1)(names)
    with pytest.raises(ValueError, match="image_ids: expected None with Candidates"):
        agsm(x, t, x, x, chosen, image_ids=[1, 2])
    with pytest.raises(ValueError, match="hard_negatives: expected None with Candidates"):
        agsm(x, t, x, x, chosen, hard_negatives=[[], []])
    with pytest.raises(TypeError, match="captions: expected a text or an id for each image"):
        agsm(x, t, x, x, None)
    with pytest.raises(ValueError, match="no image of this batch has a negative"):
        agsm(x, t, x, x, ["a", "a"])
    width = 3
    with pytest.raises(ValueError, match=r"denoiser: expected a prediction of shape .*variances"):
        agsm(x, t, x, x, names)
    with pytest.raises(ValueError, match="weight: expected a finite number"):
        AGSMRegularizer(denoiser, ema, loss, weight=-1.0)(x, t, x, x, names)
