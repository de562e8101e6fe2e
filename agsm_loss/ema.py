"""The EMA model p̂ of AGSM: a shadow of the trainable parameters alone, never of the backbone."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn

from agsm_loss._storage import (
    Shard,
    Whole,
    differ_between_ranks,
    fsdp1_refused,
    fsdp2_modules,
    holding,
    is_fsdp1,
    places_of,
    reshard,
    several_ranks,
    storage_of,
)


class EMA:
    """Exponential moving average of parameters, equal to them at the start.

    Call `update()` after each `optimizer.step()`, and run the model inside `with ema.applied():`
    for the EMA model's predictions. The averaging is `torch.optim.swa_utils`'; what is added is
    that only trainable parameters are kept, and kept in float32 at least (0.9999 is 1 in
    bfloat16).

    >>> import torch
    >>> from agsm_loss import EMA
    >>> layer = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(layer.weight)
    >>> ema = EMA(layer, decay=0.9)
    >>> _ = torch.nn.init.zeros_(layer.weight)
    >>> ema.update()
    >>> with ema.applied():
    ...     round(layer.weight.item(), 4)
    0.9
    >>> layer.weight.item()
    0.0

    With several processes it is exact in DDP, FSDP2 (`fully_shard`) and DeepSpeed's ZeRO-1 to 3.
    Every process makes one, and uses it at the same places. It keeps what the process holds: all
    of the parameters, or its shards. FSDP1 is refused.

    Args:
        parameters: the student, as a module or as its parameters; those with
            `requires_grad=False` are left out. Pass the module where FSDP2 shards it (parameters
            alone will do where an `AGSMRegularizer` gets their module as its denoiser). Parameters
            that become trainable later are not followed: make the EMA after freezing.
        decay: share of the average kept at each update, in [0, 1]. Published: 0.9999.
        warmup: start from smaller decays, min(decay, (1 + n)/(10 + n)) at update n = 1, 2, …

    The EMA may be made before DDP, DeepSpeed or FSDP2 takes the module. Where the processes had
    drawn different weights by then it starts from the first one's, as DDP and DeepSpeed do; FSDP2
    does not, and there this is an error.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[nn.Parameter],
        *,
        decay: float = 0.9999,
        warmup: bool = False,
    ) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay: expected a number in [0, 1], got {decay}.")
        self._module: nn.Module | None = None
        if isinstance(parameters, nn.Module):
            self._module = parameters
            places = places_of(parameters)
        else:
            places = places_of(holding(parameters))
        self._places = [one for one in places if one.parameter.requires_grad]
        if not self._places:
            raise ValueError(
                "parameters: none is trainable, so there is nothing to average. Set requires_grad "
                "on the soft tokens or adapters first."
            )
        self._storages = [storage_of(one.parameter) for one in self._places]
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self.shadow = [
            held.to(torch.promote_types(held.dtype, torch.float32), copy=True)
            for held in (one.held() for one in self._storages)
        ]
        self._is_applied = False
        self._is_compared = False

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, as the engine holds them."""
        return [one.parameter for one in self._storages]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters' present values."""
        if self._is_applied:
            raise RuntimeError("EMA.update() inside applied(): leave the context first.")
        self._follow(compare=True)
        self.num_updates += 1
        held = [one.held() for one in self._storages]
        current = [p.to(s.dtype) for p, s in zip(held, self.shadow, strict=True)]
        average = get_ema_multi_avg_fn(self.current_decay)
        for dtype in {s.dtype for s in self.shadow}:
            pairs = [(s, c) for s, c in zip(self.shadow, current, strict=True) if s.dtype == dtype]
            average([s for s, _ in pairs], [c for _, c in pairs], self.num_updates)

    @property
    def current_decay(self) -> float:
        """Decay of the latest update."""
        if not self.warmup:
            return self.decay
        return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the averaged values inside, and their own again after.

        Data pointers are exchanged, nothing is copied (but for half-precision parameters and
        FSDP2's shards), and no version counter moves: graphs that were recorded before can still be
        run backward after. Autocast's cast weights are dropped on the way in and out, as it knows
        them by their parameter and would take one model's for the other's. Inside, don't train. A
        second `applied` inside the first is refused.

        Raises:
            ValueError: FSDP2 shards the parameters, and their module is not known.
        """
        if self._is_applied:
            raise RuntimeError("EMA.applied() inside itself: the averaged values are in place.")
        self._follow(compare=True)
        if self._module is None and any(isinstance(one, Shard) for one in self._storages):
            raise ValueError(
                "parameters: expected the module of parameters that FSDP2 shards, as it has to "
                "gather them anew, got the parameters alone. Pass the module: EMA(denoiser)."
            )
        own: list[Tensor] = []
        self._is_applied = True
        try:
            for storage, shadow in zip(self._storages, self.shadow, strict=True):
                own.append(storage.put(shadow))
            torch.clear_autocast_cache()
            yield
        finally:
            if self._module is not None:
                reshard(self._module)
            for storage, values in zip(self._storages, own, strict=False):
                storage.put_back(values)
            torch.clear_autocast_cache()
            self._is_applied = False

    def state_dict(self) -> dict[str, Any]:
        """The averages of the whole parameters, alike for any engine and number of processes.

        Where an engine shards them, every process calls this, and the first one's state has them,
        gathered one by one to the CPU. The others' states have none: save the first one's.
        """
        self._follow(compare=False)
        return {"num_updates": self.num_updates, "shadow": self._gathered()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the averages, in every process; on any mismatch nothing is changed."""
        self._follow(compare=False)
        saved = state["shadow"]
        if saved is None:
            raise ValueError(
                "state: expected the first process's, to which the averages were gathered, got "
                "another one's."
            )
        shapes = [tuple(s.shape) for s in saved]
        expected = [tuple(one.shape) for one in self._storages]
        if shapes != expected:
            raise ValueError(
                f"state: expected averages of shapes {expected}, got {shapes}. The EMA was saved "
                "for other trainable parameters."
            )
        self.num_updates = int(state["num_updates"])
        for storage, shadow, value in zip(self._storages, self.shadow, saved, strict=True):
            shadow.copy_(storage.part(value))

    def _gathered(self) -> list[Tensor] | None:
        if all(isinstance(one, Whole) for one in self._storages):
            return [s.clone() for s in self.shadow]
        is_first = dist.get_rank() == 0
        gathered = []
        for storage, shadow in zip(self._storages, self.shadow, strict=True):
            whole = storage.whole(shadow)
            if is_first:
                gathered.append(whole.to("cpu", copy=True))
        return gathered if is_first else None

    def _look_in(self, module: nn.Module) -> None:
        """The denoiser that the parameters are a part of, where only they are known.

        Raises:
            ValueError: FSDP has put others in their place, or they are another module's.
        """
        if self._module is not None:
            inside = {id(one) for one in module.parameters()}
            if inside and not all(id(one) in inside for one in self.parameters):
                flat = any(is_fsdp1(one) for one in module.parameters())
                raise fsdp1_refused() if flat else _other_parameters()
            return
        places = {id(one.parameter): one for one in places_of(module)}
        found = [places[id(one)] for one in self.parameters if id(one) in places]
        if len(found) == len(self._places):
            self._module, self._places = module, found
        elif any(is_fsdp1(one) for one in module.parameters()):
            raise fsdp1_refused()
        elif fsdp2_modules(module):
            raise ValueError(
                "ema: expected the parameters of the denoiser, got some that it had before "
                "fully_shard, or while they were gathered. Make the EMA of the module: "
                "EMA(denoiser)."
            )
        elif places:
            raise _other_parameters()

    def _follow(self, *, compare: bool) -> None:
        """The model may have been moved since, or an engine have taken it over."""
        if self._module is not None:
            reshard(self._module)
        before, self._storages = self._storages, [storage_of(one.parameter) for one in self._places]
        pairs = list(zip(before, self._storages, strict=True))
        taken = any(type(old) is not type(new) for old, new in pairs)
        if several_ranks() and (taken or (compare and not self._is_compared)):
            self._start_alike([i for i, old in enumerate(before) if isinstance(old, Whole)])
            self._is_compared = True
        if taken:
            self.shadow = [
                s if type(old) is type(new) else new.part(old.whole(s))
                for (old, new), s in zip(pairs, self.shadow, strict=True)
            ]
        self.shadow = [
            s.to(one.held().device) for s, one in zip(self.shadow, self._storages, strict=True)
        ]

    def _start_alike(self, whole: list[int]) -> None:
        """Averages that were whole on every rank: the first rank's, where they differ.

        Not where the weights themselves differ, which the ranks then train apart (tensor parallel).
        """
        shadows = [self.shadow[i] for i in whole]
        still = [i for i in whole if isinstance(self._storages[i], Whole)]
        differ = differ_between_ranks(shadows + [self._storages[i].held() for i in still])
        apart = {i for i, one in zip(still, differ[len(shadows) :], strict=True) if one}
        for i, one in zip(whole, differ, strict=False):
            storage = self._storages[i]
            if not one or i in apart:
                continue
            if isinstance(storage, Shard):
                raise RuntimeError(
                    "EMA: expected the same weights on every rank before fully_shard, got others, "
                    "and the averages are of those. Make the EMA after fully_shard (after "
                    "accelerator.prepare), or give all ranks one seed for the weights."
                )
            self.shadow[i] = self.shadow[i].to(storage.parameter.device)
            dist.broadcast(self.shadow[i], 0)


def _other_parameters() -> ValueError:
    return ValueError(
        "ema: expected an EMA of this denoiser's parameters, got one of others (a copy's?): its "
        "pass would be the student's own. Pass EMA(denoiser), or of parameters that it has."
    )
