"""Ctrl-C and SIGTERM as a request that is polled between steps, never handled within one.

A terminal that goes away is no request: what was started in it runs on.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Interruption:
    """While entered, SIGINT and SIGTERM set `requested`; repeated ones have no effect."""

    def __init__(self, *, outlives_terminal: bool = True) -> None:
        """
        Args:
            outlives_terminal: SIGHUP is ignored; else it is a request as well.
        """
        self._outlives_terminal = outlives_terminal
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
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        # A SIGHUP that nohup ignores stays ignored.
        is_ignored = self._outlives_terminal or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        on_hangup = signal.SIG_IGN if is_ignored else self._note
        self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, on_hangup)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
