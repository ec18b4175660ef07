"""The way of hand-made gradients to the ranks that hold the parameters, summed over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dpsgd_track.distributed.sharding import trainable_parameters

MAX_BUCKETS_IN_FLIGHT = 2

# torch 2.13 renames the collective and warns on the old name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class GradientSharder(Protocol):
    """Adds up whole local gradients, and keeps what this rank holds of their sum."""

    sums: dict[str, Tensor]
    """This rank's part of each sum so far, by parameter name, float32 or float64."""

    def put(self, name: str, gradient: Tensor) -> None:
        """Add this rank's gradient, in the parameter's full shape; at most once per batch."""
        ...

    def finish(self) -> None:
        """End of a micro-batch; all ranks call it. What was not put counts as zeros."""
        ...

    def keeping_root_gathered(self) -> AbstractContextManager[None]:
        """Within it, a backward leaves the root's parameters gathered for the next one."""
        ...


class LocalSharder:
    """One device holds everything."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def put(self, name: str, gradient: Tensor) -> None:
        """Add to the sum."""
        if name in self.sums:
            self.sums[name] += gradient
        else:
            self.sums[name] = gradient

    def finish(self) -> None:
        """Nothing is on its way."""

    def keeping_root_gathered(self) -> AbstractContextManager[None]:
        """Nothing is gathered."""
        return nullcontext()


class Fsdp2Sharder:
    """Reduces gradients bucket by bucket, one bucket for each FSDP2 unit.

    All ranks reduce the units in the same order, the last of the model first, whatever order the
    gradients come in; each bucket is on its way while the next is filled.
    """

    def __init__(self, model: nn.Module) -> None:
        """`model` is sharded already."""
        self.model = model
        self.sums: dict[str, Tensor] = {}
        self.parameters = trainable_parameters(model)
        self.names_of = _names_by_unit(model)
        self._start_batch()

    def put(self, name: str, gradient: Tensor) -> None:
        """Take a gradient; start reducing every unit that is complete and next in turn."""
        self._waiting[name] = gradient
        while self._units and all(n in self._waiting for n in self.names_of[self._units[0]]):
            self._reduce(self._units.pop(0))

    def finish(self) -> None:
        """Reduce the units that are left, and wait for all."""
        for unit in self._units:
            self._reduce(unit)
        for bucket in self._in_flight:
            bucket.finish(self.sums)
        self._start_batch()

    @contextmanager
    def keeping_root_gathered(self) -> Iterator[None]:
        """Within it, a backward leaves the root's parameters gathered for the next one."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_reshard_after_backward(False, recurse=False)
        try:
            yield
        finally:
            self.model.set_reshard_after_backward(True, recurse=False)

    def _start_batch(self) -> None:
        self._waiting: dict[str, Tensor] = {}
        self._in_flight: list[_Bucket] = []
        self._units = list(self.names_of)

    def _reduce(self, unit: str) -> None:
        names = self.names_of[unit]
        whole = [self._waiting.pop(name, None) for name in names]
        if len(self._in_flight) == MAX_BUCKETS_IN_FLIGHT:
            self._in_flight.pop(0).finish(self.sums)
        self._in_flight.append(_Bucket({n: self.parameters[n] for n in names}, whole))


class _Bucket:
    """One reduce-scatter of several whole gradients.

    The input is laid out as [W, columns]: row r holds, for each parameter in turn, the rows of
    rank r's shard, padded to the largest shard.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], gradients: list[Tensor | None]) -> None:
        self.parameters = {name: _dtensor(p) for name, p in parameters.items()}
        self.mesh = next(iter(self.parameters.values())).device_mesh
        world_size = self.mesh.shape[-1]
        padded = [
            _padded_rows(torch.zeros(p.shape, device=p.device) if g is None else g, world_size)
            for p, g in zip(self.parameters.values(), gradients, strict=True)
        ]
        self.widths = [p.shape[1] for p in padded]
        packed = torch.cat(padded, dim=1)
        self.shard = packed.new_empty(packed.shape[1])
        self.work = _reduce_scatter(
            self.shard,
            packed.view(-1),
            group=self.mesh.get_group(self.mesh.ndim - 1),
            async_op=True,
        )
        # The collective reads `packed` until it is done.
        self.packed: Tensor | None = packed

    def finish(self, sums: dict[str, Tensor]) -> None:
        """Wait, then add the shards to `sums`."""
        assert self.work is not None
        self.work.wait()
        self.packed = None
        if self.mesh.ndim == 2:
            dist.all_reduce(self.shard, group=self.mesh.get_group(0))
        columns = self.shard.split(self.widths)
        for (name, parameter), column in zip(self.parameters.items(), columns, strict=True):
            shape = parameter.to_local().shape
            local = column[: shape.numel()].view(shape)
            if name in sums:
                sums[name] += local
            else:
                # A copy, so that the bucket does not outlive its smallest part.
                sums[name] = local.clone()


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


def _names_by_unit(model: nn.Module) -> dict[str, list[str]]:
    """Trainable parameters of each FSDP2 unit, the last unit first, the root's at the end."""
    units = [fqn for fqn, module in model.named_modules() if isinstance(module, FSDPModule)]
    names_of: dict[str, list[str]] = {unit: [] for unit in [*reversed(units[1:]), units[0]]}
    innermost_first = sorted(units, key=len, reverse=True)
    for name in trainable_parameters(model):
        unit = next(u for u in innermost_first if u == "" or name.startswith(u + "."))
        names_of[unit].append(name)
    return {unit: names for unit, names in names_of.items() if names}
