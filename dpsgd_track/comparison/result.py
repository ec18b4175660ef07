"""The result of a comparison, from which every report is made, and how verdicts combine."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dpsgd_track.comparison.audit.noise import NoiseAudit
from dpsgd_track.comparison.diagnose.causes import agreed
from dpsgd_track.comparison.diagnose.culprit import Culprit, first_of
from dpsgd_track.comparison.diagnose.ladder import Rung
from dpsgd_track.comparison.measure.drift import Drift, Pair
from dpsgd_track.comparison.measure.floor import Floor
from dpsgd_track.comparison.measure.resolution import Resolution
from dpsgd_track.comparison.seen import Seen, by_model
from dpsgd_track.comparison.verdict import Finding, Verdict, worst
from dpsgd_track.config import CLIP, NOISE, Thresholds, kind_of
from dpsgd_track.modes.table import REFERENCE
from dpsgd_track.record.run import Group, ModeRun
from dpsgd_track.record.stages import ObservableName, Stage
from dpsgd_track.record.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class LargestDrift:
    """The largest drift of one observable over all pairs of modes, judged or not."""

    first: str
    second: str
    drift: Drift


def largest_of(pairs: Iterable[Pair]) -> dict[ObservableName, LargestDrift]:
    """The largest drift of each observable over `pairs`."""
    largest: dict[ObservableName, LargestDrift] = {}
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
    """All runs except replays."""
    baseline: str
    """Label of the run that all others are compared with; empty if there is none."""
    pairs: tuple[Pair, ...]
    """Each mode with the baseline, and with the reference if that is a different run."""
    replays: Mapping[str, Pair]
    """Each replay with the run it repeats, by the replay's title."""
    floors: Mapping[str, Floor]
    """Joint floor of a run's sound replays, by that run's label."""
    largest: Mapping[ObservableName, LargestDrift]
    """By observable, over all pairs of modes."""
    audits: Mapping[str, NoiseAudit] = field(default_factory=dict)
    """Audits of the modes that add noise, by label."""

    def floor(self, baseline: str = "") -> Floor | None:
        """The floor of drifts from `baseline`, by default the regime's."""
        return self.floors.get(baseline or self.baseline)

    def floor_for(self, mode: str, baseline: str = "") -> Floor | None:
        """The floor that the drift of `mode` from `baseline` is held against; None for no floor.

        The oracle's replay computes in another type, so its floor applies to modes only.
        """
        return None if mode == REFERENCE else self.floor(baseline)

    def base_of(self, mode: str, baseline: str = "") -> Trajectory | None:
        """The record that `mode` is compared with, by default the regime's baseline.

        In a comparison of two groups, this is the mode's own earlier run.
        """
        held = baseline or self.baseline
        recorded = {run.label: run.trajectory for run in self.runs if run.trajectory}
        return recorded.get(held) or recorded.get(earlier_label(mode, held))

    def pair(self, mode: str, baseline: str = "") -> Pair | None:
        """The pair of `mode` and `baseline`, by default the regime's."""
        wanted = (mode, baseline or self.baseline)
        return next((p for p in self.pairs if (p.mode, p.baseline) == wanted), None)


def earlier_label(label: str, baseline: str) -> str:
    """Label of the earlier run of `label`, where `baseline` names a whole group."""
    return f"{label} [{baseline}]"


_MOST_SHOWN = 300
"""Characters of a warning in a sentence; `drift.json` has all of it."""

Key = tuple[str, str]
"""(regime, label of the baseline of the comparison)."""

EnvironmentDifferences = tuple[tuple[str, str, str], ...]
"""(key, before, after) of each fact of software and machine that differs between two groups."""


@dataclass(frozen=True, kw_only=True)
class ModeVerdict:
    """Verdict on one mode over all its regimes."""

    label: str
    verdict: Verdict
    findings: tuple[Finding, ...]
    """Worst first, waived ones last; a PASS has waived findings at most."""
    sentence: str
    """The defect, where it first shows, and its size; or the runs that the mode agrees with."""
    ladders: Mapping[Key, tuple[Rung, ...]] = field(default_factory=dict)
    """Every stage, in the order of a step."""
    culprits: Mapping[Key, Culprit] = field(default_factory=dict)
    """Culprit of each comparison in which a stage went wrong and is not accepted."""
    culprit: Culprit | None = None
    """Culprit over all comparisons; None if no stage is known to have gone wrong."""
    resolutions: Mapping[str, Resolution] = field(default_factory=dict)
    """Smallest errors that would have been found in this mode, by model."""
    warnings: tuple[str, ...] = ()
    """Warnings of the mode's own code, such as that it fell back on other code."""

    @property
    def others(self) -> tuple[Finding, ...]:
        """Findings that the sentence does not mention, and all waived ones."""
        told = _told([f for f in self.findings if not f.waiver], self.culprit)
        return tuple(f for f in self.findings if f is not told)

    def counted(self, regime: str) -> list[Finding]:
        """Findings in `regime` that no waiver accepts."""
        return [f for f in self.findings if f.regime == regime and not f.waiver]

    def reason(self, regime: str) -> str:
        """Reason for the verdict in `regime`: a sentence without the mode's name and full stop."""
        own = {key: culprit for key, culprit in self.culprits.items() if key[0] == regime}
        found = self.counted(regime)
        culprit = _leading(own, found)
        return culprit.sentence if culprit else found[0].sentence


def _told(findings: Sequence[Finding], culprit: Culprit | None) -> Finding | None:
    """The finding that the mode's sentence reports."""
    if culprit is None:
        return next(iter(findings), None)
    shown = culprit.regime, culprit.against, culprit.observable
    return next(
        (f for f in findings if f.culprit == culprit)
        if not culprit.against
        else (f for f in findings if (f.regime, f.against, f.observable) == shown),
        None,
    )


@dataclass(frozen=True, kw_only=True)
class GroupComparison:
    """The whole result, from which every report is made."""

    group: Group
    thresholds: Thresholds
    regimes: tuple[RegimeComparison, ...]
    modes: tuple[ModeVerdict, ...]
    """Replays included, as `mode (replay)`."""
    verdict: Verdict
    sentence: str
    waiver_notes: tuple[str, ...] = ()
    """A sentence for each waiver that has expired or was not needed."""
    environment_differences: EnvironmentDifferences = ()
    """Differences between two groups; empty for one."""
    seen: Seen = field(default_factory=lambda: Seen(resolutions={}))
    """Smallest errors that would have been found in any mode."""

    @property
    def not_compared(self) -> tuple[str, ...]:
        """A sentence for each thing that its launch left out, as a mode does not take it."""
        told = self.group.plan.not_compared
        return tuple(f"{text[:1].upper()}{text[1:]}." for text in told)

    @property
    def leading(self) -> ModeVerdict | None:
        """The mode that the sentence is about; None if all pass."""
        if self.verdict is Verdict.PASS:
            return None
        return next((mode for mode in self.modes if mode.verdict is self.verdict), None)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Findings on one run in one regime."""

    regime: str = ""
    findings: tuple[Finding, ...] = ()
    ladders: Mapping[Key, tuple[Rung, ...]] = field(default_factory=dict)
    culprits: Mapping[Key, Culprit] = field(default_factory=dict)
    resolutions: tuple[Resolution, ...] = ()
    """One for each comparison."""
    passed: str = ""
    """Description of the run in its regime, in case there are no findings."""
    warnings: tuple[str, ...] = ()
    """Warnings of the run's code, in sentences without full stops."""


def mode_verdict(label: str, results: Sequence[Judged]) -> ModeVerdict:
    """Combine `results`, one per regime."""
    culprits = {key: c for result in results for key, c in result.culprits.items()}
    first = first_of(culprits)
    every = sorted(
        (f for result in results for f in result.findings),
        key=lambda f: (f.waiver is not None, -f.verdict.severity, (f.regime, f.against) != first),
    )
    findings = [f for f in every if not f.waiver]
    culprit = _leading(culprits, findings)
    if not findings:
        said = f": {'; '.join(filter(None, map(_passed_or_waived, results)))}"
    elif culprit:
        said = f" {_breach(findings)}{culprit.sentence}{_waived(every, '; ')}"
    else:
        said = f": {findings[0].sentence}{_waived(every, '; ')}"
    warnings = tuple(dict.fromkeys(each for result in results for each in result.warnings))
    return ModeVerdict(
        label=label,
        verdict=worst(f.verdict for f in findings),
        findings=tuple(every),
        sentence=f"{label}{said}.{_warned(warnings)}",
        ladders={key: r for result in results for key, r in result.ladders.items()},
        culprits=culprits,
        culprit=culprit,
        resolutions=by_model([(r.regime, each) for r in results for each in r.resolutions]),
        warnings=warnings,
    )


def _warned(warnings: Sequence[str]) -> str:
    """The first of `warnings`, shortened, as a sentence of its own; empty if there are none."""
    if not warnings:
        return ""
    more = f" ({len(warnings) - 1} more)" * (len(warnings) > 1)
    first = textwrap.shorten(warnings[0], _MOST_SHOWN, placeholder="...")
    return f" Its code warned: {first}.{more}"


def _leading(culprits: Mapping[Key, Culprit], findings: Sequence[Finding]) -> Culprit | None:
    """The culprit over all comparisons and of what the run shows alone; None if there is none.

    Its cause is one that agrees in every comparison, and what an audit found in the noise is told
    where the noise is at fault.
    """
    alone = [f.culprit for f in findings if f.culprit]
    # Where noise is all there is, more of it is known.
    alone.sort(key=lambda c: c.stage is Stage.NOISE and kind_of(c.regime) != NOISE)
    first = first_of(culprits)
    if first is None:
        return next((c for c in alone if not c.breaks_bound), next(iter(alone), None))
    culprit = culprits[first]
    alike = [c for c in culprits.values() if c.stage is culprit.stage]
    # Where samples are clipped, fewer mistakes look alike.
    alike.sort(key=lambda c: (kind_of(c.regime) != CLIP, c is not culprit))
    cause = agreed(c.cause for c in alike)
    also = next((c.also for c in alike if c.also), "")
    if (cause, also) != (culprit.cause, culprit.also):
        culprit = replace(culprit, cause=cause, also=also)
    noise = [c for c in alone if c.stage is Stage.NOISE]
    audited = min(noise, key=lambda c: kind_of(c.regime) != NOISE, default=None)
    if culprit.stage is Stage.NOISE and audited and not culprit.cause.is_division:
        return replace(culprit, cause=culprit.cause.confirmed_by(audited.where))
    return culprit


def _breach(findings: Sequence[Finding]) -> str:
    """Clause that comes first where a sum is longer than privacy allows."""
    breach = next((f.culprit for f in findings if f.culprit and f.culprit.breaks_bound), None)
    if breach is None:
        return ""
    size = breach.evidence[:1].lower() + breach.evidence[1:]
    return f"breaks the privacy bound ({size}, at step {breach.step} of {breach.regime}). It "


def _passed_or_waived(result: Judged) -> str:
    # A run with a waived drift does not agree.
    if not result.findings:
        return result.passed
    more = f" (and {len(result.findings) - 1} more)" * (len(result.findings) > 1)
    return f"{result.findings[0].sentence}{more}{_waived(result.findings, '; ')}"


def _waived(findings: Sequence[Finding], before: str) -> str:
    """`before`, the number of waived findings and the earliest expiry; empty if none is waived."""
    ends = [f.waiver.expires for f in findings if f.waiver]
    if not ends:
        return ""
    return f"{before}{len(ends)} finding{'s' * (len(ends) > 1)} waived until {min(ends)}"


def group_sentence(verdict: Verdict, modes: Sequence[ModeVerdict], agreement: str) -> str:
    """The verdict on all modes, and its first reason.

    Args:
        agreement: what is said of all modes if they pass.
    """
    if not modes:
        return "INCONCLUSIVE: the group holds no run of any mode."
    every = [finding for mode in modes for finding in mode.findings]
    if verdict is Verdict.PASS:
        agreed = f"PASS: {agreement}{_waived(every, ', but for ')}"
        warned = [mode.label for mode in modes if mode.warnings]
        return agreed + (f", but the code of {', '.join(warned)} warned." if warned else ".")
    guilty = [mode for mode in modes if mode.verdict is verdict]
    others = f" The same verdict for {', '.join(m.label for m in guilty[1:])}." * (len(guilty) > 1)
    accepted = _waived(every, " ")
    return f"{verdict}: {guilty[0].sentence}{others}{accepted}{'.' * bool(accepted)}"


def iter_not_computed(comparison: GroupComparison) -> Iterator[tuple[str, Pair]]:
    """Each pair that left observables out, with the name of its regime."""
    for regime in comparison.regimes:
        yield from ((regime.name, pair) for pair in regime.pairs if pair.not_computed)
