"""Collectives that also work without a process group, as in a world of one rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(tensor: Tensor) -> None:
    """All-reduce `tensor` to its sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def stack_over_ranks(tensor: Tensor) -> Tensor:
    """All-gather `tensor`, [...], as [W, ...] in the order of ranks, on its device."""
    pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(pieces, tensor)
    return torch.stack(pieces)
