"""Checks of user input: what was expected, what came, what to do about it.

Checks of shapes and dtypes are free and always made. Checks of tensor *values* are made where the
tensor lives (keep `positives` and `mask` on the CPU to avoid a device synchronisation). They are
left out where values cannot be looked at: while `torch.compile` traces, and in `torch.func.vmap`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_floating(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}.")
        if not tensor.is_floating_point():
            raise TypeError(
                f"{name}: expected a floating-point tensor, got {tensor.dtype}. "
                f"Convert it with {name}.float()."
            )


def check_candidate_shapes(pred: Tensor, target: Tensor, *, pred_name: str = "pred") -> None:
    """`pred` is (B, K, *D), `target` (B, *D), B ≥ 1 and K ≥ 1."""
    if pred.ndim != target.ndim + 1 or target.ndim < 1:
        raise ValueError(
            f"{pred_name}: expected (B, K, *D) with one axis more than target (B, *D), got "
            f"{tuple(pred.shape)} for a target of {tuple(target.shape)}. Put the candidates on "
            f"axis 1, e.g. {pred_name}.unflatten(0, (B, K)), or {pred_name}.unsqueeze(1) for one."
        )
    if pred.shape[0] != target.shape[0] or pred.shape[2:] != target.shape[1:]:
        expected = (target.shape[0], pred.shape[1], *target.shape[1:])
        raise ValueError(
            f"{pred_name}: expected {expected} to match target {tuple(target.shape)}, got "
            f"{tuple(pred.shape)}. Only the candidate axis 1 may differ; nothing is broadcast."
        )
    if pred.numel() == 0:
        raise ValueError(
            f"{pred_name}: expected at least one image, one candidate and one element, got shape "
            f"{tuple(pred.shape)}. Skip empty batches."
        )


def check_same_shape(pred: Tensor, ema_pred: Tensor) -> None:
    if pred.shape != ema_pred.shape:
        raise ValueError(
            f"ema_pred: expected the shape of pred {tuple(pred.shape)}, got "
            f"{tuple(ema_pred.shape)}. Run student and EMA on the same candidates."
        )


def check_predictions(pred: Any, ema_pred: Any, target: Any) -> None:
    """Student and EMA predictions (B, K, *D) of the same candidates, `target` (B, *D)."""
    check_floating(pred=pred, ema_pred=ema_pred, target=target)
    check_candidate_shapes(pred, target)
    check_same_shape(pred, ema_pred)


def check_guided_shape(pred: Tensor, targets: Tensor) -> None:
    if pred.shape != targets.shape:
        raise ValueError(
            f"pred: expected the shape of the guided targets {tuple(targets.shape)}, got "
            f"{tuple(pred.shape)}. Run student and EMA on the same candidates."
        )


def check_per_image(name: str, value: Tensor, batch: int) -> None:
    if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != batch):
        raise ValueError(
            f"{name}: expected a scalar or one value an image ({batch},), got {tuple(value.shape)}."
        )


def check_mask(mask: Any, shape: Sequence[int]) -> None:
    _check_bool_grid("mask", mask, shape)


def check_positives(positives: Any, shape: Sequence[int]) -> None:
    """`positives` is (B,) column indices or bool (B, K)."""
    batch, num_candidates = shape
    if not isinstance(positives, Tensor):
        raise TypeError(
            "positives: expected None (column 0), an integer tensor (B,) or a bool tensor (B, K), "
            f"got {type(positives).__name__}."
        )
    if positives.dtype == torch.bool:
        _check_bool_grid("positives", positives, shape)
    elif positives.is_floating_point() or positives.is_complex():
        raise TypeError(
            f"positives: expected integer column indices or a bool tensor, got {positives.dtype}."
        )
    elif positives.shape != (batch,):
        raise ValueError(
            f"positives: expected column indices of shape ({batch},), got "
            f"{tuple(positives.shape)}. For several positives an image pass a bool (B, K) tensor."
        )
    elif (found := _values(positives)) and not 0 <= min(found) <= max(found) < num_candidates:
        raise ValueError(
            f"positives: expected column indices in 0..{num_candidates - 1}, got values from "
            f"{min(found)} to {max(found)}."
        )


def check_one_positive(positives: Any) -> None:
    """`positives` is None or (B,) column indices: a bool grid could mark several."""
    if isinstance(positives, Tensor) and positives.dtype == torch.bool:
        raise TypeError(
            "positives: expected None (column 0) or integer column indices (B,), because "
            "SoftREPA's loss has one positive an image; got a bool tensor. Where each row marks "
            "one, pass positives.int().argmax(1); for several use AGSMLoss."
        )


def check_rows(positive: Tensor, mask: Tensor | None) -> None:
    """Every row has a candidate, and a matching one among its candidates."""
    if mask is not None:
        empty = [row for row, kept in enumerate(_values(mask.any(1))) if not kept]
        if empty:
            raise ValueError(
                f"mask: every candidate of row(s) {_some(empty)} is masked, so there is nothing to "
                "rank. Keep at least the matching caption (True) in each row, or drop the row."
            )
        positive = positive & mask.to(positive.device)
    lost = [row for row, kept in enumerate(_values(positive.any(1))) if not kept]
    if lost:
        raise ValueError(
            f"positives: row(s) {_some(lost)} have no unmasked matching caption. Mark one and set "
            "mask to True there, or drop the row."
        )


def check_scale(name: str, value: float | int) -> None:
    if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
        raise ValueError(f"{name}: expected a finite number ≥ 0, got {value!r}.")


def check_guidance_scale(value: float | int) -> None:
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and 1 <= value < math.inf):
        raise ValueError(
            f"guidance_scale: expected a finite number ≥ 1, got {value!r}. 1 is plain denoising; "
            "3 is what classifier-free guidance at scale 3 does in a sampler."
        )


def check_weight(name: str, value: Tensor) -> None:
    if not all(_values((value.isfinite() & (value >= 0)).flatten())):
        raise ValueError(f"{name}: expected finite numbers ≥ 0, got {value.tolist()}.")


def check_temperature(name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor):
        check_floating(**{name: value})
        good = all(_values((value.isfinite() & (value > 0)).flatten()))
    else:
        good = isinstance(value, (int, float)) and 0 < value < math.inf
    if not good:
        raise ValueError(
            f"{name}: expected finite and > 0, got {value!r}. The published value is 0.1; "
            "agsm_loss.AdaptiveTemperature finds one from the errors."
        )


def _check_bool_grid(name: str, value: Any, shape: Sequence[int]) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a bool tensor, got {got}.")
    if value.shape != tuple(shape):
        raise ValueError(
            f"{name}: expected shape (B, K) = {tuple(shape)}, got {tuple(value.shape)}."
        )


def _values(tensor: Tensor) -> list[Any]:
    """Of a tensor (N,); none of them where they cannot be looked at."""
    if torch.compiler.is_compiling():
        return []
    try:
        found: list[Any] = tensor.tolist()
    except RuntimeError:  # in vmap
        return []
    return found


def _some(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:8])) + (", …" if len(rows) > 8 else "")
