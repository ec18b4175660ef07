"""Failures of runs: their kinds, and one table with the description and advice for each kind."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from dpsgd_track.config import JobConfig
from dpsgd_track.program import command
from dpsgd_track.record.codec import Codec


class FailureKind(enum.StrEnum):
    """Kind of a failure; decisions are made by it alone, never by the message."""

    OUT_OF_MEMORY = "out_of_memory"
    NOT_FINITE = "not_finite"
    UNEQUAL_NOISE = "unequal_noise"
    """Ranks that hold copies of the same parameter added different noise to it."""
    SETTING = "setting"
    """A setting does not fit the machine, the model or the mode."""
    MODE = "mode"
    """The mode's own code, or what it called, raised an exception."""
    PROTOCOL = "protocol"
    """The mode returned something that the protocol of modes does not allow."""
    ERROR = "error"
    """The project's own code raised an exception, or only the exit code is known."""
    TRACKING = "tracking"
    DISK_FULL = "disk_full"
    KILLED = "killed"
    INTERRUPTED = "interrupted"
    LEFT = "left"
    """A rank ended with exit code 0 before its work was done."""
    HUNG = "hung"
    """No rank makes progress."""
    MACHINE_LOST = "machine_lost"
    PEER = "peer"
    """A rank lost the others, for an unknown reason."""
    LAUNCHER_DIED = "launcher_died"
    NO_TRAJECTORY = "no_trajectory"
    NOT_STARTED = "not_started"
    NO_CLIP_BOUNDS = "no_clip_bounds"
    UNUSED_VARIANT = "unused_variant"
    RUNS_FAILED = "runs_failed"
    """For a group: some of its runs did not finish."""


# In the advice, {modes}, {single} and {resume} stand for command lines.
WORDS: dict[FailureKind, tuple[str, str]] = {
    FailureKind.OUT_OF_MEMORY: (
        "out of memory",
        "Try a smaller --batch-size, a shorter --seq-length, a smaller --model-name, "
        "or --param-dtype bfloat16.",
    ),
    FailureKind.NOT_FINITE: (
        "a value became NaN or infinite",
        "Try a smaller --learning-rate, a smaller --sigma, or --param-dtype float32. If no_dp or "
        "reference stays finite on the same data, the mode is at fault.",
    ),
    FailureKind.UNEQUAL_NOISE: (
        "copies of the noise differ",
        "Ranks that hold the same elements have to draw the same noise for them.",
    ),
    FailureKind.SETTING: (
        "a setting does not fit",
        "Change the option named above; `{modes}` lists the modes.",
    ),
    FailureKind.MODE: (
        "the mode raised an exception",
        "Read the log; `{single}` runs this mode alone.",
    ),
    FailureKind.PROTOCOL: (
        "the mode does not keep to the protocol",
        "Correct the mode; dpsgd_track/modes/protocol.py says what each method returns.",
    ),
    FailureKind.ERROR: (
        "the worker raised an exception",
        "Read the log; `{single}` runs this mode alone.",
    ),
    FailureKind.TRACKING: (
        "records could not be kept on this machine",
        "Make room, or choose another --spool; then `{resume}` runs what is missing.",
    ),
    FailureKind.DISK_FULL: (
        "the disk is full",
        "Make room where results_dir and the spool are; then `{resume}` runs what is missing.",
    ),
    FailureKind.KILLED: (
        "the process group was killed",
        "Signal 9 is most often the kernel running out of memory: try a smaller --batch-size, "
        "a shorter --seq-length, or fewer ranks with --nproc-per-node.",
    ),
    FailureKind.INTERRUPTED: (
        "interrupted",
        "`{resume}` runs what is missing.",
    ),
    FailureKind.LEFT: (
        "a rank ended in mid-run, with exit code 0",
        "Something called os._exit or ended the process: read the log; `{single}` runs this mode "
        "alone.",
    ),
    FailureKind.HUNG: (
        "the ranks hang",
        "The stacks of all ranks are beside the log; `{single}` runs this mode alone.",
    ),
    FailureKind.MACHINE_LOST: (
        "a machine was lost",
        "See that every machine is up and reaches the others; then `{resume}` on "
        "all of them runs what is missing.",
    ),
    FailureKind.PEER: (
        "a rank lost its connection to the others",
        "Read the logs of the other ranks: one of them ended first.",
    ),
    FailureKind.LAUNCHER_DIED: (
        "its launcher died before it could say how the run ended",
        "`{resume}` runs what is missing.",
    ),
    FailureKind.NO_TRAJECTORY: (
        "the worker ended without leaving a trajectory",
        "Read the log; a mode of your own must run every step it is asked to.",
    ),
    FailureKind.NOT_STARTED: (
        "not started",
        "See the run of that regime.",
    ),
    FailureKind.NO_CLIP_BOUNDS: (
        "not started: the clipping bounds are unknown",
        "The mode `reference` measures them and failed: see its run.",
    ),
    FailureKind.RUNS_FAILED: (
        "not every run finished",
        "See those runs; `{resume}` runs what is missing.",
    ),
    FailureKind.UNUSED_VARIANT: (
        "nothing was imported from the variant, so that what ran is the installed code",
        "Check the path, or leave out the mode, which uses nothing of what the variant brings.",
    ),
}


_LOST_PEER = re.compile(
    r"connection (?:closed|reset|was reset) by|broken pipe|remote process exited|socket timeout"
    r"|timed? ?out|heartbeat|DistNetworkError|DistStoreError|Gloo|NCCL",
    re.IGNORECASE,
)


def names_lost_peer(text: str) -> bool:
    """True if `text`, from a communication library, reports the loss of another rank.

    gloo raises plain RuntimeErrors, so that only their words tell the kind.
    """
    return bool(_LOST_PEER.search(text))


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A failure, as far as it is known."""

    kind: FailureKind
    message: str = ""
    """The error's own message, on one line."""
    place: str = ""
    """Innermost line of code outside of torch, and its owner: `in fork.py:31 of mode x:Y`."""
    regime: int | None = None
    """Index of the regime in which it happened."""
    step: int | None = None
    """Step at which it happened."""
    rank: int | None = None
    """Rank that reported the failure."""

    @property
    def reason(self) -> str:
        """Description and location of the failure: one line, with a full stop."""
        at = [
            f"{name} {value}"
            for name, value in (("step", self.step), ("rank", self.rank))
            if value is not None
        ]
        where = (f" at {', '.join(at)}" if at else "") + (f" {self.place}" if self.place else "")
        sentence = f"{WORDS[self.kind][0]}{where}" + (f": {self.message}" if self.message else "")
        return f"{sentence.rstrip('. ')}."

    def advice(self, group: str = "GROUP", job: JobConfig | None = None) -> str:
        """The next thing to try, with commands as the user would type them.

        Args:
            group: name of the group that the failed run belongs to.
            job: job of the failed run, if it is a mode's.
        """
        mode = [] if job is None else ["--mode", job.mode]
        if job is not None and job.variant is not None:
            mode += ["--variant", job.variant.option]
        return WORDS[self.kind][1].format(
            modes=command("modes"),
            single=command("single", mode or ["--mode", "MODE"]),
            resume=command("resume", [group]),
        )


FAILURE = Codec(Failure, "dpsgd-track/failure", 1)
