"""Schedules of the regularizer's weight λ: functions of the optimizer step, from 0 on.

A weight of zero skips all of the regularizer's forward passes at that step, so a cadence is the
cheapest lever on its cost.
"""

from collections.abc import Callable

Schedule = Callable[[int], float]


def as_schedule(weight: float | Schedule) -> Schedule:
    """A number becomes the constant schedule.

    >>> as_schedule(0.5)(1000)
    0.5
    """
    if callable(weight):
        return weight
    constant = float(weight)
    return lambda step: constant


def linear_warmup(weight: float | Schedule, steps: int) -> Schedule:
    """From 0 at step 0 up to `weight` at step `steps`, in equal parts.

    >>> [linear_warmup(2.0, 4)(step) for step in (0, 1, 4, 9)]
    [0.0, 0.5, 2.0, 2.0]
    """
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}.")
    inner = as_schedule(weight)
    return lambda step: inner(step) * min(1.0, step / steps)


def every(interval: int, weight: float | Schedule) -> Schedule:
    """`weight` at steps 0, n, 2n, … and 0 between. Multiply λ by n to keep the mean force.

    >>> [every(3, 2.0)(step) for step in range(5)]
    [2.0, 0.0, 0.0, 2.0, 0.0]
    """
    if interval < 1:
        raise ValueError(f"interval: expected at least 1, got {interval}.")
    inner = as_schedule(weight)
    return lambda step: inner(step) if step % interval == 0 else 0.0
