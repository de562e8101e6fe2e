"""The formulas again, in float64 NumPy and explicit loops, independent of the package.

Every function returns its value and the gradient to the student's predictions.
"""

import numpy as np


def agsm(
    pred, ema_pred, target, positives=None, mask=None, pos_scale=1.0, neg_scale=1.0,
    temperature=0.1, reward_weight=1.0,
):  # fmt: skip
    pred, ema_pred, target = (np.asarray(x, np.float64) for x in (pred, ema_pred, target))
    batch, num = pred.shape[:2]
    elements = target[0].size
    mask = np.ones((batch, num), bool) if mask is None else np.asarray(mask)
    if positives is None:
        positives = np.zeros(batch, int)
    positives = np.asarray(positives)
    temperature = np.broadcast_to(temperature, (batch,))
    reward_weight = np.broadcast_to(reward_weight, (batch,))
    loss, grad = 0.0, np.zeros_like(pred)
    weights = np.zeros((batch, num))
    for i in range(batch):
        columns = [j for j in range(num) if mask[i, j]]
        if positives.dtype == bool:
            matching = [j for j in columns if positives[i, j]]
        else:
            matching = [int(positives[i])]
        others = [j for j in columns if j not in matching]
        rewards = {}
        for j in columns:
            error = sum((a - b) ** 2 for a, b in zip(
                ema_pred[i, j].ravel(), target[i].ravel(), strict=True)) / elements  # fmt: skip
            rewards[j] = -reward_weight[i] * error / temperature[i]
        top = max(rewards.values())
        total = sum(np.exp(r - top) for r in rewards.values())
        mean = np.zeros_like(target[i])
        for j in columns:
            weights[i, j] = np.exp(rewards[j] - top) / total
            mean = mean + weights[i, j] * ema_pred[i, j]
        for group, scale, used in (
            (matching, pos_scale, True),
            (others, -neg_scale, neg_scale > 0),
        ):
            for j in group:
                if used:
                    guided = target[i] + scale * (ema_pred[i, j] - mean)
                    residual = pred[i, j] - guided
                    share = 1.0 / (batch * len(group))
                    loss += share * (residual**2).sum() / elements
                    grad[i, j] = share * 2 * residual / elements
    return loss, grad, weights


def softrepa(pred, target, positives, logit_scale=4.0, temperature=0.07, denoising_weight=0.0):
    pred, target = np.asarray(pred, np.float64), np.asarray(target, np.float64)
    batch, num = pred.shape[:2]
    elements = target[0].size
    loss, grad = 0.0, np.zeros_like(pred)
    for i in range(batch):
        residuals = [pred[i, j] - target[i] for j in range(num)]
        errors = [(r**2).sum() / elements for r in residuals]
        logits = [logit_scale * np.exp(-e / temperature) for e in errors]
        top = max(logits)
        total = sum(np.exp(x - top) for x in logits)
        y = int(positives[i])
        loss += (-(logits[y] - top) + np.log(total) + denoising_weight * errors[y]) / batch
        for j in range(num):
            slope = np.exp(logits[j] - top) / total - (j == y)
            slope = slope * -logits[j] / temperature + denoising_weight * (j == y)
            grad[i, j] = slope * 2 * residuals[j] / elements / batch
    return loss, grad
