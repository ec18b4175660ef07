"""Agree on a yes or no over ranks, without waiting for their devices."""

from __future__ import annotations

from collections.abc import Sequence

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
        return self.of_each([is_true])[0]

    def of_each(self, are_true: Sequence[bool]) -> list[bool]:
        """Those that are true on any rank, of equally many on each. Collective."""
        if self._is_alone:
            return list(are_true)
        answers = torch.tensor(are_true, dtype=torch.int32)
        dist.all_reduce(answers, op=dist.ReduceOp.MAX, group=self._group)
        return answers.bool().tolist()
