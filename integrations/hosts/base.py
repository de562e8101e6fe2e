"""What the hosts share. A *host* is the training step of another method, to which AGSM is added.

Every host is a `Host`: call it for a `StepOutput` (loss and metrics), and call its `update_ema()`
after each optimizer step. A host with clean images and their noise gives AGSM those; the others
take an `AGSMBatch`:

>>> import torch
>>> from diffusers import DDPMScheduler
>>> from torch import nn
>>> from agsm_loss import AGSMLoss, AGSMRegularizer
>>> from agsm_loss.integrations.hosts.base import AGSMBatch, agsm_on, best_rows, best_samples
>>> layer = nn.Linear(4 + 3, 4)
>>> def denoiser(noisy, timesteps, text, bank):  # yours: TokenDenoiser or PlainDenoiser
...     return layer(torch.cat([noisy, text], dim=1))
>>> agsm = AGSMRegularizer(denoiser, loss=AGSMLoss(guidance_scale=3))
>>> latents, noise, text = torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 3)
>>> captions, empty = ["a dog", "a cat"], torch.zeros(1, 3)  # the empty caption, encoded
>>> batch = AGSMBatch(latents, torch.tensor([10, 900]), noise, text, captions, null=empty)
>>> loss, metrics = agsm_on(batch, agsm, DDPMScheduler())
>>> loss.backward()

Of generated images, AGSM takes those with the best rewards:

>>> rewards = torch.tensor([0.1, 0.9, 0.4, 0.7])
>>> best_rows(rewards, share=0.5)
tensor([1, 3])
>>> best_samples(rewards, ["a dog", "a cat", "two dogs", "a red cube"], share=0.5)
['a cat', 'a red cube']

On several processes `best_samples` finds them among all processes' samples.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils._pytree import tree_map

from agsm_loss import AGSMRegularizer, Bank, Candidates, Denoiser, StepOutput
from agsm_loss._storage import several_ranks
from agsm_loss.integrations.noise import add_noise, regression_target
from agsm_loss.integrations.tokens.attach import unwrap

Sample = TypeVar("Sample")


class AGSMBatch(NamedTuple):
    """B captioned images for AGSM, in a host that has no clean images with noise of its own.

    Attributes:
        latents: clean latents x_0 (B, *D).
        timesteps: t of each image (B,), as the scheduler counts them.
        noise: ε of each image (B, *D), drawn from N(0, 1).
        conditioning: the encoded captions, one row each, then those of `hard_negatives`.
        captions, hard_negatives, image_ids, image_conditioning, null: as `AGSMRegularizer` takes
            them.
    """

    latents: Tensor
    timesteps: Tensor
    noise: Tensor
    conditioning: Any
    captions: Sequence[Hashable] | Tensor | Candidates
    hard_negatives: Sequence[Sequence[Hashable]] | None = None
    image_ids: Sequence[Hashable] | Tensor | None = None
    image_conditioning: Mapping[str, Any] | None = None
    null: Any = None


def agsm_on(batch: AGSMBatch, agsm: AGSMRegularizer, scheduler: Any) -> StepOutput:
    """λ·L and metrics of AGSM on these images, noised at their timesteps.

    Args:
        batch: B images with captions.
        agsm: the regularizer; its `weight` is λ.
        scheduler: the training scheduler, for the noise levels and what is predicted.

    Raises:
        ValueError, TypeError: those of `AGSMRegularizer`.
    """
    return agsm(
        add_noise(scheduler, batch.latents, batch.noise, batch.timesteps),
        batch.timesteps,
        regression_target(scheduler, batch.latents, batch.noise, batch.timesteps),
        batch.conditioning,
        batch.captions,
        hard_negatives=batch.hard_negatives,
        image_ids=batch.image_ids,
        image_conditioning=batch.image_conditioning,
        null=batch.null,
    )


def best_rows(
    scores: Float[Tensor, " B"], share: float = 0.5, *, at_least: int = 1
) -> Int[Tensor, " n"]:
    """The rows of the best ⌈share·B⌉ scores, at least one, in the batch's order.

    A score that is not a number is never taken. Of equal scores the earlier row is taken.

    Args:
        scores: one an image (B,), larger is better.
        share: of the images to take, in (0, 1].
        at_least: images to take where the share has fewer; all of them where there are fewer.

    Raises:
        ValueError: no score that is a number, or a share that is not in (0, 1].
    """
    if scores.ndim != 1 or not len(scores) or not 0 < share <= 1:
        raise ValueError(
            f"expected scores (B,) of at least one image and share in (0, 1], got "
            f"{tuple(scores.shape)} and {share}."
        )
    if scores.isnan().all():
        raise ValueError(
            f"scores: expected numbers, got NaN for all {len(scores)} images: none is good. Look "
            "at the reward and its images."
        )
    number = max(share_of(share, len(scores)), at_least)
    number = min(number, int((~scores.isnan()).sum()))
    order = scores.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)
    return order[:number].sort().values


def share_of(share: float, number: int) -> int:
    """⌈share·number⌉: 0.07 * 100 is above 7 by a rounding error.

    >>> share_of(0.07, 100)
    7
    """
    return math.ceil(round(share * number, 9))


def best_samples(
    scores: Float[Tensor, " B"], samples: Sequence[Sample], share: float = 0.5, *, each: int = 1
) -> list[Sample]:
    """The samples of all processes with the best scores, the same list in each of them.

    Every process calls it with samples of its own, maybe none. Only the best ones are sent.

    >>> best_samples(torch.tensor([0.1, 0.9, 0.4]), ["a dog", "a cat", "a fox"], 0.1, each=2)
    ['a cat', 'a fox']

    Args:
        scores: one a sample (B,), larger is better.
        samples: B trees (dicts, lists and tuples) of tensors and what can be pickled.
        share: of all processes' samples to take, in (0, 1].
        each: samples that a process trains on at a time. Where the share has fewer for each
            process, more of the best are taken.

    Returns:
        Copies on the CPU, in the order of the processes and of their samples.

    Raises:
        ValueError: as of `best_rows`.
    """
    every = of_all_processes(scores.detach().cpu())
    rows = best_rows(torch.cat(every), share, at_least=each * len(every))
    before = sum(map(len, every[: dist.get_rank()])) if several_ranks() else 0
    own = [row - before for row in rows.tolist() if before <= row < before + len(samples)]
    copies = [
        # Each its own copy: of a view the whole storage would be pickled.
        tree_map(
            lambda x: x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x, samples[row]
        )
        for row in own
    ]
    return [sample for few in of_all_processes(copies) for sample in few]


def of_all_processes(value: Sample) -> list[Sample]:
    """Every process's value, which is pickled, in each of them. Every process calls it."""
    if not several_ranks():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def mean_log_prob(x: Float[Tensor, "N *D"], mean: Tensor, std: Tensor) -> Float[Tensor, " N"]:
    """log N(x; mean, std²) of each sample, averaged over its dimensions, as in SPO and DDPO.

    >>> x = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    >>> mean_log_prob(x, mean=torch.zeros(2, 2), std=torch.ones(2, 1))
    tensor([-0.9189, -1.9189])

    Args:
        x: samples (N, *D).
        mean: (N, *D).
        std: any shape that broadcasts to (N, *D), e.g. (N, 1, 1, 1).

    Computed in float32 at least.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, std, x = mean.to(dtype), std.to(dtype), x.to(dtype)
    log_prob = torch.distributions.Normal(mean, std.expand_as(mean), validate_args=False)
    return log_prob.log_prob(x).flatten(1).mean(1)


class Host:
    """A training step of another method, alone or with AGSM as a term.

    Subclasses compute the method's loss in `__call__`.

    Args:
        denoiser: the model in training (`agsm_loss.Denoiser`), e.g. `TokenDenoiser`.
        scheduler: its diffusers scheduler, for the noise levels and what is predicted.
        agsm: the regularizer on the same denoiser; its `weight` is λ. None, or λ = 0: the method
            alone, bit for bit.
    """

    def __init__(self, denoiser: Denoiser, scheduler: Any, agsm: AGSMRegularizer | None) -> None:
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.agsm = agsm

    def update_ema(self) -> None:
        """After each `optimizer.step()`: moves AGSM's EMA and schedule."""
        if self.agsm is not None:
            self.agsm.update_ema()

    def state_dict(self) -> dict[str, Any]:
        """AGSM's state, empty without AGSM; for `accelerator.register_for_checkpointing`."""
        return {} if self.agsm is None else self.agsm.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.agsm is not None:
            self.agsm.load_state_dict(state)

    def _check_batch(self, agsm_batch: AGSMBatch | None) -> None:
        """ValueError for AGSM without images, or images without AGSM."""
        if (agsm_batch is None) != (self.agsm is None):
            given, missing = ("agsm", "none") if agsm_batch is None else ("no agsm", "one")
            raise ValueError(
                f"agsm_batch: expected it with agsm, and only then, got {missing} and {given}. "
                "Pass the images that AGSM trains on in each call of a step made with agsm=."
            )

    def _with_agsm(self, host: StepOutput, agsm_batch: AGSMBatch | None) -> StepOutput:
        """The method's output, with AGSM's on these images added where there is one."""
        if self.agsm is None or agsm_batch is None:
            return host
        return added(host, agsm_on(agsm_batch, self.agsm, self.scheduler))


def added(host: StepOutput, term: StepOutput) -> StepOutput:
    """The sum of the losses, with the metrics of both."""
    return StepOutput(host.loss + term.loss, host.metrics | term.metrics)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """A LoRA's base model: all that peft trains is off inside, and on again after.

    `requires_grad` is after as it was before. Works through DDP and torch.compile.

    >>> from peft import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(
    ...     LoraConfig(target_modules=["0"], init_lora_weights=False),
    ...     nn.Sequential(nn.Linear(4, 4)),
    ... )
    >>> x = torch.randn(1, 4)
    >>> with adapters_off(model):
    ...     base = model(x)
    >>> torch.equal(base, model[0].base_layer(x)), torch.equal(base, model(x))
    (True, False)

    Args:
        model: with peft adapters, bare or wrapped.

    Raises:
        ValueError: the model has no adapters, so it would be its own reference; or a config of
            theirs trains biases of the base, which cannot be switched off.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    kinds = BaseTunerLayer, AuxiliaryTrainingWrapper
    layers = [one for one in unwrap(model).modules() if isinstance(one, kinds)]
    configs = getattr(unwrap(model), "peft_config", {}).values()
    biases = {getattr(one, "bias", "none") for one in configs} - {"none"}
    if not layers or biases:
        got = f"bias={min(biases)!r}, which trains biases of the base" if biases else "none"
        raise ValueError(
            f"model: expected peft adapters, of bias='none', got {got}. Where more of the model is "
            "trained, its reference is EMA(denoiser, decay=1.0).applied."
        )
    # The flag alone: peft's enable_adapters also sets requires_grad, in FSDP2 of the wrong ones.
    before = [one._disable_adapters for one in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


def bank_of(bank: Bank, number: int) -> Int[Tensor, " N"]:
    """The same bank for each of `number` samples, on the CPU.

    >>> from agsm_loss import Bank
    >>> bank_of(Bank.NEGATIVE, 3)
    tensor([1, 1, 1])
    """
    return torch.full((number,), int(bank))


def take_rows(tree: Any, rows: Tensor) -> Any:
    """These rows of every tensor in dicts, lists and tuples; other leaves as they are.

    >>> take_rows({"prompt_embeds": torch.tensor([[1.0], [2.0]])}, torch.tensor([1, 0, 1]))
    {'prompt_embeds': tensor([[2.],
            [1.],
            [2.]])}
    """
    return tree_map(lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf, tree)


def first_rows_twice(tree: Any, batch: int) -> Any:
    """The first `batch` rows of every tensor, for the winners and again for the losers.

    >>> first_rows_twice({"prompt_embeds": torch.tensor([[1.0], [2.0], [3.0]])}, 1)
    {'prompt_embeds': tensor([[1.],
            [1.]])}
    """
    return tree_map(
        lambda leaf: torch.cat([leaf[:batch]] * 2) if isinstance(leaf, Tensor) else leaf, tree
    )
