"""Verdicts: PASS, DRIFT, BUG or INCONCLUSIVE, each with a sentence that gives the reason."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dpsgd_track.comparison.audit.consistency import TOLERANCE, Inconsistency, inconsistencies
from dpsgd_track.comparison.diagnose.culprit import Culprit, contradiction
from dpsgd_track.comparison.diagnose.ladder import (
    Rung,
    StageStatus,
    first_introduced,
    rung_at,
    unlike_inputs,
)
from dpsgd_track.comparison.measure.amount import number
from dpsgd_track.comparison.measure.clip_factors import clipped_share
from dpsgd_track.comparison.measure.drift import LOSS, Pair
from dpsgd_track.comparison.measure.excess import Evidence, Excess
from dpsgd_track.comparison.measure.finite import not_finite
from dpsgd_track.comparison.measure.observables import STAGES
from dpsgd_track.comparison.waivers import Waiver
from dpsgd_track.config import FLAT, PER_LAYER
from dpsgd_track.modes.table import spec_of
from dpsgd_track.record.failure import FailureKind
from dpsgd_track.record.run import ModeRun, Status
from dpsgd_track.record.stages import ObservableName, Stage
from dpsgd_track.record.trajectory import Trajectory

COVERAGE = (0.2, 0.8)
"""Fraction of samples in the mixed half of the clip regime that must be clipped for the regime to
be conclusive."""

SURE = 10.0
"""Multiple of its limit from which on an error is a bug, however small, if the stage's inputs were
right."""


class Verdict(enum.StrEnum):
    """Ordered by severity."""

    PASS = "PASS"
    INCONCLUSIVE = "INCONCLUSIVE"
    DRIFT = "DRIFT"
    BUG = "BUG"

    @property
    def severity(self) -> int:
        """0 for PASS, 3 for BUG."""
        return list(Verdict).index(self)


FAILURES = (Verdict.BUG, Verdict.DRIFT)
"""Verdicts on something that was compared and is wrong."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One reason for a verdict other than PASS."""

    verdict: Verdict
    regime: str
    sentence: str
    against: str = ""
    """Label of the baseline; empty if none is involved."""
    observable: ObservableName | None = None
    value: float | None = None
    threshold: float | None = None
    floor: float | None = None
    step: int | None = None
    where: str = ""
    culprit: Culprit | None = None
    """Culprit of a finding that needs no baseline."""
    waiver: Waiver | None = None
    """The waiver that accepts the finding for now, if any."""

    @property
    def fails(self) -> bool:
        """True if the finding makes a comparison fail."""
        return self.verdict in FAILURES and self.waiver is None


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The most severe of `verdicts`; PASS if there are none."""
    return max(verdicts, key=lambda v: v.severity, default=Verdict.PASS)


def judge_run(run: ModeRun) -> Iterator[Finding]:
    """Findings that need no comparison: how the run ended, NaN, and missing norms."""
    reason = f": {run.reason}" if run.reason else ""
    if run.status is not Status.FINISHED:
        # The worker stopped because of a computed value, which is a result.
        broke = run.failure is not None and run.failure.kind is FailureKind.NOT_FINITE
        yield Finding(
            verdict=Verdict.BUG if broke else Verdict.INCONCLUSIVE,
            regime=run.regime,
            sentence=f"its run in {run.regime} is {run.status}{reason}",
        )
    if run.trajectory_missing and run.status is Status.FINISHED:
        yield Finding(
            verdict=Verdict.INCONCLUSIVE,
            regime=run.regime,
            sentence=f"its record of {run.regime} is incomplete: {run.trajectory_missing}",
        )
    if run.trajectory is None:
        return
    if lacking := run.facts.not_optimized if run.facts else ():
        shown = ", ".join(lacking[:3]) + ", ..." * (len(lacking) > 3)
        yield Finding(
            verdict=Verdict.BUG,
            regime=run.regime,
            sentence=f"its optimizer lacks {len(lacking)} of "
            f"{len(run.trajectory.parameter_names)} trainable parameters ({shown}), which no step "
            f"in {run.regime} updates",
            where=lacking[0],
        )
    for bad in not_finite(run.trajectory):
        yield Finding(
            verdict=Verdict.BUG,
            regime=run.regime,
            sentence=f"{bad.title} is {bad.value} in {run.regime} at step {bad.step}"
            + (f", {bad.where}" if bad.where else ""),
            observable=bad.observable,
            value=bad.value,
            step=bad.step,
            where=bad.where,
        )
    yield from _unobserved(run, run.trajectory)


def _unobserved(run: ModeRun, trajectory: Trajectory) -> Iterator[Finding]:
    # A built-in mode that clips has per-sample norms; without them its clipping was not checked.
    # A user's own mode may be unable to report them.
    norms = trajectory.sample_norm
    spec = spec_of(run.mode)
    clips = spec is not None and spec.is_private
    if clips and norms.size and np.isnan(norms).all():
        yield Finding(
            verdict=Verdict.INCONCLUSIVE,
            regime=run.regime,
            sentence=f"it recorded no per-sample gradient norms in {run.regime}",
            observable=ObservableName.SAMPLE_NORM,
        )


def judge_coverage(run: ModeRun) -> Iterator[Finding]:
    """INCONCLUSIVE unless the reference clipped some samples, but not all, in the clip regime."""
    trajectory = run.trajectory
    if trajectory is None:
        return
    rule = run.setup.clipping if run.setup else FLAT
    clipped = clipped_share(rule, trajectory)
    is_mixed = clipped < 1
    # A record read from metrics lacks the number of samples per step.
    weights = np.maximum(trajectory.num_samples, 1)[is_mixed]
    mixed = clipped[is_mixed]
    share = float(np.average(mixed, weights=weights / weights.sum())) if mixed.size else 1.0
    low, high = COVERAGE
    parts = "the layers' gradients" if rule == PER_LAYER else "the samples"
    if not low <= share <= high:
        yield Finding(
            verdict=Verdict.INCONCLUSIVE,
            regime=run.regime,
            sentence=f"the reference clipped {share:.0%} of {parts} in {run.regime} where "
            f"{low:.0%} to {high:.0%} were meant, so clipping was not put to the test",
            value=share,
        )


def judge_likeness(
    baseline: ModeRun, mode: ModeRun, *, is_noise_settled: bool = False
) -> Iterator[Finding]:
    """INCONCLUSIVE if the runs' inputs or settings differ, so that drifts would mean nothing.

    Args:
        is_noise_settled: their noise is known to be the same, or nothing that depends on it is
            compared.
    """
    ours, theirs = baseline.trajectory, mode.trajectory
    if ours is None or theirs is None:
        return
    reasons = []
    unlike = unlike_inputs(ours, theirs)
    if unlike:
        when = "" if unlike.step is None else f" at step {unlike.step}"
        reasons.append(f"other {unlike.stage}{when}")
    if _differ(ours.noise_std, theirs.noise_std):
        reasons.append(f"noise of {number(theirs.noise_std)}, not {number(ours.noise_std)}")
    elif max(ours.noise_std, theirs.noise_std) > 0 and not is_noise_settled:
        reasons += [] if noise_is_matched(baseline, mode) else ["noise of its own"]
    _, i, j = np.intersect1d(ours.step, theirs.step, return_indices=True)
    if any(map(_differ, ours.max_grad_norm[i].tolist(), theirs.max_grad_norm[j].tolist())):
        reasons.append("other clipping bounds")
    divisors = ours.expected_batch_size, theirs.expected_batch_size
    if all(divisors) and divisors[0] != divisors[1]:
        reasons.append(f"an expected batch size of {divisors[1]}, not {divisors[0]}")
    if reasons:
        yield Finding(
            verdict=Verdict.INCONCLUSIVE,
            regime=mode.regime,
            sentence=f"cannot be compared with {baseline.label} in {mode.regime}: "
            f"it ran with {' and '.join(reasons)}",
            against=baseline.label,
            step=unlike.step if unlike else None,
        )


def noise_is_matched(baseline: ModeRun, run: ModeRun) -> bool:
    """True if the plan gives both runs the same source of noise."""
    keys = [_noise_key(each) for each in (baseline, run)]
    return "" not in keys and keys[0] == keys[1]


def _noise_key(run: ModeRun) -> str:
    """Name of the source; empty for one that no other run can have, or that is not known."""
    if run.setup is None:
        return ""
    if run.setup.noise_matched:
        return "common"
    is_seeded = run.job is not None and run.job.noise_from == "seed"
    return f"seed of {run.mode}" if is_seeded else ""


def _differ(ours: float, theirs: float) -> bool:
    # NaN means unknown. 1e-6: the bound may have passed through float32 on one side.
    known = math.isfinite(ours) and math.isfinite(theirs)
    return known and not math.isclose(ours, theirs, rel_tol=1e-6)


def judge_gaps(pair: Pair, left_out: Sequence[int] = ()) -> list[Finding]:
    """One finding for each kind of item that only one side has.

    Args:
        left_out: steps that the mode's run reports as not taken.
    """
    return [
        Finding(
            verdict=Verdict.INCONCLUSIVE,
            regime=pair.regime,
            sentence=f"compared with {pair.baseline} in {pair.regime} only in part: {gap.sentence}",
            against=pair.baseline,
        )
        for gap in pair.gaps
        if (gap.kind, gap.missing_from, gap.names) != ("step", "mode", tuple(map(str, left_out)))
    ]


def judge_consistency(run: ModeRun) -> tuple[list[Finding], tuple[Inconsistency, ...]]:
    """Violated relations between the run's own numbers, with a finding for each."""
    if run.trajectory is None:
        return [], ()
    spec = spec_of(run.mode)
    clips = spec is None or spec.is_private
    broken = inconsistencies(run.trajectory, run.setup, clips=clips)
    findings = [
        Finding(
            verdict=Verdict.BUG if each.value > SURE * TOLERANCE else Verdict.DRIFT,
            regime=run.regime,
            sentence=f"{each.title}"
            + f", by {number(each.value)} (relative; limit {number(TOLERANCE)})" * each.has_amount
            + f" in {run.regime} at step {each.step}"
            + (f", {each.where}" if each.where else ""),
            observable=each.observable,
            value=each.value,
            threshold=TOLERANCE,
            step=each.step,
            where=each.where,
            culprit=contradiction(run.regime, each),
        )
        for each in broken
    ]
    return findings, broken


def judge_floor(evidence: Evidence) -> Iterator[Finding]:
    """INCONCLUSIVE if, from some step on, rounding alone explains any gradient."""
    pair, floor = evidence.pair, evidence.floor
    if floor is None or floor.chaos is None:
        return
    measured = floor.of(ObservableName.GRADIENT)
    yield Finding(
        verdict=Verdict.INCONCLUSIVE,
        regime=pair.regime,
        sentence=f"cannot be compared with {pair.baseline} in {pair.regime} from step "
        f"{floor.chaos} on: rounding alone moves equal runs apart, by up to {number(measured)} "
        "times the clipped sum. Run fewer steps, or lower the learning rate",
        against=pair.baseline,
        step=floor.chaos,
    )


def judge_pair(
    evidence: Evidence, rungs: Sequence[Rung], left_out: Sequence[int] = ()
) -> list[Finding]:
    """Every gap, and every drift over its limit.

    Args:
        rungs: the pair's ladder.
        left_out: as in `judge_gaps`.
    """
    pair = evidence.pair
    found = judge_gaps(pair, left_out)
    if not pair.drifts:
        found.append(
            Finding(
                verdict=Verdict.INCONCLUSIVE,
                regime=pair.regime,
                sentence=f"has nothing in common with {pair.baseline} in {pair.regime}",
                against=pair.baseline,
            )
        )
    guilty = {rung.stage for rung in rungs if rung.status is StageStatus.INTRODUCED}
    drifts = [
        finding
        for stage, observables in STAGES.items()
        for name in observables
        if name in evidence.excesses
        and (finding := _judge_drift(evidence, evidence.excesses[name], stage, stage in guilty))
    ]
    failure = first_introduced(rungs)
    first = failure.observable if failure else None
    # The worst drift leads; among equals, the one that shows the stage at fault.
    drifts.sort(key=lambda f: (-f.verdict.severity, f.observable is not first))
    return found + drifts


def _judge_drift(
    evidence: Evidence, excess: Excess, stage: Stage, is_at_fault: bool
) -> Finding | None:
    thresholds, floor, drift = evidence.thresholds, evidence.floor, excess.drift
    observable = drift.observable
    threshold = float(getattr(thresholds, observable.threshold))
    measured = evidence.measured(observable.name)
    times = float(np.nanmax(excess.times))
    if times <= 1:
        # Within the floor, or within the threshold if no floor is known.
        is_as_right_as_plain = floor is not None and floor.against_float64
        if drift.max <= threshold or is_as_right_as_plain:
            return None
        row = int(np.nanargmax(drift.per_step))
    else:
        row = int(np.nanargmax(excess.times))
    shown = rung_at(evidence, excess, row, stage, StageStatus.OK)
    as_fraction = _as_fraction(excess)
    verdict = Verdict.DRIFT
    if times <= 1:
        verdict = Verdict.INCONCLUSIVE
    elif as_fraction > thresholds.bug or (is_at_fault and measured is not None and times > SURE):
        verdict = Verdict.BUG
    held_to = thresholds.bug if as_fraction > thresholds.bug and times > 1 else threshold
    terms = _terms(excess, measured, times, held_to, is_bug=held_to == thresholds.bug)
    pair = evidence.pair
    return Finding(
        verdict=verdict,
        regime=pair.regime,
        sentence=f"{observable.title} differs from {pair.baseline} in {pair.regime} by "
        f"{number(shown.value)} ({terms}) at step {shown.step}"
        + (f", {shown.where}" if shown.where else ""),
        against=pair.baseline,
        observable=observable.name,
        value=shown.value,
        threshold=held_to,
        floor=measured,
        step=shown.step,
        where=shown.where,
    )


def _as_fraction(excess: Excess) -> float:
    """The largest difference over its limit, as a fraction of the baseline's value."""
    over = excess.by_item[excess.by_item > excess.limits]
    if not over.size:
        return 0.0
    drift = excess.drift
    unit = drift.relative_max / drift.max if drift.observable.threshold == LOSS else 1.0
    return float(over.max()) * unit


def _terms(
    excess: Excess, floor: float | None, times: float, held_to: float, *, is_bug: bool
) -> str:
    """The terms in brackets after a drift."""
    observable = excess.drift.observable
    terms = ["relative" if observable.is_relative else "absolute"]
    if observable.is_estimate:
        terms[0] += ", estimated from projections"
    if observable.threshold == LOSS:
        terms[0] += f", {number(excess.drift.relative_max)} of the loss"
    terms.append(f"{'bug ' * is_bug}threshold {number(held_to)}")
    if floor is None:
        terms.append("floor not measured")
    elif times <= 1:
        terms.append(f"cannot be told from rounding: floor {number(floor)}")
    else:
        terms.append(f"{number(times)} times what rounding explains, floor {number(floor)}")
    return "; ".join(terms)
