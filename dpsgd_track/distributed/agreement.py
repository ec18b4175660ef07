"""Lets ranks agree through their hosts, without waiting for their devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
        return list(map(bool, self.largest(list(map(int, are_true)))()))

    def largest(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """Ask for the largest of the ranks' numbers in each place, of equally many on each.

        Collective: all ranks call it. Returns a function that waits for them.
        """
        found = torch.tensor(numbers, dtype=torch.int64)
        if self._is_alone:
            return found.tolist
        work = dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None

        def wait() -> list[int]:
            work.wait()
            return found.tolist()

        return wait
