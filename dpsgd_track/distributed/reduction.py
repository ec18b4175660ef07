"""Reduce-scatters clipped sums to the ranks that own the shards, micro-batch by micro-batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dpsgd_track.distributed.agreement import Agreement
from dpsgd_track.distributed.sample_exchange import (
    Formed,
    Matrix,
    SampleExchange,
    WeightedSums,
    code_of,
)
from dpsgd_track.distributed.sharding import (
    as_local,
    fsdp_units,
    trainable_parameters,
    transformer_blocks,
)

MAX_IN_FLIGHT = 2

# torch 2.13 renames the collective and warns on the old name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


Fill = Callable[[Sequence[Tensor]], None]
"""Writes this rank's unsharded gradients of a group, each as [W, elements of one rank's shard].
Elements past a gradient's end are left as they are."""


class GradientSharder(ABC):
    """Adds up unsharded local gradients over ranks, and keeps this rank's shard of each sum."""

    groups: list[list[str]]
    """Parameters that are reduced together, in the order in which they are best put."""
    packs = False
    """True if `pack` takes a whole group."""
    repeats_batches = False
    """True if one rank may run a batch again without the others."""
    num_copies = 1
    """Ranks that hold the same shard, one in each replica of the model."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        """This rank's shard of each sum so far, by parameter name, float32 or float64."""
        self._batch: dict[str, Tensor] = {}
        """The sums of a micro-batch that may still fail."""

    def left(self) -> list[list[str]]:
        """Groups that are still to be put in this micro-batch, in order."""
        return self.groups

    def offer(self, formed: Mapping[str, Formed], num_samples: int) -> SampleExchange | None:
        """Say what a backward that is about to run delivers. Collective: all ranks call it.

        Args:
            formed: the matrices whose per-sample gradients it delivers, by name.
            num_samples: this rank's samples.
        Returns:
            What takes the gradients of some of them as the backward runs; None if nothing does.
        """
        return None

    def put_sent(self, weight_B: Tensor, weighted_sums: WeightedSums) -> None:  # noqa: B027
        """Add sum_i w_i g_i over this rank's samples, of the gradients that an offer has taken."""

    @abstractmethod
    def put(self, gradients: dict[str, Tensor]) -> None:
        """Add this rank's gradients, in their unsharded shapes; each at most once per batch."""

    def pack(self, names: list[str], fill: Fill) -> None:
        """Add the group `names`, which is the next in order, as `fill` writes it."""
        raise NotImplementedError

    def start_with(self, groups: list[list[str]]) -> None:  # noqa: B027
        """Reduce these groups before the others, in a micro-batch in which nothing was put yet.

        All ranks call it with the same groups.
        """

    @abstractmethod
    def finish(self) -> None:
        """End a micro-batch; all ranks call it. A gradient that was not put counts as zeros."""

    def commit(self) -> None:
        """Add the finished micro-batch to the sums."""
        batch, self._batch = self._batch, {}
        _add_to(self.sums, batch)

    def discard(self) -> None:
        """Drop everything of a micro-batch that failed."""
        self._batch = {}

    @contextmanager
    def aside(self) -> Iterator[dict[str, Tensor]]:
        """Collect sums in the dict that is yielded, and leave those so far as they are."""
        sums, self.sums = self.sums, {}
        try:
            yield self.sums
        finally:
            self.sums = sums

    @abstractmethod
    def gradients_of(self, total: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """This rank's shards of the gradients of `total`, summed over ranks, by autograd."""

    @abstractmethod
    def reshard(self) -> None:
        """After a forward without a backward, reshard the parameters that it gathered."""

    @abstractmethod
    def keeping_root_gathered(self) -> AbstractContextManager[None]:
        """Context in which a backward leaves the root's parameters gathered for the next one."""


class LocalSharder(GradientSharder):
    """One device that holds every parameter unsharded."""

    repeats_batches = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.groups = list(_names_by_unit(model, transformer_blocks(model)).values())

    def put(self, gradients: dict[str, Tensor]) -> None:
        """Add gradients to the micro-batch's sums."""
        _add_to(self._batch, gradients)

    def finish(self) -> None:
        """Do nothing: nothing is in flight."""

    def gradients_of(self, total: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """The gradients of `total`."""
        if not total.requires_grad:
            return [None for _ in parameters]
        return list(torch.autograd.grad(total, parameters, allow_unused=True))

    def reshard(self) -> None:
        """Do nothing: nothing is gathered."""

    def keeping_root_gathered(self) -> AbstractContextManager[None]:
        """Change nothing: nothing is gathered."""
        return nullcontext()


def _add_to(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    repeated = [name for name in more if name in sums]
    if repeated:
        torch._foreach_add_([sums[n] for n in repeated], [more[n] for n in repeated])
    sums |= {name: total for name, total in more.items() if name not in sums}


class Fsdp2Sharder(GradientSharder):
    """Reduce-scatters gradients group by group, one group for each FSDP2 unit.

    All ranks reduce the groups in the same order, the model's last group first, whatever order the
    gradients come in; each group is in flight while the next is filled.
    """

    packs = True
    sends_samples: bool
    """True if per-sample gradients may be sent while a backward runs: on GPUs, where the transfer
    takes no time of the computation's."""
    max_bytes = 4
    """Most that is sent for each element of a gradient: what a reduction in float32 sends."""
    min_operations = 500_000_000_000
    """Operations of one product of a group from which on they are. With fewer the host decides how
    long a step takes, and a transfer takes more of its time than a reduction."""

    def __init__(self, model: nn.Module, late: Container[str] = ()) -> None:
        """
        Args:
            model: sharded already.
            late: parameters whose gradients arrive at the end of a backward. They are reduced
                with the root's.
        """
        super().__init__()
        self.model = model
        self._exchange: SampleExchange | None = None
        """Takes the per-sample gradients of this batch that are sent early."""
        self._pending: list[list[str]] = []
        """Groups that are still to be reduced in this batch, in order."""
        self.parameters = {n: _dtensor(n, p) for n, p in trainable_parameters(model).items()}
        mesh = next(iter(self.parameters.values())).device_mesh
        self.num_copies = mesh.shape[0] if mesh.ndim == 2 else 1
        names_of = _names_by_unit(model, fsdp_units(model)[1:])
        *inner, root = names_of.values()
        root += [name for names in inner for name in names if name in late]
        inner = [[name for name in names if name not in late] for names in inner]
        self.groups = [names for names in [*inner, root] if names]
        self._layouts: dict[tuple[str, ...], _Layout] = {}
        self.sends_samples = mesh.device_type == "cuda"
        self._mesh = mesh
        self._start_batch()

    @cached_property
    def _agreement(self) -> Agreement:
        return Agreement()

    @cached_property
    def _exchange_group(self) -> dist.ProcessGroup:
        """The ranks that share a copy of the model, with transfers beside those of FSDP2."""
        # All ranks make the groups of all copies.
        copies = self._mesh.mesh.view(-1, self._num_shards).tolist()
        groups = {tuple(ranks): dist.new_group(ranks) for ranks in copies}
        (own,) = (group for ranks, group in groups.items() if dist.get_rank() in ranks)
        assert own is not None
        return own

    @property
    def _num_shards(self) -> int:
        return self._mesh.shape[-1]

    def left(self) -> list[list[str]]:
        """Groups that are still to be reduced."""
        return list(self._pending)

    def offer(self, formed: Mapping[str, Formed], num_samples: int) -> SampleExchange | None:
        """Take the matrices of all groups but the root's, if all ranks have offered the same.

        What is not taken is reduced with the root's group.
        """
        if not self.sends_samples or self._num_shards == 1:
            return None
        *inner, _ = self.groups
        of_groups = [{n: formed[n] for n in names if n in formed} for names in inner]
        of_groups = [forms for forms in of_groups if forms]
        every = [form for forms in of_groups for form in forms.values()]
        operations = sum(form.num_operations for form in every)
        is_of_one_type = len({form.dtype for form in every}) == 1
        if not is_of_one_type or operations < self.min_operations * len(of_groups):
            of_groups = []
        taken = {name: form for forms in of_groups for name, form in forms.items()}
        code, group = code_of(taken), self._exchange_group
        largest = self._agreement.largest([num_samples, code, -code])

        def agree() -> int:
            most, highest, lowest = largest()
            num_bytes = most * max((form.dtype.itemsize for form in taken.values()), default=0)
            are_alike = bool(taken) and highest == -lowest
            return most if are_alike and num_bytes <= self.max_bytes else 0

        matrices = [
            [Matrix(name, self.parameters[name].shape, form) for name, form in forms.items()]
            for forms in of_groups
        ]
        device = next(iter(self.parameters.values())).device
        self._exchange = SampleExchange(matrices, device, group, agree)
        return self._exchange

    def put_sent(self, weight_B: Tensor, weighted_sums: WeightedSums) -> None:
        """Add the sums of the gradients that were sent."""
        if self._exchange is None or self._exchange.num_samples == 0:
            return
        replicas = _replicas_of(self._mesh)
        for name, total in self._exchange.sums(weight_B, weighted_sums):
            if replicas is not None:
                dist.all_reduce(total, group=replicas)
            _add_to(self._batch, {name: _local_rows(self.parameters[name], total.flatten())})
        taken = self._exchange
        self._pending = [[n for names in self.groups for n in names if not taken.takes(n)]]

    def put(self, gradients: dict[str, Tensor]) -> None:
        """Take gradients; start to reduce every group that is complete and next in order."""
        self._waiting |= gradients
        while self._pending and all(name in self._waiting for name in self._pending[0]):
            self._reduce(self._pending.pop(0))

    def finish(self) -> None:
        """Reduce the remaining groups, and wait for all of them."""
        for names in self._pending:
            self._reduce(names)
        for reduction in self._in_flight:
            _add_to(self._batch, reduction.finish())
        self._start_batch()

    def discard(self) -> None:
        """Drop everything of a micro-batch that failed, and have FSDP2 end its backward.

        A backward that raises leaves parameters gathered, and skips what FSDP2 does at its end,
        which every later backward would skip too.
        """
        super().discard()
        self._start_batch()
        assert isinstance(self.model, FSDPModule)
        state = self.model._get_fsdp_state()
        if state._state_ctx.post_backward_final_callback_queued:
            state._root_post_backward_final_callback()
        for unit in fsdp_units(self.model):
            unit.reshard()

    def gradients_of(self, total: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """This rank's shards of the gradients of `total`, as FSDP2 sums them over ranks."""
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
        """Reshard the root, which FSDP2 leaves gathered for a backward."""
        assert isinstance(self.model, FSDPModule)
        self.model.reshard()

    @contextmanager
    def keeping_root_gathered(self) -> Iterator[None]:
        """Have a backward leave the root's parameters gathered for the next one."""
        assert isinstance(self.model, FSDPModule)
        self.model.set_reshard_after_backward(False, recurse=False)
        try:
            yield
        finally:
            self.model.set_reshard_after_backward(True, recurse=False)

    def start_with(self, groups: list[list[str]]) -> None:
        """Reduce these groups before the others."""
        assert self._pending == self.groups
        self._pending = [*groups, *(names for names in self.groups if names not in groups)]

    def _start_batch(self) -> None:
        self._waiting: dict[str, Tensor] = {}
        self._in_flight: list[_Packed] = []
        self._pending = list(self.groups)
        self._exchange = None

    def pack(self, names: list[str], fill: Fill) -> None:
        """Reduce the group `names`, which is the next in order, as `fill` writes it."""
        assert self._pending[0] == names
        self._pending.pop(0)
        layout = self._layout_of(names)
        packed = torch.empty(layout.num_shards, sum(layout.widths), device=layout.device)
        columns = packed.split(layout.widths, dim=1)
        for column, parameter in zip(columns, layout.parameters.values(), strict=True):
            if parameter.shape[0] % layout.num_shards:
                column.zero_()
        fill(columns)
        self._start(_Packed(layout, packed))

    def _reduce(self, names: list[str]) -> None:
        layout = self._layout_of(names)
        unsharded = [
            self._waiting.pop(name)
            if name in self._waiting
            else torch.zeros(parameter.shape, device=layout.device)
            for name, parameter in layout.parameters.items()
        ]
        columns = [_padded_rows(gradient, layout.num_shards) for gradient in unsharded]
        self._start(_Packed(layout, torch.cat(columns, dim=1)))

    def _layout_of(self, names: list[str]) -> _Layout:
        key = tuple(names)
        if key not in self._layouts:
            self._layouts[key] = _Layout({name: self.parameters[name] for name in names})
        return self._layouts[key]

    def _start(self, reduction: _Packed) -> None:
        if len(self._in_flight) == MAX_IN_FLIGHT:
            _add_to(self._batch, self._in_flight.pop(0).finish())
        self._in_flight.append(reduction)


class _Layout:
    """The unsharded gradients of one group, packed into one tensor [num_shards, columns].

    Row r holds, for each parameter in turn, the rows of rank r's shard, padded to the largest
    shard. It is the same on all ranks.
    """

    def __init__(self, parameters: dict[str, DTensor]) -> None:
        self.parameters = parameters
        first = next(iter(parameters.values()))
        mesh = first.device_mesh
        self.device = first.device
        self.num_shards: int = mesh.shape[-1]
        self.shard_group: dist.ProcessGroup = mesh.get_group(mesh.ndim - 1)
        """Ranks that one copy of the parameters is sharded over."""
        self.replica_group = _replicas_of(mesh)
        """Ranks that hold the same shard."""
        shapes = [parameter.shape for parameter in parameters.values()]
        self.widths = [-(-shape[0] // self.num_shards) * shape[1:].numel() for shape in shapes]
        """Elements of the largest shard of each parameter."""


def _replicas_of(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    return mesh.get_group(0) if mesh.ndim == 2 else None


class _Packed:
    """One reduce-scatter of a group's gradients. Ranks may fill it in different ways."""

    def __init__(self, layout: _Layout, packed: Tensor) -> None:
        self.layout = layout
        self.shard = packed.new_empty(packed.shape[1])
        self.work = _reduce_scatter(
            self.shard, packed.view(-1), group=layout.shard_group, async_op=True
        )
        # The collective reads `packed` until it is done.
        self.packed: Tensor | None = packed

    def finish(self) -> dict[str, Tensor]:
        """Wait for the collective; returns this rank's shards of the sums."""
        assert self.work is not None
        self.work.wait()
        self.packed = None
        if self.layout.replica_group is not None:
            dist.all_reduce(self.shard, group=self.layout.replica_group)
        columns = self.shard.split(self.layout.widths)
        pairs = zip(self.layout.parameters.items(), columns, strict=True)
        return {name: _local_rows(parameter, column) for (name, parameter), column in pairs}


def _padded_rows(gradient: Tensor, num_shards: int) -> Tensor:
    """[rows, ...] as [num_shards, chunk * row], float32, zero rows added at the end."""
    rows = gradient.shape[0]
    chunk = -(-rows // num_shards)
    flat = gradient.float().reshape(rows, -1)
    if chunk * num_shards != rows:
        flat = torch.nn.functional.pad(flat, (0, 0, 0, chunk * num_shards - rows))
    return flat.reshape(num_shards, -1)


def _local_rows(parameter: DTensor, shard: Tensor) -> Tensor:
    """This rank's rows, without the padding of its shard."""
    shape = as_local(parameter).shape
    return shard[: shape.numel()].view(shape)


def _dtensor(name: str, tensor: Tensor) -> DTensor:
    if not isinstance(tensor, DTensor):
        raise ValueError(
            f"{name}: expected a parameter that fully_shard has sharded, got one that it ignores. "
            "Leave it out of ignored_params, or freeze it."
        )
    return tensor


def _names_by_unit(model: nn.Module, units: Sequence[object]) -> dict[str, list[str]]:
    """Trainable parameters of each unit, the last unit first, and at the end those of no unit."""
    fqn_of: dict[object, str] = {module: fqn for fqn, module in model.named_modules()}
    fqns = [fqn_of[unit] for unit in units]
    names_of: dict[str, list[str]] = {fqn: [] for fqn in [*reversed(fqns), ""]}
    innermost_first = sorted(fqns, key=len, reverse=True)
    for name in trainable_parameters(model):
        unit = next((fqn for fqn in innermost_first if name.startswith(fqn + ".")), "")
        names_of[unit].append(name)
    return names_of
