"""Ctrl-C and SIGTERM as a request that is polled between steps, never handled within one."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Interruption:
    """While entered, SIGINT, SIGTERM and SIGHUP set `requested`; repeated ones have no effect."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """True once the user or the system has asked to end."""
        return self.signal is not None

    @property
    def name(self) -> str:
        """The signal's name."""
        return signal.Signals(self.signal or signal.SIGINT).name

    @property
    def reason(self) -> str:
        """Source of the request, in words."""
        return f"interrupted by {self.name}."

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # A SIGHUP that nohup ignores stays ignored.
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
