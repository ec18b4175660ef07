"""What is held against what: all that tells one group's comparison from that of two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from dpsgd_track.comparison.measure.drift import Labelled, Pair
from dpsgd_track.comparison.measure.floor import Floor
from dpsgd_track.comparison.result import EnvironmentDifferences, RegimeComparison
from dpsgd_track.comparison.verdict import Finding, Verdict, judge_likeness, judge_run
from dpsgd_track.record.run import Group, ModeRun

_KEYS_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Held:
    """A run against another one."""

    pair: Pair | None
    """None where one of the two is not compared."""
    floor: Floor | None = None
    """What rounding explains of the pair."""
    findings: Sequence[Finding] = ()
    """What is to be said of the two whatever their numbers are."""
    unlike: bool = False
    """Whether the two cannot be compared; their drifts then say nothing about the mode."""
    other_environment: Sequence[str] = ()
    """Settings of software and machine in which the two differ."""

    def attributed(self, finding: Finding) -> Finding:
        """`finding`, or INCONCLUSIVE where another environment may be the cause of a drift."""
        keys = self.other_environment
        if finding.verdict is not Verdict.DRIFT or not keys:
            return finding
        more = f" and {len(keys) - _KEYS_SHOWN} more" * (len(keys) > _KEYS_SHOWN)
        return replace(
            finding,
            verdict=Verdict.INCONCLUSIVE,
            sentence=f"{finding.sentence}; it cannot be attributed, since the groups also differ "
            f"in {', '.join(keys[:_KEYS_SHOWN])}{more}",
        )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A run that is judged, and all that it is held against."""

    run: ModeRun
    held: Sequence[Held] = ()
    findings: Sequence[Finding] = ()
    """That there is nothing to hold it against, where there ought to be."""
    new: str = ""
    """That it has no like to be held against, where it need not have one."""


@dataclass(frozen=True, kw_only=True)
class Matched:
    """One regime, measured, in which each run knows what it is held against."""

    comparison: RegimeComparison
    candidates: Sequence[Candidate]
    """Replays included."""
    reference: ModeRun | None
    """The oracle, which shows whether clipping was put to the test."""


class Pairing(Protocol):
    """A way to pair the runs of one group or of two."""

    @property
    def regimes(self) -> Sequence[str]:
        """Names of the regimes, in the order of the launcher."""

    @property
    def differences(self) -> EnvironmentDifferences:
        """What differs between two groups."""

    def match(self, regime: str) -> Matched:
        """Measure all pairs of one regime."""

    def shown(self, matched: Sequence[Matched]) -> Group:
        """The group that a report is about."""

    def unmatched(self, matched: Sequence[Matched]) -> str:
        """Why a comparison in which nothing is wrong shows nothing either; empty if it does."""


def labelled(run: ModeRun, label: str = "") -> Labelled:
    """A recorded run as it is held against others, by default under its own label."""
    assert run.trajectory is not None, "only a recorded run is held against others"
    return label or run.label, run.trajectory


def run_of(runs: Iterable[ModeRun], label: str) -> ModeRun | None:
    """The run of `label` that is no replay."""
    return next((run for run in runs if run.label == label and not run.replay), None)


def is_sound(base: ModeRun, replay: ModeRun) -> bool:
    """Whether `replay` did what `base` did: an unsound one would excuse what rounding does not."""
    return not [*judge_run(replay), *judge_likeness(base, replay)]
