"""Compares all runs of a group: each mode against the baseline of each regime, then all pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations

from dpsgd_track.comparison.alignment import align
from dpsgd_track.comparison.blame import Blame, blame
from dpsgd_track.comparison.drift import Drift, Labelled, Pair, compare_pairs
from dpsgd_track.comparison.floor import Floor, floor_of
from dpsgd_track.comparison.ladder import (
    FirstFailure,
    Rung,
    first_failure,
    ladder,
    own_errors,
    unlike_inputs,
)
from dpsgd_track.comparison.noise import NoiseAudit, audit, judge_noise, passed_noise
from dpsgd_track.comparison.observables import OBSERVABLES
from dpsgd_track.comparison.verdict import (
    Finding,
    Verdict,
    judge_consistency,
    judge_coverage,
    judge_floor,
    judge_gaps,
    judge_likeness,
    judge_pair,
    judge_run,
    number,
    worst,
)
from dpsgd_track.config import CLIP, NOISE, PLAIN, SILENT, Thresholds
from dpsgd_track.modes.table import BASELINE, REFERENCE
from dpsgd_track.tracking.reader import FINISHED, Group, ModeRun


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


@dataclass(frozen=True, kw_only=True)
class _Judged:
    findings: tuple[Finding, ...]
    failures: Mapping[tuple[str, str], FirstFailure]
    ladders: Mapping[tuple[str, str], tuple[Rung, ...]]
    blames: Mapping[tuple[str, str], Blame]
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
            if run.replay == SILENT and run.status == FINISHED:
                continue
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
        sentence=_group_sentence(
            verdict, modes, has_floor=any(regime.floors for regime in regimes)
        ),
    )


def _compare_regime(
    name: str, runs: tuple[ModeRun, ...]
) -> tuple[RegimeComparison, ModeRun | None, ModeRun | None]:
    if name == NOISE:
        return _audit_regime(name, runs), None, None
    # no_dp clips nothing, so in the clip regime only the oracle can be the baseline.
    reference = _recorded(runs, REFERENCE)
    baseline = reference if name == CLIP else _recorded(runs, BASELINE) or reference
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
        if frozenset((pair[0][0], pair[1][0])) not in known
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
        largest=_largest(recorded, [*shown, *pairs[num_detailed:]]),
        audits=_audits(runs, reference),
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
        audits=_audits(runs, None),
    )


def _audits(runs: tuple[ModeRun, ...], reference: ModeRun | None) -> dict[str, NoiseAudit]:
    """What can be said of each run's noise, by label."""
    plain = next((r for r in runs if r.label == REFERENCE and r.replay == PLAIN), None)
    found = {run.label: audit(run, reference, plain) for run in runs if not run.replay}
    return {label: each for label, each in found.items() if each}


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
        exact = base.params.get("performance.reference_dtype", "float64") == "float64"
        against_float64 |= run.replay == PLAIN and exact
    # All are held to the largest: each replay is one draw of what rounding can do.
    floor = floor_of(sound, against_float64=against_float64)
    return dict.fromkeys((base.label for base, _ in repeats), floor) if floor else {}


def _recorded(runs: tuple[ModeRun, ...], label: str) -> ModeRun | None:
    return next((r for r in runs if r.label == label and not r.replay and r.trajectory), None)


def _largest(recorded: list[Labelled], pairs: list[Pair]) -> dict[str, LargestDrift]:
    by_labels = {frozenset((pair.baseline, pair.mode)): pair for pair in pairs}
    largest: dict[str, LargestDrift] = {}
    for (first, _), (second, _) in combinations(recorded, 2):
        pair = by_labels[frozenset((first, second))]
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
    own_findings, broken = judge_consistency(run)
    found = [*judge_run(run), *own_findings]
    if not run.replay:
        found += judge_noise(run, regime.audits.get(run.label))
    ladders: dict[tuple[str, str], tuple[Rung, ...]] = {}
    blames: dict[tuple[str, str], Blame] = {}
    failures: dict[tuple[str, str], FirstFailure] = {}
    baseline, reference = held_against
    if regime.name == CLIP and reference:
        found += judge_coverage(reference)
    if baseline is None and regime.name != NOISE:
        found.append(_alone(regime, f"there is no baseline to compare with in {regime.name}"))
    elif baseline and run is baseline and not regime.pairs:
        found.append(_alone(regime, f"there is nothing to compare with in {regime.name}"))
    bases = {id(b): b for b in held_against if b and b is not run and run is not reference}
    for base in bases.values():
        unlike = list(judge_likeness(base, run))
        found += unlike
        pair = regime.pair(run.label, base.label)
        replay = regime.replays.get(run.title)
        if replay and replay.baseline == base.label:
            found += judge_gaps(replay)
        if run.replay or not pair or run.trajectory is None or base.trajectory is None:
            continue
        if any(f.verdict is Verdict.BUG for f in judge_run(base)):
            found.append(
                _alone(regime, f"{base.label} is itself at fault in {regime.name}", base.label)
            )
        key, floor = (regime.name, base.label), regime.floor(base.label)
        found += judge_floor(pair, floor)
        aligned = align(base.trajectory, run.trajectory)
        ladders[key] = ladder(
            pair,
            thresholds,
            floor,
            inputs=unlike_inputs(base.trajectory, run.trajectory),
            broken=broken,
            own_errors=own_errors(aligned, pair, thresholds, floor),
        )
        drifts = judge_pair(pair, thresholds, floor, ladders[key])
        # Unlike runs differ for a reason that says nothing about the mode.
        found += [f for f in drifts if not unlike or not f.observable]
        if unlike:
            continue
        if failure := first_failure(ladders[key]):
            failures[key] = failure
        if guilty := blame(ladders[key], aligned, run.params):
            blames[key] = guilty
    return _Judged(
        findings=tuple(found),
        failures=failures,
        ladders=ladders,
        blames=blames,
        passed=_passed(run, regime, thresholds, ladders),
    )


def _alone(regime: RegimeComparison, sentence: str, against: str = "") -> Finding:
    return Finding(
        verdict=Verdict.INCONCLUSIVE, regime=regime.name, sentence=sentence, against=against
    )


def _passed(
    run: ModeRun,
    regime: RegimeComparison,
    thresholds: Thresholds,
    ladders: Mapping[tuple[str, str], tuple[Rung, ...]],
) -> str:
    if regime.name == NOISE and run.label in regime.audits:
        return passed_noise(regime.audits[run.label])
    if run.replay:
        return f"replay that measures the floor of {regime.name}"
    role = f"baseline of {regime.name}" if run.label == regime.baseline else ""
    if not ladders:
        return role or f"oracle of {regime.name}"
    bases = " and ".join(base for _, base in ladders)
    agrees = f"{role + ', ' if role else ''}agrees with {bases} in {regime.name}"
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


def _mode_verdict(label: str, results: list[_Judged]) -> ModeVerdict:
    findings = sorted(
        (f for result in results for f in result.findings),
        key=lambda f: -f.verdict.severity,
    )
    verdict = worst(f.verdict for f in findings)
    failures = {key: f for result in results for key, f in result.failures.items()}
    blames = {key: b for result in results for key, b in result.blames.items()}
    if not findings:
        sentence = "; ".join(result.passed for result in results if result.passed)
    else:
        sentence = findings[0].sentence
        guilty = blames.get((findings[0].regime, findings[0].against))
        if guilty and findings[0].observable:
            sentence += f". To blame: {guilty.sentence}"
        if len(findings) > 1:
            sentence += f" (and {len(findings) - 1} more)"
    return ModeVerdict(
        label=label,
        verdict=verdict,
        findings=tuple(findings),
        failures=failures,
        sentence=f"{label}: {sentence}.",
        ladders={key: r for result in results for key, r in result.ladders.items()},
        blames=blames,
    )


def _group_sentence(verdict: Verdict, modes: tuple[ModeVerdict, ...], *, has_floor: bool) -> str:
    if not modes:
        return "INCONCLUSIVE: the group holds no run of any mode."
    if verdict is Verdict.PASS:
        how = "as closely as rounding allows" if has_floor else "within the thresholds"
        return f"PASS: all {len(modes)} runs agree {how}."
    guilty = [mode for mode in modes if mode.verdict is verdict]
    others = f" The same verdict for {', '.join(m.label for m in guilty[1:])}." * (len(guilty) > 1)
    return f"{verdict}: {guilty[0].sentence}{others}"


def iter_not_computed(comparison: GroupComparison) -> Iterator[tuple[str, Pair]]:
    """Each pair, with its regime's name, that left observables out."""
    for regime in comparison.regimes:
        yield from ((regime.name, pair) for pair in regime.pairs if pair.not_computed)
