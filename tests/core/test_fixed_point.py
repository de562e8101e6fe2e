"""Where the closed loop comes to rest: guidance as of the sampler, taught to the model."""

import pytest
import torch
from torch import nn

from agsm_loss import EMA, AGSMLoss, AGSMRegularizer
from agsm_loss import functional as AF

FLAT = 1e9  # a temperature at which every caption has the same weight


def rest(wrong, target, pos_scale, *, steps=400, temperature=FLAT):
    """The matching prediction after many steps of the way to its guided target, and its weight."""
    loss = AGSMLoss(pos_scale=pos_scale, neg_scale=0, temperature=temperature)
    own = torch.zeros_like(target)
    for _ in range(steps):
        guidance = loss.guide(torch.cat([own.unsqueeze(1), wrong], dim=1), target)
        own = torch.lerp(own, guidance.targets[:, 0], 0.5)
    return own, guidance.weights[:, 0]


@pytest.mark.parametrize(("num_wrong", "pos_scale"), [(1, 1.0), (1, 0.5), (3, 1.0), (7, 0.9)])
def test_flat_weights_give_a_fixed_guidance_scale(num_wrong, pos_scale):
    generator = torch.Generator().manual_seed(num_wrong)
    wrong = torch.randn(5, num_wrong, 6, generator=generator).double()
    target = torch.randn(5, 6, generator=generator).double()
    own, weight = rest(wrong, target, pos_scale)
    scale = 1 / (1 - pos_scale * num_wrong / (1 + num_wrong))
    away = wrong.mean(1)
    torch.testing.assert_close(own, away + scale * (target - away))
    torch.testing.assert_close(AF.guidance_scale(weight, pos_scale), torch.full_like(weight, scale))


def test_the_empty_caption_alone_is_classifier_free_guidance_at_scale_2():
    wrong, target = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[4.0, 3.0]])
    own, weight = rest(wrong, target, 1.0)
    assert AF.guidance_scale(weight) == 2
    torch.testing.assert_close(own, wrong[:, 0] + 2 * (target - wrong[:, 0]))


def test_sure_weights_guide_less():
    """At the rest that Plackett-Luce weights find, the formula holds with their own w_y."""
    wrong, target = torch.tensor([[[1.0, -1.0]]]).double(), torch.tensor([[4.0, 3.0]]).double()
    own, weight = rest(wrong, target, 1.0, temperature=20.0)
    scale = AF.guidance_scale(weight)
    assert 1 < scale < 2
    torch.testing.assert_close(own, wrong[:, 0] + scale * (target - wrong[:, 0]))


def test_a_scale_that_the_loop_runs_away_from_is_infinite():
    weights = torch.tensor([0.0, 0.25, 1.0])
    assert AF.guidance_scale(weights, 4 / 3).tolist() == [torch.inf, torch.inf, 1.0]
    with pytest.raises(ValueError, match="pos_scale"):
        AF.guidance_scale(weights, -1.0)


class Table(nn.Module):
    """A prediction a caption, whatever the image; the last caption is the empty one."""

    def __init__(self, captions):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(captions, 2))

    def forward(self, noisy, timesteps, conditioning, bank):
        return conditioning @ self.rows


@pytest.mark.unchecked_shapes
def test_a_model_trained_with_the_regularizer_predicts_what_guidance_would_sample():
    """Noisy targets, an EMA that lags, SGD: the mean of the targets at scale 2."""
    torch.manual_seed(0)
    model, means = Table(3), torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    null = torch.tensor([0.5, 0.5])
    with torch.no_grad():
        model.rows[2] = null
    agsm = AGSMRegularizer(
        model,
        EMA(model, decay=0.9),
        AGSMLoss(pos_scale=1, temperature=FLAT),
        seed=0,
    )
    captions, total = ["a dog", "a cat"] * 8, torch.zeros(2, 2)
    conditioning, empty = torch.eye(3)[[0, 1] * 8], torch.eye(3)[[2]]
    for step in range(700):
        target = means.repeat(8, 1) + torch.randn(16, 2)
        model.zero_grad()
        agsm(target, torch.zeros(16), target, conditioning, captions, null=empty).loss.backward()
        with torch.no_grad():
            model.rows -= 0.1 * model.rows.grad
        agsm.update_ema()
        total += model.rows.detach()[:2] / 500 if step >= 200 else 0
    torch.testing.assert_close(model.rows[2].detach(), null)  # the negatives are not trained
    torch.testing.assert_close(total, null + 2 * (means - null), atol=0.1, rtol=0)
