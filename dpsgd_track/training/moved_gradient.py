"""Gradients with elements in wrong places, as mistakes of sharding and layout put them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dpsgd_track.record.alternatives import Move


def moved(gradient: Tensor, move: Move, world_size: int) -> Tensor:
    """`gradient` with its elements moved, in its own shape.

    Args:
        gradient: a whole parameter's, rows first; a vector has rows of one element.
        world_size: ranks that the rows are sharded over.
    """
    return _MOVES[move](gradient, world_size)


def _transposed(gradient: Tensor, world_size: int) -> Tensor:
    return gradient.mT.reshape(gradient.shape) if gradient.ndim > 1 else gradient


def _rolled(gradient: Tensor, world_size: int, *, by: int, axis: int) -> Tensor:
    return gradient.roll(by, axis)


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


_MOVES: dict[Move, Callable[[Tensor, int], Tensor]] = {
    Move.TRANSPOSED: _transposed,
    Move.NEXT_ROW: partial(_rolled, by=1, axis=0),
    Move.ROW_BEFORE: partial(_rolled, by=-1, axis=0),
    Move.NEXT_COLUMN: partial(_rolled, by=1, axis=-1),
    Move.COLUMN_BEFORE: partial(_rolled, by=-1, axis=-1),
    Move.NEXT_SHARD: partial(_shards_rotated, by=1),
    Move.SHARD_BEFORE: partial(_shards_rotated, by=-1),
    Move.PADDED_IN_FRONT: _padded_in_front,
    Move.REVERSED: lambda gradient, world_size: gradient.flip(0),
    Move.INTERLEAVED: _interleaved,
}
