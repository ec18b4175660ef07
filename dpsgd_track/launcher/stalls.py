"""Notices a process group that makes no progress, and says which rank keeps the others waiting.

A rank without progress writes its stacks to `stacks-rankR.txt` in its work folder. A step may take
long, so that this alone is only told. A group that no longer computes either is ended, and so is
one whose silence has no end.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dpsgd_track.config import JobConfig
from dpsgd_track.modes.code_owner import OURS, is_of_python, is_of_torch, owner_of
from dpsgd_track.record.failure import Failure, FailureKind
from dpsgd_track.record.names import stacks_file

STALL_S = 60.0
"""Seconds without progress after which a rank writes its stacks."""
PATIENCE_S = 1800.0
"""Seconds without progress after which a group is ended even though it computes."""
_ANSWER_S = 5.0
"""Time for a rank to write its stacks."""
_IDLE_CORES = 0.05
"""CPU time of waiting processes, as a share of a core: they poll now and then."""
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x", re.MULTILINE)


@dataclass(frozen=True)
class Standstill:
    """Position of a rank in its code."""

    rank: int
    place: str
    """Innermost line outside of torch and the standard library, and its owner; empty if unknown."""
    owner: str
    waits_in: str
    """Function of torch that was called from there; empty if none was."""

    def __str__(self) -> str:
        if not self.place:
            return f"rank {self.rank} does not answer"
        waits = f" waits in {self.waits_in}," if self.waits_in else " is"
        return f"rank {self.rank}{waits} {self.place}"


class Stalls:
    """Follows one process group on this machine."""

    def __init__(
        self,
        job: JobConfig,
        work_dir: Path,
        ranks: range,
        stall_s: float,
        cpu_s: Callable[[], float],
    ) -> None:
        """
        Args:
            ranks: those of this machine.
            stall_s: seconds without progress after which a rank writes its stacks.
            cpu_s: CPU time of the group so far.
        """
        self._job, self._work_dir, self._ranks = job, work_dir, ranks
        self._stall_s, self._cpu_s = stall_s, cpu_s
        self._since: float | None = None
        self._window: tuple[float, float] = (0.0, 0.0)

    def look(self, tell: Callable[[str], object], *, has_begun: bool) -> Failure | None:
        """Tell of a group that stands still; returns the failure if it has to be ended.

        Args:
            has_begun: every rank has built its mode. Before, one may wait for a download.
        """
        now = time.monotonic()
        if any(map(self._goes_on, self._ranks)):
            self._since = None
            return None
        if self._since is None:
            self._since = now
            self._window = now, self._cpu_s()
            tell(f"{self._job.title}: {self._described(self._stall_s)}. Stacks: {self._work_dir}")
            return None
        silent_s = now - self._since + self._stall_s
        start, cpu_s = self._window
        window_s = self._stall_s / 6
        if now - start < window_s:
            return None
        used_s = self._cpu_s() - cpu_s
        self._window = now, used_s + cpu_s
        is_idle = has_begun and used_s < _IDLE_CORES * window_s
        return self._failure(silent_s) if is_idle or silent_s > PATIENCE_S else None

    def _goes_on(self, rank: int) -> bool:
        try:
            file = (self._work_dir / stacks_file(rank)).stat()
        except FileNotFoundError:
            # It has not begun, or is done.
            return True
        return not file.st_size and time.time() - file.st_mtime < self._stall_s + _ANSWER_S

    def _stacks(self, rank: int) -> str:
        try:
            return (self._work_dir / stacks_file(rank)).read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def _standstills(self) -> list[Standstill]:
        return [standstill(rank, self._stacks(rank), self._job) for rank in self._ranks]

    def _described(self, silent_s: float) -> str:
        return f"no progress for {silent_s:.0f} s: {'; '.join(map(str, self._standstills()))}"

    def _failure(self, silent_s: float) -> Failure:
        culprit = blamed(self._standstills())
        return Failure(
            kind=FailureKind.HUNG,
            message=self._described(silent_s),
            place=culprit.place,
            rank=culprit.rank,
        )


def standstill(rank: int, stacks: str, job: JobConfig) -> Standstill:
    """Position of a rank in its code, by the stacks that its interpreter wrote."""
    # The main thread is the oldest, and comes last; within it, the innermost frame comes first.
    main = _THREAD.split(stacks)[-1]
    inner = ""
    for file, line, function in _FRAME.findall(main):
        path = Path(file)
        if is_of_torch(path):
            # torch logs its collectives through a decorator.
            inner = inner if function == "wrapper" else function
        elif not is_of_python(path):
            owner = owner_of(path, job)
            return Standstill(rank, f"in {path.name}:{line} of {owner}", owner, inner)
    return Standstill(rank, "", "", inner)


def blamed(standstills: list[Standstill]) -> Standstill:
    """The rank that the others wait for: silent, else outside of torch, else in foreign code."""
    return min(standstills, key=lambda s: (bool(s.place), bool(s.waits_in), s.owner == OURS))
