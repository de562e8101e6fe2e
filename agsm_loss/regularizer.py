"""`AGSMRegularizer`: AGSM as one line in somebody's training step.

    loss = agsm(noisy, timesteps, target, prompt_embeds, captions, null=empty).loss
    loss.backward(); optimizer.step(); agsm.update_ema()

In place of a denoising loss, which it contains, or added to a host's (a reward's, a preference's).
It chooses the candidates, runs the teacher (the student itself, or an EMA of it) on them without
gradient, turns its predictions into weights and guided targets, and runs the student on the
matching caption (or takes the host's own prediction) with ψ⁺ and, where γ⁻ > 0, on the others with
ψ⁻. The targets being constants, the loss is a sum over (image, caption) cells, so the cells can be
run a few at a time with the same gradient, and over a random subset of the negatives with the same
gradient on average (`Passes`).
"""

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributed as dist

from agsm_loss import _checks
from agsm_loss import functional as AF
from agsm_loss._engines import (
    check_backward,
    check_checkpointing,
    ddp_modules,
    exchange_later,
    run_again,
    spared_by_negatives,
    without_gradient,
)
from agsm_loss._passes import Cells, NoisedBatch, checked, own_is_null, split_alike, with_rows_of
from agsm_loss._random import draws
from agsm_loss._storage import Place, several_ranks
from agsm_loss.candidates import (
    EMPTY,
    Candidates,
    Grid,
    Hard,
    InBatch,
    Mixed,
    Rule,
    as_list,
    own_alone,
    with_null,
)
from agsm_loss.ema import EMA
from agsm_loss.loss import AGSMLoss
from agsm_loss.schedule import Schedule, as_schedule


@runtime_checkable
class Denoiser(Protocol):
    """The student, as the regularizer calls it: N samples in, N predictions out.

    `conditioning` has the structure that was given to the regularizer, with N rows in every
    tensor; `bank` (N,) says which soft tokens each sample uses; `image_conditioning`'s entries
    come as keywords.
    """

    def __call__(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Any, bank: Tensor, **image: Any
    ) -> Tensor: ...


class StepOutput(NamedTuple):
    """The loss to add or to run backward, and detached scalars to log."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Passes:
    """How the regularizer runs the student. Advanced: the defaults are one pass over everything.

    >>> Passes(chunk_size=8, negatives_per_step=1)
    Passes(chunk_size=8, negatives_per_step=1, backward=None, ema_chunk_size=None)

    Args:
        chunk_size: samples in a pass of the student; None for one pass. Fewer take less memory,
            more are faster. All passes but the last are checkpointed (none with `backward`), so
            that memory doesn't grow with K. The gradients are the same.
        negatives_per_step: train on this many of each image's negatives a step, drawn at random,
            while the weights and guidance use all of them. Unbiased; None for all.
        backward: `torch.Tensor.backward` or `accelerator.backward`. Each chunk's loss is then
            passed to it at once, so that only one chunk's graph lives, and nothing is run twice.
            The returned loss still has the full value, and graph only for what was not yet run
            backward (the matching captions, where `pred` was given). In DDP the last of these calls
            exchanges the gradients of all, and a host's graph from before them would not be
            exchanged: run the host's backward first, and give no `pred`. DeepSpeed cannot be run
            backward several times a step: leave it out there.
        ema_chunk_size: samples in a pass of the EMA model, which keeps no graph; None for four
            times `chunk_size`, or for one pass where that is None. Where the denoiser checkpoints
            itself, and its own graph is small, take `chunk_size`.
    """

    chunk_size: int | None = None
    negatives_per_step: int | None = None
    backward: Callable[[Tensor], object] | None = None
    ema_chunk_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("chunk_size", "negatives_per_step", "ema_chunk_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name}: expected None or at least 1, got {size}.")


class AGSMRegularizer:
    """AGSM as a term in another training loss.

    >>> import torch
    >>> from torch import nn
    >>> from agsm_loss import AGSMLoss, AGSMRegularizer
    >>> layer = nn.Linear(4 + 3, 4)
    >>> def denoiser(noisy, timesteps, text, bank):
    ...     return layer(torch.cat([noisy, text], dim=1))
    >>> agsm = AGSMRegularizer(denoiser, loss=AGSMLoss(guidance_scale=3))
    >>> noisy, target, text = torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 3)
    >>> captions, empty = ["a dog", "a cat"], torch.zeros(1, 3)
    >>> timesteps = torch.tensor([10, 900])
    >>> loss, metrics = agsm(noisy, timesteps, target, text, captions, null=empty)
    >>> loss.backward()  # then optimizer.step() and
    >>> agsm.update_ema()
    >>> metrics["agsm/chance_weight"]
    tensor(0.5000)

    Args:
        denoiser: the student (`Denoiser`); it must run the parameters that `ema` follows.
        ema: the teacher, an `EMA` of the trainable parameters (tokens, adapters, or all of them).
            None: the student is its own teacher, by its detached predictions. That saves the EMA's
            memory and its pass over the matching captions. γ⁻ > 0 needs an EMA.
        loss: an `AGSMLoss`.
        weight: λ, a number or a function of the optimizer step (`agsm_loss.schedule`). At a step
            where it is 0 nothing is run and the returned loss is a constant 0.
        candidates: the rule by which other captions compete, besides the empty one: `InBatch`,
            `Hard`, `Mixed` or `Grid` of `agsm_loss.candidates`, or your own `Rule`. None: the empty
            caption alone, which each call gets as `null`; in the published form without `null`,
            `InBatch(3)`, as published.
        negatives_train: the parameters that the negatives' gradient reaches, where γ⁻ > 0. None
            for those of the `SoftTokens` in the denoiser. Weights that all captions share would
            learn this image for wrong captions (`AGSMLoss`). Where others are trained too, the
            negatives have a pass of their own, in which `requires_grad` is off for those others.
            Checkpointing inside the denoiser cannot be on then: it would run parts of that pass
            again after `requires_grad` is on. torch raises a CheckpointError; for the reentrant
            kind, where torch says nothing, this raises a ValueError. Take `Passes(chunk_size=...)`.
        passes: `Passes`, for less memory or time.
        seed: of the draws of captions and negatives; default `torch.initial_seed()`. Each call
            draws from this and its own number, so that the host's random stream stays as it is and
            every rank resumes exactly. Give each rank a different one.

    With several processes each one calls this at each step. Their numbers of candidates may
    differ: all make as many passes as the one with most, and extra passes have weight 0.

    Raises:
        TypeError: an `ema`, `loss` or `candidates` of another kind.
        ValueError: γ⁻ > 0, and no EMA or no parameter for the negatives to train; an EMA of
            parameters that the denoiser does not have; an EMA with decay 1, which never follows
            the student, and a loss that is not for a `frozen_teacher`, or the reverse.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        ema: EMA | None = None,
        loss: AGSMLoss | None = None,
        *,
        weight: float | Schedule = 1.0,
        candidates: Rule | None = None,
        negatives_train: Iterable[nn.Parameter] | None = None,
        passes: Passes = Passes(),
        seed: int | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.ema = ema
        self.loss = _checked_parts(ema, loss, candidates)
        self.weight = as_schedule(weight)
        self.candidates = candidates
        self.passes = passes
        self.seed = torch.initial_seed() if seed is None else seed
        self._spared: list[Place] = []
        if ema is not None:
            neg_scale = self.loss.neg_scale
            self._spared = spared_by_negatives(denoiser, ema, neg_scale, negatives_train)
            # A module's method, or a partial of it, has its parameters.
            whose = denoiser.func if isinstance(denoiser, partial) else denoiser
            whose = getattr(whose, "__self__", whose)
            if isinstance(whose, nn.Module):
                ema._look_in(whose)
        self.step = self.calls = 0
        self._versions: int | None = None
        self._warned: set[str] = set()

    def __call__(
        self,
        noisy: Float[Tensor, "B *D"],
        timesteps: Tensor,
        target: Float[Tensor, "B *D"],
        conditioning: Any,
        captions: Sequence[Hashable] | Tensor | Candidates,
        *,
        hard_negatives: Sequence[Sequence[Hashable]] | None = None,
        image_ids: Sequence[Hashable] | Tensor | None = None,
        image_conditioning: Mapping[str, Any] | None = None,
        null: Any = None,
        pred: Float[Tensor, "B *D"] | None = None,
    ) -> StepOutput:
        """λ·L and metrics for one batch of B images.

        Args:
            noisy: x_t.
            timesteps: t of each image, (B,) or a scalar.
            target: regression target τ in the denoiser's parametrisation.
            conditioning: encoded captions: a tensor, or any nesting of dicts, lists and tuples of
                tensors, with one row a caption of the pool: the batch's own captions, then the
                hard negatives, image by image (`caption_pool`).
            captions: text or id of each image's caption, to tell equal ones; or `Candidates`, where
                you have chosen who competes already. A dropped caption, "", has no competitors.
            hard_negatives: each image's edited captions, for `Hard` and `Mixed`.
            image_ids: rows with the same id show the same image, and their captions don't compete.
            image_conditioning: what belongs to the image and not to the caption (SDXL's time ids,
                a ControlNet's input): tensors with B rows, passed on by keyword.
            null: the encoded empty caption, which competes with each image's own: the structure of
                `conditioning`, with one row, or one an image. What your sampler takes for the
                unconditional pass of guidance is right; SDXL's is zeros.
            pred: the host's own prediction for (x_t, t, own caption), made with ψ⁺; the matching
                captions are then not run again, and the returned loss reaches the host's graph.

        Raises:
            ValueError, TypeError: as in `agsm_loss.functional.guide` and `agsm_loss.candidates`;
                for conditioning whose rows are not the pool's, or whose leaves are no tensors; for
                a `pred` without gradient; where neither `null` nor a rule says who competes.
        """
        weight = float(self.weight(self.step))
        _checks.check_scale("weight", weight)
        if weight == 0:
            zero = target.new_zeros((), dtype=torch.float32)
            return StepOutput(zero, {"agsm/weight": torch.zeros(())})
        backward = self.passes.backward
        if backward is not None:
            check_backward(backward, self.denoiser, pred)
        self.calls += 1
        generator = draws(self.seed, self.calls)
        _check_images(noisy, target, pred)
        self._check_updated()
        texts: list[Hashable] = []
        if not isinstance(captions, Candidates | Tensor):
            captions = texts = as_list(captions)  # an iterator is read once
        candidates = self._choose(captions, hard_negatives, image_ids, generator, null is not None)
        empty = [isinstance(text, str) and text == EMPTY for text in texts]
        if 2 * sum(empty) > len(noisy):
            self._warn(
                "empty",
                f"captions: expected most of them to say something, got {sum(empty)} empty ones of "
                f"{len(empty)}: nothing competes with those, which is plain denoising. Drop "
                "captions for the host's own loss only.",
            )
        if null is not None:
            conditioning = with_rows_of(null, conditioning, candidates.pool_size, len(noisy))
            if isinstance(captions, Candidates | Tensor):  # texts that are not known
                empty = own_is_null(conditioning, candidates)
            candidates = with_null(candidates, empty)
        if int(candidates.mask.sum()) == len(candidates.mask):
            self._warn(
                "alone",
                "captions: expected competitors, got none for any image of this batch, which is "
                "plain denoising: their captions are alike, or empty.",
            )
        batch, num_candidates = candidates.index.shape
        if batch != noisy.shape[0]:
            raise ValueError(
                f"captions: expected one for each of the {noisy.shape[0]} images, got {batch}."
            )
        timesteps = timesteps.expand(batch) if timesteps.ndim == 0 else timesteps
        inputs = NoisedBatch(noisy, timesteps, conditioning, image_conditioning or {}, candidates)
        inputs.check()

        positive = torch.arange(num_candidates) == candidates.positives.unsqueeze(1)
        coefficients = self._coefficients(positive, candidates.mask, generator)
        own = Cells(torch.arange(batch), candidates.positives)
        taught = candidates.mask
        if self.ema is None:
            if pred is None and backward is None and self.passes.chunk_size is None:
                pred = self.denoiser(*inputs.of(own), **inputs.image(own))
                checked(pred, noisy, own)
            if pred is not None:
                taught = taught & ~positive
        todo = coefficients > 0
        if pred is not None:
            todo = todo & ~positive
        # Matching cells apart where the negatives spare something.
        kinds = [todo & positive, todo & ~positive] if self._spared else [todo]
        chunk_size, ema_chunk_size = self.passes.chunk_size, self.passes.ema_chunk_size
        if ema_chunk_size is None and chunk_size is not None:
            ema_chunk_size = 4 * chunk_size
        ema_passes, *passes = split_alike(
            [(taught, ema_chunk_size), *((kind, chunk_size) for kind in kinds)],
            own.split(1)[0],
            target.device,
        )
        own_pred = pred if self.ema is None else None
        guidance = self._guide(inputs, target, ema_passes, own, own_pred)
        errors = target.new_zeros(batch, num_candidates, dtype=guidance.targets.dtype)
        if pred is not None:
            errors = _weighted_errors(pred, guidance, own, coefficients, errors)
        to_run = [
            (cells, spared)
            for kind, spared in zip(passes, ([], self._spared), strict=False)
            for cells in kind
        ]
        if backward is not None and ddp_modules(self.denoiser):
            to_run.reverse()  # DDP exchanges in the last pass; the matching cells' reaches all
        for number, (cells, spared) in enumerate(to_run, start=1):
            is_last = number == len(to_run)
            # What is run backward at once has no need to be run again for it, and neither has the
            # last pass, whose graph is the only one.
            again = chunk_size is not None and backward is None and not is_last
            waits = backward is not None and not is_last
            with exchange_later(self.denoiser) if waits else nullcontext():
                values = self._student_errors(
                    inputs, guidance, cells, spared, coefficients, errors, again
                )
                if backward is not None:
                    backward(values.sum() * weight)
                    values = values.detach()
            errors = errors + values
        terms = AF.terms_from_errors(errors, guidance)
        return StepOutput(terms.loss * weight, _metrics(terms, weight))

    def update_ema(self) -> None:
        """After each `optimizer.step()`: moves the EMA, if there is one, and the schedule."""
        if self.ema is not None:
            self.ema.update()
        self._versions = None
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Step, draws, EMA and temperature; for `accelerator.register_for_checkpointing`.

        One rank's state serves all: of several, each but the first keeps the seed that it was made
        with.
        """
        return {
            "step": self.step,
            "calls": self.calls,
            "seed": self.seed,
            "ema": None if self.ema is None else self.ema.state_dict(),
            "loss": {name: one.clone() for name, one in self.loss.state_dict().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (self.ema is None) != (state["ema"] is None):
            saved, here = ("no EMA", "one") if state["ema"] is None else ("an EMA", "none")
            raise ValueError(
                f"state: expected the teacher that it was saved with ({saved}), got {here}. Make "
                "the regularizer as it was made then."
            )
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self._versions = None
        self.loss.load_state_dict(state["loss"])
        if not (several_ranks() and dist.get_rank()):
            self.seed = int(state["seed"])
        self.step, self.calls = int(state["step"]), int(state["calls"])

    def _choose(
        self,
        captions: Sequence[Hashable] | Tensor | Candidates,
        hard_negatives: Sequence[Sequence[Hashable]] | None,
        image_ids: Sequence[Hashable] | Tensor | None,
        generator: torch.Generator,
        has_null: bool,
    ) -> Candidates:
        if not isinstance(captions, Candidates):
            rule = self.candidates
            if rule is None and not has_null and self.loss.guidance_scale is None:
                rule = InBatch(3)
            if rule is None:
                if not has_null:
                    raise ValueError(
                        "null: expected the encoded empty caption, one row in the structure of "
                        "conditioning, got None: no caption would compete. Pass "
                        'null=encode(""), or let captions of the batch compete: '
                        "AGSMRegularizer(..., candidates=InBatch(3))."
                    )
                return own_alone(captions, hard_negatives)
            if has_null and isinstance(rule, InBatch | Hard | Mixed | Grid):
                rule = replace(rule, allow_empty=True)  # the empty caption competes anyway
            return rule(
                captions, hard_negatives=hard_negatives, image_ids=image_ids, generator=generator
            )
        for name, given in (("hard_negatives", hard_negatives), ("image_ids", image_ids)):
            if given is not None:
                raise ValueError(
                    f"{name}: expected None with Candidates, which are chosen already."
                )
        return captions

    def _guide(
        self,
        inputs: NoisedBatch,
        target: Tensor,
        passes: list[Cells],
        own: Cells,
        own_pred: Tensor | None,
    ) -> AF.Guidance:
        """The teacher's passes, and what follows from them.

        own_pred: the student's prediction of the `own` cells, where it is its own teacher.
        """
        candidates = inputs.candidates
        # Masked places are never read, so they may hold anything.
        teacher_pred = torch.zeros(
            (*candidates.index.shape, *target.shape[1:]),
            dtype=torch.promote_types(target.dtype, torch.float32),
            device=target.device,
        )
        if own_pred is not None:
            teacher_pred[own.rows, own.columns] = own_pred.detach().to(teacher_pred)
        with torch.no_grad(), self._teacher():
            for cells in passes:
                values = self.denoiser(*inputs.of(cells), **inputs.image(cells))
                checked(values, inputs.noisy, cells)
                if cells.counts:
                    teacher_pred[cells.rows, cells.columns] = values.to(teacher_pred)
        timesteps = None if self.loss.reward_weight is None else inputs.timesteps
        return self.loss.guide(
            teacher_pred, target, candidates.positives, candidates.mask, timesteps=timesteps
        )

    @contextmanager
    def _teacher(self) -> Iterator[None]:
        """The denoiser is the teacher inside."""
        if self.ema is not None:
            with self.ema.applied():
                yield
            return
        try:
            yield
        finally:
            # Weights that autocast has cast without gradient would serve a pass that needs one.
            torch.clear_autocast_cache()

    def _check_updated(self) -> None:
        """Warns where the weights have moved since the last call, and the EMA has not."""
        if self.ema is None:
            return
        versions = sum(one._version for one in self.ema.parameters)
        if self._versions is None:
            self._versions = versions
        elif versions != self._versions:
            self._warn(
                "update_ema",
                "update_ema(): expected a call after each optimizer.step(), got none since the "
                "weights were changed: the EMA does not follow them.",
            )

    def _warn(self, kind: str, message: str) -> None:
        """Once."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=3)

    def _coefficients(self, positive: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
        """c_ij of the loss, with this step's draw of the negatives; on the CPU."""
        number = self.passes.negatives_per_step
        if number is not None and self.loss.neg_scale > 0:
            # Rank 0 is the positive, ranks 1..n the negatives in random order, then the masked.
            keys = torch.rand(valid.shape, generator=generator)
            keys = keys.masked_fill(~valid, 2.0).masked_fill(positive, -1.0)
            valid = valid & (keys.argsort(1).argsort(1) <= number)
        return AF.loss_coefficients(
            positive, valid, neg_scale=self.loss.neg_scale, dtype=torch.float64
        )

    def _student_errors(
        self,
        inputs: NoisedBatch,
        guidance: AF.Guidance,
        cells: Cells,
        spared: list[Place],
        coefficients: Tensor,
        errors: Tensor,
        again: bool,
    ) -> Tensor:
        """(B, K) weighted errors of the cells, zero elsewhere.

        `again`: keep no graph, and run the cells again in the backward pass.
        """

        def run(*_: Tensor) -> Tensor:
            given, image = inputs.of(cells), inputs.image(cells)
            with without_gradient(spared, self.denoiser):
                pred = self.denoiser(*given, **image)
            checked(pred, inputs.noisy, cells)
            if spared:
                check_checkpointing(pred, (given, image))
            weights = coefficients if cells.counts else torch.zeros_like(coefficients)
            return _weighted_errors(pred, guidance, cells, weights, torch.zeros_like(errors))

        if not again or not torch.is_grad_enabled():
            return run()
        # The cells' rows are taken inside, so as not to be kept.
        return run_again(run, inputs.noisy, self.denoiser)


def _checked_parts(ema: Any, loss: Any, candidates: Any) -> AGSMLoss:
    """The loss, if all three are of their kind and go together."""
    if ema is not None and not isinstance(ema, EMA):
        raise TypeError(
            f"ema: expected an agsm_loss.EMA or None, got {type(ema).__name__}. Name the others: "
            "AGSMRegularizer(denoiser, loss=AGSMLoss(guidance_scale=3))."
        )
    if not isinstance(loss, AGSMLoss):
        got = "None" if loss is None else type(loss).__name__
        raise TypeError(
            f"loss: expected an AGSMLoss, got {got}. Pass loss=AGSMLoss(guidance_scale=3)."
        )
    if candidates is not None and not isinstance(candidates, Rule):
        raise TypeError(
            f"candidates: expected None (the empty caption alone) or a rule, such as InBatch(3) of "
            f"agsm_loss, got {candidates!r}."
        )
    if loss.neg_scale > 0 and ema is None:
        raise ValueError(
            f"ema: expected an EMA with neg_scale={loss.neg_scale}, got None. Pass "
            "EMA(denoiser.tokens.parameters()), or take AGSMLoss(guidance_scale=3)."
        )
    frozen = ema is not None and ema.decay == 1
    if loss.guidance_scale is not None and frozen != loss.frozen_teacher:
        decay = None if ema is None else ema.decay
        raise ValueError(
            f"ema: expected {'decay 1' if loss.frozen_teacher else 'a decay below 1'} with "
            f"AGSMLoss(guidance_scale=..., frozen_teacher={loss.frozen_teacher}), got {decay}. A "
            "teacher that never follows the student needs another target for the same scale."
        )
    return loss


def _check_images(noisy: Tensor, target: Tensor, pred: Tensor | None) -> None:
    _checks.check_floating(noisy=noisy, target=target)
    given = {"target": target} if pred is None else {"target": target, "pred": pred}
    for name, tensor in given.items():
        if tensor.shape != noisy.shape:
            raise ValueError(
                f"{name}: expected the shape of noisy {tuple(noisy.shape)}, got "
                f"{tuple(tensor.shape)}."
            )
    if pred is not None and torch.is_grad_enabled() and not pred.requires_grad:
        raise ValueError(
            "pred: expected the host's prediction with its graph, got a tensor without gradient: "
            "AGSM would train nothing. Leave out .detach() and torch.no_grad(), or pred."
        )


def _weighted_errors(
    pred: Tensor, guidance: AF.Guidance, cells: Cells, coefficients: Tensor, errors: Tensor
) -> Tensor:
    """`errors` (B, K) with c_ij·mean((p_ij − guided target_ij)²) put at the cells."""
    targets = guidance.targets[cells.rows, cells.columns]
    values = AF.denoising_error(pred.unsqueeze(1), targets).squeeze(1)
    scaled = values * coefficients[cells.rows, cells.columns].to(values)
    return errors.index_put((cells.rows, cells.columns), scaled.to(errors.dtype))


def _metrics(terms: AF.AGSMTerms, weight: float) -> dict[str, Tensor]:
    scalars = {name: value.detach() for name, value in terms._asdict().items() if value.ndim == 0}
    return {f"agsm/{name}": value for name, value in scalars.items()} | {
        "agsm/weight": torch.tensor(weight)
    }
