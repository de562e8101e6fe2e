"""Alignment-Guided Score Matching (AGSM, arXiv 2605.30038) as pure functions, in its order.

An image is noised once to x_t; K captions c_1..c_K compete to explain it, one of them (or some)
matching. With the regression target τ (ε, v, or ε − x_0), the student's predictions p_j and the
EMA model's predictions p̂_j:

    error     e_j = mean((p̂_j − τ)²)                                   `denoising_error`
    reward    r_j = −A(t)·e_j / T                                      `implicit_reward`
    weights   w   = softmax_j(r), first place under Plackett–Luce      `plackett_luce_weights`
    guidance  Δ_j = p̂_j − Σ_k w_k p̂_k,   so Σ_j w_j Δ_j = 0            `alignment_guidance`
    targets   τ + γ⁺Δ_j where c_j matches, τ − γ⁻Δ_j elsewhere         `guided_targets`
    loss      (1/B) Σ_i [ mean_{j∈P_i} mean((p_j − τ − γ⁺Δ_j)²)
                        + mean_{j∈N_i} mean((p_j − τ + γ⁻Δ_j)²) ]      `agsm_loss`

P_i are row i's matching captions, N_i its other unmasked candidates; a mean over an empty set is
zero and with γ⁻ = 0 the second term is dropped, so a row with one candidate (w = 1, Δ = 0) is left
with plain score matching. With one positive a row and no mask this is the published objective.
The targets are constants for the gradient.

Symbols in shapes: B images, K candidate captions, `*D` any trailing axes of one prediction.
All arithmetic is in float32, or in float64 where an input is.

Why it is bounded. Δ_j subtracts a convex combination, so ‖Δ_j‖ ≤ max_k ‖p̂_j − p̂_k‖, and for
fixed targets the loss is a convex quadratic of p. In the closed loop, where the EMA follows the
student, let d_j = p̂_j − τ, D = ‖d_y‖ and N = max_{j≠y} ‖d_j‖. Each d_j moves along
s_j(d_j − Σ w_k d_k) − d_j with s_y = γ⁺ and s_j = −γ⁻, and by the triangle inequality
D + N never grows when γ⁺ ≤ 1 and γ⁻ ≤ 1, for every K, every temperature and whatever the weights
(so far as p̂ moves by at most 1/(1 + γ⁻) of the way a step). With γ⁺ > 1 the matching prediction
can run away; with γ⁻ > 1 the proof fails. SoftREPA's objective has no such bound.

Where it comes to rest. Take γ⁻ = 0, one matching caption y, an EMA right behind the student,
w_y < 1, and write p̄ = Σ_{k≠y} w_k p_k / (1 − w_y) for the others' mean, τ* for the mean of τ given
x_t and the caption, and g = γ⁺(1 − w_y). Then Δ_y = (1 − w_y)(p_y − p̄), and a student at the
minimum has p_y = τ* + g(p_y − p̄). For g < 1 the loop contracts to

    p_y = p̄ + s·(τ* − p̄)   with   s = 1/(1 − g)                        `guidance_scale`

which is what a sampler with guidance scale s would have made of τ* (classifier-free guidance,
arXiv 2207.12598, where the other caption is the empty one). Flat weights and the empty caption
alone give s = 2 at γ⁺ = 1. γ⁺ sets the scale, and Plackett–Luce weights lower it where the model is
sure (w_y near 1).

The scale as the setting. Solved for g, the same equation reads g = 1 − 1/s. With `guidance_scale=s`
the target is τ + (1 − 1/s)(p̂_y − p̄) whatever w_y is: the weights choose *from which* captions to
move away, s *how far*. s = 1 is plain denoising. The loop contracts for every s, as g < 1: one
round takes the distance to the fixed point times g (p̄ held). Where the teacher is frozen there is
no loop; the student then rests at its target, and τ* + a(p̂_y − p̄) is guidance at scale s for
a = s − 1 (`frozen_teacher`).

The loss contains the denoising loss: take it in that loss's place. Added to ‖v − τ‖² with weight λ
it comes to rest where g is λ/(1 + λ) of itself: s = 3 at λ = 1 trains in 1.5.

Other names. With the empty caption u as the one competitor and the student's own detached
prediction sg(v) as the teacher's, the same loss stands elsewhere as follows (g = 1 − 1/s):

    ‖v − τ − g(sg(v) − u)‖²   here; Model-guidance (arXiv 2502.12154), whose w is g
    ‖(v + (s−1)u)/s − τ‖²     Guidance-Free Training (arXiv 2501.15420), diffusion-pipe,
                              DiffSynth-Studio: the same value, 1/s of the gradient
    ‖v − (u + s(τ − u))‖²     ai-toolkit (do_guidance_loss), musubi-tuner: s² times the value,
                              s times the gradient

In a loss with a weighting or a mask of its own, move the prediction by as much in place of the
target: `undo_guidance`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from agsm_loss import _checks
from agsm_loss.temperature import AdaptiveTemperature

Positives = Int[Tensor, " B"] | Bool[Tensor, "B K"] | None
"""None: column 0 matches; (B,): the matching column of each row; bool (B, K): several may match."""

Temperature = float | Tensor | Callable[[Tensor, Tensor | None], Tensor]
"""A number, a tensor () or (B,), or a function of (errors (B, K), mask (B, K) or None) to one."""


class Guidance(NamedTuple):
    """What the EMA model says of K candidates, and what the loss needs of it; all constants."""

    rewards: Float[Tensor, "B K"]
    weights: Float[Tensor, "B K"]
    guidance_norm: Float[Tensor, "B K"]
    """Root mean square of Δ_j over its elements."""
    targets: Float[Tensor, "B K *D"]
    """The guided targets."""
    coefficients: Float[Tensor, "B K"]
    """c_ij of `loss_coefficients`."""
    positive: Bool[Tensor, "B K"]
    """Which candidates match."""
    mask: Bool[Tensor, "B K"] | None
    """Which are candidates at all; None for all of them."""

    @property
    def valid(self) -> Bool[Tensor, "B K"]:
        """`mask`, or True everywhere where there is none."""
        return torch.ones_like(self.positive) if self.mask is None else self.mask


class AGSMTerms(NamedTuple):
    """Every named term of the loss. Only `loss`, its two terms and `per_image` carry gradient.

    `win_rate` and `score_margin` are means over the rows that have a negative (0 if none has).
    """

    loss: Float[Tensor, ""]
    positive_term: Float[Tensor, ""]
    negative_term: Float[Tensor, ""]
    per_image: Float[Tensor, " B"]
    rewards: Float[Tensor, "B K"]
    weights: Float[Tensor, "B K"]
    win_rate: Float[Tensor, ""]
    """Share of images whose best matching caption has a smaller error than every negative."""
    score_margin: Float[Tensor, ""]
    """Mean of (largest matching weight − largest negative weight), in −1..1."""
    positive_weight: Float[Tensor, ""]
    """Mean total weight w⁺ of the matching captions; compare it with `chance_weight`."""
    chance_weight: Float[Tensor, ""]
    """What `positive_weight` would be under uniform weights: 1/K for one positive, no mask."""
    weight_entropy: Float[Tensor, ""]
    """Mean entropy of the weights in nats; log K means that they are at chance."""
    guidance_norm: Float[Tensor, ""]
    """Mean over candidates of the root mean square of Δ_j."""


def denoising_error(
    pred: Float[Tensor, "B K *D"], target: Float[Tensor, "B *D"] | Float[Tensor, "B K *D"]
) -> Float[Tensor, "B K"]:
    """Mean squared error of each candidate against one target an image, or one a candidate.

    >>> pred, target = torch.tensor([[[1.0, 1.0], [0.0, 2.0]]]), torch.zeros(1, 2)
    >>> denoising_error(pred, target)
    tensor([[1., 2.]])
    """
    _checks.check_floating(pred=pred, target=target)
    if pred.shape != target.shape:
        _checks.check_candidate_shapes(pred, target)
    pred, target = _in_float32(pred, target)
    if pred.ndim != target.ndim:
        target = target.unsqueeze(1).expand_as(pred)
    squares = F.mse_loss(pred, target, reduction="none")
    axes = tuple(range(2, pred.ndim))
    # Summed and then divided, because the gradient of a sum is a view and that of a mean a copy.
    return squares.sum(axes) / (pred[0, 0].numel()) if axes else squares


def implicit_reward(
    ema_pred: Float[Tensor, "B K *D"],
    target: Float[Tensor, "B *D"],
    mask: Bool[Tensor, "B K"] | None = None,
    *,
    temperature: Temperature = 0.1,
    reward_weight: Float[Tensor, " B"] | Float[Tensor, ""] | None = None,
) -> Float[Tensor, "B K"]:
    """r_j = −A(t)·mean((p̂_j − τ)²)/T: a caption is good if the EMA model denoises well under it.

    `reward_weight` is A(t), 1 if None. The paper's (A(t)/2)·‖·‖² is a sum over the D elements; the
    published configuration is the mean with T = 0.1, and so are the units of T here.
    `mask` is used by a callable temperature only.

    >>> ema_pred, target = torch.tensor([[[1.0], [2.0]]]), torch.zeros(1, 1)
    >>> implicit_reward(ema_pred, target, temperature=0.5)
    tensor([[-2., -8.]])
    """
    _checks.check_floating(ema_pred=ema_pred, target=target)
    _checks.check_candidate_shapes(ema_pred, target, pred_name="ema_pred")
    # Candidate by candidate: the squares of one at a time, not of all K.
    columns = ema_pred.detach().split(1, dim=1)
    error = torch.cat([denoising_error(column, target.detach()) for column in columns], dim=1)
    if reward_weight is not None:
        _checks.check_floating(reward_weight=reward_weight)
        _checks.check_per_image("reward_weight", reward_weight, error.shape[0])
        _checks.check_weight("reward_weight", reward_weight)
        error = error * reward_weight.detach().to(error).reshape(-1, 1)
    if callable(temperature):
        own = isinstance(temperature, AdaptiveTemperature)  # its is positive
        temperature = temperature(error, mask)
        if not own:
            _checks.check_temperature("temperature", temperature)
    else:
        _checks.check_temperature("temperature", temperature)
    if isinstance(temperature, Tensor):
        _checks.check_per_image("temperature", temperature, error.shape[0])
        temperature = temperature.detach().to(error).reshape(-1, 1)
    # A finite floor keeps the softmax defined where a huge error over a tiny T overflows.
    return (-error / temperature).clamp(min=torch.finfo(error.dtype).min)


def plackett_luce_weights(
    reward: Float[Tensor, "B K"], mask: Bool[Tensor, "B K"] | None = None
) -> Float[Tensor, "B K"]:
    """Probability that each candidate is ranked first; zero where `mask` is False.

    The published exp(r_j)/Σ exp(r_k), as a softmax, so that large errors don't underflow to 0/0.
    With K = 2 it is the Bradley–Terry model, σ(r_1 − r_2).

    >>> reward = torch.tensor([[0.0, 0.0, -1.0]])
    >>> plackett_luce_weights(reward)
    tensor([[0.4223, 0.4223, 0.1554]])
    >>> plackett_luce_weights(reward, torch.tensor([[True, False, True]]))
    tensor([[0.7311, 0.0000, 0.2689]])
    """
    _checks.check_floating(reward=reward)
    (reward,) = _in_float32(reward)
    if mask is not None:
        _checks.check_mask(mask, reward.shape)
        reward = reward.masked_fill(~mask.to(reward.device), -torch.inf)
    return reward.softmax(-1)


def alignment_guidance(
    ema_pred: Float[Tensor, "B K *D"], weights: Float[Tensor, "B K"]
) -> Float[Tensor, "B K *D"]:
    """Δ_j = p̂_j − Σ_k w_k p̂_k. Σ_j w_j Δ_j = 0, and Δ_j → 0 as w_j → 1.

    >>> ema_pred, weights = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[0.75, 0.25]])
    >>> alignment_guidance(ema_pred, weights).flatten()
    tensor([-0.2500,  0.7500])
    """
    _checks.check_floating(ema_pred=ema_pred, weights=weights)
    if weights.shape != ema_pred.shape[:2]:
        raise ValueError(
            f"weights: expected (B, K) = {tuple(ema_pred.shape[:2])}, got {tuple(weights.shape)}."
        )
    ema_pred, weights = _in_float32(ema_pred, weights)
    # Summed candidate by candidate: no (B, K, *D) product, and no matmul that TF32 or autocast
    # would round.
    columns = zip(ema_pred.unbind(1), weights.unbind(1), strict=True)
    first, w_first = next(columns)
    mean = first * _expand(w_first, first)
    for column, w in columns:
        mean.add_(column * _expand(w, column))
    return ema_pred - mean.unsqueeze(1)


def guided_targets(
    target: Float[Tensor, "B *D"],
    guidance: Float[Tensor, "B K *D"],
    positives: Positives = None,
    *,
    pos_scale: float | int = 1.0,
    neg_scale: float | int,
) -> Float[Tensor, "B K *D"]:
    """τ + γ⁺Δ_j for matching captions (γ⁺ = `pos_scale`), τ − γ⁻Δ_j for the rest (`neg_scale`).

    >>> target, guidance = torch.zeros(1, 1), torch.tensor([[[-0.5], [0.5]]])
    >>> guided_targets(target, guidance, neg_scale=0.1)
    tensor([[[-0.5000],
             [-0.0500]]])
    """
    _checks.check_floating(target=target, guidance=guidance)
    _checks.check_candidate_shapes(guidance, target, pred_name="guidance")
    _checks.check_scale("pos_scale", pos_scale)
    _checks.check_scale("neg_scale", neg_scale)
    target, guidance = _in_float32(target, guidance)
    positive, _ = candidate_masks(positives, None, guidance.shape[:2], guidance.device)
    scale = _signed_scales(guidance, positive, pos_scale, neg_scale)
    return guidance * scale + target.unsqueeze(1)


def guidance_scale(
    positive_weight: Float[Tensor, "*B"], pos_scale: float | int = 1.0
) -> Float[Tensor, "*B"]:
    """s = 1/(1 − γ⁺(1 − w_y)): the sampler's guidance that training comes to rest at.

    1 is no guidance. Infinite where γ⁺(1 − w_y) ≥ 1: the loop would not come to rest. The module's
    text derives it, for γ⁻ = 0 and one matching caption.

    Args:
        positive_weight: w_y, the matching caption's weight.
        pos_scale: γ⁺ ≥ 0.

    >>> guidance_scale(torch.tensor([1.0, 0.5, 0.25]))
    tensor([1., 2., 4.])
    """
    _checks.check_scale("pos_scale", pos_scale)
    return 1 / (1 - pos_scale * (1 - positive_weight)).clamp(min=0)


def undo_guidance(
    pred: Float[Tensor, "*D"], null_pred: Float[Tensor, "*D"], guidance_scale: float | int
) -> Float[Tensor, "*D"]:
    """p − (1 − 1/s)·sg(p − u): put in the place of p in any squared error, it makes that AGSM.

    For a trainer with a weighting, a mask or a target of its own. The value is (p + (s − 1)u)/s, of
    which guidance at scale s makes p; the gradient is that of p. So the squared error to τ is
    `agsm_loss` with the empty caption and the student as its own teacher, value and gradient.

    Args:
        pred: p, the model's prediction under the image's own caption, with its graph.
        null_pred: u, the same model's under the empty caption, at the same x_t and t.
        guidance_scale: s ≥ 1, the scale to train in. At 1 `pred` itself is returned.

    Raises:
        TypeError: predictions that are no floating-point tensors.
        ValueError: shapes that differ, or a scale below 1.

    >>> pred, null_pred = torch.tensor([3.0]), torch.tensor([1.0])
    >>> unguided = undo_guidance(pred, null_pred, 2)
    >>> unguided, null_pred + 2 * (unguided - null_pred)
    (tensor([2.]), tensor([3.]))
    """
    _checks.check_floating(pred=pred, null_pred=null_pred)
    _checks.check_guidance_scale(guidance_scale)
    if null_pred.shape != pred.shape:
        raise ValueError(
            f"null_pred: expected the shape of pred {tuple(pred.shape)}, got "
            f"{tuple(null_pred.shape)}. Repeat the empty caption for each image."
        )
    if guidance_scale == 1:
        return pred
    pred, null_pred = _in_float32(pred, null_pred)
    return pred - (1 - 1 / guidance_scale) * (pred - null_pred).detach()


def guide(
    ema_pred: Float[Tensor, "B K *D"],
    target: Float[Tensor, "B *D"],
    positives: Positives = None,
    mask: Bool[Tensor, "B K"] | None = None,
    *,
    guidance_scale: float | int | None = None,
    frozen_teacher: bool = False,
    pos_scale: float | int | None = None,
    neg_scale: float | int | None = None,
    temperature: Temperature = 0.1,
    reward_weight: Float[Tensor, " B"] | Float[Tensor, ""] | None = None,
) -> Guidance:
    """All that the EMA model contributes: weights, guided targets, and how they enter the loss.

    Args:
        ema_pred: the EMA model's predictions of every candidate.
        target: regression target τ of each image, in the parametrisation of `ema_pred`.
        positives: which candidates match: None for column 0, column indices (B,), or bool (B, K).
        mask: bool (B, K), False where a candidate is padding or a false negative. What is in
            masked places is never read, not even a NaN.
        guidance_scale: s ≥ 1. Matching captions' target is τ + (1 − 1/s)(p̂_j − p̄), with p̄ the
            weighted mean of the candidates that don't match; τ where there is none.
        frozen_teacher: with `guidance_scale`: `ema_pred` is of a model that never follows the
            student; the target is τ + (s − 1)(p̂_j − p̄).
        pos_scale: γ⁺ ≥ 0 of the published form, in place of `guidance_scale`; 1 where only
            `neg_scale` is given. Above 1 the closed loop can run away.
        neg_scale: γ⁻ ≥ 0 of the published form; 0, the default, drops the negative term.
        temperature: T of the implicit reward, in units of A(t)·mean squared error: a number, a
            tensor () or (B,), or an `agsm_loss.AdaptiveTemperature`.
        reward_weight: A(t) of each image, (B,) or a scalar; None for 1.

    Raises:
        TypeError: a tensor of the wrong kind.
        ValueError: shapes that don't match, positives out of range or masked, a row with every
            candidate masked, neither `guidance_scale` nor one of the published scales, or both; a
            scale that is too small, a temperature that isn't finite and positive.

    >>> ema_pred, target = torch.tensor([[[1.0], [2.0]]]), torch.zeros(1, 1)
    >>> guidance = guide(ema_pred, target, neg_scale=0.1, temperature=1.0)
    >>> guidance.weights  # the first caption, which matches, explains the image better
    tensor([[0.9526, 0.0474]])
    >>> guidance.targets  # τ = 0, moved along its guidance, and against the other's
    tensor([[[-0.0474],
             [-0.0953]]])
    """
    _checks.check_floating(ema_pred=ema_pred, target=target)
    _checks.check_candidate_shapes(ema_pred, target, pred_name="ema_pred")
    pos_scale, neg_scale = scales(guidance_scale, frozen_teacher, pos_scale, neg_scale)
    positive, valid = candidate_masks(positives, mask, ema_pred.shape[:2], ema_pred.device)
    mask = None if mask is None else valid
    with torch.no_grad():
        ema_pred, target = _in_float32(ema_pred, target)
        if mask is not None:
            # A masked target becomes τ itself, whatever the EMA prediction holds there.
            ema_pred = torch.where(_expand(mask, ema_pred), ema_pred, target.unsqueeze(1))
        rewards = implicit_reward(
            ema_pred, target, mask, temperature=temperature, reward_weight=reward_weight
        )
        weights = plackett_luce_weights(rewards, mask)
        moved = positive
        if guidance_scale is None:
            # `where` changes nothing, but in vmap it has the batches of `positive` too.
            chosen = torch.where(positive, weights, weights)
            guidance = alignment_guidance(ema_pred, chosen)
        else:
            others = valid & ~positive
            moved = positive & others.any(1, keepdim=True)
            # Of the rewards, since the weights of the others can all round to 0.
            guidance = alignment_guidance(ema_pred, _weights_among(rewards, others))
        norm = _root_mean_square(guidance)
        scale = _signed_scales(guidance, moved, pos_scale, neg_scale)
        targets = guidance.mul_(scale).add_(target.unsqueeze(1))  # in place: it may be large
    coefficients = loss_coefficients(positive, valid, neg_scale=neg_scale, dtype=targets.dtype)
    return Guidance(rewards, weights, norm, targets, coefficients, positive, mask)


def scales(
    guidance_scale: float | int | None,
    frozen_teacher: bool,
    pos_scale: float | int | None,
    neg_scale: float | int | None,
) -> tuple[float, float]:
    """(how far matching captions' targets move, γ⁻) of `guide`'s settings.

    >>> scales(4, False, None, None)  # 1 − 1/s
    (0.75, 0.0)
    >>> scales(None, False, None, 0.1)  # as published
    (1.0, 0.1)
    """
    if guidance_scale is None:
        if pos_scale is None and neg_scale is None:
            raise ValueError(
                "guidance_scale: expected the scale that you would sample with, e.g. 3, or "
                "pos_scale and neg_scale (the published form), got none of them."
            )
        if frozen_teacher:
            raise ValueError("frozen_teacher: expected a guidance_scale with it, got None.")
        pos_scale, neg_scale = (1.0 if pos_scale is None else pos_scale), (neg_scale or 0.0)
        _checks.check_scale("pos_scale", pos_scale)
        _checks.check_scale("neg_scale", neg_scale)
        return float(pos_scale), float(neg_scale)
    if pos_scale is not None or neg_scale:
        raise ValueError(
            f"guidance_scale: expected no pos_scale and no neg_scale with it, got {guidance_scale} "
            f"with pos_scale={pos_scale} and neg_scale={neg_scale}. It sets how far the target "
            "moves; the other captions are not trained."
        )
    _checks.check_guidance_scale(guidance_scale)
    return float(guidance_scale - 1 if frozen_teacher else 1 - 1 / guidance_scale), 0.0


def loss_coefficients(
    positive: Bool[Tensor, "B K"],
    valid: Bool[Tensor, "B K"],
    *,
    neg_scale: float | int,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B K"]:
    """c_ij of the loss Σ_ij c_ij·mean((p_ij − guided target_ij)²): it is a sum over candidates.

    1/(B·|P_i|) at positives; [γ⁻ > 0]/(B·|N_i|) at negatives; 0 where not `valid`. With one
    positive and no mask: 1/B and 1/(B(K − 1)). The masks are those of `candidate_masks`.

    >>> positive, valid = candidate_masks(None, None, (1, 3))
    >>> loss_coefficients(positive, valid, neg_scale=0.1)
    tensor([[1.0000, 0.5000, 0.5000]])
    """

    def share(group: Tensor) -> Tensor:
        return group.to(dtype) / group.sum(1, keepdim=True).clamp(min=1)

    coefficients = share(positive)
    if neg_scale > 0:
        coefficients = coefficients + share(valid & ~positive)
    return coefficients / positive.shape[0]


def agsm_loss(
    pred: Float[Tensor, "B K *D"],
    ema_pred: Float[Tensor, "B K *D"],
    target: Float[Tensor, "B *D"],
    positives: Positives = None,
    mask: Bool[Tensor, "B K"] | None = None,
    *,
    guidance_scale: float | int | None = None,
    frozen_teacher: bool = False,
    pos_scale: float | int | None = None,
    neg_scale: float | int | None = None,
    temperature: Temperature = 0.1,
    reward_weight: Float[Tensor, " B"] | Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """The AGSM objective (arXiv 2605.30038), averaged over images, elements and candidates.

    It is `agsm_terms(pred, guide(ema_pred, ...)).loss`, and raises what `guide` raises.

    Args:
        pred: student predictions (B, K, *D) of every candidate; the only input that gets a
            gradient.
        ema_pred: the EMA model's predictions for the same x_t, t and captions.
        target, positives, mask: as of `guide`, and so are all settings.

    >>> pred = torch.zeros(2, 3, 4, requires_grad=True)
    >>> ema_pred, target = torch.zeros(2, 3, 4), torch.ones(2, 4)
    >>> agsm_loss(pred, ema_pred, target, neg_scale=0.1).item()  # plain score matching, twice
    2.0
    """
    _checks.check_predictions(pred, ema_pred, target)
    guidance = guide(
        ema_pred,
        target,
        positives,
        mask,
        guidance_scale=guidance_scale,
        frozen_teacher=frozen_teacher,
        pos_scale=pos_scale,
        neg_scale=neg_scale,
        temperature=temperature,
        reward_weight=reward_weight,
    )
    return agsm_terms(pred, guidance).loss


def agsm_terms(pred: Float[Tensor, "B K *D"], guidance: Guidance) -> AGSMTerms:
    """The loss of student predictions under `guide`'s guidance, with its terms and diagnostics.

    >>> ema_pred, target = torch.tensor([[[1.0], [2.0]]]), torch.zeros(1, 1)
    >>> terms = agsm_terms(ema_pred, guide(ema_pred, target, neg_scale=0.1))
    >>> terms.positive_term.item(), round(terms.negative_term.item(), 2)  # 1² and (2 + 0.1)²
    (1.0, 4.41)
    """
    _checks.check_floating(pred=pred)
    _checks.check_guided_shape(pred, guidance.targets)
    if guidance.mask is not None:
        pred = torch.where(_expand(guidance.mask, pred), pred, torch.zeros_like(pred))
    errors = denoising_error(pred, guidance.targets)
    return terms_from_errors(errors * guidance.coefficients, guidance)


def terms_from_errors(errors: Float[Tensor, "B K"], guidance: Guidance) -> AGSMTerms:
    """Named terms from the weighted errors c_ij·mean((p_ij − guided target_ij)²) that sum to L.

    For loops that make the predictions a few candidates at a time.

    >>> ema_pred, target = torch.tensor([[[1.0], [2.0]]]), torch.zeros(1, 1)
    >>> guidance = guide(ema_pred, target, neg_scale=0.1)
    >>> first = denoising_error(ema_pred[:, :1], guidance.targets[:, :1])
    >>> second = denoising_error(ema_pred[:, 1:], guidance.targets[:, 1:])
    >>> errors = torch.cat([first, second], dim=1) * guidance.coefficients
    >>> round(terms_from_errors(errors, guidance).loss.item(), 2)
    5.41
    """
    positive, valid = guidance.positive, guidance.valid
    zero = errors.new_zeros(())
    positive_term = torch.where(positive, errors, zero).sum()
    negative_term = torch.where(positive, zero, errors).sum()

    weights = guidance.weights
    ranked = (valid & ~positive).any(1)
    rows = ranked.sum().clamp(min=1)
    best_positive = weights.masked_fill(~positive, 0).amax(1)
    best_negative = weights.masked_fill(positive, 0).amax(1)
    margin = best_positive - best_negative
    # By the rewards: the weights of a large temperature are all equal in float32.
    low = float("-inf")
    best_match = guidance.rewards.masked_fill(~positive, low).amax(1)
    won = best_match > guidance.rewards.masked_fill(positive | ~valid, low).amax(1)
    entropy = -torch.xlogy(weights, weights).sum(1)
    return AGSMTerms(
        loss=positive_term + negative_term,
        positive_term=positive_term,
        negative_term=negative_term,
        per_image=errors.sum(1) * errors.shape[0],
        rewards=guidance.rewards,
        weights=weights,
        win_rate=(won & ranked).sum() / rows,
        score_margin=(margin * ranked).sum() / rows,
        positive_weight=weights.masked_fill(~positive, 0).sum(1).mean(),
        chance_weight=(positive.sum(1) / valid.sum(1)).mean(),
        weight_entropy=entropy.mean(),
        guidance_norm=(guidance.guidance_norm * valid).sum() / valid.sum(),
    )


def softrepa_loss(
    pred: Float[Tensor, "B K *D"],
    target: Float[Tensor, "B *D"],
    positives: Int[Tensor, " B"] | None = None,
    mask: Bool[Tensor, "B K"] | None = None,
    *,
    logit_scale: float = 4.0,
    temperature: float = 0.07,
    denoising_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """SoftREPA's contrastive objective (arXiv 2503.08250), the baseline to beat.

    Cross-entropy over the candidates of each image with logits s·exp(−e_j/T), where
    e_j = mean((p_j − τ)²) and s is `logit_scale`, plus `denoising_weight` times the mean error of
    the matching captions. Published on the full B×B grid of images and captions: K = B and
    `positives = arange(B)` (`agsm_loss.candidates.Grid`).

    >>> pred, target = torch.zeros(2, 2, 4), torch.ones(2, 4)
    >>> round(softrepa_loss(pred, target, torch.arange(2)).item(), 4)  # equal errors: log 2
    0.6931
    """
    _checks.check_floating(pred=pred, target=target)
    _checks.check_candidate_shapes(pred, target)
    _checks.check_scale("logit_scale", logit_scale)
    _checks.check_temperature("temperature", temperature)
    _checks.check_scale("denoising_weight", denoising_weight)
    _checks.check_one_positive(positives)
    positive, valid = candidate_masks(positives, mask, pred.shape[:2], pred.device)
    if mask is not None:
        pred = torch.where(_expand(valid, pred), pred, torch.zeros_like(pred))
    errors = denoising_error(pred, target.detach())
    logits = logit_scale * torch.exp(-errors / temperature)
    if mask is not None:
        logits = logits.masked_fill(~valid, -torch.inf)
    loss = F.cross_entropy(logits, positive.int().argmax(1))
    if denoising_weight > 0:
        loss = loss + denoising_weight * torch.where(positive, errors, 0.0).sum(1).mean()
    return loss


def candidate_masks(
    positives: Positives,
    mask: Bool[Tensor, "B K"] | None,
    shape: Sequence[int],
    device: torch.device | None = None,
) -> tuple[Bool[Tensor, "B K"], Bool[Tensor, "B K"]]:
    """(positive, valid): which candidates match, and which are candidates at all.

    Checked where `positives` and `mask` live, then moved to `device`. Positives are valid.

    >>> candidate_masks(torch.tensor([1, 0]), None, (2, 2))[0]
    tensor([[False,  True],
            [ True, False]])
    """
    if mask is not None:
        _checks.check_mask(mask, shape)
    if positives is None:
        positive = (torch.arange(shape[1]) == 0).expand(tuple(shape))
    else:
        _checks.check_positives(positives, shape)
        positive = positives
        if positives.dtype != torch.bool:
            columns = torch.arange(shape[1], device=positives.device)
            positive = positives.unsqueeze(1) == columns
    _checks.check_rows(positive, mask)
    positive = positive.to(device)
    if mask is None:
        return positive, torch.ones_like(positive)
    valid = mask.to(device)
    return positive & valid, valid


def _signed_scales(
    guidance: Tensor, positive: Tensor, pos_scale: float | int, neg_scale: float | int
) -> Tensor:
    """γ⁺ at matching captions and −γ⁻ at the others, with axes of length one for `*D`."""
    scale = guidance.new_full(positive.shape, -neg_scale).masked_fill(positive, pos_scale)
    return _expand(scale, guidance)


def _weights_among(rewards: Tensor, chosen: Tensor) -> Tensor:
    """Plackett–Luce weights among the chosen candidates; 0 in rows with none."""
    weights = rewards.masked_fill(~chosen, -torch.inf).softmax(-1)
    return torch.where(chosen, weights, torch.zeros_like(weights))


def _in_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common dtype, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def _expand(value: Tensor, like: Tensor) -> Tensor:
    """`value` with trailing axes of length one, to the rank of `like`."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def _root_mean_square(x: Tensor) -> Tensor:
    """Over all but the first two axes."""
    axes = tuple(range(2, x.ndim))
    return torch.linalg.vector_norm(x, dim=axes) / x[0, 0].numel() ** 0.5 if axes else x.abs()
