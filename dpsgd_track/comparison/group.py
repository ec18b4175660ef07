"""Compares all runs of a group: each mode against the baseline of each regime, then all pairs."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from dpsgd_track.comparison.audit.noise import audits_of
from dpsgd_track.comparison.judge import joined, judge_against, judge_alone, passed, waive
from dpsgd_track.comparison.measure.drift import Labelled, Pair, compare_pairs
from dpsgd_track.comparison.measure.floor import Floor, floor_of
from dpsgd_track.comparison.result import (
    GroupComparison,
    Judged,
    LargestDrift,
    RegimeComparison,
    group_sentence,
    largest_of,
    mode_verdict,
)
from dpsgd_track.comparison.verdict import (
    Finding,
    Verdict,
    judge_coverage,
    judge_gaps,
    judge_likeness,
    judge_run,
    worst,
)
from dpsgd_track.comparison.waivers import Waiver, waiver_notes
from dpsgd_track.config import CLIP, NOISE, PLAIN, SILENT, Thresholds, kind_of
from dpsgd_track.modes.table import BASELINE, REFERENCE
from dpsgd_track.record.run import Group, ModeRun, Status


def compare_group(
    group: Group,
    thresholds: Thresholds,
    waivers: Sequence[Waiver] = (),
    today: datetime.date | None = None,
    *,
    all_pairs: bool = True,
) -> GroupComparison:
    """Compare and judge all runs of `group`.

    Args:
        waivers: drifts that are accepted until they expire.
        today: the day that they are asked on (default: this one).
        all_pairs: compare every two modes, also those of which neither is a baseline. No verdict
            depends on it.
    """
    today = today or datetime.date.today()
    regimes = []
    judged: dict[str, list[Judged]] = {}
    for name in dict.fromkeys(run.regime for run in group.runs):
        runs = tuple(run for run in group.runs if run.regime == name)
        regime, baseline, reference = _compare_regime(name, runs, all_pairs=all_pairs)
        regimes.append(regime)
        for run in runs:
            if run.replay == SILENT and run.status is Status.FINISHED:
                continue
            result = _judge(run, regime, (baseline, reference), thresholds)
            result = waive(result, run.title, regime, thresholds, waivers, today)
            judged.setdefault(run.title, []).append(result)
    modes = tuple(mode_verdict(label, results) for label, results in judged.items())
    verdict = worst(mode.verdict for mode in modes) if modes else Verdict.INCONCLUSIVE
    used = {f.waiver for mode in modes for f in mode.findings if f.waiver}
    return GroupComparison(
        group=group,
        thresholds=thresholds,
        regimes=tuple(regimes),
        modes=modes,
        verdict=verdict,
        sentence=group_sentence(verdict, modes, regimes),
        waiver_notes=waiver_notes(waivers, used, today),
    )


def _compare_regime(
    name: str, runs: tuple[ModeRun, ...], *, all_pairs: bool
) -> tuple[RegimeComparison, ModeRun | None, ModeRun | None]:
    if kind_of(name) == NOISE:
        return _audit_regime(name, runs), None, None
    # no_dp clips nothing, so in the clip regime only the oracle can be the baseline.
    reference = _recorded(runs, REFERENCE)
    baseline = reference if kind_of(name) == CLIP else _recorded(runs, BASELINE) or reference
    # A mode on its own can still be the baseline of its variants.
    installed = (_recorded(runs, run.mode) for run in runs if run.variant)
    baseline = baseline or next(filter(None, installed), None)
    recorded = [(r.label, r.trajectory) for r in runs if r.trajectory and not r.replay]
    bases = list({id(r): r for r in (baseline, reference) if r}.values())
    # The oracle is held against nobody: where it and no_dp differ, no_dp is at fault.
    judged = [
        (held, other)
        for held in map(_labelled, bases)
        for other in recorded
        if other[0] not in (held[0], REFERENCE)
    ]
    repeats = [
        (base, run)
        for base in bases
        for run in runs
        if run.replay and run.label == base.label and run.trajectory
    ]
    replayed = [(_labelled(base), (run.title, _labelled(run)[1])) for base, run in repeats]
    known = {frozenset((held[0], other[0])) for held, other in judged}
    rest = [
        pair
        for pair in combinations(recorded, 2)
        if all_pairs and frozenset((pair[0][0], pair[1][0])) not in known
    ]
    num_detailed = len(judged) + len(replayed)
    pairs = compare_pairs(name, [*judged, *replayed, *rest], num_detailed)
    shown, replays = tuple(pairs[: len(judged)]), pairs[len(judged) : num_detailed]
    regime = RegimeComparison(
        name=name,
        runs=tuple(r for r in runs if not r.replay),
        baseline=baseline.label if baseline else "",
        pairs=shown,
        replays={pair.mode: pair for pair in replays},
        floors=_floors(repeats, replays),
        largest=_largest(recorded, [*shown, *pairs[num_detailed:]]) if all_pairs else {},
        audits=audits_of(runs, reference),
    )
    return regime, baseline, reference


def _audit_regime(name: str, runs: tuple[ModeRun, ...]) -> RegimeComparison:
    """A regime whose runs differ by design, each having noise of its own."""
    return RegimeComparison(
        name=name,
        runs=tuple(r for r in runs if not r.replay),
        baseline="",
        pairs=(),
        replays={},
        floors={},
        largest={},
        audits=audits_of(runs, None),
    )


def _labelled(run: ModeRun) -> Labelled:
    assert run.trajectory is not None, "only a recorded run is held against others"
    return run.label, run.trajectory


def _floors(repeats: list[tuple[ModeRun, ModeRun]], replays: list[Pair]) -> dict[str, Floor]:
    """The floor that the sound replays show together, by the label of each base."""
    sound: list[Pair] = []
    against_float64 = False
    for (base, run), pair in zip(repeats, replays, strict=True):
        # An unsound replay would excuse what rounding does not explain.
        if [*judge_run(run), *judge_likeness(base, run)]:
            continue
        sound.append(pair)
        exact = base.job is None or base.job.performance.reference_dtype == "float64"
        against_float64 |= run.replay == PLAIN and exact
    # All are held to the largest: each replay is one draw of what rounding can do.
    floor = floor_of(sound, against_float64=against_float64)
    return dict.fromkeys((base.label for base, _ in repeats), floor) if floor else {}


def _recorded(runs: tuple[ModeRun, ...], label: str) -> ModeRun | None:
    return next((r for r in runs if r.label == label and not r.replay and r.trajectory), None)


def _largest(recorded: list[Labelled], pairs: list[Pair]) -> dict[str, LargestDrift]:
    by_labels = {frozenset((pair.baseline, pair.mode)): pair for pair in pairs}
    # Of equal ones the first counts, in the launcher's order.
    return largest_of(by_labels[frozenset((a, b))] for (a, _), (b, _) in combinations(recorded, 2))


def _judge(
    run: ModeRun,
    regime: RegimeComparison,
    held_against: tuple[ModeRun | None, ModeRun | None],
    thresholds: Thresholds,
) -> Judged:
    found, broken = judge_alone(run, regime)
    baseline, reference = held_against
    if kind_of(regime.name) == CLIP and reference:
        found += judge_coverage(reference)
    if baseline is None and kind_of(regime.name) != NOISE:
        found.append(_alone(regime, f"there is no baseline to compare with in {regime.name}"))
    elif baseline and run is baseline and not regime.pairs:
        found.append(_alone(regime, f"there is nothing to compare with in {regime.name}"))
    bases = {id(b): b for b in held_against if b and b is not run and run is not reference}
    results = []
    for base in bases.values():
        unlike = list(judge_likeness(base, run))
        found += unlike
        replay = regime.replays.get(run.title)
        if replay and replay.baseline == base.label:
            found += judge_gaps(replay)
        pair = regime.pair(run.label, base.label)
        if run.replay or not pair:
            continue
        if any(f.verdict is Verdict.BUG for f in judge_run(base)):
            found.append(
                _alone(regime, f"{base.label} is itself at fault in {regime.name}", base.label)
            )
        floor = regime.floor(base.label)
        results.append(
            judge_against(base, run, pair, thresholds, floor, unlike=unlike, broken=broken)
        )
    result = joined(results, found, "")
    return replace(result, passed=passed(run, regime, thresholds, result.ladders))


def _alone(regime: RegimeComparison, sentence: str, against: str = "") -> Finding:
    return Finding(
        verdict=Verdict.INCONCLUSIVE, regime=regime.name, sentence=sentence, against=against
    )
