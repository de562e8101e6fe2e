"""How the training engine holds a parameter, and how other values take its place for a pass.

One process, DDP and ZeRO-1/2 hold it whole. FSDP2 (`fully_shard`) holds a shard of it, a DTensor,
and ZeRO-3 a flat partition; both gather it for each pass. What a rank holds is what its EMA keeps.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch import distributed as dist


@runtime_checkable
class Storage(Protocol):
    """One parameter, as the engine holds it."""

    parameter: nn.Parameter

    @property
    def shape(self) -> torch.Size:
        """Of the whole parameter."""

    def held(self) -> Tensor:
        """The values that this rank holds, without gradient."""

    def put(self, values: Tensor) -> Tensor:
        """Let the passes that follow use `values`; returns what `put_back` takes."""

    def put_back(self, own: Tensor) -> None: ...

    def whole(self, held: Tensor) -> Tensor:
        """The whole of what the ranks hold a part each of. Every rank calls it."""

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of the whole. Every rank calls it."""


class Whole:
    """One process, DDP, ZeRO-1 and ZeRO-2. Data pointers are exchanged, nothing is copied."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    def held(self) -> Tensor:
        return self.parameter.detach()

    def put(self, values: Tensor) -> Tensor:
        own = self.parameter.data
        self.parameter.data = values.to(own.dtype)
        return own

    def put_back(self, own: Tensor) -> None:
        self.parameter.data = own

    def whole(self, held: Tensor) -> Tensor:
        return held

    def part(self, whole: Tensor) -> Tensor:
        return whole


class Shard:
    """FSDP2. It gathers from memory of its own, so the values are copied into that.

    `.data` keeps the version counters as they are: a graph from before can still be run backward.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter: Any = parameter  # a DTensor

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    @torch.no_grad()
    def held(self) -> Tensor:
        return self.parameter.to_local()

    def put(self, values: Tensor) -> Tensor:
        own = self.held().clone()
        self.held().data.copy_(values)
        return own

    def put_back(self, own: Tensor) -> None:
        self.held().data.copy_(own)

    def whole(self, held: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        mesh = self.parameter.device_mesh
        return DTensor.from_local(
            held.to(mesh.device_type),
            mesh,
            self.parameter.placements,
            run_check=False,
            shape=self.parameter.shape,
            stride=self.parameter.stride(),
        ).full_tensor()

    def part(self, whole: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        mesh = self.parameter.device_mesh
        sharded = distribute_tensor(whole.to(mesh.device_type), mesh, self.parameter.placements)
        return sharded.to_local()


class Partition:
    """ZeRO-3. `parameter.ds_tensor` is this rank's part of the flattened, padded values."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter: Any = parameter
        place = parameter.ds_tensor.final_location  # type: ignore[attr-defined]
        if getattr(place, "value", place) == "nvme":
            raise ValueError(
                "parameters: expected ZeRO-3 without NVMe, got parameters offloaded to it, whose "
                "values cannot be exchanged. Offload them to the CPU instead."
            )
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            raise ValueError(
                "parameters: expected plain ZeRO-3, got ZeRO++'s secondary partitions, whose "
                "values cannot be exchanged. Set zero_hpz_partition_size to 1."
            )

    @property
    def shape(self) -> torch.Size:
        return self.parameter.ds_shape

    def held(self) -> Tensor:
        return self.parameter.ds_tensor.detach()

    def put(self, values: Tensor) -> Tensor:
        self._release()
        own = self.parameter.ds_tensor.data
        self.parameter.ds_tensor.data = values.to(own)
        return own

    def put_back(self, own: Tensor) -> None:
        self._release()
        self.parameter.ds_tensor.data = own

    def whole(self, held: Tensor) -> Tensor:
        group = self.parameter.ds_process_group
        held = held.to(self.parameter.device)
        parts = [torch.empty_like(held) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, held, group=group)
        return torch.cat(parts)[: self.shape.numel()].view(self.shape)

    def part(self, whole: Tensor) -> Tensor:
        size = self.parameter.ds_tensor.numel()
        start = size * dist.get_rank(self.parameter.ds_process_group)
        held = whole.new_zeros(size)
        values = whole.flatten()[start : start + size]
        held[: len(values)] = values
        return held.to(self.parameter.ds_tensor.device)

    def _release(self) -> None:
        """What was gathered (small parameters stay so between passes) is gathered anew."""
        if self.parameter.ds_status.name == "AVAILABLE":
            self.parameter.partition()


def storage_of(parameter: nn.Parameter) -> Storage:
    """How the engine holds the parameter now.

    Raises:
        ValueError: FSDP1, or a form of ZeRO-3 whose values cannot be exchanged.
    """
    if is_fsdp1(parameter):
        raise fsdp1_refused()
    if is_partitioned(parameter):
        return Partition(parameter)
    return Shard(parameter) if hasattr(parameter, "to_local") else Whole(parameter)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """By ZeRO-3."""
    return getattr(parameter, "ds_tensor", None) is not None


def is_fsdp1(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_fsdp_flattened", False)


def fsdp1_refused() -> ValueError:
    return ValueError(
        "parameters: expected FSDP2 or whole parameters, got FSDP1's (FullyShardedDataParallel), "
        "which keeps weights in a flat copy of its own: the EMA pass would run the student, or "
        "overwrite it. Use FSDP2: torch's fully_shard, or fsdp_version: 2 in accelerate."
    )


class Place(NamedTuple):
    """Where a module keeps a parameter. Engines put others in its place (FSDP2, at each pass)."""

    owner: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self.owner._parameters.get(self.name)
        if parameter is None:  # FSDP1 with use_orig_params=False leaves a view of its flat copy
            raise fsdp1_refused()
        return parameter


def places_of(module: nn.Module) -> list[Place]:
    """The module's parameters, each once, as FSDP2 shards them."""
    reshard(module)
    places: dict[int, Place] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), Place(owner, name))
    return list(places.values())


def holding(parameters: Iterable[nn.Parameter]) -> nn.Module:
    """A module that has these parameters, and nothing to run."""
    module = nn.Module()
    module._parameters.update({str(i): one for i, one in enumerate(parameters)})
    return module


def reshard(module: nn.Module) -> None:
    """FSDP2 forgets what it has gathered, and gathers the shards anew for the next pass."""
    for one in fsdp2_modules(module):
        one.reshard()


def fsdp2_modules(module: nn.Module) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [one for one in module.modules() if isinstance(one, FSDPModule)]


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def differ_between_ranks(tensors: Sequence[Tensor]) -> list[bool]:
    """Which tensors differ from rank to rank, by their sums and norms. Every rank calls it."""

    def prints() -> Iterator[tuple[float, float]]:
        for one in tensors:
            norm = torch.linalg.vector_norm(one, dtype=torch.float64)
            yield float(one.sum(dtype=torch.float64)), float(norm)

    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, list(prints()))
    return [any(rank[i] != ranks[0][i] for rank in ranks) for i in range(len(tensors))]
