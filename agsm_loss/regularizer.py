"""`AGSMRegularizer`: AGSM as one line in somebody's training step.

    loss = loss + agsm(noisy_latents, timesteps, target, prompt_embeds, captions=captions).loss
    loss.backward(); optimizer.step(); agsm.update_ema()

It chooses the candidates, runs the EMA model on all of them without gradient, turns its
predictions into weights and guided targets, and runs the student on the matching caption (or takes
the host's own prediction) with ψ⁺ and on the others with ψ⁻. The targets being constants, the
loss is a sum over (image, caption) pairs, so the pairs can be worked through a few at a time
with the same gradient, and over a random subset of the negatives with the same gradient on average.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from agsm_loss import _checks
from agsm_loss import functional as AF
from agsm_loss._inputs import Inputs, Pairs, checked
from agsm_loss.candidates import Candidates, in_batch_candidates
from agsm_loss.ema import EMA
from agsm_loss.loss import AGSMLoss
from agsm_loss.schedule import Schedule, as_schedule


@runtime_checkable
class Denoiser(Protocol):
    """The student, as the regularizer calls it: N samples in, N predictions out.

    `conditioning` has the structure that was given to the regularizer, with N rows in every
    tensor; `bank` (N,) says which soft tokens each sample wears; `image_conditioning`'s entries
    come as keywords.
    """

    def __call__(
        self, noisy: Tensor, timesteps: Tensor, conditioning: Any, bank: Tensor, **image: Any
    ) -> Tensor: ...


class RegularizerOutput(NamedTuple):
    """`loss` is already multiplied by λ. `metrics` are detached scalars to log."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]


class AGSMRegularizer:
    """AGSM beside another training loss.

    Args:
        denoiser: the student (`Denoiser`); it must run the parameters that `ema` follows.
        ema: `EMA` of the trainable parameters (tokens, adapters, or all of them).
        loss: an `AGSMLoss`; default `AGSMLoss()`.
        weight: λ, a number or a function of the optimizer step (`agsm_loss.schedule`). At a step
            where it is 0 nothing is run and the returned loss is a constant 0.
        num_negatives: in-batch negatives an image, where the call is given captions.
        train_negatives: train on this many of each image's negatives a step, drawn at random,
            while the weights and guidance use all of them. Unbiased; None for all.
        chunk_size: samples a forward pass may hold. The student's passes are then checkpointed,
            so that memory doesn't grow with K; gradients are the same. None for one pass.
        seed: of the draws of captions and negatives; default `torch.initial_seed()`. Each call draws
            from this and its own number, so that the host's random stream stays as it is and every
            rank resumes exactly. Give each rank a different one.
        allow_empty: accept batches in which no image has a negative (as in `in_batch_candidates`).
        shared: what is trained and all captions share (a LoRA, the denoiser's own weights). The
            negatives' gradient stops there and is left to ψ⁻: else shared weights learn this image
            for wrong captions. Those passes run with `requires_grad` off for these parameters, so
            checkpointing inside the denoiser cannot be on (torch raises a CheckpointError); take
            `chunk_size` instead. Two student passes in place of one.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        ema: EMA,
        loss: AGSMLoss | None = None,
        *,
        weight: float | Schedule = 1.0,
        num_negatives: int = 3,
        train_negatives: int | None = None,
        chunk_size: int | None = None,
        seed: int | None = None,
        allow_empty: bool = False,
        shared: Iterable[nn.Parameter] = (),
    ) -> None:
        for name, size in (("train_negatives", train_negatives), ("chunk_size", chunk_size)):
            if size is not None and size < 1:
                raise ValueError(f"{name}: expected None or at least 1, got {size}.")
        self.denoiser = denoiser
        self.ema = ema
        self.loss = AGSMLoss() if loss is None else loss
        self.weight = as_schedule(weight)
        self.num_negatives = num_negatives
        self.train_negatives = train_negatives
        self.chunk_size = chunk_size
        self.seed = torch.initial_seed() if seed is None else seed
        self.allow_empty = allow_empty
        self.shared = list(shared)
        held = {id(one) for one in self.shared}
        if self.loss.neg_scale > 0 and all(id(one) in held for one in ema.parameters):
            raise ValueError(
                f"shared: expected some of the {len(ema.parameters)} parameters that the EMA follows to be "
                "left to the negatives, got all. Train soft tokens beside them, or take neg_scale=0."
            )
        self.step = self.calls = 0

    def __call__(
        self,
        noisy: Float[Tensor, "B *D"],
        timesteps: Tensor,
        target: Float[Tensor, "B *D"],
        conditioning: Any,
        *,
        captions: Sequence[Hashable] | Tensor | None = None,
        image_ids: Sequence[Hashable] | Tensor | None = None,
        candidates: Candidates | None = None,
        image_conditioning: Mapping[str, Any] | None = None,
        pred: Float[Tensor, "B *D"] | None = None,
        backward: Callable[[Tensor], object] | None = None,
    ) -> RegularizerOutput:
        """λ·L and metrics for one batch of B images.

        Args:
            noisy: x_t.
            timesteps: t of each image, (B,) or a scalar.
            target: regression target τ in the denoiser's parametrisation.
            conditioning: encoded captions: a tensor, or any nesting of dicts, lists and tuples of
                tensors, with one row a caption of the pool. Without `candidates` the pool is the
                batch's own captions, so B rows.
            captions: text or id of each image's caption, to tell equal ones; in-batch negatives
                are drawn from them. Give these or `candidates`.
            image_ids: as in `in_batch_candidates`.
            candidates: which captions compete (`agsm_loss.candidates`).
            image_conditioning: what belongs to the image and not to the caption (SDXL's time ids,
                a ControlNet's input): tensors with B rows, passed on by keyword.
            pred: the host's own prediction for (x_t, t, own caption), made with ψ⁺; the matching
                pairs are then not run again, and the returned loss reaches the host's graph.
            backward: if given (`torch.Tensor.backward`, `accelerator.backward`), each chunk's loss
                is passed to it at once, so that only one chunk's graph lives. The returned loss
                still has the full value, and graph only for what was not yet run backward
                (the matching pairs, where `pred` was given). In DDP each of these calls exchanges
                gradients, and a host's graph from before them would not be exchanged: run the host's
                backward first, and no `pred`.

        Raises:
            ValueError, TypeError: as in `agsm_loss.functional.agsm_loss` and
                `agsm_loss.candidates.in_batch_candidates`, and for conditioning whose rows are not
                the pool's.
        """
        weight = float(self.weight(self.step))
        _checks.check_scale("weight", weight)
        if weight == 0:
            return RegularizerOutput(target.new_zeros((), dtype=torch.float32), self._idle())
        if backward is not None and pred is not None and _in_ddp(self.denoiser):
            raise ValueError(
                "backward: expected None beside pred in DDP, whose exchange of gradients it would end before "
                "the host's own backward. Take chunk_size without backward, or no pred."
            )
        draws = self._draws()
        candidates = self._candidates(noisy, target, captions, image_ids, candidates, pred, draws)
        batch, num_candidates = candidates.index.shape
        timesteps = timesteps.expand(batch) if timesteps.ndim == 0 else timesteps
        inputs = Inputs(noisy, timesteps, conditioning, image_conditioning or {}, candidates)
        inputs.check()

        guided = self._guide(inputs, target)
        positive = torch.arange(num_candidates) == candidates.positives.unsqueeze(1)
        coefficients = self._coefficients(positive, candidates.mask, draws)
        errors = target.new_zeros(batch, num_candidates, dtype=guided.targets.dtype)
        todo = coefficients > 0
        if pred is not None:
            own = Pairs(torch.arange(batch), candidates.positives)
            errors = _weighted_errors(pred, guided, own, coefficients, errors)
            todo = todo & ~positive
        for chunk in self._chunks(todo, positive):
            values = self._student_errors(inputs, guided, chunk, coefficients, errors)
            if backward is not None:
                backward(values.sum() * weight)
                values = values.detach()
            errors = errors + values
        masks = positive.to(errors.device), candidates.mask.to(errors.device)
        terms = AF.terms_from_errors(errors, guided, *masks)
        return RegularizerOutput(terms.loss * weight, _metrics(terms, weight))

    def update_ema(self) -> None:
        """After each `optimizer.step()`: moves the EMA and the schedule's step."""
        self.ema.update()
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Step, draws, EMA and temperature; for `accelerator.register_for_checkpointing`.

        One rank's state serves all: of several, each but the first keeps the seed that it was made with.
        """
        return {
            "step": self.step,
            "calls": self.calls,
            "seed": self.seed,
            "ema": self.ema.state_dict(),
            "loss": self.loss.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ema.load_state_dict(state["ema"])
        self.loss.load_state_dict(state["loss"])
        if not (_several_ranks() and dist.get_rank()):
            self.seed = int(state["seed"])
        self.step, self.calls = int(state["step"]), int(state["calls"])

    def _draws(self) -> torch.Generator:
        """The next call's. The factor is odd, so that all calls of 2**32 have seeds of their own."""
        self.calls += 1
        return torch.Generator().manual_seed((self.seed + self.calls * 0x9E3779B1) % 2**63)

    def _candidates(
        self,
        noisy: Tensor,
        target: Tensor,
        captions: Sequence[Hashable] | Tensor | None,
        image_ids: Sequence[Hashable] | Tensor | None,
        candidates: Candidates | None,
        pred: Tensor | None,
        draws: torch.Generator,
    ) -> Candidates:
        _checks.check_floating(noisy=noisy, target=target)
        given = {"target": target} if pred is None else {"target": target, "pred": pred}
        for name, tensor in given.items():
            if tensor.shape != noisy.shape:
                raise ValueError(
                    f"{name}: expected the shape of noisy {tuple(noisy.shape)}, got "
                    f"{tuple(tensor.shape)}."
                )
        if (captions is None) == (candidates is None):
            raise ValueError("expected either captions or candidates, got both or neither.")
        if candidates is None:
            assert captions is not None
            candidates = in_batch_candidates(
                captions,
                num_negatives=self.num_negatives,
                image_ids=image_ids,
                generator=draws,
                allow_empty=self.allow_empty,
            )
        elif image_ids is not None:
            raise ValueError("image_ids: they belong with captions; candidates are chosen already.")
        if candidates.index.shape[0] != noisy.shape[0]:
            raise ValueError(
                f"expected one caption for each of the {noisy.shape[0]} images, got "
                f"{candidates.index.shape[0]}."
            )
        return candidates

    def _guide(self, inputs: Inputs, target: Tensor) -> AF.Guidance:
        """The EMA pass over every candidate, and what follows from it."""
        candidates = inputs.candidates
        # Masked places are never read, so they may hold anything.
        ema_pred = torch.zeros(
            (*candidates.index.shape, *target.shape[1:]),
            dtype=torch.promote_types(target.dtype, torch.float32),
            device=target.device,
        )
        with torch.no_grad(), self.ema.applied():
            for chunk in Pairs.where(candidates.mask).split(self.chunk_size):
                values = self.denoiser(*inputs.of(chunk), **inputs.image(chunk))
                ema_pred[chunk.rows, chunk.columns] = checked(values, inputs.noisy, chunk).to(
                    ema_pred
                )
        timesteps = None if self.loss.reward_weight is None else inputs.timesteps
        return self.loss.guide(
            ema_pred, target, candidates.positives, candidates.mask, timesteps=timesteps
        )

    def _coefficients(self, positive: Tensor, valid: Tensor, draws: torch.Generator) -> Tensor:
        """c_ij of the loss, with this step's draw of the negatives; on the CPU."""
        if self.train_negatives is not None and self.loss.neg_scale > 0:
            # Rank 0 is the positive, ranks 1..n the negatives in random order, then the masked.
            keys = torch.rand(valid.shape, generator=draws)
            keys = keys.masked_fill(~valid, 2.0).masked_fill(positive, -1.0)
            valid = valid & (keys.argsort(1).argsort(1) <= self.train_negatives)
        return AF.loss_coefficients(
            positive, valid, neg_scale=self.loss.neg_scale, dtype=torch.float64
        )

    def _chunks(self, todo: Tensor, positive: Tensor) -> list[Pairs]:
        """What the student is run on, pass by pass; a pass with `shared` has one kind of pairs."""
        kinds = [todo & positive, todo & ~positive] if self.shared else [todo]
        return [chunk for kind in kinds for chunk in Pairs.where(kind).split(self.chunk_size)]

    def _student_errors(
        self,
        inputs: Inputs,
        guided: AF.Guidance,
        chunk: Pairs,
        coefficients: Tensor,
        errors: Tensor,
    ) -> Tensor:
        """(B, K) weighted errors of the chunk's pairs, zero elsewhere."""

        matching = bool((chunk.columns == inputs.candidates.positives[chunk.rows]).all())
        stopped = [] if matching else self.shared

        def run(noisy: Tensor, timesteps: Tensor, conditioning: Any, bank: Tensor) -> Tensor:
            with _without_gradient(stopped):
                pred = self.denoiser(noisy, timesteps, conditioning, bank, **inputs.image(chunk))
            checked(pred, inputs.noisy, chunk)
            return _weighted_errors(pred, guided, chunk, coefficients, torch.zeros_like(errors))

        if self.chunk_size is None or not torch.is_grad_enabled():
            return run(*inputs.of(chunk))
        return checkpoint(run, *inputs.of(chunk), use_reentrant=False)

    def _idle(self) -> dict[str, Tensor]:
        return {"agsm/weight": torch.zeros(())}


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _in_ddp(denoiser: Any) -> bool:
    """Whether DDP exchanges the denoiser's gradients, as far as can be seen from here."""
    modules = denoiser.modules() if isinstance(denoiser, nn.Module) else ()
    return _several_ranks() and any(isinstance(one, DistributedDataParallel) for one in modules)


@contextmanager
def _without_gradient(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """What runs here has no gradient to these parameters."""
    trained = [one for one in parameters if one.requires_grad]
    for one in trained:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in trained:
            one.requires_grad_(True)


def _weighted_errors(
    pred: Tensor, guided: AF.Guidance, pairs: Pairs, coefficients: Tensor, errors: Tensor
) -> Tensor:
    """`errors` (B, K) with c_ij·mean((p_ij − guided target_ij)²) put at the pairs."""
    targets = guided.targets[pairs.rows, pairs.columns]
    values = AF.denoising_error(pred.unsqueeze(1), targets).squeeze(1)
    scaled = values * coefficients[pairs.rows, pairs.columns].to(values)
    return errors.index_put((pairs.rows, pairs.columns), scaled.to(errors.dtype))


def _metrics(terms: AF.AGSMTerms, weight: float) -> dict[str, Tensor]:
    scalars = {name: value.detach() for name, value in terms._asdict().items() if value.ndim == 0}
    return {f"agsm/{name}": value for name, value in scalars.items()} | {
        "agsm/weight": torch.tensor(weight)
    }
