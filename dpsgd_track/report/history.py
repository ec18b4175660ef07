"""The history of an experiment: drifts, costs and verdicts, group by group."""

from __future__ import annotations

from datetime import UTC, datetime

from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.comparison.verdict import Verdict
from dpsgd_track.record.judged import JudgedGroup, with_metrics
from dpsgd_track.record.run import Marks
from dpsgd_track.record.stages import Stage
from dpsgd_track.report.brief import faster_or_slower
from dpsgd_track.report.table import ABSENT

STAGES = tuple(stage for stage in Stage if stage not in (Stage.DATA, Stage.INITIAL_WEIGHTS))
"""Stages with a drift that can be larger or smaller."""
HEADINGS = ("group", "started (UTC)", "revision", "verdict", *STAGES, "cost")
VERDICT = HEADINGS.index("verdict")
_LEAST_OF_LIMIT, _LEAST_FACTOR, _LEAST_COST = 0.1, 2.0, 0.02
"""Least share of a limit, change of it, and change of a cost that are worth telling."""
_MOST_TOLD = 2


def judged(comparison: GroupComparison, marks: Marks) -> JudgedGroup:
    """A comparison as a point of the history.

    Args:
        marks: of the group's run.
    """
    group = comparison.group
    point = JudgedGroup(
        name=group.name,
        start_time_ms=group.start_time_ms,
        revision=group.plan.environment.git_revision,
        verdict=comparison.verdict.value,
    )
    return with_metrics(point, marks.metrics)


def since(before: JudgedGroup, now: JudgedGroup) -> str:
    """Changes from one group to another: `Since 0a7250e: drifts unchanged, 3 % slower.`"""
    moved = _moved(before, now)
    told = [
        f"{stage} from {_share(before.drifts[stage])} to {_share(now.drifts[stage])} × limit"
        for stage in moved[:_MOST_TOLD]
    ] or ["drifts unchanged"]
    costs = {
        label: now.costs[label] / before.costs[label] - 1
        for label in sorted(now.costs.keys() & before.costs.keys())
    }
    if costs:
        label = max(costs, key=lambda each: abs(costs[each]))
        changed = f"{label} {faster_or_slower(costs[label])}"
        told.append(changed if abs(costs[label]) >= _LEAST_COST else "as fast")
    if before.verdict != now.verdict:
        told.insert(0, f"was {before.verdict}")
    return f"Since {before.shown_revision}: {', '.join(told)}."


def _moved(before: JudgedGroup, now: JudgedGroup) -> list[str]:
    """Stages whose drifts changed much, the largest drift first."""

    def change(stage: str) -> float:
        return max(now.drifts[stage], _LEAST_OF_LIMIT) / max(before.drifts[stage], _LEAST_OF_LIMIT)

    both = [stage for stage in STAGES if stage in before.drifts and stage in now.drifts]
    moved = [stage for stage in both if not 1 / _LEAST_FACTOR < change(stage) < _LEAST_FACTOR]
    return sorted(moved, key=lambda stage: -now.drifts[stage])


def _share(share: float) -> str:
    return f"{share:.2g}" if share < 100 else f"{share:,.0f}"


def started(group: JudgedGroup) -> str:
    """Time at which a group was launched."""
    return f"{datetime.fromtimestamp(group.start_time_ms / 1000, tz=UTC):%Y-%m-%d %H:%M}"


def cells(group: JudgedGroup) -> tuple[str, ...]:
    """One row, in the order of HEADINGS."""
    return (
        group.name,
        started(group),
        group.revision[:7] or ABSENT,
        group.verdict,
        *(_share(group.drifts[stage]) if stage in group.drifts else ABSENT for stage in STAGES),
        f"{max(group.costs.values()):.2f} ×" if group.costs else ABSENT,
    )


LEGEND = (
    "Drifts: the largest of any mode as a share of its limit, above 1 too much. Cost: step time "
    "over that of ordinary training, of the mode where it is largest."
)


def verdict_of(group: JudgedGroup) -> Verdict:
    """The verdict of a group; INCONCLUSIVE if somebody edited the tag."""
    known = {verdict.value: verdict for verdict in Verdict}
    return known.get(group.verdict, Verdict.INCONCLUSIVE)
