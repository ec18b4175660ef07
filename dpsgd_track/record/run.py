"""A group and its runs as the comparison reads them, wherever they are stored."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from dpsgd_track.config import JobConfig, RegimeConfig
from dpsgd_track.record.facts import RunFacts
from dpsgd_track.record.failure import Failure
from dpsgd_track.record.plan import GroupPlan, RunKey
from dpsgd_track.record.timings import Timings
from dpsgd_track.record.trajectory import Trajectory


class Status(enum.StrEnum):
    """Status of a run, in MLflow's words where it has one."""

    RUNNING = "RUNNING"
    SCHEDULED = "SCHEDULED"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"
    MISSING = "MISSING"
    """Planned, but never started."""
    ELSEWHERE = "ELSEWHERE"
    """In the spool: another machine sets the final status."""


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Tags, metrics and status that a comparison adds to a stored run."""

    tags: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    is_faulty: bool | None = None
    """True if the run is to be shown as failed although it finished, False if it is not; None
    leaves its status alone."""

    def status_after(self, status: Status, *, has_failure: bool) -> Status:
        """Status to be shown of a run.

        Args:
            status: the present one.
            has_failure: the run failed by itself, whatever a comparison says.
        """
        if self.is_faulty is None or has_failure or status not in (Status.FINISHED, Status.FAILED):
            return status
        return Status.FAILED if self.is_faulty else Status.FINISHED


@dataclass(frozen=True, kw_only=True)
class ModeRun:
    """One mode in one regime."""

    mode: str
    regime: str
    variant: str = ""
    """Name of the code it ran; empty for the installed code."""
    replay: str = ""
    """Kind of replay that measures the floor (config.REPLAYS); empty for a run that is judged."""
    order: int = 0
    """Position among the timed runs of a profile; 0 for others."""
    run_id: str = ""
    """Empty when the run is missing."""
    status: Status = Status.MISSING
    job: JobConfig | None = None
    """Job as planned, with the model and data of the regime; None for a run outside the plan."""
    setup: RegimeConfig | None = None
    """The regime as planned."""
    failure: Failure | None = None
    """Reason that the run did not finish, if known."""
    facts: RunFacts | None = None
    """None for a run that ended before it reported any."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Last value of each metric."""
    trajectory: Trajectory | None = None
    trajectory_missing: str = ""
    """Reason for no trajectory, or only one rebuilt from metrics; empty when it is exact."""
    timings: Timings | None = None
    """Step times of a timed run of a profile."""
    timings_missing: str = ""
    """Reason that a timed run has no timings."""

    @property
    def key(self) -> RunKey:
        """Identity of the run within its group."""
        return RunKey(
            mode=self.mode,
            regime=self.regime,
            variant=self.variant,
            replay=self.replay,
            order=self.order,
        )

    @property
    def label(self) -> str:
        """Name in tables and charts: `mode` or `mode@variant`."""
        return f"{self.mode}@{self.variant}" if self.variant else self.mode

    @property
    def title(self) -> str:
        """`label`, with the kind of a replay: `no_dp (permuted)`."""
        return f"{self.label} ({self.replay})" if self.replay else self.label

    @property
    def reason(self) -> str:
        """Reason that it did not finish, in a sentence without a full stop; empty if unknown."""
        if self.failure is not None:
            return self.failure.reason.rstrip(". ")
        return self.trajectory_missing if self.status is Status.MISSING else ""


@dataclass(frozen=True, kw_only=True)
class Group:
    """All runs of one launch, which are compared together."""

    name: str
    run_id: str
    start_time_ms: int
    """Unix time."""
    plan: GroupPlan
    runs: tuple[ModeRun, ...]
    """Runs in the plan's order, with replays and missing ones, without timed ones."""
    timed_runs: tuple[ModeRun, ...] = ()
    """Runs of a profile, missing ones included, in the order of timing."""
    rank_statuses: Mapping[Status, int] = field(default_factory=dict)
    """Number of rank runs with each status."""
    superseded: int = 0
    """Earlier attempts of the same mode and regime, left out."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """Tags of the group's run, which users may set."""
