"""Gradients with elements in wrong places or lost, by mistakes of sharding and layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dpsgd_track.distributed.sharding import row_range
from dpsgd_track.record.alternatives import SumFormula


def moved(gradient: Tensor, move: SumFormula, world_size: int) -> Tensor:
    """`gradient` with its elements moved or lost, in its own shape.

    Args:
        gradient: a whole parameter's, rows first; a vector has rows of one element.
        world_size: ranks that the rows are sharded over.
    """
    return MOVES[move](gradient, world_size)


def _transposed(gradient: Tensor, world_size: int) -> Tensor:
    return gradient.mT.reshape(gradient.shape) if gradient.ndim > 1 else gradient


def _rolled(gradient: Tensor, world_size: int, *, by: int, axis: int) -> Tensor:
    return gradient.roll(by, axis)


def _rotated_by_half(gradient: Tensor, world_size: int, *, axis: int) -> Tensor:
    return gradient.roll(gradient.shape[axis] // 2, axis)


def _in_column_order(gradient: Tensor, world_size: int) -> Tensor:
    rows = gradient.reshape(len(gradient), -1)
    return rows.reshape(rows.shape[1], rows.shape[0]).mT.reshape(gradient.shape)


def _shards_rotated(gradient: Tensor, world_size: int, *, by: int) -> Tensor:
    padded = _padded(gradient, world_size)
    return padded.roll(by * (len(padded) // world_size), 0)[: len(gradient)]


def _padded_in_front(gradient: Tensor, world_size: int) -> Tensor:
    missing = -len(gradient) % world_size
    empty = gradient.new_zeros(missing, *gradient.shape[1:])
    return torch.cat([empty, gradient])[: len(gradient)]


def _interleaved(gradient: Tensor, world_size: int) -> Tensor:
    padded = _padded(gradient, world_size)
    dealt = padded.unflatten(0, (-1, world_size)).transpose(0, 1).flatten(0, 1)
    return dealt[: len(gradient)]


def _padded(gradient: Tensor, world_size: int) -> Tensor:
    """`gradient` with rows of zeros after it, up to a multiple of `world_size`."""
    missing = -len(gradient) % world_size
    return torch.cat([gradient, gradient.new_zeros(missing, *gradient.shape[1:])])


def _last_shard_rolled(gradient: Tensor, world_size: int, *, by: int) -> Tensor:
    first, last = row_range(len(gradient), world_size - 1, world_size)
    return torch.cat([gradient[:first], gradient[first:last].roll(by, 0)])


def _without_rows(rows: Callable[[Tensor, int], list[int]]) -> Callable[[Tensor, int], Tensor]:
    def lost(gradient: Tensor, world_size: int) -> Tensor:
        return gradient.index_fill(
            0, torch.tensor(rows(gradient, world_size), device=gradient.device, dtype=torch.long), 0
        )

    return lost


def _shard_ends(gradient: Tensor, world_size: int) -> list[int]:
    ranges = (row_range(len(gradient), rank, world_size) for rank in range(world_size))
    return [last - 1 for first, last in ranges if last > first]


def _used_rows(gradient: Tensor) -> list[int]:
    used: list[int] = gradient.reshape(len(gradient), -1).any(dim=1).nonzero().flatten().tolist()
    return used


def _without_last_column(gradient: Tensor, world_size: int) -> Tensor:
    lost = gradient.clone()
    lost[..., -1] = 0
    return lost


def _first_shard_alone(gradient: Tensor, world_size: int) -> Tensor:
    kept = torch.zeros_like(gradient)
    first, last = row_range(len(gradient), 0, world_size)
    kept[first:last] = gradient[first:last]
    return kept


MOVES: dict[SumFormula, Callable[[Tensor, int], Tensor]] = {
    SumFormula.TRANSPOSED: _transposed,
    SumFormula.NEXT_ROW: partial(_rolled, by=1, axis=0),
    SumFormula.ROW_BEFORE: partial(_rolled, by=-1, axis=0),
    SumFormula.NEXT_COLUMN: partial(_rolled, by=1, axis=-1),
    SumFormula.COLUMN_BEFORE: partial(_rolled, by=-1, axis=-1),
    SumFormula.NEXT_SHARD: partial(_shards_rotated, by=1),
    SumFormula.SHARD_BEFORE: partial(_shards_rotated, by=-1),
    SumFormula.PADDED_IN_FRONT: _padded_in_front,
    SumFormula.REVERSED: lambda gradient, world_size: gradient.flip(0),
    SumFormula.INTERLEAVED: _interleaved,
    SumFormula.LAST_SHARD_DOWN: partial(_last_shard_rolled, by=1),
    SumFormula.LAST_SHARD_UP: partial(_last_shard_rolled, by=-1),
    SumFormula.LAST_ROW_LOST: _without_rows(lambda gradient, world_size: [len(gradient) - 1]),
    SumFormula.LAST_USED_ROW_LOST: _without_rows(lambda g, world_size: _used_rows(g)[-1:]),
    SumFormula.FIRST_USED_ROW_LOST: _without_rows(lambda g, world_size: _used_rows(g)[:1]),
    SumFormula.LAST_COLUMN_LOST: _without_last_column,
    SumFormula.FIRST_SHARD_END_LOST: _without_rows(
        lambda g, world_size: _shard_ends(g, world_size)[:1]
    ),
    SumFormula.SHARD_ENDS_LOST: _without_rows(_shard_ends),
    SumFormula.MEAN_OF_ELEMENTS: lambda g, world_size: g.mean().expand_as(g),
    SumFormula.SUM_OF_ELEMENTS: lambda g, world_size: g.sum().expand_as(g),
    SumFormula.FIRST_SHARD_ALONE: _first_shard_alone,
    SumFormula.COLUMNS_REVERSED: lambda gradient, world_size: gradient.flip(-1),
    SumFormula.TWO_ROWS_DOWN: partial(_rolled, by=2, axis=0),
    SumFormula.TWO_ROWS_UP: partial(_rolled, by=-2, axis=0),
    SumFormula.HALVES_EXCHANGED: partial(_rotated_by_half, axis=0),
    SumFormula.COLUMN_HALVES_EXCHANGED: partial(_rotated_by_half, axis=-1),
    SumFormula.IN_COLUMN_ORDER: _in_column_order,
}
"""The formulas that move or lose elements of the right sum."""
