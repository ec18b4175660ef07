"""Display of running modes: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from dpsgd_track.visible_text import visible

if TYPE_CHECKING:
    from rich.console import Console

    from dpsgd_track.config import RegimeConfig


_WIDE = 120
"""Columns of a terminal that has room for the loss and long names."""


class Display(Protocol):
    """Follows the modes of a suite."""

    def start_group(self, num_steps: int) -> None:
        """All modes together are about to take `num_steps` recorded steps."""

    def start_mode(self, mode: str, regimes: Sequence[RegimeConfig]) -> None:
        """A mode is about to start."""

    def event(self, event: Mapping[str, Any]) -> None:
        """The running mode reported progress."""

    def end_mode(self, status: str, reason: str = "") -> None:
        """The running mode ended."""

    def say(self, line: str) -> None:
        """Print a line."""

    def conclude(self, line: str, *, is_last: bool = True) -> None:
        """Print the outcome of all modes; not the last if a sentence on the results follows."""

    def close(self) -> None:
        """Leave the terminal as it was."""


def open_display(stream: TextIO | None = None, *, is_quiet: bool = False) -> Display:
    """The display that fits `stream` (default: stdout).

    Args:
        is_quiet: print the outcome alone.
    """
    stream = stream or sys.stdout
    if is_quiet:
        return QuietDisplay(stream)
    if not stream.isatty():
        return PlainDisplay(stream)
    from rich.console import Console

    return LiveDisplay(Console(file=stream))


def describe(regime: RegimeConfig) -> str:
    """A regime's name for display."""
    return f"{regime.name} ({regime.replay})" if regime.replay else regime.name


def _loss(event: Mapping[str, Any]) -> str:
    loss = event.get("loss")
    return "" if loss is None else f"{loss:.4f}"


def _is_one_point(regimes: Sequence[RegimeConfig]) -> bool:
    """True for a single timed run of a profile, which is shown on one line."""
    return len(regimes) == 1 and bool(regimes[0].order)


def _cost(event: Mapping[str, Any]) -> str:
    if event.get("step_time_ms") is None:
        return ""
    return f", {event['step_time_ms']:.4g} ms a step, {event['peak_memory_gib']:.3g} GiB"


def _epsilon(event: Mapping[str, Any]) -> str:
    epsilon = event.get("epsilon")
    return "" if epsilon is None else f", epsilon {epsilon:.3g}"


def _steps(regimes: Sequence[RegimeConfig]) -> int:
    return sum(regime.num_iter for regime in regimes)


def duration(seconds: float) -> str:
    """`seconds` as one would say it: 40 s, 7 min or 3.2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class QuietDisplay:
    """The outcome of all modes, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def start_group(self, num_steps: int) -> None:
        """See `Display`."""

    def start_mode(self, mode: str, regimes: Sequence[RegimeConfig]) -> None:
        """See `Display`."""

    def event(self, event: Mapping[str, Any]) -> None:
        """See `Display`."""

    def end_mode(self, status: str, reason: str = "") -> None:
        """See `Display`."""

    def say(self, line: str) -> None:
        """See `Display`."""

    def conclude(self, line: str, *, is_last: bool = True) -> None:
        """See `Display`."""
        if is_last:
            print(visible(line), file=self._stream, flush=True)

    def close(self) -> None:
        """See `Display`."""


class PlainDisplay:
    """One line for each mode's start, each regime's end and each mode's end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._mode = ""
        self._regimes: Sequence[RegimeConfig] = ()
        self._mode_start = self._regime_start = 0.0
        self._is_told = False
        self._loss = ""
        self._num_steps = self._num_done = 0
        self._group_start = 0.0

    def start_group(self, num_steps: int) -> None:
        """See `Display`."""
        self._num_steps, self._group_start = num_steps, time.monotonic()

    def start_mode(self, mode: str, regimes: Sequence[RegimeConfig]) -> None:
        """See `Display`."""
        self._mode, self._regimes = mode, regimes
        self._mode_start = time.monotonic()
        self._is_told = False
        if regimes and not _is_one_point(regimes):
            self.say(f"{mode}: started ({', '.join(map(describe, regimes))})")

    def event(self, event: Mapping[str, Any]) -> None:
        """See `Display`."""
        self._loss = _loss(event) or self._loss
        if event["event"] == "start":
            self._regime_start = time.monotonic()
            self._loss = ""
        elif event["event"] == "end":
            took = time.monotonic() - self._regime_start
            steps = f"{event['num_iter']} steps in {took:.1f} s"
            loss = f", loss {self._loss}" if self._loss else ""
            regime = describe(self._regimes[event["regime"]])
            self.say(f"{self._mode}: {regime}, {steps}{loss}{_epsilon(event)}{_cost(event)}")
            self._is_told = _is_one_point(self._regimes)

    def end_mode(self, status: str, reason: str = "") -> None:
        """See `Display`."""
        self._num_done += _steps(self._regimes)
        if self._is_told and not reason:
            return
        took = time.monotonic() - self._mode_start
        rest = f": {reason}" if reason else self._left()
        self.say(f"{self._mode}: {status} after {took:.1f} s{rest}")

    def _left(self) -> str:
        """`, about 40 s left`, at the mean speed so far; empty at the end."""
        if not 0 < self._num_done < self._num_steps:
            return ""
        elapsed = time.monotonic() - self._group_start
        left = elapsed / self._num_done * (self._num_steps - self._num_done)
        return f", about {duration(left)} left"

    def say(self, line: str) -> None:
        """See `Display`."""
        print(visible(line), file=self._stream, flush=True)

    def conclude(self, line: str, *, is_last: bool = True) -> None:
        """See `Display`."""
        self.say(line)

    def close(self) -> None:
        """See `Display`."""


class LiveDisplay:
    """A bar for all modes and one for each: regime, step, loss, time left.

    A terminal of 80 columns has all of it but the loss.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as TimeLeft
        from rich.table import Column

        is_wide = console.width >= _WIDE
        loss = [TextColumn("{task.fields[loss]}")] if is_wide else []
        name, regime = (
            Column(no_wrap=True, max_width=width) for width in (40 if is_wide else 24, 19)
        )
        self._progress = Progress(
            TextColumn("[bold]{task.description}", table_column=name),
            TextColumn("{task.fields[regime]}", table_column=regime),
            BarColumn(bar_width=20 if is_wide else 10),
            MofNCompleteColumn(),
            *loss,
            TimeLeft(elapsed_when_finished=True),
            console=console,
        )
        self._regimes: Sequence[RegimeConfig] = ()
        self._group: Any = None
        self._num_before = 0
        self._progress.start()

    def start_group(self, num_steps: int) -> None:
        """See `Display`."""
        self._group = self._progress.add_task("all modes", total=num_steps, regime="", loss="")

    def start_mode(self, mode: str, regimes: Sequence[RegimeConfig]) -> None:
        """See `Display`."""
        self._regimes, self._loss = regimes, ""
        self._task = self._progress.add_task(
            mode, total=_steps(regimes), regime="starting", loss=""
        )

    def event(self, event: Mapping[str, Any]) -> None:
        """See `Display`."""
        at = event["regime"]
        done = _steps(self._regimes[:at])
        if event["event"] == "end":
            done += self._regimes[at].num_iter
        elif event["event"] == "step":
            done += int(event["step"]) + 1
        loss = _loss(event)
        self._loss = f"loss {loss}" if loss else self._loss
        regime = describe(self._regimes[at])
        shown = f"{self._loss}{_epsilon(event)}{_cost(event)}".removeprefix(", ")
        self._progress.update(self._task, completed=done, regime=regime, loss=shown)
        self._show_group(self._num_before + done)

    def end_mode(self, status: str, reason: str = "") -> None:
        """See `Display`."""
        self._progress.update(self._task, regime=status)
        self._progress.stop_task(self._task)
        self._num_before += _steps(self._regimes)
        self._show_group(self._num_before)
        if reason:
            mode = self._progress.tasks[self._task].description
            self.say(f"{mode}: {status}: {reason}")

    def say(self, line: str) -> None:
        """See `Display`."""
        self._progress.console.print(visible(line), markup=False, highlight=False, soft_wrap=True)

    def conclude(self, line: str, *, is_last: bool = True) -> None:
        """See `Display`."""
        self.say(line)

    def _show_group(self, num_done: int) -> None:
        if self._group is not None:
            self._progress.update(self._group, completed=num_done)

    def close(self) -> None:
        """See `Display`."""
        self._progress.stop()
