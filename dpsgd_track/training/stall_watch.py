"""Has a rank that makes no progress write its stacks to a file.

The interpreter's own watchdog thread does it, which needs no lock that a hanging extension may
hold. A rank that goes on empties the file, and one that is done removes it.
"""

from __future__ import annotations

import faulthandler
import os
import time
from pathlib import Path
from typing import IO

# Arming costs as much as starting a thread.
_ARM_EVERY_S = 1.0


class _Watch:
    """The watch of this process."""

    def __init__(self, file: IO[bytes], limit_s: float) -> None:
        self.file, self._limit_s = file, limit_s
        self._armed_at = 0.0

    def beat(self) -> None:
        now = time.monotonic()
        if now - self._armed_at < min(_ARM_EVERY_S, self._limit_s / 2):
            return
        self._armed_at = now
        faulthandler.cancel_dump_traceback_later()
        self.file.truncate(0)
        # Of a process that is stopped, the file's age alone tells.
        os.utime(self.file.fileno())
        faulthandler.dump_traceback_later(self._limit_s, file=self.file)


_watches: list[_Watch] = []


def start(path: Path, limit_s: float) -> None:
    """Write the stacks of all threads to `path` after `limit_s` without a beat."""
    # Appended to, so that nothing precedes what is written after the file was emptied.
    _watches[:] = [_Watch(path.open("ab"), limit_s)]
    beat()


def beat() -> None:
    """Tell that this rank makes progress."""
    for watch in _watches:
        watch.beat()


def stop() -> None:
    """Watch no longer."""
    faulthandler.cancel_dump_traceback_later()
    for watch in _watches:
        Path(watch.file.name).unlink(missing_ok=True)
    _watches.clear()
