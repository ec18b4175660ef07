"""A yes or no of all ranks, without a wait for their devices."""

from __future__ import annotations

import torch
import torch.distributed as dist


class Agreement:
    """Ranks that have to take the same turn, whichever of them asks for it."""

    def __init__(self) -> None:
        """All ranks make it together: over NCCL it takes a group of its own, through the hosts."""
        self._is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._group = None
        if not self._is_alone and "gloo" not in dist.get_backend():
            self._group = dist.new_group(backend="gloo")

    def any(self, is_so: bool) -> bool:
        """Whether it is so on any rank; all ranks call it."""
        if self._is_alone:
            return is_so
        answer = torch.tensor([int(is_so)])
        dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self._group)
        return bool(answer)
