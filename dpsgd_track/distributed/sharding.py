"""FSDP2 sharding by transformer block, and the way of hand-made gradients into the shards.

FSDP2 shards every parameter along dimension 0 in chunks of ceil(rows / W); the last ranks may
hold fewer rows, or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

MAX_BUCKETS_IN_FLIGHT = 2

# torch 2.13 renames the collective and warns on the old name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class GradientSharder(Protocol):
    """Adds whole local gradients into the shards of `.grad`, summed over ranks."""

    def add(self, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """Consume (parameter name, this rank's gradient in the parameter's full shape)."""
        ...

    def keeping_root_gathered(self) -> AbstractContextManager[None]:
        """Within it, a backward leaves the root's parameters gathered for the next one."""
        ...


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of `model`: members of its outermost lists of like modules."""
    blocks: list[nn.Module] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            members = list(child) if isinstance(child, nn.ModuleList) else []
            if len({type(m) for m in members}) == 1 and any(True for _ in child.parameters()):
                blocks.extend(members)
            else:
                visit(child)

    visit(model)
    return blocks


def mixed_precision(param_dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Compute in `param_dtype`, reduce in float32; master weights stay float32."""
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)


def shard_fsdp2(model: nn.Module, mesh: DeviceMesh, param_dtype: torch.dtype) -> None:
    """Shard each transformer block and the root, in place; gradients are summed over ranks."""
    policy = mixed_precision(param_dtype)
    for block in transformer_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A clipped sum is a sum: FSDP2's default divides by the number of ranks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


@dataclass(frozen=True)
class LocalPart:
    """What this rank holds of one parameter-shaped tensor."""

    name: str
    local: Tensor
    """This rank's rows."""
    start: int
    """Flat index, in the whole tensor, of the first element held."""
    num_elements: int
    """Elements of the whole tensor."""

    @property
    def stop(self) -> int:
        """Flat index after the last element held."""
        return self.start + self.local.numel()


def row_range(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Rows [start, stop) of dimension 0 that FSDP2 gives to `rank`."""
    chunk = -(-num_rows // world_size)
    return min(rank * chunk, num_rows), min((rank + 1) * chunk, num_rows)


def local_part(name: str, parameter: Tensor, tensor: Tensor) -> LocalPart:
    """This rank's part of `tensor`, which is laid out as `parameter` is.

    Raises:
        ValueError: the parameter is a DTensor that FSDP2's default placement did not make.
    """
    if not isinstance(parameter, DTensor):
        return LocalPart(name, tensor, 0, parameter.numel())
    placement = parameter.placements[0]
    if parameter.device_mesh.ndim != 1 or not placement.is_shard(0):
        raise ValueError(
            f"{name}: expected one mesh dimension sharded along rows, got {parameter.placements}."
        )
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    mesh = parameter.device_mesh
    first_row, _ = row_range(parameter.shape[0], mesh.get_local_rank(), mesh.size())
    row_elements = parameter.numel() // max(parameter.shape[0], 1)
    return LocalPart(name, local, first_row * row_elements, parameter.numel())


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by fully qualified name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Fsdp2Sharder:
    """Reduces hand-made gradients bucket by bucket, one bucket for each FSDP2 unit."""

    def __init__(self, model: nn.Module) -> None:
        """`model` is sharded already."""
        self.model = model
        self.parameters = trainable_parameters(model)
        self.unit_of = _units(model)

    def add(self, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """Sum over ranks and add to this rank's shards, overlapping with the producer."""
        in_flight: list[_Bucket] = []
        for names, whole in _by_unit(gradients, self.unit_of):
            in_flight.append(_Bucket([self.parameters[name] for name in names], whole))
            del whole
            if len(in_flight) == MAX_BUCKETS_IN_FLIGHT:
                in_flight.pop(0).finish()
        for bucket in in_flight:
            bucket.finish()

    @contextmanager
    def keeping_root_gathered(self) -> Iterator[None]:
        """Within it, a backward leaves the root's parameters gathered for the next one."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_reshard_after_backward(False, recurse=False)
        try:
            yield
        finally:
            self.model.set_reshard_after_backward(True, recurse=False)


class _Bucket:
    """One reduce-scatter of several whole gradients.

    The input is laid out as [W, columns]: row r holds, for each parameter in turn, the rows of
    rank r's shard, padded to the largest shard.
    """

    def __init__(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
        self.parameters = parameters
        mesh = _dtensor(parameters[0]).device_mesh
        world_size, self.rank = mesh.size(), mesh.get_local_rank()
        self.world_size = world_size
        padded = [_padded_rows(gradient, world_size) for gradient in gradients]
        self.widths = [p.shape[1] for p in padded]
        packed = torch.cat(padded, dim=1)
        self.shard = packed.new_empty(packed.shape[1])
        self.work = _reduce_scatter(
            self.shard, packed.view(-1), group=mesh.get_group(), async_op=True
        )
        # The collective reads `packed` until it is done.
        self.packed: Tensor | None = packed

    def finish(self) -> None:
        """Wait, then add the shards to `.grad`."""
        assert self.work is not None
        self.work.wait()
        self.packed = None
        for parameter, columns in zip(self.parameters, self.shard.split(self.widths), strict=True):
            sharded = _dtensor(parameter)
            local_shape = sharded.to_local().shape
            local = columns[: local_shape.numel()].view(local_shape).to(sharded.dtype)
            if parameter.grad is None:
                parameter.grad = as_sharded(local.clone(), sharded)
            else:
                _dtensor(parameter.grad).to_local().add_(local)


def as_sharded(local: Tensor, like: DTensor) -> DTensor:
    """`local` rows as a DTensor laid out as `like`."""
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _padded_rows(gradient: Tensor, world_size: int) -> Tensor:
    """[rows, ...] as [W, chunk * row], float32, zero rows added at the end."""
    rows = gradient.shape[0]
    chunk = -(-rows // world_size)
    flat = gradient.reshape(rows, -1).float()
    if chunk * world_size != rows:
        flat = torch.nn.functional.pad(flat, (0, 0, 0, chunk * world_size - rows))
    return flat.reshape(world_size, -1)


def _dtensor(tensor: Tensor) -> DTensor:
    assert isinstance(tensor, DTensor)
    return tensor


def _units(model: nn.Module) -> dict[str, str]:
    """The FSDP2 unit that each parameter belongs to, by fully qualified name."""
    units = [fqn for fqn, module in model.named_modules() if isinstance(module, FSDPModule)]
    longest_first = sorted(units, key=len, reverse=True)
    return {
        name: next(u for u in longest_first if u == "" or name.startswith(u + "."))
        for name, _ in model.named_parameters()
    }


def _by_unit(
    gradients: Iterable[tuple[str, Tensor]], unit_of: dict[str, str]
) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Runs of neighbouring gradients of one unit."""
    names: list[str] = []
    whole: list[Tensor] = []
    for name, gradient in gradients:
        if names and unit_of[names[-1]] != unit_of[name]:
            yield names, whole
            names, whole = [], []
        names.append(name)
        whole.append(gradient)
        del gradient
    if names:
        yield names, whole
