"""Why a run failed, in a sentence, and what to try. One table: failure kind -> words."""

from __future__ import annotations

import re
from dataclasses import dataclass

OUT_OF_MEMORY = "out_of_memory"
NOT_FINITE = "not_finite"
CONFIG = "config"
TRACKING = "tracking"
DISK_FULL = "disk_full"
ERROR = "error"
KILLED = "killed"
NO_TRAJECTORY = "no_trajectory"
NOT_STARTED = "not_started"
NO_CLIP_BOUNDS = "no_clip_bounds"
NODE_LOST = "node_lost"

_TABLE: dict[str, tuple[str, str]] = {
    OUT_OF_MEMORY: (
        "out of memory",
        "Try a smaller --batch-size, a shorter --seq-length, a smaller --model-name, "
        "or --param-dtype bfloat16.",
    ),
    NOT_FINITE: (
        "a value became NaN or infinite (not-finite)",
        "Try a smaller --learning-rate, a smaller --sigma, or --param-dtype float32; "
        "if other modes stay finite on the same data, the mode is at fault.",
    ),
    CONFIG: (
        "the configuration does not fit",
        "Change the option named above; `launch.py modes` lists the modes.",
    ),
    TRACKING: (
        "records could not be kept on this machine",
        "Make room, or choose another --spool; then `launch.py resume GROUP` runs what is missing.",
    ),
    DISK_FULL: (
        "the disk is full",
        "Make room where results_dir and the spool are; then `launch.py resume GROUP` runs what is "
        "missing.",
    ),
    ERROR: (
        "the worker raised an error",
        "Read the log; `launch.py single --mode NAME` runs this mode alone.",
    ),
    KILLED: (
        "the process group was killed",
        "Signal 9 is most often the kernel running out of memory: try a smaller --batch-size, "
        "a shorter --seq-length, or fewer ranks with --nproc-per-node.",
    ),
    NODE_LOST: (
        "a machine was lost",
        "See that every machine is up and reaches the others; then `launch.py resume GROUP` on all "
        "of them runs what is missing.",
    ),
    NO_TRAJECTORY: (
        "the worker ended without leaving a trajectory",
        "Read the log; a mode of your own must run every step it is asked to.",
    ),
    NOT_STARTED: (
        "not started",
        "See the run of that regime.",
    ),
    NO_CLIP_BOUNDS: (
        "not started: the clipping bounds are unknown",
        "The mode `reference` measures them and failed: see its run.",
    ),
}


_ECHO = re.compile(
    r"connection (?:closed|reset|was reset) by|broken pipe|remote process exited|socket timeout"
    r"|timed? ?out|heartbeat|DistNetworkError|DistStoreError|Gloo|NCCL",
    re.IGNORECASE,
)
"""What the communication libraries say of a rank that ended."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What went wrong, as far as it is known."""

    kind: str
    """A key of this module's table; an unknown one reads as `error`."""
    message: str = ""
    """The error's own words."""
    regime: int | None = None
    """Index of the regime it happened in."""
    step: int | None = None
    """Step it happened at."""
    rank: int | None = None
    """Rank it was reported by."""

    @property
    def reason(self) -> str:
        """What happened and where, in one line."""
        places = [
            f"{name} {value}"
            for name, value in (("step", self.step), ("rank", self.rank))
            if value is not None
        ]
        where = f" at {', '.join(places)}" if places else ""
        summary = _TABLE.get(self.kind, _TABLE[ERROR])[0]
        return f"{summary}{where}" + (f": {self.message}" if self.message else ".")

    @property
    def is_echo(self) -> bool:
        """Whether it may say no more than that another rank is gone."""
        return self.kind == ERROR and bool(_ECHO.search(self.message))

    @property
    def advice(self) -> str:
        """What to try next."""
        return _TABLE.get(self.kind, _TABLE[ERROR])[1]
