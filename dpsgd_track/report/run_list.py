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
    stages = _by_stage(comparison)
    detail = {f"{names.DRIFT_OF_LIMIT}/{stage}": drift for stage, drift in stages.items()}
    detail |= {names.metric_of(names.COST, label): cost for label, cost in costs.items()}
    whole = _metrics(_largest(stages.values()), _largest(costs.values()))
    found[group.run_id] = Marks(
        tags={names.VERDICT: comparison.verdict.value, names.NOTE: note},
        metrics={**whole, **{name: _rounded(value) for name, value in detail.items()}},
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


def _by_stage(comparison: GroupComparison) -> dict[str, float]:
    """Largest finite drift of any mode as a share of its limit, by stage; 0 where all are equal."""
    drifts: dict[str, float] = {}
    for mode in comparison.modes:
        for rung in (rung for rungs in mode.ladders.values() for rung in rungs):
            if rung.value is not None and rung.limit is not None:
                share = rung.times if rung.value else 0.0
                if math.isfinite(share):
                    drifts[rung.stage] = max(share, drifts.get(rung.stage, 0.0))
    return drifts


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
    return {name: _rounded(value) for name, value in both.items() if value is not None}


def _rounded(value: float) -> float:
    # The list shows all digits that there are.
    return float(f"{value:.3g}")
