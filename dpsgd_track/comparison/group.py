"""Compares all runs of a group: each mode against the baseline of each regime, then all pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations

from dpsgd_track.comparison.blame import Blame
from dpsgd_track.comparison.drift import Drift, Pair, compare_pair
from dpsgd_track.comparison.floor import Floor, floor_of
from dpsgd_track.comparison.ladder import FirstFailure, Rung
from dpsgd_track.comparison.noise import NoiseAudit
from dpsgd_track.comparison.verdict import (
    Finding,
    Verdict,
    judge_coverage,
    judge_gaps,
    judge_likeness,
    judge_pair,
    judge_run,
    number,
    worst,
)
from dpsgd_track.config import CLIP, Thresholds
from dpsgd_track.modes.table import BASELINE, REFERENCE
from dpsgd_track.tracking.reader import Group, ModeRun
from dpsgd_track.tracking.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class LargestDrift:
    """The largest drift of one observable over all pairs of modes, judged or not."""

    first: str
    second: str
    drift: Drift


@dataclass(frozen=True, kw_only=True)
class RegimeComparison:
    """Everything compared in one regime."""

    name: str
    runs: tuple[ModeRun, ...]
    """Without replays."""
    baseline: str
    """Label of the run that all others are held against; empty when there is none."""
    pairs: tuple[Pair, ...]
    """Each mode against the baseline, and against the reference where that is another run."""
    replays: Mapping[str, Pair]
    """Replays against the run they repeat, by the replay's title."""
    floors: Mapping[str, Floor]
    """What the sound replays of a run show together, by that run's label."""
    largest: Mapping[str, LargestDrift]
    """By observable, over all pairs of modes."""
    audits: Mapping[str, NoiseAudit] = field(default_factory=dict)
    """By label, of the modes that add noise."""

    def floor(self, baseline: str = "") -> Floor | None:
        """The floor of drifts from `baseline`, by default the regime's."""
        return self.floors.get(baseline or self.baseline)

    def pair(self, mode: str, baseline: str = "") -> Pair | None:
        """`mode` against `baseline`, by default the regime's."""
        wanted = (mode, baseline or self.baseline)
        return next((p for p in self.pairs if (p.mode, p.baseline) == wanted), None)


@dataclass(frozen=True, kw_only=True)
class ModeVerdict:
    """One mode over all its regimes."""

    label: str
    verdict: Verdict
    findings: tuple[Finding, ...]
    """Worst first; empty for PASS."""
    failures: Mapping[tuple[str, str], FirstFailure]
    """First failing stage by (regime, baseline)."""
    sentence: str
    ladders: Mapping[tuple[str, str], tuple[Rung, ...]] = field(default_factory=dict)
    """Every stage, in the order of a step, by (regime, baseline)."""
    blames: Mapping[tuple[str, str], Blame] = field(default_factory=dict)
    """By (regime, baseline); only where something is to blame."""


@dataclass(frozen=True, kw_only=True)
class GroupComparison:
    """The whole result: what every report is made from."""

    group: Group
    thresholds: Thresholds
    regimes: tuple[RegimeComparison, ...]
    modes: tuple[ModeVerdict, ...]
    """Replays included, as `mode (replay)`."""
    verdict: Verdict
    sentence: str
    waiver_notes: tuple[str, ...] = ()
    """Waivers that have expired, or that nothing needed."""
    environment_differences: tuple[tuple[str, str, str], ...] = ()
    """(setting, before, after) of what two groups that are compared ran with."""


@dataclass(frozen=True, kw_only=True)
class _Judged:
    findings: tuple[Finding, ...]
    failures: Mapping[tuple[str, str], FirstFailure]
    passed: str
    """What is said of the run in its regime if nothing was found."""


def compare_group(group: Group, thresholds: Thresholds) -> GroupComparison:
    """Compare and judge all runs of `group`."""
    regimes = []
    judged: dict[str, list[_Judged]] = {}
    for name in dict.fromkeys(run.regime for run in group.runs):
        runs = tuple(run for run in group.runs if run.regime == name)
        regime, baseline, reference = _compare_regime(name, runs)
        regimes.append(regime)
        for run in runs:
            result = _judge(run, regime, (baseline, reference), thresholds)
            judged.setdefault(run.title, []).append(result)
    modes = tuple(_mode_verdict(label, results) for label, results in judged.items())
    verdict = worst(mode.verdict for mode in modes) if modes else Verdict.INCONCLUSIVE
    return GroupComparison(
        group=group,
        thresholds=thresholds,
        regimes=tuple(regimes),
        modes=modes,
        verdict=verdict,
        sentence=_group_sentence(verdict, modes),
    )


def _compare_regime(
    name: str, runs: tuple[ModeRun, ...]
) -> tuple[RegimeComparison, ModeRun | None, ModeRun | None]:
    # no_dp clips nothing, so in the clip regime only the oracle can be the baseline.
    reference = _recorded(runs, REFERENCE)
    baseline = reference if name == CLIP else _recorded(runs, BASELINE) or reference
    recorded = [(r.label, r.trajectory) for r in runs if r.trajectory and not r.replay]
    pairs = []
    for held in dict.fromkeys(r.label for r in (baseline, reference) if r):
        ours = next(t for label, t in recorded if label == held)
        # The oracle is held against nobody: where it and no_dp differ, no_dp is at fault.
        pairs += [
            compare_pair(name, (held, ours), other)
            for other in recorded
            if other[0] not in (held, REFERENCE)
        ]
    replays, floors = _replay(runs, [r for r in (baseline, reference) if r])
    regime = RegimeComparison(
        name=name,
        runs=tuple(r for r in runs if not r.replay),
        baseline=baseline.label if baseline else "",
        pairs=tuple(pairs),
        replays=replays,
        floors=floors,
        largest=_largest(name, recorded, pairs),
    )
    return regime, baseline, reference


def _replay(
    runs: tuple[ModeRun, ...], bases: list[ModeRun]
) -> tuple[dict[str, Pair], dict[str, Floor]]:
    """Each replay against its base, by title, and the floor of each base by its label."""
    replays: dict[str, Pair] = {}
    floors: dict[str, Floor] = {}
    for base in {id(base): base for base in bases}.values():
        sound: list[Pair] = []
        for run in runs:
            if not run.replay or run.label != base.label:
                continue
            if run.trajectory is None or base.trajectory is None:
                continue
            ours, theirs = (base.label, base.trajectory), (run.title, run.trajectory)
            pair = replays[run.title] = compare_pair(run.regime, ours, theirs)
            # An unsound replay would excuse what rounding does not explain.
            if not [*judge_run(run), *judge_likeness(base, run)]:
                sound.append(pair)
        if floor := floor_of(sound):
            floors[base.label] = floor
    return replays, floors


def _recorded(runs: tuple[ModeRun, ...], label: str) -> ModeRun | None:
    return next((r for r in runs if r.label == label and not r.replay and r.trajectory), None)


def _largest(
    regime: str, recorded: list[tuple[str, Trajectory]], known: list[Pair]
) -> dict[str, LargestDrift]:
    done = {frozenset((pair.baseline, pair.mode)): pair for pair in known}
    largest: dict[str, LargestDrift] = {}
    for first, second in combinations(recorded, 2):
        pair = done.get(frozenset((first[0], second[0]))) or compare_pair(regime, first, second)
        for name, drift in pair.drifts.items():
            if name not in largest or drift.max > largest[name].drift.max:
                largest[name] = LargestDrift(first=pair.baseline, second=pair.mode, drift=drift)
    return largest


def _judge(
    run: ModeRun,
    regime: RegimeComparison,
    held_against: tuple[ModeRun | None, ModeRun | None],
    thresholds: Thresholds,
) -> _Judged:
    found = list(judge_run(run))
    failures: dict[tuple[str, str], FirstFailure] = {}
    baseline, reference = held_against
    if regime.name == CLIP and reference:
        found += judge_coverage(reference)
    if baseline is None:
        found.append(_alone(regime, f"there is no baseline to compare with in {regime.name}"))
    elif run is baseline and not regime.pairs:
        found.append(_alone(regime, f"there is nothing to compare with in {regime.name}"))
    bases = {id(b): b for b in held_against if b and b is not run and run is not reference}
    for base in bases.values():
        unlike = list(judge_likeness(base, run))
        found += unlike
        pair = regime.pair(run.label, base.label)
        replay = regime.replays.get(run.title)
        if replay and replay.baseline == base.label:
            found += judge_gaps(replay)
        if run.replay or not pair:
            continue
        if any(f.verdict is Verdict.BUG for f in judge_run(base)):
            found.append(
                _alone(regime, f"{base.label} is itself at fault in {regime.name}", base.label)
            )
        drifts, failure = judge_pair(pair, thresholds, regime.floor(base.label))
        # Unlike runs differ for a reason that says nothing about the mode.
        found += [f for f in drifts if not unlike or not f.observable]
        if failure and not unlike:
            failures[regime.name, base.label] = failure
    return _Judged(
        findings=tuple(found), failures=failures, passed=_passed(run, regime, thresholds)
    )


def _alone(regime: RegimeComparison, sentence: str, against: str = "") -> Finding:
    return Finding(
        verdict=Verdict.INCONCLUSIVE, regime=regime.name, sentence=sentence, against=against
    )


def _passed(run: ModeRun, regime: RegimeComparison, thresholds: Thresholds) -> str:
    if run.replay:
        return f"replay that measures the floor of {regime.name}"
    role = f"baseline of {regime.name}" if run.label == regime.baseline else ""
    pairs = [pair for pair in regime.pairs if pair.mode == run.label]
    drifts = [drift for pair in pairs for drift in pair.drifts.values()]
    if not drifts:
        return role or f"oracle of {regime.name}"

    def threshold(drift: Drift) -> float:
        return float(getattr(thresholds, drift.observable.threshold))

    bases = " and ".join(pair.baseline for pair in pairs)
    agrees = f"{role + ', ' if role else ''}agrees with {bases} in {regime.name}"
    nearest = max(drifts, key=lambda drift: drift.max / threshold(drift))
    if nearest.max == 0:
        return f"{agrees} to the last bit"
    known = regime.floor()
    floor = known.of(nearest.observable.name) if known else None
    return (
        f"{agrees}, nearest to its threshold in {nearest.observable.title} with "
        f"{number(nearest.max)} (threshold {number(threshold(nearest))}, floor {number(floor)})"
    )


def _mode_verdict(label: str, results: list[_Judged]) -> ModeVerdict:
    findings = sorted(
        (f for result in results for f in result.findings),
        key=lambda f: -f.verdict.severity,
    )
    verdict = worst(f.verdict for f in findings)
    failures = {key: f for result in results for key, f in result.failures.items()}
    if not findings:
        sentence = "; ".join(result.passed for result in results if result.passed)
    else:
        sentence = findings[0].sentence
        failure = failures.get((findings[0].regime, findings[0].against))
        if failure and findings[0].observable:
            sentence += f". First failing stage: {failure.sentence}"
        if len(findings) > 1:
            sentence += f" (and {len(findings) - 1} more)"
    return ModeVerdict(
        label=label,
        verdict=verdict,
        findings=tuple(findings),
        failures=failures,
        sentence=f"{label}: {sentence}.",
    )


def _group_sentence(verdict: Verdict, modes: tuple[ModeVerdict, ...]) -> str:
    if not modes:
        return "INCONCLUSIVE: the group holds no run of any mode."
    if verdict is Verdict.PASS:
        return f"PASS: all {len(modes)} runs agree within the thresholds."
    guilty = [mode for mode in modes if mode.verdict is verdict]
    others = f" The same verdict for {', '.join(m.label for m in guilty[1:])}." * (len(guilty) > 1)
    return f"{verdict}: {guilty[0].sentence}{others}"


def iter_not_computed(comparison: GroupComparison) -> Iterator[tuple[str, Pair]]:
    """Each pair, with its regime's name, that left observables out."""
    for regime in comparison.regimes:
        yield from ((regime.name, pair) for pair in regime.pairs if pair.not_computed)
