"""A comparison in a line each: what is wrong, where, how sure that is, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dpsgd_track.comparison.diagnose.ladder import Rung
from dpsgd_track.comparison.profile import RESTLESS, Cost, Profile, profile_of
from dpsgd_track.comparison.result import GroupComparison, ModeVerdict
from dpsgd_track.report.stages import advised, capitalised, multiple

_MOST_COSTS = 3


@dataclass(frozen=True, kw_only=True)
class Brief:
    """Sentences for somebody who reads nothing else."""

    what: str
    where: str
    how_sure: str
    cost: str


def brief(comparison: GroupComparison) -> Brief:
    """The lines of a comparison."""
    leading = comparison.leading
    culprit = leading.culprit if leading else None
    what = capitalised(comparison)
    if culprit is not None:
        # Place and evidence are lines of their own.
        what = what.replace(culprit.sentence, culprit.claimed)
        where, sure = culprit.where, f"{culprit.evidence}."
    elif leading is not None:
        where, sure = _place(leading), ""
    else:
        where, sure = _nearest(comparison), comparison.seen.sentence
    return Brief(
        what=what,
        where=f"{where[:1].upper()}{where[1:]}.",
        how_sure=f"{sure} {advised(comparison).why}".strip(),
        cost=_cost(profile_of(comparison.group)),
    )


def _place(mode: ModeVerdict) -> str:
    """The place of the finding that a mode's sentence tells."""
    finding = mode.findings[0]
    step = f"step {finding.step}" if finding.step is not None else ""
    return ", ".join(filter(None, [f"in {finding.regime}", step, finding.where]))


def _nearest(comparison: GroupComparison) -> str:
    """The stage that is nearest to its limit, where all are within theirs."""
    told = {
        rung.times: f"{rung.stage} of {mode.label} in {regime}, {multiple(rung.value, rung.limit)}"
        for mode in comparison.modes
        for (regime, _), rungs in mode.ladders.items()
        for rung in _measured(rungs)
    }
    *rest, last = [regime.name for regime in comparison.regimes] or [""]
    regimes = " and ".join(filter(None, [", ".join(rest), last]))
    if not told:
        return f"in {regimes}" if regimes else "nowhere"
    return f"in {regimes}; nearest to its limit: {told[max(told)]}"


def _measured(rungs: tuple[Rung, ...]) -> Iterator[Rung]:
    return (rung for rung in rungs if rung.value and math.isfinite(rung.times))


def _cost(profile: Profile | None) -> str:
    """Costs of modes: of a variant beside the same mode without it, else beside no privacy."""
    measured = [cost for cost in profile.costs if cost.time_ratio] if profile else []
    if not measured:
        return "Not measured: dpsgd-track profile does."
    moved = max((abs(c.baseline.moved or 0) for c in measured if c.baseline), default=0)
    if moved >= RESTLESS:
        return f"Not told: the machine was restless, its baseline moved by {_percent(moved)}."
    lines = list(_changes(measured)) or [
        f"{cost.label} takes {cost.time_ratio.median:.2f} × the time of {cost.baseline.label}"
        for cost in sorted(measured, key=lambda c: -c.time_ratio.median if c.time_ratio else 0)
        if cost.time_ratio and cost.baseline
    ]
    more = f", and {len(lines) - _MOST_COSTS} more" if len(lines) > _MOST_COSTS else ""
    return f"{', '.join(lines[:_MOST_COSTS])}{more}."


def _changes(measured: list[Cost]) -> Iterator[str]:
    plain = {(cost.mode, cost.shape): cost for cost in measured if not cost.variant}
    for cost in measured:
        before = plain.get((cost.mode, cost.shape)) if cost.variant else None
        if before and before.time_ratio and cost.time_ratio:
            change = cost.time_ratio.median / before.time_ratio.median - 1
            yield f"{cost.label} is {faster_or_slower(change)} than {before.label}"


def faster_or_slower(change: float) -> str:
    """`3 % slower`, of a relative change of a time."""
    return f"{_percent(abs(change))} {'slower' if change >= 0 else 'faster'}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
