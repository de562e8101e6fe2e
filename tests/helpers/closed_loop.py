"""Free predictions trained by gradient descent on the loss, with an EMA following them.

The closed loop of AGSM without a network: what the objective itself does over thousands of steps.
"""

import torch

from agsm_loss import AGSMLoss


def distances(start, target, *, steps, rate=0.5, decay=0.9, **settings):
    """‖p_j − τ‖ of every candidate over time: (steps + 1, B, K).

    `rate` is the share of the way to its target that a prediction goes in one step.
    """
    loss = AGSMLoss(**settings)
    batch, num = start.shape[:2]
    elements = target[0].numel()
    pred, ema = start.clone().requires_grad_(), start.clone()
    # The gradient of candidate j's mean squared error is 2·residual/elements times its share.
    shares = torch.full((batch, num), 1.0 / (batch * max(1, num - 1))).double()
    shares[:, 0] = 1.0 / batch
    step_size = rate * elements / (2 * shares).reshape(batch, num, *[1] * (start.ndim - 2))
    history = [pred.detach() - target.unsqueeze(1)]
    for _ in range(steps):
        (grad,) = torch.autograd.grad(loss(pred, ema, target), pred)
        with torch.no_grad():
            pred -= step_size * grad
            ema.lerp_(pred, 1 - decay)
        history.append(pred.detach() - target.unsqueeze(1))
    return torch.stack(history).flatten(3).norm(dim=-1)


def worst_growth(num, pos_scale, neg_scale, *, starts=16, steps=600, **settings):
    """Largest (D + N)/(D₀ + N₀) over random starts, D of the match and N the largest negative's."""
    generator = torch.Generator().manual_seed(num)
    start = torch.randn(starts, num, 3, generator=generator).double()
    start *= 10 ** (2 * torch.rand(starts, num, 1, generator=generator).double() - 1)
    target = torch.randn(starts, 3, generator=generator).double()
    paths = distances(
        start, target, steps=steps, pos_scale=pos_scale, neg_scale=neg_scale, **settings
    )
    total = paths[:, :, 0] + paths[:, :, 1:].amax(-1)
    return float((total / total[0]).max())
