"""The result of a comparison: what every report is made from, and how verdicts add up to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from dpsgd_track.comparison.audit.noise import NoiseAudit
from dpsgd_track.comparison.diagnose.culprit import Blame
from dpsgd_track.comparison.diagnose.ladder import STAGES, FirstFailure, Rung
from dpsgd_track.comparison.measure.drift import Drift, Pair
from dpsgd_track.comparison.measure.floor import Floor
from dpsgd_track.comparison.verdict import Finding, Verdict, worst
from dpsgd_track.config import Thresholds
from dpsgd_track.record.run import Group, ModeRun
from dpsgd_track.record.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class LargestDrift:
    """The largest drift of one observable over all pairs of modes, judged or not."""

    first: str
    second: str
    drift: Drift


def largest_of(pairs: Iterable[Pair]) -> dict[str, LargestDrift]:
    """The largest drift of each observable over `pairs`."""
    largest: dict[str, LargestDrift] = {}
    for pair in pairs:
        for name, drift in pair.drifts.items():
            if name not in largest or drift.max > largest[name].drift.max:
                largest[name] = LargestDrift(first=pair.baseline, second=pair.mode, drift=drift)
    return largest


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

    def base_of(self, mode: str, baseline: str = "") -> Trajectory | None:
        """The record that `mode` is held against, by default as the regime's baseline.

        Of two groups, each mode is held against its own earlier run.
        """
        held = baseline or self.baseline
        recorded = {run.label: run.trajectory for run in self.runs if run.trajectory}
        return recorded.get(held) or recorded.get(earlier_label(mode, held))

    def pair(self, mode: str, baseline: str = "") -> Pair | None:
        """`mode` against `baseline`, by default the regime's."""
        wanted = (mode, baseline or self.baseline)
        return next((p for p in self.pairs if (p.mode, p.baseline) == wanted), None)


def earlier_label(label: str, baseline: str) -> str:
    """What the earlier run of `label` is called where `baseline` is the name of a whole group."""
    return f"{label} [{baseline}]"


@dataclass(frozen=True, kw_only=True)
class ModeVerdict:
    """One mode over all its regimes."""

    label: str
    verdict: Verdict
    findings: tuple[Finding, ...]
    """Worst first, waived ones last; a PASS has none but waived ones."""
    failures: Mapping[tuple[str, str], FirstFailure]
    """First failing stage by (regime, baseline)."""
    sentence: str
    ladders: Mapping[tuple[str, str], tuple[Rung, ...]] = field(default_factory=dict)
    """Every stage, in the order of a step, by (regime, baseline)."""
    blames: Mapping[tuple[str, str], Blame] = field(default_factory=dict)
    """By (regime, baseline); only where something is to blame."""
    guilty: Guilty | None = None
    """What all of it comes down to; None where no stage is known to have gone wrong."""


@dataclass(frozen=True, kw_only=True)
class Guilty:
    """The one place that a mode's sentence names."""

    stage: str
    regime: str
    step: int | None = None
    """None before the first step, or where it is not known."""
    layers: tuple[str, ...] = ()
    """Layers or parameters concerned, worst first; empty where the stage has none."""
    observable: str = ""
    """What showed it."""


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
    """Of two groups: (key, before, after) of each fact of software and machine that differs."""


Key = tuple[str, str]
"""(regime, label of the run held against)."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What was found of one run in one regime."""

    findings: tuple[Finding, ...] = ()
    failures: Mapping[Key, FirstFailure] = field(default_factory=dict)
    ladders: Mapping[Key, tuple[Rung, ...]] = field(default_factory=dict)
    blames: Mapping[Key, Blame] = field(default_factory=dict)
    passed: str = ""
    """What is said of the run in its regime if nothing was found."""


def mode_verdict(label: str, results: Sequence[Judged]) -> ModeVerdict:
    """What `results`, one a regime, add up to."""
    blames = {key: b for result in results for key, b in result.blames.items()}
    first = _first_blamed(blames)
    every = sorted(
        (f for result in results for f in result.findings),
        key=lambda f: (f.waiver is not None, -f.verdict.severity, (f.regime, f.against) != first),
    )
    findings = [f for f in every if not f.waiver]
    if not findings:
        sentence = "; ".join(filter(None, map(_passed_or_waived, results)))
    else:
        sentence = findings[0].sentence
        guilty = blames.get((findings[0].regime, findings[0].against))
        if guilty and findings[0].observable:
            sentence += f". To blame: {guilty.sentence}"
        if len(findings) > 1:
            sentence += f" (and {len(findings) - 1} more)"
        sentence += _waived(every, "; ")
    return ModeVerdict(
        label=label,
        verdict=worst(f.verdict for f in findings),
        findings=tuple(every),
        failures={key: f for result in results for key, f in result.failures.items()},
        sentence=f"{label}: {sentence}.",
        ladders={key: r for result in results for key, r in result.ladders.items()},
        blames=blames,
        guilty=_guilty(findings, blames, first),
    )


def _guilty(
    findings: Sequence[Finding], blames: Mapping[Key, Blame], first: Key | None
) -> Guilty | None:
    alone = next((f for f in findings if f.stage), None)
    if first is not None:
        blamed = blames[first]
        shown = (f.observable for f in findings if (f.regime, f.against) == first)
        return Guilty(
            stage=blamed.stage,
            regime=first[0],
            step=blamed.step,
            layers=blamed.layers,
            observable=next(shown, alone.observable if alone else ""),
        )
    if alone is None:
        return None
    return Guilty(
        stage=alone.stage,
        regime=alone.regime,
        step=alone.step,
        layers=alone.layers,
        observable=alone.observable,
    )


def _first_blamed(blames: Mapping[Key, Blame]) -> Key | None:
    """Where the earliest stage of a step is blamed: what is held against no_dp alone shows no
    norms, and where nothing is clipped a wrong clip factor does not show."""
    order = [stage for stage, _ in STAGES]

    def place(key: Key) -> tuple[int, int, bool]:
        blamed = blames[key]
        stage = order.index(blamed.stage) if blamed.stage in order else -1
        says_where = bool(blamed.layers or blamed.samples)
        return stage, -1 if blamed.step is None else blamed.step, not says_where

    return min(blames, key=place, default=None)


def _passed_or_waived(result: Judged) -> str:
    # A run whose drift is waived does not agree.
    if not result.findings:
        return result.passed
    more = f" (and {len(result.findings) - 1} more)" * (len(result.findings) > 1)
    return f"{result.findings[0].sentence}{more}{_waived(result.findings, '; ')}"


def _waived(findings: Sequence[Finding], before: str) -> str:
    """`before`, how many findings are waived, and until when the first of them; or nothing."""
    ends = [f.waiver.expires for f in findings if f.waiver]
    if not ends:
        return ""
    return f"{before}{len(ends)} finding{'s' * (len(ends) > 1)} waived until {min(ends)}"


def group_sentence(
    verdict: Verdict, modes: Sequence[ModeVerdict], regimes: Sequence[RegimeComparison]
) -> str:
    """The verdict on all modes, and its first reason."""
    if not modes:
        return "INCONCLUSIVE: the group holds no run of any mode."
    every = [finding for mode in modes for finding in mode.findings]
    if verdict is Verdict.PASS:
        has_floor = any(regime.floors for regime in regimes)
        how = "as closely as rounding allows" if has_floor else "within the thresholds"
        return f"PASS: all {len(modes)} runs agree {how}{_waived(every, ', but for ')}."
    guilty = [mode for mode in modes if mode.verdict is verdict]
    others = f" The same verdict for {', '.join(m.label for m in guilty[1:])}." * (len(guilty) > 1)
    accepted = _waived(every, " ")
    return f"{verdict}: {guilty[0].sentence}{others}{accepted}{'.' * bool(accepted)}"


def iter_not_computed(comparison: GroupComparison) -> Iterator[tuple[str, Pair]]:
    """Each pair, with its regime's name, that left observables out."""
    for regime in comparison.regimes:
        yield from ((regime.name, pair) for pair in regime.pairs if pair.not_computed)
