"""Cost of each mode relative to ordinary training: medians, spreads and ratios. No verdict.

A mode's run is compared with the baseline runs right before and after it, which cancels drift of
the machine; the rounds of a profile are pooled afterwards. Ratios are of untracked steps.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dpsgd_track.modes.table import baseline_of
from dpsgd_track.record.failure import FailureKind
from dpsgd_track.record.run import Group, ModeRun, Status
from dpsgd_track.record.timings import Timings

RESTLESS = 0.05
"""Least relative change between the two baseline runs around a mode that is reported."""


class CostStatus(enum.StrEnum):
    """Outcome of one run of a profile."""

    MEASURED = "measured"
    OUT_OF_MEMORY = "out of memory"
    FAILED = "failed"
    MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Distribution over steps of one kind."""

    median: float
    p20: float
    p80: float
    """20th and 80th percentile."""
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The baseline's runs before and after a mode, in every round."""

    label: str
    step_time_ms: float
    """Median over the steps of all these runs."""
    peak_memory_gib: float
    """Median over all these runs."""
    num_runs: int
    """2 per round, less the runs without a measurement."""
    moved: float | None
    """Median step time of the run after over that of the run before, minus 1, in the round where
    it is farthest from 0; None if no round has both."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Measurements of one mode at one shape, pooled over rounds."""

    label: str
    """`mode` or `mode@variant`."""
    mode: str
    variant: str
    seq_length: int
    """Tokens per sequence."""
    batch_size: int
    """Sequences per step on each rank."""
    status: CostStatus
    is_baseline: bool = False
    reason: str = ""
    """Reason for a missing measurement; otherwise empty."""
    num_ranks: int | None = None
    step_time_ms: Spread | None = None
    """Untracked steps."""
    tracked_time_ms: Spread | None = None
    """Tracked steps."""
    tokens_per_second: Spread | None = None
    """Untracked steps."""
    peak_memory_gib: float | None = None
    """Median over its runs of the largest rank's peak."""
    baseline: Baseline | None = None
    """None for a baseline itself, and if no baseline was measured."""
    time_ratio: Spread | None = None
    """Step time over the baseline's median in the same round."""
    ratio_of_rounds: tuple[float, ...] = ()
    """Median of each round's ratios, in order."""
    memory_ratio: float | None = None
    """Peak memory over the baseline's in the same round, median over rounds."""
    moved: float | None = None
    """For a baseline: largest over smallest median of its runs at the shape, minus 1."""
    plan: Mapping[str, str] = field(default_factory=dict)
    """Method that the mode chose for each layer."""


@dataclass(frozen=True, kw_only=True)
class Cost(Figures):
    """One mode at one shape, or all runs of a baseline."""

    run: ModeRun
    """One of its runs, a measured one if there is any."""

    @property
    def shape(self) -> tuple[int, int]:
        """(T, B)"""
        return self.seq_length, self.batch_size

    @property
    def tracking_overhead(self) -> float | None:
        """Median time of tracked steps over that of untracked ones, minus 1."""
        if self.tracked_time_ms is None or self.step_time_ms is None:
            return None
        return self.tracked_time_ms.median / self.step_time_ms.median - 1

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the figures, or the reason why there are none."""
        found = []
        if self.status is CostStatus.OUT_OF_MEMORY:
            found.append("out of memory")
        elif self.status is not CostStatus.MEASURED:
            found.append(f"{self.status}: {self.reason}" if self.reason else str(self.status))
        elif not self.is_baseline and self.baseline is None:
            found.append("no baseline was measured beside it")
        elif self.baseline is not None and self.baseline.num_runs < 2:
            found.append("held against one baseline run")
        moved = self.baseline.moved if self.baseline else self.moved
        if moved is not None and abs(moved) >= RESTLESS:
            change = 100 * moved
            own = f"moved {change:.0f} %"
            found.append(f"baseline moved {change:+.0f} %" if self.baseline else own)
        if len(self.ratio_of_rounds) > 1:
            least, most = min(self.ratio_of_rounds), max(self.ratio_of_rounds)
            found.append(f"{len(self.ratio_of_rounds)} rounds, {least:.2f} to {most:.2f}")
        if self.reason and self.status is CostStatus.MEASURED:
            found.append(self.reason)
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Cost of all modes of a group."""

    costs: tuple[Cost, ...]
    """One for each mode and shape, shape after shape, in the order of measurement."""
    incomplete: tuple[str, ...]
    """A sentence for each run that failed or is missing; running out of memory is a result."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the modes, in order."""
        return tuple(dict.fromkeys(cost.label for cost in self.costs))

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(T, B) of each shape, in order."""
        return tuple(dict.fromkeys(cost.shape for cost in self.costs))

    @property
    def sentence(self) -> str:
        """Summary of the measurements in a line."""
        counts = dict.fromkeys(CostStatus, 0)
        for cost in self.costs:
            counts[cost.status] += 1
        num_modes, num_shapes = len(self.labels), len(self.shapes)
        said = [
            f"{num_modes} mode{'s' * (num_modes != 1)} at "
            f"{num_shapes} shape{'s' * (num_shapes != 1)}"
        ]
        said += [f"{count} {status}" for status, count in counts.items() if count]
        return ", ".join(said) + "."


def profile_of(group: Group) -> Profile | None:
    """Profile of the group; None if it has none."""
    if not group.timed_runs:
        return None
    costs: list[Cost] = []
    in_order = sorted(group.timed_runs, key=lambda run: run.order)
    for shape in dict.fromkeys(map(_shape, in_order)):
        runs = [run for run in in_order if _shape(run) == shape]
        for label in dict.fromkeys(run.label for run in runs):
            own = [run for run in runs if run.label == label]
            if label in {baseline_of(run.mode) for run in runs}:
                costs.append(_baseline_cost(own))
            else:
                costs.append(_cost(own, runs))
    failed = (
        run for run in group.timed_runs if status_of(run) in (CostStatus.FAILED, CostStatus.MISSING)
    )
    return Profile(costs=tuple(costs), incomplete=tuple(map(_failure, failed)))


def over_limits(
    profile: Profile, max_slowdown: float | None, max_memory: float | None
) -> list[str]:
    """A sentence for each mode and shape that costs more than its limit, or has no ratio to hold
    against it.

    Args:
        max_slowdown: step time over the baseline's, median over the steps; None for no limit.
        max_memory: peak memory over the baseline's.
    """
    found = []
    for cost in profile.costs:
        ratios = (
            ("step time", cost.time_ratio.median if cost.time_ratio else None, max_slowdown),
            ("peak memory", cost.memory_ratio, max_memory),
        )
        where = f"{cost.label} (T={cost.seq_length}, B={cost.batch_size})"
        for what, ratio, limit in ratios:
            if cost.is_baseline or limit is None:
                continue
            if ratio is None:
                why = "; ".join(cost.notes) or "nothing was measured"
                found.append(f"{where}: no {what} to hold against {limit:g}: {why}")
            elif not ratio <= limit:
                found.append(
                    f"{where}: {ratio:.3g} times the {what} of the baseline, over {limit:g}"
                )
    return found


def _shape(run: ModeRun) -> tuple[int, int]:
    assert run.job is not None, "a timed run is planned"
    return run.job.data.seq_length, run.job.data.batch_size


def status_of(run: ModeRun) -> CostStatus:
    """Outcome of `run`."""
    if run.failure is not None and run.failure.kind is FailureKind.OUT_OF_MEMORY:
        return CostStatus.OUT_OF_MEMORY
    if run.status is Status.MISSING:
        return CostStatus.MISSING
    is_measured = run.status is Status.FINISHED and run.timings
    return CostStatus.MEASURED if is_measured else CostStatus.FAILED


def spread(values: Sequence[float]) -> Spread | None:
    """Median, 20th and 80th percentile; None if `values` is empty."""
    if not values:
        return None
    p20, median, p80 = np.percentile(values, [20, 50, 80]).tolist()
    return Spread(median=median, p20=p20, p80=p80, num_steps=len(values))


def _failure(run: ModeRun) -> str:
    shape = "T={}, B={}".format(*_shape(run))
    reason = run.reason or run.timings_missing
    return f"{run.label} ({shape}) is {run.status}" + (f": {reason}" if reason else "")


def _steps(timings: Timings, *, tracked: bool) -> list[float]:
    pairs = zip(timings.step_time_ms, timings.is_tracked, strict=True)
    return [time for time, is_tracked in pairs if is_tracked == tracked]


def _speeds(timings: Timings) -> list[float]:
    every = zip(timings.num_tokens, timings.step_time_ms, timings.is_tracked, strict=True)
    return [tokens / time * 1e3 for tokens, time, is_tracked in every if time and not is_tracked]


def _measured(runs: Iterable[ModeRun]) -> list[Timings]:
    return [r.timings for r in runs if r.timings and status_of(r) is CostStatus.MEASURED]


def _own(runs: Sequence[ModeRun]) -> Cost:
    """Pooled runs of one mode at one shape, without a baseline."""
    timings = _measured(runs)
    # A measured run represents the others.
    shown = next((run for run in runs if status_of(run) is CostStatus.MEASURED), runs[0])
    seq_length, batch_size = _shape(shown)
    num_lost = len(runs) - len(timings)
    reason = f"{num_lost} of {len(runs)} runs not measured" if num_lost else ""
    return Cost(
        label=shown.label,
        mode=shown.mode,
        variant=shown.variant,
        seq_length=seq_length,
        batch_size=batch_size,
        status=status_of(shown),
        reason=reason if timings else shown.reason or shown.timings_missing,
        run=shown,
        num_ranks=shown.job.num_ranks if shown.job else None,
        step_time_ms=spread([ms for t in timings for ms in _steps(t, tracked=False)]),
        tracked_time_ms=spread([ms for t in timings for ms in _steps(t, tracked=True)]),
        tokens_per_second=spread([speed for t in timings for speed in _speeds(t)]),
        peak_memory_gib=float(np.median([t.peak_memory_gib for t in timings])) if timings else None,
        plan=shown.facts.norm_plan if shown.facts else {},
    )


def _baseline_cost(runs: Sequence[ModeRun]) -> Cost:
    medians = [np.median(_steps(t, tracked=False)) for t in _measured(runs)]
    moved = float(max(medians) / min(medians) - 1) if len(medians) > 1 else None
    return replace(_own(runs), is_baseline=True, moved=moved)


def _cost(own: Sequence[ModeRun], runs: Sequence[ModeRun]) -> Cost:
    """Cost of the runs `own` of a mode, one per round, relative to the baseline's among `runs`."""
    rounds = [
        (timings, around)
        for run in own
        for timings in _measured([run])
        if (around := _around(run, runs))
    ]
    if not rounds:
        return _own(own)
    ratios = [
        [ms / _median(around) for ms in _steps(timings, tracked=False)]
        for timings, around in rounds
    ]
    beside = [each for _, around in rounds for each in around]
    moved = [
        _median(around[1:]) / _median(around[:1]) - 1 for _, around in rounds if len(around) == 2
    ]
    memory = [timings.peak_memory_gib / _peak_gib(around) for timings, around in rounds]
    return replace(
        _own(own),
        baseline=Baseline(
            label=baseline_of(own[0].mode),
            step_time_ms=_median(beside),
            peak_memory_gib=_peak_gib(beside),
            num_runs=len(beside),
            moved=max(moved, key=abs, default=None),
        ),
        time_ratio=spread([ratio for each in ratios for ratio in each]),
        ratio_of_rounds=tuple(float(np.median(each)) for each in ratios),
        memory_ratio=float(np.median(memory)),
    )


def _median(runs: Sequence[Timings]) -> float:
    """Median step time over all untracked steps of `runs` (ms)."""
    return float(np.median([ms for timings in runs for ms in _steps(timings, tracked=False)]))


def _peak_gib(runs: Sequence[Timings]) -> float:
    return float(np.median([timings.peak_memory_gib for timings in runs]))


def _around(run: ModeRun, runs: Sequence[ModeRun]) -> list[Timings]:
    """The baseline's last run before `run` and its first after it, at the same shape."""
    label = baseline_of(run.mode)
    theirs = [other for other in runs if other.label == label]
    before = [other for other in theirs if other.order < run.order][-1:]
    after = [other for other in theirs if other.order > run.order][:1]
    return _measured([*before, *after])
