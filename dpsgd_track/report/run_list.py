"""Tags and metrics by which the MLflow UI's list of runs tells verdict, drift and cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from dpsgd_track.comparison.profile import Profile, profile_of
from dpsgd_track.comparison.result import GroupComparison, ModeVerdict
from dpsgd_track.comparison.verdict import Verdict, worst
from dpsgd_track.record import names
from dpsgd_track.record.run import Marks


def marks(comparison: GroupComparison, note: str) -> dict[str, Marks]:
    """Marks of the group's run and of each mode run, by run id.

    Args:
        note: note of the group's run.
    """
    group = comparison.group
    costs = _costs(profile_of(group))
    found = dict(_costs_of_runs(comparison, costs))
    modes = {mode.label: mode for mode in comparison.modes}
    for run in group.runs:
        mode = modes.get(run.title)
        if mode is None or not run.run_id:
            continue
        verdict = worst(finding.verdict for finding in mode.counted(run.regime))
        drift = _largest(_drifts(mode, run.regime))
        found[run.run_id] = Marks(
            tags={names.VERDICT: verdict.value}, metrics=_metrics(drift, costs.get(run.label))
        )
    drift = _largest(
        each
        for mode in comparison.modes
        for regime in comparison.regimes
        for each in _drifts(mode, regime.name)
    )
    found[group.run_id] = Marks(
        tags={names.VERDICT: comparison.verdict.value, names.NOTE: note},
        metrics=_metrics(drift, _largest(costs.values())),
        is_faulty=comparison.verdict is Verdict.BUG,
    )
    return found


def profile_marks(profile: Profile, group_run: str, note: str) -> dict[str, Marks]:
    """Marks of a group that holds only a profile."""
    cost = _largest(_costs(profile).values())
    return {group_run: Marks(tags={names.NOTE: note}, metrics=_metrics(None, cost))}


def _costs_of_runs(
    comparison: GroupComparison, costs: Mapping[str, float]
) -> Iterable[tuple[str, Marks]]:
    for run in comparison.group.timed_runs:
        if run.run_id and run.label in costs:
            yield run.run_id, Marks(metrics=_metrics(None, costs[run.label]))


def _costs(profile: Profile | None) -> dict[str, float]:
    """Step time over ordinary training's by mode, at the shape where it is largest."""
    costs: dict[str, float] = {}
    for cost in profile.costs if profile else ():
        if cost.time_ratio is not None:
            ratio = cost.time_ratio.median
            costs[cost.label] = max(ratio, costs.get(cost.label, ratio))
    return costs


def _drifts(mode: ModeVerdict, regime: str) -> Iterable[float]:
    """Largest drift of each stage, as a share of its limit."""
    for (of, _), rungs in mode.ladders.items():
        if of == regime:
            yield from (rung.times for rung in rungs if rung.value)


def _largest(values: Iterable[float]) -> float | None:
    """The largest finite value: a store keeps no infinity, and a list sorts by the column."""
    return max(filter(math.isfinite, values), default=None)


def _metrics(drift: float | None, cost: float | None) -> dict[str, float]:
    both = {names.DRIFT_OF_LIMIT: drift, names.COST: cost}
    # The list shows all digits that there are.
    return {name: float(f"{value:.3g}") for name, value in both.items() if value is not None}
