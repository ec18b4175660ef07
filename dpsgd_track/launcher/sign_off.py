"""Ranks sign off when their work is done, so that one that merely ends is noticed.

torch's launcher takes exit code 0 for success, and waits for the other ranks, which wait for the
one that is gone. Any other exit code it answers itself, by ending the group.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct

# Process id; exit code, or one of those below.
_ENTRY = struct.Struct("<ii")
_RUNNING, _DONE = -1000, -1001


class SignOffs:
    """Memory shared between a fork server, the agent, and the ranks that are forked from it."""

    def __init__(self, num_ranks: int) -> None:
        """
        Args:
            num_ranks: on this machine.
        """
        self._num_ranks = num_ranks
        # Anonymous: nothing is left of it anywhere.
        self._memory = mmap.mmap(-1, _ENTRY.size * num_ranks)

    def sign_on(self, local_rank: int) -> None:
        """In a rank: begin."""
        self._put(local_rank, os.getpid(), _RUNNING)

    def sign_off(self, local_rank: int) -> None:
        """In a rank: end, with all of the work done."""
        self._put(local_rank, os.getpid(), _DONE)

    def note_exits(self, *_: object) -> None:
        """In the agent, on SIGCHLD: note how ranks ended, and leave them to be joined."""
        for local_rank in range(self._num_ranks):
            pid, code = self._entry(local_rank)
            if pid and code == _RUNNING:
                # It may have been joined already.
                with contextlib.suppress(ChildProcessError):
                    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                    if ended is not None:
                        is_exit = ended.si_code == os.CLD_EXITED
                        self._put(local_rank, pid, ended.si_status if is_exit else -ended.si_status)

    def deserter(self) -> int | None:
        """Local rank that ended with exit code 0 and did not sign off; None if there is none."""
        for local_rank in range(self._num_ranks):
            pid, code = self._entry(local_rank)
            if pid and code == 0:
                return local_rank
        return None

    def _entry(self, local_rank: int) -> tuple[int, int]:
        pid, code = _ENTRY.unpack_from(self._memory, _ENTRY.size * local_rank)
        return pid, code

    def _put(self, local_rank: int, pid: int, code: int) -> None:
        _ENTRY.pack_into(self._memory, _ENTRY.size * local_rank, pid, code)
