"""The plan of a group: its modes, regimes and processes, and their configuration.

Made once from the command line and kept as an artifact of the group. It is complete: `resume`,
other machines and the comparison read the plan, never a command line.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from dpsgd_track.config import JobConfig, RegimeConfig, require
from dpsgd_track.demands import LeftOut, sentences
from dpsgd_track.record.codec import Codec
from dpsgd_track.record.environment import Environment

PLAN_FILE = "plan.json"


class Suite(enum.StrEnum):
    """Suite that a group was launched with."""

    QUICK = "quick"
    FULL = "full"
    SINGLE = "single"
    PROFILE = "profile"
    FAULTS = "faults"

    @property
    def is_resumable(self) -> bool:
        """False for a profile, whose times are comparable only within one launch."""
        return self is not Suite.PROFILE

    @property
    def is_charted(self) -> bool:
        """True if the group's run has the loss and gradient norm of every mode.

        Faults are too many, and timed runs have neither.
        """
        return self not in (Suite.PROFILE, Suite.FAULTS)

    @property
    def is_judged(self) -> bool:
        """True if a launch itself ends with a judgement of its runs, not only with their number."""
        return self in (Suite.PROFILE, Suite.FAULTS)


@dataclass(frozen=True, kw_only=True, order=True)
class RunKey:
    """Identity of a mode run within its group."""

    mode: str
    regime: str
    variant: str = ""
    """Name of the code it runs; empty for the installed code."""
    replay: str = ""
    """One of config.REPLAYS; empty for a run that is judged."""
    order: int = 0
    """Position among the timed runs of a profile; 0 for others."""


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """All jobs of a group and their common settings."""

    suite: Suite
    jobs: tuple[JobConfig, ...]
    """One process group each, run in this order: modes, then the modes of each variant; in a
    profile, one for each timed run."""
    num_ranks: int
    """Processes of each job, except for single-device modes."""
    environment: Environment
    """Environment of the machine that made the plan."""
    num_nodes: int = 1
    """Machines that the ranks are spread over."""
    left_out: tuple[LeftOut, ...] = ()
    """Runs that were asked for and are left out, as the mode does not take them."""
    command: str = ""
    """Command line it was made from, without credentials and group; for display, never parsed."""

    def __post_init__(self) -> None:
        require(self.num_nodes >= 1, "nnodes", self.num_nodes, "an integer >= 1")

    @property
    def not_compared(self) -> tuple[str, ...]:
        """A clause for each part that is left out, `not compared: ghost in clip, as ...`."""
        return sentences(self.left_out)

    def runs(self) -> Iterator[tuple[RunKey, JobConfig, RegimeConfig]]:
        """Every mode run, in the order of execution."""
        for job in self.jobs:
            for regime in job.regimes:
                yield run_key(job, regime), job, regime


def run_key(job: JobConfig, regime: RegimeConfig) -> RunKey:
    """The key of `job`'s run in `regime`."""
    return RunKey(
        mode=job.mode,
        regime=regime.name,
        variant=job.variant.name if job.variant else "",
        replay=regime.replay,
        order=regime.order,
    )


PLAN = Codec(GroupPlan, "dpsgd-track/plan", 1)


@dataclass(frozen=True, kw_only=True)
class StartedJob:
    """A job with the locations that its workers write to."""

    job: JobConfig
    environment: Environment
    """Environment of the launcher."""
    work_dir: str
    """Folder for trajectories, progress and failure reports."""
    spool: str = ""
    """Folder of the group's spool, which workers append records to; empty to keep none."""
    group_run: str = ""
    """Key of the group's run, which charts all modes; empty to keep nothing there."""
    mode_runs: tuple[str, ...] = ()
    """Mode run of each regime, by its key in the spool."""
    rank_runs: tuple[tuple[str, ...], ...] = ()
    """For each regime, the key of each rank's run; empty for a rank that is not logged."""
    stall_s: float = 60.0
    """Seconds without progress after which a rank writes its stacks to its work folder."""


STARTED_JOB = Codec(StartedJob, "dpsgd-track/job", 1)
