"""Reduce-scatters clipped sums to the ranks that own the shards, micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dpsgd_track.distributed.sharding import as_local, trainable_parameters, transformer_blocks

MAX_IN_FLIGHT = 2

# torch 2.13 renames the collective and warns on the old name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


Fill = Callable[[Sequence[Tensor]], None]
"""Writes this rank's whole gradients of a group, each as [W, elements of one rank's shard]. What is
beyond a gradient's end is left as it is."""


class GradientSharder(Protocol):
    """Adds up whole local gradients, and keeps what this rank holds of their sum."""

    sums: dict[str, Tensor]
    """This rank's part of each sum so far, by parameter name, float32 or float64."""
    groups: list[list[str]]
    """Parameters that go together, in the order in which they are best put."""
    packs: bool
    """Whether `pack` takes whole groups."""
    repeats_batches: bool
    """Whether one rank may run a batch again without the others."""
    num_copies: int
    """Ranks that hold the same shard, one in each replica of the model."""

    def put(self, gradients: dict[str, Tensor]) -> None:
        """Add this rank's gradients, in full shapes; each at most once per batch."""
        ...

    def pack(self, names: list[str], fill: Fill) -> None:
        """Add a whole group, which is next in turn, from where `fill` writes it."""
        ...

    def finish(self) -> None:
        """End of a micro-batch; all ranks call it. What was not put counts as zeros."""
        ...

    def commit(self) -> None:
        """Add the finished micro-batch to the sums."""
        ...

    def discard(self) -> None:
        """Forget everything of a micro-batch that failed."""
        ...

    def aside(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Within it, sums start from nothing and go into what is returned."""
        ...

    def gradients_of(self, total: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """This rank's part of the gradients of all ranks' `total`, by autograd."""
        ...

    def reshard(self) -> None:
        """After a forward without a backward, leave parameters as they were before it."""
        ...

    def keeping_root_gathered(self) -> AbstractContextManager[None]:
        """Within it, a backward leaves the root's parameters gathered for the next one."""
        ...


class _Sums:
    """The sums so far, and those of a micro-batch that may still fail."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._batch: dict[str, Tensor] = {}

    def commit(self) -> None:
        """Add the finished micro-batch to the sums."""
        batch, self._batch = self._batch, {}
        _add_to(self.sums, batch)

    def discard(self) -> None:
        """Forget everything of a micro-batch that failed."""
        self._batch = {}

    @contextmanager
    def aside(self) -> Iterator[dict[str, Tensor]]:
        """Within it, sums start from nothing and go into what is returned."""
        sums, self.sums = self.sums, {}
        try:
            yield self.sums
        finally:
            self.sums = sums


class LocalSharder(_Sums):
    """One device holds everything."""

    packs = False
    repeats_batches = True
    num_copies = 1

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.groups = list(_names_by_unit(model, transformer_blocks(model)).values())

    def put(self, gradients: dict[str, Tensor]) -> None:
        """Add to the micro-batch's sums."""
        _add_to(self._batch, gradients)

    def pack(self, names: list[str], fill: Fill) -> None:
        """Nothing is packed."""
        raise NotImplementedError

    def finish(self) -> None:
        """Nothing is on its way."""

    def gradients_of(self, total: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """The gradients of `total`."""
        if not total.requires_grad:
            return [None for _ in parameters]
        return list(torch.autograd.grad(total, parameters, allow_unused=True))

    def reshard(self) -> None:
        """Nothing is gathered."""

    def keeping_root_gathered(self) -> AbstractContextManager[None]:
        """Nothing is gathered."""
        return nullcontext()


def _add_to(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    again = [name for name in more if name in sums]
    if again:
        torch._foreach_add_([sums[n] for n in again], [more[n] for n in again])
    sums |= {name: total for name, total in more.items() if name not in sums}


class Fsdp2Sharder(_Sums):
    """Reduces gradients group by group, one group for each FSDP2 unit.

    All ranks reduce the groups in the same order, the last of the model first, whatever order the
    gradients come in; each group is on its way while the next is filled.
    """

    packs = True
    repeats_batches = False

    def __init__(self, model: nn.Module, late: Container[str] = ()) -> None:
        """
        Args:
            model: sharded already.
            late: parameters whose gradients come at the end of a backward. They go with the root's.
        """
        super().__init__()
        self.model = model
        self.parameters = {n: _dtensor(n, p) for n, p in trainable_parameters(model).items()}
        mesh = next(iter(self.parameters.values())).device_mesh
        self.num_copies = mesh.shape[0] if mesh.ndim == 2 else 1
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        names_of = _names_by_unit(model, units[1:])
        *inner, root = names_of.values()
        root += [name for names in inner for name in names if name in late]
        inner = [[name for name in names if name not in late] for names in inner]
        self.groups = [names for names in [*inner, root] if names]
        self._start_batch()

    def put(self, gradients: dict[str, Tensor]) -> None:
        """Take gradients; start reducing every group that is complete and next in turn."""
        self._waiting |= gradients
        while self._to_do and all(name in self._waiting for name in self._to_do[0]):
            self._reduce(self._to_do.pop(0))

    def finish(self) -> None:
        """Reduce the groups that are left, and wait for all."""
        for names in self._to_do:
            self._reduce(names)
        for reduction in self._in_flight:
            _add_to(self._batch, reduction.finish())
        self._start_batch()

    def discard(self) -> None:
        """Forget everything of a micro-batch that failed, and have FSDP2 end its backward.

        A backward that raises leaves parameters gathered, and what FSDP2 does at its end undone for
        all that follow.
        """
        super().discard()
        self._start_batch()
        assert isinstance(self.model, FSDPModule)
        state = self.model._get_fsdp_state()
        if state._state_ctx.post_backward_final_callback_queued:
            state._root_post_backward_final_callback()
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def gradients_of(self, total: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """This rank's part of the gradients of all ranks' `total`, as FSDP2 reduces them."""
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            total.backward()
            return [None if p.grad is None else as_local(p.grad) for p in parameters]
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

    def reshard(self) -> None:
        """The root, which FSDP2 leaves gathered for a backward."""
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()

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
        self._in_flight: list[_Packed] = []
        self._to_do = list(self.groups)

    def pack(self, names: list[str], fill: Fill) -> None:
        """Reduce a whole group, which is next in turn, from where `fill` writes it."""
        assert self._to_do[0] == names
        self._to_do.pop(0)
        self._start(_Packed({name: self.parameters[name] for name in names}, fill))

    def _reduce(self, names: list[str]) -> None:
        parameters = {name: self.parameters[name] for name in names}
        whole = {
            name: self._waiting.pop(name)
            if name in self._waiting
            else torch.zeros(parameter.shape, device=parameter.device)
            for name, parameter in parameters.items()
        }
        world_size = dist.get_world_size(_shard_group(parameters))

        def fill(columns: Sequence[Tensor]) -> None:
            for column, gradient in zip(columns, whole.values(), strict=True):
                column.copy_(_padded_rows(gradient, world_size))

        self._start(_Packed(parameters, fill))

    def _start(self, reduction: _Packed) -> None:
        if len(self._in_flight) == MAX_IN_FLIGHT:
            _add_to(self._batch, self._in_flight.pop(0).finish())
        self._in_flight.append(reduction)


def _shard_group(parameters: dict[str, DTensor]) -> dist.ProcessGroup:
    """Ranks that share one copy of the parameters."""
    mesh = next(iter(parameters.values())).device_mesh
    return mesh.get_group(mesh.ndim - 1)


class _Packed:
    """One reduce-scatter of several whole gradients, written into one tensor.

    That is laid out as [W, columns]: row r holds, for each parameter in turn, the rows of rank r's
    shard, padded to the largest shard. Ranks may write it in different ways, as a rank without
    samples does; what they send is laid out alike.
    """

    def __init__(self, parameters: dict[str, DTensor], fill: Fill) -> None:
        self.parameters = parameters
        self.mesh = next(iter(parameters.values())).device_mesh
        world_size = self.mesh.shape[-1]
        shapes = [parameter.shape for parameter in parameters.values()]
        self.widths = [-(-shape[0] // world_size) * shape[1:].numel() for shape in shapes]
        device = next(iter(parameters.values())).device
        packed = torch.empty(world_size, sum(self.widths), device=device)
        columns = packed.split(self.widths, dim=1)
        for column, shape in zip(columns, shapes, strict=True):
            if shape[0] % world_size:
                column.zero_()
        fill(columns)
        self.shard = packed.new_empty(packed.shape[1])
        self.work = _reduce_scatter(
            self.shard, packed.view(-1), group=_shard_group(parameters), async_op=True
        )
        # The collective reads `packed` until it is done.
        self.packed: Tensor | None = packed

    def finish(self) -> dict[str, Tensor]:
        """Wait; this rank's shards of the sums."""
        assert self.work is not None
        self.work.wait()
        self.packed = None
        if self.mesh.ndim == 2:
            dist.all_reduce(self.shard, group=self.mesh.get_group(0))
        columns = self.shard.split(self.widths)
        pairs = zip(self.parameters.items(), columns, strict=True)
        return {name: _local_rows(parameter, column) for (name, parameter), column in pairs}


def _padded_rows(gradient: Tensor, world_size: int) -> Tensor:
    """[rows, ...] as [W, chunk * row], float32, zero rows added at the end."""
    rows = gradient.shape[0]
    chunk = -(-rows // world_size)
    flat = gradient.float().reshape(rows, -1)
    if chunk * world_size != rows:
        flat = torch.nn.functional.pad(flat, (0, 0, 0, chunk * world_size - rows))
    return flat.reshape(world_size, -1)


def _local_rows(parameter: DTensor, shard: Tensor) -> Tensor:
    """The rows that this rank holds, of a shard that may be padded."""
    shape = as_local(parameter).shape
    return shard[: shape.numel()].view(shape)


def _dtensor(name: str, tensor: Tensor) -> DTensor:
    if not isinstance(tensor, DTensor):
        raise ValueError(
            f"{name}: expected a parameter that fully_shard has sharded, got one that it ignores. "
            "Leave it out of ignored_params, or freeze it."
        )
    return tensor


def _names_by_unit(model: nn.Module, units: Sequence[nn.Module]) -> dict[str, list[str]]:
    """Trainable parameters of each unit, the last unit first, and at the end what is in none."""
    fqn_of = {module: fqn for fqn, module in model.named_modules()}
    fqns = [fqn_of[unit] for unit in units]
    names_of: dict[str, list[str]] = {fqn: [] for fqn in [*reversed(fqns), ""]}
    innermost_first = sorted(fqns, key=len, reverse=True)
    for name in trainable_parameters(model):
        unit = next((fqn for fqn in innermost_first if name.startswith(fqn + ".")), "")
        names_of[unit].append(name)
    return names_of
