"""What the hosts' steps share: their output, their reference model, and AGSM's state."""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from agsm_loss import AGSMRegularizer, Bank, Candidates, StepOutput
from agsm_loss.integrations.noise import add_noise, regression_target
from agsm_loss.integrations.tokens.attach import unwrap


class AGSMBatch(NamedTuple):
    """What AGSM trains on in a host that has no clean image with a known noise of its own.

    Attributes:
        latents: clean, (B, *D).
        timesteps: to which they are noised, (B,).
        noise: (B, *D).
        conditioning: a row a caption; `captions`, `hard_negatives`, `image_ids` and
            `image_conditioning` as `AGSMRegularizer` takes them.
    """

    latents: Tensor
    timesteps: Tensor
    noise: Tensor
    conditioning: Any
    captions: Sequence[Hashable] | Tensor | Candidates
    hard_negatives: Sequence[Sequence[Hashable]] | None = None
    image_ids: Sequence[Hashable] | Tensor | None = None
    image_conditioning: Mapping[str, Any] | None = None


def agsm_on(batch: AGSMBatch, agsm: AGSMRegularizer, scheduler: Any) -> StepOutput:
    """λ·L and metrics of AGSM on these images, noised as they say."""
    return agsm(
        add_noise(scheduler, batch.latents, batch.noise, batch.timesteps),
        batch.timesteps,
        regression_target(scheduler, batch.latents, batch.noise, batch.timesteps),
        batch.conditioning,
        batch.captions,
        hard_negatives=batch.hard_negatives,
        image_ids=batch.image_ids,
        image_conditioning=batch.image_conditioning,
    )


def best_rows(scores: Float[Tensor, " B"], share: float = 0.5) -> Int[Tensor, " n"]:
    """The rows of the best ⌈share·B⌉ scores, at least one, in the batch's order.

    A score that is not a number is the worst. Of equal scores the earlier row is taken.

    Raises:
        ValueError: no score, or a share that is not in (0, 1].
    """
    if scores.ndim != 1 or not len(scores) or not 0 < share <= 1:
        raise ValueError(
            f"expected scores (B,) of at least one image and share in (0, 1], got "
            f"{tuple(scores.shape)} and {share}."
        )
    number = math.ceil(share * len(scores))
    order = scores.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)
    return order[:number].sort().values


def mean_log_prob(x: Float[Tensor, "N *D"], mean: Tensor, std: Tensor) -> Float[Tensor, " N"]:
    """log N(x; mean, std²), averaged over each sample's dimensions, as in SPO and DDPO."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, std, x = mean.to(dtype), std.to(dtype), x.to(dtype)
    log_prob = torch.distributions.Normal(mean, std.expand_as(mean), validate_args=False)
    return log_prob.log_prob(x).flatten(1).mean(1)


class Host:
    """A step that may have AGSM in it."""

    def __init__(self, agsm: AGSMRegularizer | None) -> None:
        self.agsm = agsm

    def update_ema(self) -> None:
        """After each optimizer step: AGSM's EMA and schedule move on."""
        if self.agsm is not None:
            self.agsm.update_ema()

    def state_dict(self) -> dict[str, Any]:
        """AGSM's state; for `accelerator.register_for_checkpointing`."""
        return {} if self.agsm is None else self.agsm.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.agsm is not None:
            self.agsm.load_state_dict(state)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """A LoRA's base model: peft's adapters are off inside, on after. Also through DDP and compile.

    Raises:
        ValueError: the model has no adapters, so it would be its own reference.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [one for one in unwrap(model).modules() if isinstance(one, BaseTunerLayer)]
    if not layers:
        raise ValueError(
            "model: expected peft adapters, got none. Where all of the model is trained, its "
            "reference is EMA(parameters, decay=1.0).applied."
        )
    parameters = [p for one in layers for p in one.parameters()]
    before = [p.requires_grad for p in parameters]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        # peft marks every parameter of an adapter that it switches on as trainable.
        for parameter, trained in zip(parameters, before, strict=True):
            parameter.requires_grad_(trained)


def bank_of(bank: Bank, number: int) -> Tensor:
    """The same bank for `number` samples."""
    return torch.full((number,), int(bank))


def first_rows_twice(tree: Any, batch: int) -> Any:
    """The first `batch` rows of every tensor, for winners and for losers."""
    return tree_map(
        lambda leaf: torch.cat([leaf[:batch]] * 2) if isinstance(leaf, Tensor) else leaf, tree
    )
