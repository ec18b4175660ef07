"""Agree on a yes or no over ranks, without waiting for their devices."""

from __future__ import annotations

import torch
import torch.distributed as dist


class Agreement:
    """Lets all ranks take a branch if any of them asks for it."""

    def __init__(self) -> None:
        """Collective: all ranks call it. Beside NCCL it makes a gloo group, through the hosts."""
        self._is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._group = None
        if not self._is_alone and "gloo" not in dist.get_backend():
            self._group = dist.new_group(backend="gloo")

    def any(self, is_true: bool) -> bool:
        """True if `is_true` is on any rank. Collective: all ranks call it."""
        if self._is_alone:
            return is_true
        answer = torch.tensor([int(is_true)])
        dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self._group)
        return bool(answer)
