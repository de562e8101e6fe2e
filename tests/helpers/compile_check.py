"""The losses compile with fullgraph=True; for a fresh process."""

import torch

from agsm_loss import AdaptiveTemperature, AGSMLoss, SoftREPALoss

BACKEND = "aot_eager"  # the graphs and their backward; C++ for them takes ten times as long


def compare(module, pred, *arguments):
    torch.manual_seed(0)
    compiled = torch.compile(module, fullgraph=True, backend=BACKEND)
    value = compiled(pred, *arguments)
    eager = module(pred, *arguments)
    torch.testing.assert_close(value, eager)
    slopes = (torch.autograd.grad(x, pred)[0] for x in (value, eager))
    torch.testing.assert_close(*slopes)


def main():
    pred, ema_pred = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    target, columns = torch.randn(2, 4, 4), torch.tensor([1, 0])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    for extra in ((), (columns, mask)):
        compare(AGSMLoss(neg_scale=0.3), pred, ema_pred, target, *extra)
    print("AGSMLoss")
    follows = AGSMLoss(neg_scale=1.0, temperature=AdaptiveTemperature(momentum=0.0))
    compare(follows, pred, ema_pred, target, columns, mask)
    print("AdaptiveTemperature")
    compare(SoftREPALoss(), pred, target, columns)
    print("SoftREPALoss")
