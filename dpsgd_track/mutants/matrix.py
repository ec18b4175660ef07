"""Detection matrix: the comparison's verdict on each fault planted in a group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from dpsgd_track.comparison import compare_group
from dpsgd_track.comparison.diagnose.culprit import Culprit
from dpsgd_track.comparison.result import GroupComparison, ModeVerdict
from dpsgd_track.comparison.verdict import FAILURES, Verdict
from dpsgd_track.config import PROBE_NAIVE, PROBES, Thresholds
from dpsgd_track.modes.table import BASELINE, REFERENCE, runs_on_one_device, spec_of, split_planted
from dpsgd_track.mutants.catalogue import MUTANTS
from dpsgd_track.mutants.choice import is_ours, redactions_of
from dpsgd_track.mutants.mutant import Mutant
from dpsgd_track.mutants.needs import Need
from dpsgd_track.mutants.redaction import Redaction
from dpsgd_track.record.run import Group, ModeRun, Status
from dpsgd_track.record.stages import ObservableName

LATEST_STEP = 3
"""Last step at which the detection of a fault is in time."""
_EVERYWHERE = 1 / 3
"""Least share of the parameters that counts as blaming all of them."""
_NAIVE = (ObservableName.LOSS, ObservableName.GRAD_NORM)
"""The only observables that a naive test checks."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault in one mode."""

    fault: Mutant
    mode: str
    """The mode that the fault was planted in."""
    label: str
    """`mode+fault`, as in the group."""
    verdict: Verdict
    sentence: str
    culprit: Culprit | None
    """The first thing that went wrong, according to the comparison."""
    num_places: int
    """Number of the model's parameters; of its layers if layers are blamed."""
    naive_saw: bool
    """True if, without clipping, loss or total gradient norm exceeded its fixed threshold."""
    found_in: tuple[str, ...]
    """Regimes that detect the fault on their own."""
    excuse: str = ""
    """Reason why the fault cannot show in this mode; empty if it can."""
    known_reason: str = ""
    """Known reason why it is not detected in the modes' compute type."""
    redactions: tuple[Redaction, ...] = ()
    """Fields that the mode does not report, or was kept from reporting."""
    stand_in_for: str = ""
    """The user's mode that lacks the code at fault, so that the fault was planted in one of ours
    that reports as little; empty if it was planted in a mode that was asked for."""

    @property
    def is_detected(self) -> bool:
        """True if the verdict fails a review."""
        return self.verdict in FAILURES

    @property
    def has_right_stage(self) -> bool:
        """True if the stage of the fault is blamed."""
        return self.culprit is not None and self.culprit.stage == self.fault.stage

    @property
    def has_right_place(self) -> bool:
        """True if the right stage is blamed, and no layer without the fault.

        A fault in all parameters must not be blamed on a few of them.
        """
        if not self.has_right_stage or self.culprit is None:
            return False
        places = self.culprit.places
        if not self.fault.where:
            return not places or len(places) >= _EVERYWHERE * self.num_places
        return bool(places) and all(map(self._holds, places))

    def _holds(self, layer: str) -> bool:
        """True if the fault is in the parameter `layer`, or in the weight of the layer `layer`."""
        names = layer, f"{layer}.weight"
        return any(fnmatchcase(n, pattern) for n in names for pattern in self.fault.where)

    @property
    def is_in_time(self) -> bool:
        """True if the blamed step is no later than LATEST_STEP, or than the fault's first step."""
        step = self.culprit.step if self.culprit else None
        return step is not None and step <= max(LATEST_STEP, self.fault.since)


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Every planted fault, and the healthy modes of the same group."""

    group: str
    rows: tuple[Row, ...]
    healthy: tuple[ModeVerdict, ...]
    """Modes without faults, except replays and the reference."""
    naive_alarms: tuple[str, ...]
    """Healthy modes that the naive test would flag."""
    settings: str
    """Ranks, type and device in a few words."""

    @property
    def counted(self) -> tuple[Row, ...]:
        """Faults that can show."""
        return tuple(row for row in self.rows if not row.excuse)

    @property
    def missed(self) -> tuple[Row, ...]:
        """Faults that can show and were not detected."""
        return tuple(row for row in self.counted if not row.is_detected)

    @property
    def unexplained(self) -> tuple[Row, ...]:
        """Missed faults without a known reason."""
        return tuple(row for row in self.missed if not (row.redactions or row.known_reason))

    @property
    def false_alarms(self) -> tuple[ModeVerdict, ...]:
        """Healthy modes that did not pass.

        A user's mode that is INCONCLUSIVE, since it leaves fields out, is no false alarm.
        """
        return tuple(
            mode
            for mode in self.healthy
            if mode.verdict in FAILURES
            or (mode.verdict is not Verdict.PASS and spec_of(mode.label) is not None)
        )

    def count(self, what: str) -> int:
        """Number of counted rows that have the property `what`."""
        return sum(bool(getattr(row, what)) for row in self.counted)


def matrix_of(group: Group, thresholds: Thresholds) -> Matrix:
    """Compare a group as `compare` does, and collect the outcome of each fault.

    The runs of the naive test are compared separately and do not contribute to detection.
    """

    def compared(runs: Iterable[ModeRun]) -> GroupComparison:
        return compare_group(replace(group, runs=tuple(runs)), thresholds, all_pairs=False)

    def alone(regime: str) -> GroupComparison:
        return compared(run for run in group.runs if run.regime == regime)

    return _Reader(
        probed=compared(run for run in group.runs if run.regime != PROBE_NAIVE),
        found_by={r: {m.label for m in alone(r).modes if m.verdict in FAILURES} for r in PROBES},
        naive=alone(PROBE_NAIVE),
    ).matrix()


@dataclass(frozen=True, kw_only=True)
class _Reader:
    probed: GroupComparison
    """Comparison of all regimes that may detect a fault."""
    found_by: Mapping[str, Set[str]]
    """Labels of the modes that each regime finds at fault on its own."""
    naive: GroupComparison

    @property
    def _labels(self) -> set[str]:
        return {run.label for run in self.probed.group.runs}

    @property
    def _theirs(self) -> str:
        """The user's mode, as it was given; empty if there is none."""
        healthy = sorted(label for label in self._labels if not split_planted(label)[1])
        foreign = [m for m in healthy if not is_ours(m) and m not in (BASELINE, REFERENCE)]
        return foreign[0] if foreign else ""

    def matrix(self) -> Matrix:
        runs, labels = self.probed.group.runs, self._labels
        rows, healthy = [], []
        for mode in self.probed.modes:
            name, planted = split_planted(mode.label)
            # The title of a replay is no label.
            if mode.label not in labels or name == REFERENCE:
                continue
            faults = [MUTANTS[each] for each in planted if each in MUTANTS]
            if faults:
                rows.append(self._row(mode, faults[0]))
            elif not planted:
                healthy.append(mode)
        return Matrix(
            group=self.probed.group.name,
            rows=tuple(rows),
            healthy=tuple(healthy),
            naive_alarms=tuple(m.label for m in healthy if _naive_saw(self.naive, m.label)),
            settings=_settings(runs),
        )

    def _row(self, verdict: ModeVerdict, fault: Mutant) -> Row:
        every = self.probed.group.runs
        runs = [run for run in every if run.label == verdict.label]
        mode, planted = split_planted(verdict.label)
        redacted = tuple(each for each in Redaction if each in planted)
        # A mode that stands in has no healthy run, unless it was asked for itself.
        is_stand_in = is_ours(mode) and (bool(redacted) or mode not in self._labels)
        return Row(
            fault=fault,
            mode=mode,
            label=verdict.label,
            verdict=verdict.verdict,
            sentence=verdict.sentence.removeprefix(verdict.label).lstrip(": "),
            culprit=verdict.culprit,
            num_places=_num_places(verdict.culprit, runs),
            naive_saw=_naive_saw(self.naive, verdict.label),
            found_in=tuple(r for r, labels in self.found_by.items() if verdict.label in labels),
            excuse=_excuse(fault, mode, runs),
            known_reason=_known_reason(fault, runs),
            # Built-in modes report everything, unless they are redacted.
            redactions=redacted or (() if is_ours(mode) else redactions_of(mode, every) or ()),
            stand_in_for=self._theirs if is_stand_in else "",
        )


def _num_places(culprit: Culprit | None, runs: Iterable[ModeRun]) -> int:
    for run in runs:
        if run.trajectory and culprit and culprit.places:
            layers = run.trajectory.layer_names.tolist()
            is_layer = culprit.places[0] in layers
            return len(layers) if is_layer else len(run.trajectory.parameter_names)
    return 0


def _naive_saw(naive: GroupComparison, label: str) -> bool:
    for regime in naive.regimes:
        if any(run.label == label and run.status is not Status.FINISHED for run in regime.runs):
            return True
        pair = regime.pair(label)
        drifts = pair.drifts.values() if pair else ()
        for drift in drifts:
            threshold = getattr(naive.thresholds, drift.observable.threshold)
            if drift.observable.name in _NAIVE and not drift.max <= threshold:
                return True
    return False


def _excuse(fault: Mutant, mode: str, runs: Sequence[ModeRun]) -> str:
    facts = [run.facts for run in runs if run.facts]
    unreached = [set(each.unreached) for each in facts]
    never = set.intersection(*unreached) if unreached else set()
    if never:
        return f"the mode never comes by {', '.join(sorted(never))}"
    if Need.SHARDS in fault.needs and any(each.is_replicated for each in facts):
        return "the mode holds every parameter whole on every rank"
    if Need.EMPTY_STEP in fault.needs and any(each.left_out_steps for each in facts):
        return "the mode takes no empty batch"
    if fault.needs_ranks and runs_on_one_device(mode):
        return f"the mode runs on one device, and it needs {', '.join(fault.needs)}"
    return ""


def _known_reason(fault: Mutant, runs: Iterable[ModeRun]) -> str:
    is_low = any(run.job and run.job.performance.param_dtype == "bfloat16" for run in runs)
    return fault.in_bf16 if is_low else ""


def _settings(runs: Iterable[ModeRun]) -> str:
    run = next(run for run in runs if run.mode == BASELINE)
    assert run.job is not None, "the baseline is planned"
    performance = run.job.performance
    device = run.facts.device.name if run.facts else ""
    ranks = run.job.num_ranks
    return f"{ranks} ranks, {performance.param_dtype}, {device or performance.device}"
