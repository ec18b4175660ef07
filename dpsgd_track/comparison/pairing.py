"""The pairs of runs to compare: the only difference between comparing one group and two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from dpsgd_track.comparison.extent import WHOLE, Extent
from dpsgd_track.comparison.measure.drift import Labelled, Pair
from dpsgd_track.comparison.measure.floor import Floor
from dpsgd_track.comparison.result import EnvironmentDifferences, RegimeComparison
from dpsgd_track.comparison.verdict import Finding, Verdict, judge_likeness, judge_run
from dpsgd_track.config import NOISE, kind_of
from dpsgd_track.record.run import Group, ModeRun
from dpsgd_track.record.trajectory import Trajectory

_KEYS_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Held:
    """A run compared with another one."""

    pair: Pair | None
    """None if no drift was measured between the two."""
    floor: Floor | None = None
    """Rounding error to expect of the pair; None if it is unknown."""
    plain: Trajectory | None = None
    """Plain autograd in the modes' type, aligned with the pair; None if it was not recorded."""
    findings: Sequence[Finding] = ()
    """Findings that do not depend on the numbers of the two runs."""
    unlike: bool = False
    """True if the two cannot be compared; their drifts then say nothing about the mode."""
    extent: Extent = WHOLE
    """The part of the two runs that is compared."""
    other_environment: Sequence[str] = ()
    """Settings of software and machine in which the two differ."""

    def attributed(self, finding: Finding) -> Finding:
        """`finding`; a DRIFT becomes INCONCLUSIVE if another environment may be its cause."""
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
    """A run to judge, with all runs that it is compared with."""

    run: ModeRun
    held: Sequence[Held] = ()
    findings: Sequence[Finding] = ()
    """Findings that report a required baseline as missing."""
    new: str = ""
    """Sentence about a run that has no counterpart and needs none; otherwise empty."""


@dataclass(frozen=True, kw_only=True)
class Matched:
    """The measured pairs of one regime."""

    comparison: RegimeComparison
    candidates: Sequence[Candidate]
    """Runs to judge, replays included."""
    reference: ModeRun | None
    """The oracle, which shows whether the regime exercised clipping."""


class Pairing(Protocol):
    """A way to pair the runs of one group, or of two."""

    @property
    def regimes(self) -> Sequence[str]:
        """Names of the regimes, in the order of the launcher."""

    @property
    def differences(self) -> EnvironmentDifferences:
        """Facts of the environment that differ between two groups."""

    def match(self, regime: str) -> Matched:
        """Measure all pairs of one regime."""

    def shown(self, matched: Sequence[Matched]) -> Group:
        """The group that a report describes."""

    def agreement(self, matched: Sequence[Matched]) -> str:
        """The sentence of a PASS, without a full stop."""

    def unmatched(self, matched: Sequence[Matched]) -> str:
        """Reason why a comparison without findings shows nothing; empty if it shows something."""


def labelled(run: ModeRun, label: str = "", extent: Extent = WHOLE) -> Labelled:
    """The steps of a recorded run that are compared, with its label, by default the run's own."""
    assert run.trajectory is not None, "only a recorded run is held against others"
    return label or run.label, extent.of(run.trajectory)


def run_of(runs: Iterable[ModeRun], label: str) -> ModeRun | None:
    """The run of `label` that is not a replay."""
    return next((run for run in runs if run.label == label and not run.replay), None)


def is_sound(base: ModeRun, replay: ModeRun) -> bool:
    """True if `replay` did the same as `base`; otherwise it would excuse more than rounding."""
    return not [*judge_run(replay), *judge_likeness(base, replay)]


def has_noise_regime(group: Group, run: ModeRun) -> bool:
    """True if `group` has a recorded run of the same mode in a regime that audits its noise."""
    audited = (each for each in group.runs if kind_of(each.regime) == NOISE)
    return any(each.label == run.label and each.trajectory and not each.replay for each in audited)
