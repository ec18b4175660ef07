"""Judges one run of one regime: by itself, and against each run that it is held against."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from dpsgd_track.comparison.audit.consistency import Inconsistency
from dpsgd_track.comparison.audit.noise import judge_noise, passed_noise
from dpsgd_track.comparison.diagnose.culprit import blame
from dpsgd_track.comparison.diagnose.ladder import (
    Rung,
    excess_of,
    first_failure,
    ladder,
    own_errors,
    unlike_inputs,
)
from dpsgd_track.comparison.measure.alignment import align
from dpsgd_track.comparison.measure.drift import Pair
from dpsgd_track.comparison.measure.floor import Floor
from dpsgd_track.comparison.measure.observables import OBSERVABLES
from dpsgd_track.comparison.result import Judged, Key, RegimeComparison
from dpsgd_track.comparison.verdict import (
    Finding,
    judge_consistency,
    judge_floor,
    judge_pair,
    judge_run,
    number,
)
from dpsgd_track.comparison.waivers import Waiver, waiver_of
from dpsgd_track.config import NOISE, Thresholds, kind_of
from dpsgd_track.record.run import ModeRun


def judge_alone(
    run: ModeRun, regime: RegimeComparison
) -> tuple[list[Finding], tuple[Inconsistency, ...]]:
    """What is wrong with `run` whatever it is held against, and the relations that it breaks."""
    findings, broken = judge_consistency(run)
    findings = [*judge_run(run), *findings]
    if not run.replay:
        findings += judge_noise(run, regime.audits.get(run.label))
    return findings, broken


def judge_against(
    base: ModeRun,
    run: ModeRun,
    pair: Pair,
    thresholds: Thresholds,
    floor: Floor | None,
    *,
    unlike: Sequence[Finding],
    broken: Sequence[Inconsistency],
) -> Judged:
    """What `pair`, of two recorded runs, shows.

    Args:
        unlike: why the two cannot be compared; their drifts then say nothing about the mode.
        broken: relations between its own numbers that `run` breaks.
    """
    assert base.trajectory is not None
    assert run.trajectory is not None
    aligned = align(base.trajectory, run.trajectory)
    rungs = ladder(
        pair,
        thresholds,
        floor,
        inputs=unlike_inputs(base.trajectory, run.trajectory),
        broken=broken,
        own_errors=own_errors(aligned, pair, thresholds, floor),
    )
    left_out = run.facts.left_out_steps if run.facts else ()
    found = [*judge_floor(pair, floor), *judge_pair(pair, thresholds, floor, rungs, left_out)]
    key = pair.regime, pair.baseline
    if unlike:
        return Judged(findings=tuple(f for f in found if not f.observable), ladders={key: rungs})
    failure, guilty = first_failure(rungs), blame(rungs, aligned, run)
    return Judged(
        findings=tuple(found),
        failures={key: failure} if failure else {},
        ladders={key: rungs},
        blames={key: guilty} if guilty else {},
    )


def joined(results: Sequence[Judged], findings: Iterable[Finding], passed: str) -> Judged:
    """`findings` and all of `results` as one."""
    return Judged(
        findings=(*findings, *(f for result in results for f in result.findings)),
        failures={key: f for result in results for key, f in result.failures.items()},
        ladders={key: r for result in results for key, r in result.ladders.items()},
        blames={key: b for result in results for key, b in result.blames.items()},
        passed=passed,
    )


def passed(
    run: ModeRun,
    regime: RegimeComparison,
    thresholds: Thresholds,
    ladders: Mapping[Key, tuple[Rung, ...]],
) -> str:
    """What is said of a run that nothing was found of."""
    if kind_of(regime.name) == NOISE and run.label in regime.audits:
        return passed_noise(regime.audits[run.label])
    if run.replay:
        return f"replay that measures the floor of {regime.name}"
    role = f"baseline of {regime.name}" if run.label == regime.baseline else ""
    if not ladders:
        return role or f"oracle of {regime.name}"
    bases = " and ".join(base for _, base in ladders)
    agrees = f"{role + ', ' if role else ''}agrees with {bases} in {regime.name}"
    if run.facts and (left_out := run.facts.left_out_steps):
        steps = ", ".join(map(str, left_out))
        agrees += f" but for steps {steps}, which have batches that are empty and it takes none"
    rungs = [rung for rungs in ladders.values() for rung in rungs if rung.value is not None]
    nearest = max(rungs, key=lambda rung: rung.times, default=None)
    if nearest is None or not nearest.value:
        return f"{agrees} to the last bit"
    observable = OBSERVABLES[nearest.observable]
    threshold = float(getattr(thresholds, observable.threshold))
    limit = "what rounding explains" if nearest.floor is not None else "its threshold"
    return (
        f"{agrees}, nearest to its limit in {observable.title} with {number(nearest.value)}, "
        f"{number(nearest.times)} times {limit} (threshold {number(threshold)}, "
        f"floor {number(nearest.floor)})"
    )


def waive(
    judged: Judged,
    label: str,
    regime: RegimeComparison,
    thresholds: Thresholds,
    waivers: Sequence[Waiver],
    today: datetime.date,
) -> Judged:
    """`judged`, in which each finding that a waiver accepts carries it."""

    def waived(finding: Finding) -> Finding:
        pair = regime.pair(label, finding.against) if finding.against else None
        drift = pair.drifts.get(finding.observable) if pair else None
        if drift is None or finding.threshold is None:
            return finding
        excess = excess_of(drift, thresholds, regime.floor(finding.against))
        return replace(finding, waiver=waiver_of(finding, label, excess, waivers, today))

    return replace(judged, findings=tuple(map(waived, judged.findings)))
