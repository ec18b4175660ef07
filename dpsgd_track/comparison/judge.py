"""Judges one run of one regime: on its own, and against each run that it is compared with."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dpsgd_track.comparison.audit.bias import completed, judge_bias
from dpsgd_track.comparison.audit.consistency import Inconsistency
from dpsgd_track.comparison.audit.noise import judge_noise, passed_noise
from dpsgd_track.comparison.diagnose.culprit import Culprit, culprit_of
from dpsgd_track.comparison.diagnose.ladder import Rung, first_introduced, ladder
from dpsgd_track.comparison.measure.amount import number
from dpsgd_track.comparison.measure.bias import TOLERANCES, Biases, biases_of
from dpsgd_track.comparison.measure.excess import Evidence, evidence_of
from dpsgd_track.comparison.measure.finite import not_finite
from dpsgd_track.comparison.measure.observables import OBSERVABLES, STAGES
from dpsgd_track.comparison.measure.resolution import resolution_of
from dpsgd_track.comparison.pairing import Candidate, Held, Matched
from dpsgd_track.comparison.result import Judged, Key, RegimeComparison
from dpsgd_track.comparison.verdict import (
    Finding,
    judge_consistency,
    judge_coverage,
    judge_floor,
    judge_pair,
    judge_run,
)
from dpsgd_track.comparison.waivers import Waiver, waiver_of
from dpsgd_track.config import CLIP, NOISE, Thresholds, kind_of
from dpsgd_track.record.run import ModeRun


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Thresholds, waivers and date that apply to every run."""

    thresholds: Thresholds
    waivers: Sequence[Waiver] = ()
    """Drifts that are accepted until they expire."""
    today: datetime.date


def judge(candidate: Candidate, matched: Matched, measure: Measure) -> Judged:
    """All findings on a run in one regime, on its own and in each comparison."""
    run, regime = candidate.run, matched.comparison
    found, broken = judge_consistency(run)
    found = [*judge_run(run), *found]
    if not run.replay:
        found += judge_noise(run, regime.audits.get(run.label))
    if kind_of(regime.name) == CLIP and matched.reference:
        found += judge_coverage(matched.reference)
    found += candidate.findings
    results = []
    for held in candidate.held:
        found += held.findings
        if held.pair:
            results.append(_judge_against(held, run, measure, broken))
    ladders = {key: rungs for result in results for key, rungs in result.ladders.items()}
    return Judged(
        regime=regime.name,
        findings=(*found, *(f for result in results for f in result.findings)),
        ladders=ladders,
        resolutions=tuple(r for result in results for r in result.resolutions),
        culprits={key: c for result in results for key, c in result.culprits.items()},
        passed=candidate.new or _passed(candidate, regime, measure.thresholds, ladders),
        warnings=run.facts.warnings if run.facts else (),
    )


def _judge_against(
    held: Held, run: ModeRun, measure: Measure, broken: Sequence[Inconsistency]
) -> Judged:
    """Judge a pair of two recorded runs.

    Args:
        broken: relations between its own numbers that `run` violates.
    """
    assert held.pair is not None
    evidence = evidence_of(held.pair, measure.thresholds, held.floor)
    rungs = ladder(evidence, broken, not_finite(run.trajectory) if run.trajectory else ())
    key = held.pair.regime, held.pair.baseline
    left_out = run.facts.left_out_steps if run.facts else ()
    if held.unlike:
        # Drifts between incomparable runs say nothing about the mode.
        found = [*judge_floor(evidence), *judge_pair(evidence, rungs, left_out)]
        return Judged(
            findings=tuple(f for f in found if f.observable is None), ladders={key: rungs}
        )
    biases = _biases(held, run)
    bias = judge_bias(biases, rungs, held.pair, measure.thresholds)
    accepted = None
    if bias:
        waivers, today = measure.waivers, measure.today
        accepted = waiver_of(bias.finding, run.label, bias.excess, waivers, today)
    if bias and not accepted:
        rungs = bias.blamed(rungs, broken)
    rungs = completed(rungs, biases)
    found = [*judge_floor(evidence), *judge_pair(evidence, rungs, left_out)]
    found = [_waived(held.attributed(f), run.label, evidence, measure) for f in found]
    found += [replace(bias.finding, waiver=accepted)] if bias else []
    culprit = _culprit(evidence, rungs, found, run, broken)
    return Judged(
        findings=tuple(found),
        ladders={key: rungs},
        culprits={key: culprit} if culprit else {},
        resolutions=(resolution_of(evidence, biases),),
    )


def _biases(held: Held, run: ModeRun) -> Biases | None:
    """Mean errors of the held pair's mode; None without plain autograd in the same type."""
    if held.pair is None or held.plain is None:
        return None
    aligned = held.pair.aligned
    dtype = run.job.performance.param_dtype if run.job else "bfloat16"
    return biases_of(
        aligned.other,
        held.plain,
        aligned.baseline,
        TOLERANCES[dtype].of_model(aligned.baseline.parameter_sizes),
        stands_still=kind_of(held.pair.regime) == CLIP,
    )


def _waived(finding: Finding, label: str, evidence: Evidence, measure: Measure) -> Finding:
    """`finding`, with the waiver that accepts it."""
    if finding.observable is None:
        return finding
    excess = evidence.excesses[finding.observable]
    accepted = waiver_of(finding, label, excess, measure.waivers, measure.today)
    return replace(finding, waiver=accepted)


def _culprit(
    evidence: Evidence,
    rungs: Sequence[Rung],
    found: Sequence[Finding],
    run: ModeRun,
    broken: Sequence[Inconsistency],
) -> Culprit | None:
    """The first stage that went wrong, skipping stages whose drifts are all accepted."""

    def is_accepted(rung: Rung) -> bool:
        shown = [f for f in found if f.observable in STAGES.get(rung.stage, ())]
        contradicts_itself = any(each.stage is rung.stage for each in broken)
        return bool(shown) and not contradicts_itself and not any(f.fails for f in shown)

    counted = [rung for rung in rungs if not is_accepted(rung)]
    first = first_introduced(counted)
    biased = next((f.culprit for f in found if f.culprit), None)
    if first and biased and first.stage is biased.stage:
        return biased
    return culprit_of(evidence.pair, counted, run, broken)


def _passed(
    candidate: Candidate,
    regime: RegimeComparison,
    thresholds: Thresholds,
    ladders: Mapping[Key, tuple[Rung, ...]],
) -> str:
    """Description of a run without findings."""
    run = candidate.run
    in_part = _in_part(candidate.held)
    if kind_of(regime.name) == NOISE and run.label in regime.audits:
        return f"{passed_noise(regime.audits[run.label])}{in_part}"
    if run.replay:
        return f"replay that measures the floor of {regime.name}"
    role = f"baseline of {regime.name}" if run.label == regime.baseline else ""
    if not ladders:
        return role or f"oracle of {regime.name}"
    bases = " and ".join(base for _, base in ladders)
    agrees = f"{role + ', ' if role else ''}agrees with {bases} in {regime.name}{in_part}"
    if run.facts and (left_out := run.facts.left_out_steps):
        steps = ", ".join(map(str, left_out))
        agrees += f" but for steps {steps}, which have batches that are empty and it takes none"
    rungs = [rung for rungs in ladders.values() for rung in rungs if rung.value is not None]
    nearest = max(rungs, key=lambda rung: rung.times, default=None)
    if nearest is None or not nearest.value:
        return f"{agrees} to the last bit"
    assert nearest.observable is not None
    observable = OBSERVABLES[nearest.observable]
    threshold = float(getattr(thresholds, observable.threshold))
    limit = "what rounding explains" if nearest.floor is not None else "its threshold"
    return (
        f"{agrees}, nearest to its limit in {observable.title} with {number(nearest.value)}, "
        f"{number(nearest.times)} times {limit} (threshold {number(threshold)}, "
        f"floor {number(nearest.floor)})"
    )


def _in_part(held: Sequence[Held]) -> str:
    """The part of a run that was not compared, with the reason; empty if all was."""
    said = dict.fromkeys(each.extent.told for each in held if each.extent.told)
    return "".join(f" ({each})" for each in said)
