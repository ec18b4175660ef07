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
        return self.each([is_true])[0]

    def each(self, are_true: Sequence[bool]) -> list[bool]:
        """For several questions at once, True where `any` is. Collective: all ranks call it."""
        if self._is_alone:
            return list(are_true)
        answers = torch.tensor([int(is_true) for is_true in are_true])
        dist.all_reduce(answers, op=dist.ReduceOp.MAX, group=self._group)
        return list(map(bool, answers.tolist()))
