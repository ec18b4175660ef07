"""Sends per-sample gradients to the ranks that own their shards, while the backward still runs.

A rank's clipped sum cannot be reduced before its samples' norms are known: after the backward, when
no computation is left to hide the transfer behind. Per-sample gradients can be sent as soon as they
are formed. Their owner weighs and sums them once the clip factors are known. That takes B times the
elements of one gradient in their own type, where a reduction takes one in float32, so that it pays
for few samples in 16 bits.

Shapes: W ranks that share a copy of the model, B samples of the rank that has the most.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

WeightedSums = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
"""Takes gradients [samples, rows, columns] and weights [samples] of each of several matrices, and
returns sum_i w_i g_i of each; see `kernels.weighted_sum`."""

MAX_IN_FLIGHT = 2
MAX_TRANSFERS = 12
"""Transfers of a micro-batch. Each takes some time of the host; the last has nothing to hide it."""

# torch 2.13 renames the collective and warns on the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Formed:
    """The form in which a backward delivers the per-sample gradients of a matrix."""

    dtype: torch.dtype
    is_transposed: bool
    """True if [B, rows, columns] is [B, columns, rows] in memory."""
    num_operations: int
    """Operations of the product that they are formed by."""

    @classmethod
    def by_product(cls, like: Tensor, num_positions: int, *, is_transposed: bool) -> Formed:
        """Gradients of the shape and type of `like`, summed over T positions by one product."""
        return cls(like.dtype, is_transposed, 2 * num_positions * like.numel())


@dataclass(frozen=True)
class Matrix:
    """A parameter of two dimensions, sharded by rows, whose gradients are sent."""

    name: str
    shape: torch.Size
    """[rows, columns]"""
    formed: Formed

    def shard_shape(self, num_shards: int) -> tuple[int, int]:
        """The largest shard's shape in memory."""
        num_rows, num_columns = self.shape
        shape = -(-num_rows // num_shards), num_columns
        return shape[::-1] if self.formed.is_transposed else shape

    def as_rows(self, shards: Tensor) -> Tensor:
        """Shards [..., elements] as [..., rows, columns]."""
        return shards.mT if self.formed.is_transposed else shards

    def copies(self, grad_B: Tensor, to: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Places in shards [W, B, elements], each with what of [B, rows, columns] goes there."""
        num_shards = len(to)
        to_rows = self.as_rows(to.unflatten(2, self.shard_shape(num_shards)))
        if self.shape[0] % num_shards == 0:
            yield to_rows, grad_B.unflatten(1, (num_shards, -1)).transpose(0, 1)
            return
        for place, rows in zip(to_rows, grad_B.split(to_rows.shape[2], dim=1), strict=False):
            yield place[:, : rows.shape[1]], rows


def code_of(formed: Mapping[str, Formed]) -> int:
    """A number that is equal on ranks whose backwards form the same gradients in the same form."""
    text = ";".join(
        f"{name} {formed[name].dtype} {formed[name].is_transposed}" for name in sorted(formed)
    )
    return zlib.crc32(text.encode())


class SampleExchange:
    """The per-sample gradients of one micro-batch that are sent early, transfer by transfer.

    All ranks make the same transfers in the same order, whatever order the gradients come in.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Matrix]],
        device: torch.device,
        group: dist.ProcessGroup,
        agree: Callable[[], int],
    ) -> None:
        """
        Args:
            groups: matrices whose gradients come together, in order, all of one type.
            device: device of the gradients.
            group: the ranks that share a copy of the model.
            agree: waits for all ranks; returns B, or 0 if some do not take part.
        """
        size = max(1, -(-len(groups) // MAX_TRANSFERS))
        self._transfers = [
            [matrix for group in groups[first : first + size] for matrix in group]
            for first in range(0, len(groups), size)
        ]
        self._device, self._agree = device, agree
        self._group, self._num_shards = group, dist.get_world_size(group)
        self._place = {m.name: n for n, every in enumerate(self._transfers) for m in every}
        self._given: dict[str, Tensor] = {}
        self._unsent = list(self._transfers)
        self._in_flight: list[_Sent] = []
        self._received: list[Tensor] = []
        """[W B, elements of one rank's shards] of each transfer."""

    @cached_property
    def num_samples(self) -> int:
        """B; 0 if some rank does not take part, so that nothing is sent."""
        return self._agree()

    def takes(self, name: str) -> bool:
        """True if the gradients of a parameter are to be given."""
        return name in self._place and self.num_samples > 0

    def may_take(self, name: str) -> bool:
        """True if they are unless some rank does not take part."""
        return name in self._place

    def give(self, name: str, grad_B: Tensor) -> dict[str, Tensor]:
        """Take the per-sample gradients [up to B, rows, columns] of a parameter.

        Returns:
            Those of its whole transfer, if they are the last of it; otherwise nothing.
        """
        self._given[name] = grad_B
        names = [matrix.name for matrix in self._transfers[self._place[name]]]
        is_whole = all(other in self._given for other in names)
        return {other: self._given[other] for other in names} if is_whole else {}

    def unsent(self) -> dict[str, Tensor]:
        """Gradients that were given and belong to transfers that are not whole."""
        return {
            matrix.name: self._given[matrix.name]
            for matrices in self._unsent
            if any(matrix.name not in self._given for matrix in matrices)
            for matrix in matrices
            if matrix.name in self._given
        }

    def send(self, *, is_last: bool = False) -> None:
        """Make every transfer that is whole and next in order; at last, all others.

        Gradients that were not given count as zeros.
        """
        while self._unsent:
            matrices = self._unsent[0]
            if not is_last and any(matrix.name not in self._given for matrix in matrices):
                return
            del self._unsent[0]
            if len(self._in_flight) == MAX_IN_FLIGHT:
                self._received.append(self._in_flight.pop(0).finish())
            self._in_flight.append(_Sent(self._packed(matrices), self._group))

    def sums(self, weight_B: Tensor, weighted_sums: WeightedSums) -> Iterator[tuple[str, Tensor]]:
        """This rank's shard of sum_i w_i g_i over the samples of all ranks, for each parameter.

        Each is [rows, columns] of the largest shard, float32. Collective: all ranks call it.

        Args:
            weight_B: weights of this rank's samples. A sample of weight 0 adds nothing.
        """
        self.send(is_last=True)
        own = weight_B.new_zeros(self.num_samples)
        own[: len(weight_B)] = weight_B
        weights = own.new_empty(self._num_shards * self.num_samples)
        _all_gather(weights, own, group=self._group)
        self._received += [sent.finish() for sent in self._in_flight]
        self._in_flight = []
        for matrices in self._transfers:
            # Freed one by one, as the sums take their place.
            received = self._received.pop(0)
            shapes = [matrix.shard_shape(self._num_shards) for matrix in matrices]
            columns = received.split([a * b for a, b in shapes], dim=1)
            grads = [
                matrix.as_rows(column.unflatten(1, shape))
                for matrix, shape, column in zip(matrices, shapes, columns, strict=True)
            ]
            del received, columns
            totals = weighted_sums(grads, [weights] * len(grads))
            del grads
            yield from zip((matrix.name for matrix in matrices), totals, strict=True)

    def _packed(self, matrices: Sequence[Matrix]) -> Tensor:
        """Shards of all gradients of a transfer side by side, [W, B, elements of one's shards]."""
        grads = {m.name: self._given.pop(m.name) for m in matrices if m.name in self._given}
        widths = [a * b for a, b in (m.shard_shape(self._num_shards) for m in matrices)]
        packed = torch.empty(
            self._num_shards,
            self.num_samples,
            sum(widths),
            dtype=matrices[0].formed.dtype,
            device=self._device,
        )
        pairs: list[tuple[Tensor, Tensor]] = []
        for matrix, to in zip(matrices, packed.split(widths, dim=2), strict=True):
            if matrix.name in grads:
                # Samples beyond this rank's have weight 0, and rows beyond the last are dropped.
                grad_B = grads[matrix.name]
                pairs += matrix.copies(grad_B, to[:, : len(grad_B)])
            else:
                to.zero_()
        if pairs:
            torch._foreach_copy_([place for place, _ in pairs], [part for _, part in pairs])
        return packed


class _Sent:
    """Gradients on their way."""

    def __init__(self, packed: Tensor, group: dist.ProcessGroup) -> None:
        self._packed: Tensor | None = packed
        """[W, B, elements]; the collective reads it until it is done."""
        self._received = torch.empty_like(packed)
        self._work = dist.all_to_all_single(self._received, packed, group=group, async_op=True)

    def finish(self) -> Tensor:
        """Wait for the collective; returns what all ranks have sent, [W B, elements]."""
        assert self._work is not None
        self._work.wait()
        self._packed = None
        return self._received.flatten(0, 1)
