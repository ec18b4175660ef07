"""Missing runs of a group: its plan minus its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dpsgd_track.config import CLIP, NOISE, JobConfig, NodesConfig, RegimeConfig, Settings, require
from dpsgd_track.launcher.recording import Recording, take_up
from dpsgd_track.modes.table import REFERENCE
from dpsgd_track.record import names
from dpsgd_track.record.environment import environment
from dpsgd_track.record.plan import GroupPlan, RunKey, Suite, run_key
from dpsgd_track.record.run import Group, Status
from dpsgd_track.store.find_group import read_group_anywhere
from dpsgd_track.store.reader import GroupNotFound


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Runs of a group that did not finish."""

    group: Group
    """The group, with the runs it has."""
    jobs: tuple[JobConfig, ...]
    """Jobs of its plan with the missing regimes; none if the group is complete."""
    clip_bounds: Mapping[str, tuple[float, ...]]
    """C of each step, for clip regimes that the reference finished."""

    @property
    def plan(self) -> GroupPlan:
        """The group's plan with the missing jobs alone."""
        return replace(self.group.plan, jobs=self.jobs)

    @property
    def changes(self) -> tuple[str, ...]:
        """Facts of the environment that have changed since the group was launched."""
        before = dict(self.group.plan.environment.items())
        return tuple(
            f"{name} is {value}, was {before[name]}"
            for name, value in environment().items()
            if before[name] != value
        )


def find_missing(settings: Settings, wanted: str, nodes: NodesConfig) -> Missing:
    """Compare the plan of a group with its record.

    Args:
        wanted: a group's name, a run id, or `latest`.
        nodes: machines to run it on, as many as before.

    Raises:
        ValueError: there is no such group, or it cannot be resumed.
    """
    try:
        group = read_group_anywhere(settings, wanted, print).group
    except GroupNotFound as error:
        raise ValueError(str(error)) from error
    plan = group.plan
    allowed = f"a group of {', '.join(suite for suite in Suite if suite.is_resumable)}"
    advice = "Times of a profile mean something beside those of the same launch: launch it again."
    require(plan.suite.is_resumable, "group", wanted, allowed, advice)
    advice = "Ranks are spread over machines as they were. Give --nnodes, --node-rank and "
    advice += "--rdzv-endpoint on each."
    allowed = f"{plan.num_nodes}, as before"
    require(nodes.num_nodes == plan.num_nodes, "nnodes", nodes.num_nodes, allowed, advice)
    # A run that ended without its record cannot be compared.
    done = {
        run.key
        for run in group.runs
        if run.status is Status.FINISHED and not run.trajectory_missing
    }
    jobs = (_with_regimes(job, _missing(job, done)) for job in plan.jobs)
    return Missing(
        group=group,
        jobs=tuple(job for job in jobs if job is not None),
        clip_bounds=_clip_bounds(group),
    )


def _with_regimes(job: JobConfig, regimes: tuple[RegimeConfig, ...]) -> JobConfig | None:
    """`job` with `regimes` alone; None if there are none."""
    return replace(job, regimes=regimes) if regimes else None


def _missing(job: JobConfig, done: set[RunKey]) -> tuple[RegimeConfig, ...]:
    missing = [regime for regime in job.regimes if run_key(job, regime) not in done]
    # A replay of clip needs the bounds of the original run, noise the update of its silent twin.
    together = {regime.name for regime in missing if regime.kind in (CLIP, NOISE)}
    return tuple(r for r in job.regimes if r in missing or r.name in together)


def _clip_bounds(group: Group) -> dict[str, tuple[float, ...]]:
    return {
        run.regime: tuple(map(float, run.trajectory.max_grad_norm))
        for run in group.runs
        if run.mode == REFERENCE and not run.replay and run.status is Status.FINISHED
        if run.trajectory is not None and not run.trajectory_missing
    }


def reopen_group(missing: Missing, settings: Settings, *, is_offline: bool) -> Recording:
    """Resume recording of the group.

    Args:
        is_offline: records stay in the spool; no store is used.

    Raises:
        ValueError: it is still being run, or the store cannot be used.
    """
    group = missing.group
    allowed = "a group that nobody works on"
    recording, is_new = take_up(settings, group.name, group.name, allowed, is_offline=is_offline)
    key = group.tags.get(names.KEY, group.run_id)
    outdated = (names.VERDICT, names.NOTE)
    tags = {name: value for name, value in group.tags.items() if name not in outdated}
    recording.tree.resume_group(key, group.start_time_ms, tags, group.plan, is_elsewhere=is_new)
    return recording
