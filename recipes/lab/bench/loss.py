"""Time and memory of AGSMLoss against a plain restatement of the published arithmetic.

    python -m recipes.lab.bench.loss

Forward and backward on predictions of shape (4, 4, 16, 128, 128), the two side by side in one run:
time is the median over rounds in which they alternate; memory is what the peak resident set of
a fresh process grows by over the inputs.
"""

import argparse
import statistics
from functools import partial

import torch
from torch import Tensor

from agsm_loss import AGSMLoss
from lab.bench.measure import growth, in_turns, peak

SHAPE = (4, 4, 16, 128, 128)


def plain(pred: Tensor, ema_pred: Tensor, target: Tensor) -> Tensor:
    """The formulas of arXiv 2605.30038 as they are written, with γ⁺ = γ⁻ = 1 and T = 0.1."""
    num = pred.shape[1]
    truth = target.unsqueeze(1).expand_as(pred)
    with torch.no_grad():
        error = ((ema_pred - truth) ** 2).mean(dim=(2, 3, 4))
        score = torch.exp(-error / 0.1)
        weights = score / score.sum(dim=1, keepdim=True)
        mean = (weights[:, :, None, None, None] * ema_pred).sum(dim=1, keepdim=True)
        delta = ema_pred - mean
        positive_target = truth[:, 0] + delta[:, 0]
        negative_target = truth[:, 1:] - delta[:, 1:]
    positive = ((pred[:, 0] - positive_target) ** 2).mean()
    negative = ((pred[:, 1:] - negative_target) ** 2).mean(dim=(2, 3, 4)).sum()
    return positive + negative / (pred.shape[0] * (num - 1))


METHODS = {"plain": plain, "AGSMLoss": AGSMLoss(neg_scale=1.0)}


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    target = torch.randn(shape[0], *shape[2:])
    ema_pred = target.unsqueeze(1) + 0.3 * torch.randn(shape)
    return (ema_pred + 0.1 * torch.randn(shape)).requires_grad_(), ema_pred, target


def step(method: str, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    batch[0].grad = None
    loss = METHODS[method](*batch)
    loss.backward()
    return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        step(args.child, inputs((1, 4, 2, 2, 2)))  # loads the kernels
        print(growth(partial(step, args.child, inputs(SHAPE)), 1))
        return
    batch = inputs(SHAPE)
    losses = {name: step(name, batch).item() for name in METHODS}
    times = in_turns({name: partial(step, name, batch) for name in METHODS}, args.rounds)
    memory = {name: peak("loss", "--child", name) for name in METHODS}
    for name in METHODS:
        spread = statistics.quantiles(times[name], n=4)
        print(
            f"{name:10} loss {losses[name]:.6f}  time {1e3 * spread[1]:.1f} ms "
            f"(quartiles {1e3 * spread[0]:.1f}-{1e3 * spread[2]:.1f})  peak +{memory[name]:.0f} MiB"
        )
    faster = statistics.median(times["AGSMLoss"]) / statistics.median(times["plain"])
    print(f"AGSMLoss / plain: time {faster:.2f}, memory {memory['AGSMLoss'] / memory['plain']:.2f}")


if __name__ == "__main__":
    main()
