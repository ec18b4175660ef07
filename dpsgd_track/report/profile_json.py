"""`profile.json`: step times of a profile and the costs computed from them, as one document."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dpsgd_track.comparison.profile import Cost, Figures, Profile
from dpsgd_track.record.codec import Codec
from dpsgd_track.record.run import Group, ModeRun, Status
from dpsgd_track.record.timings import Timings
from dpsgd_track.report.profile_table import started


@dataclass(frozen=True, kw_only=True)
class CostEntry(Figures):
    """Cost of one mode at one shape, relative to ordinary training."""

    tracking_overhead: float | None
    """Median time of tracked steps over that of the others, minus 1."""
    notes: tuple[str, ...]
    """Remarks on the figures, or the reason why there are none."""


@dataclass(frozen=True, kw_only=True)
class TimedRunEntry:
    """One run of the profile."""

    mode: str
    variant: str
    seq_length: int
    """Tokens per sequence."""
    batch_size: int
    """Sequences per step on each rank."""
    order: int
    """Position among the runs of the group, from 1."""
    run_id: str
    """Id on the tracking server; empty when the run is missing."""
    status: Status
    reason: str
    """Reason that it failed, or has no timings."""
    timings: Timings | None


@dataclass(frozen=True, kw_only=True)
class ProfileDocument:
    """Cost of each mode of a group relative to ordinary training; every number is finite."""

    group: str
    """Name of the run group."""
    group_run_id: str
    """Id of the group's run on the tracking server."""
    started: str
    """Start of the launch, UTC, ISO 8601."""
    sentence: str
    incomplete: tuple[str, ...]
    """One sentence for each run that failed or is missing."""
    costs: tuple[CostEntry, ...]
    runs: tuple[TimedRunEntry, ...]


PROFILE = Codec(ProfileDocument, "dpsgd-track/profile", 1)
"""Writes and reads `profile.json`; `PROFILE.json_schema()` is its JSON schema."""


def profile_json(profile: Profile, group: Group) -> str:
    """The profile as JSON text."""
    return PROFILE.dumps(profile_document(profile, group), indent=1) + "\n"


def profile_document(profile: Profile, group: Group) -> ProfileDocument:
    """The contents of `profile.json`."""
    return ProfileDocument(
        group=group.name,
        group_run_id=group.run_id,
        started=started(group),
        sentence=profile.sentence,
        incomplete=profile.incomplete,
        costs=tuple(map(_cost, profile.costs)),
        runs=tuple(map(_run, group.timed_runs)),
    )


def _cost(cost: Cost) -> CostEntry:
    figures = {field.name: getattr(cost, field.name) for field in dataclasses.fields(Figures)}
    return CostEntry(**figures, tracking_overhead=cost.tracking_overhead, notes=cost.notes)


def _run(run: ModeRun) -> TimedRunEntry:
    assert run.job is not None, "a timed run is planned"
    return TimedRunEntry(
        mode=run.mode,
        variant=run.variant,
        seq_length=run.job.data.seq_length,
        batch_size=run.job.data.batch_size,
        order=run.order,
        run_id=run.run_id,
        status=run.status,
        reason=run.reason or run.timings_missing,
        timings=run.timings,
    )
