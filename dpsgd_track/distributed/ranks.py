"""Ranks where there may be none: a process by itself is a group of one."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensor: Tensor) -> None:
    """Add up `tensor` over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
