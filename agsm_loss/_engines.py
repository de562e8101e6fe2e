"""What the regularizer's passes have to mind of the engine that trains, and what they refuse.

DDP exchanges gradients at the end of a backward pass, DeepSpeed ends a step with it, FSDP2 gathers
other parameters in each pass, and checkpointing runs parts of a pass again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from agsm_loss._storage import (
    Place,
    fsdp2_modules,
    holding,
    is_partitioned,
    places_of,
    several_ranks,
)
from agsm_loss.ema import EMA
from agsm_loss.soft_tokens import SoftTokens


def check_backward(
    backward: Callable[[Tensor], object], denoiser: Any, pred: Tensor | None
) -> None:
    """ValueError where the engine cannot run `backward` several times a step."""
    if pred is not None and ddp_modules(denoiser):
        raise ValueError(
            "pred: expected None with Passes(backward=...) in DDP, whose exchange of gradients "
            "would end before the host's own backward. Take chunk_size without backward, or no "
            "pred."
        )
    caller = getattr(backward, "__self__", None)  # an engine or accelerate's Accelerator, say
    if getattr(caller, "deepspeed_engine_wrapped", None) is not None or any(
        base.__name__ == "DeepSpeedEngine"
        for one in (caller, *_modules(denoiser))
        for base in type(one).__mro__
    ):
        raise ValueError(
            "passes: expected no backward with DeepSpeed, which ends a step with each backward. "
            "Take Passes(chunk_size=...) alone, and run its loss backward with the host's."
        )


def ddp_modules(denoiser: Any) -> list[DistributedDataParallel]:
    """Where DDP exchanges the denoiser's gradients, as far as can be seen from here."""
    if not several_ranks():
        return []
    return [one for one in _modules(denoiser) if isinstance(one, DistributedDataParallel)]


@contextmanager
def exchange_later(denoiser: Any) -> Iterator[None]:
    """DDP only adds up gradients here, and exchanges them in the next pass outside."""
    with ExitStack() as stack:
        for one in ddp_modules(denoiser):
            stack.enter_context(one.no_sync())
        yield


def spared_by_negatives(
    denoiser: Any, ema: EMA, neg_scale: float | int, negatives_train: Iterable[nn.Parameter] | None
) -> list[Place]:
    """What is trained and the negatives' gradient does not reach."""
    places = [
        *places_of(holding(ema.parameters)),
        *(places_of(denoiser) if isinstance(denoiser, nn.Module) else []),
    ]
    if negatives_train is None:
        tokens = [one for one in _modules(denoiser) if isinstance(one, SoftTokens)]
        negatives_train = [p for one in tokens for p in one.parameters()]
    reached = {id(p) for p in negatives_train if p.requires_grad}
    if neg_scale > 0 and not reached:
        raise ValueError(
            f"negatives_train: expected trainable parameters for neg_scale={neg_scale}, got none: "
            "the denoiser has no trainable SoftTokens. Take neg_scale=0 (for a LoRA or the "
            "denoiser's own weights), train soft tokens, or pass the parameters that the negatives "
            "shall train (ema.parameters for all)."
        )
    trained = {id(one.parameter): one for one in places if one.parameter.requires_grad}
    return [one for key, one in trained.items() if key not in reached]


@contextmanager
def without_gradient(places: list[Place], denoiser: Any) -> Iterator[None]:
    """What runs here has no gradient to the parameters at these places.

    FSDP2 puts the gathered parameters in their places in the pass itself.
    """
    trained = [one for one in places if one.parameter.requires_grad]
    off: dict[int, nn.Parameter] = {}

    def switch_off(*_: Any) -> None:
        for one in trained:
            parameter = one.parameter
            off[id(parameter)] = parameter
            parameter.requires_grad_(False)

    sharding = fsdp2_modules(denoiser) if trained and isinstance(denoiser, nn.Module) else []
    hooks = [one.register_forward_pre_hook(switch_off) for one in sharding]
    try:
        switch_off()
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in off.values():
            parameter.requires_grad_(True)


def check_checkpointing(pred: Tensor, inputs: Any) -> None:
    """ValueError where the denoiser will run parts of this pass again, with nothing spared."""
    graphs = (one.grad_fn for one in tree_leaves(inputs) if isinstance(one, Tensor))
    seen = {None, *graphs}
    todo: list[Any] = [pred.grad_fn]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError(
                "negatives_train: expected no reentrant checkpointing inside the denoiser, which "
                "runs parts of it again when the parameters that the negatives spare are trained. "
                "Switch it off and take Passes(chunk_size=...), or pass the parameters of all that "
                "is trained (ema.parameters)."
            )
        todo.extend(one for one, _ in node.next_functions)


def run_again(run: Callable[[Tensor], Tensor], noisy: Tensor, denoiser: Any) -> Tensor:
    """`run(noisy)` without its graph: it runs once more in the backward pass.

    By its argument, `checkpoint` knows the device whose random state it restores.
    """
    # ZeRO-3 frees frozen weights before torch compares the sizes of what both runs have kept.
    parameters = denoiser.parameters() if isinstance(denoiser, nn.Module) else ()
    compare = "none" if any(map(is_partitioned, parameters)) else "default"
    return checkpoint(run, noisy, use_reentrant=False, determinism_check=compare)


def _modules(denoiser: Any) -> list[nn.Module]:
    """None where the denoiser is a plain function."""
    return list(denoiser.modules()) if isinstance(denoiser, nn.Module) else []
