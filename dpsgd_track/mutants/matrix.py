"""What the comparison of a group said of each fault that was planted in it."""

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
"""Step by which a fault has to be found."""
_EVERYWHERE = 1 / 3
"""Share of the parameters from which on they are no few."""
_NAIVE = (ObservableName.LOSS, ObservableName.GRAD_NORM)
"""All that a naive test looks at."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault in one mode."""

    fault: Mutant
    mode: str
    """What it was planted in."""
    label: str
    """`mode+fault`, as the group has it."""
    verdict: Verdict
    sentence: str
    culprit: Culprit | None
    """What the comparison found to have gone wrong first."""
    num_places: int
    """Parameters of the model; its layers where layers are blamed."""
    naive_saw: bool
    """Whether loss or total gradient norm passed its fixed threshold where nothing is clipped."""
    found_in: tuple[str, ...]
    """Regimes that would have found it without the others."""
    excuse: str = ""
    """Why it could not show in this mode; empty where it could."""
    known_reason: str = ""
    """Why it is known not to be found in the type that modes compute in."""
    redactions: tuple[Redaction, ...] = ()
    """What the mode does not report, or was kept from reporting."""

    @property
    def is_detected(self) -> bool:
        """Whether the verdict is one that fails a review."""
        return self.verdict in FAILURES

    @property
    def has_right_stage(self) -> bool:
        """Whether the stage is blamed in which the fault is."""
        return self.culprit is not None and self.culprit.stage == self.fault.stage

    @property
    def has_right_place(self) -> bool:
        """Right stage, and no layer blamed that the fault is not in.

        Of a fault that is everywhere, no few layers may be blamed.
        """
        if not self.has_right_stage or self.culprit is None:
            return False
        places = self.culprit.places
        if not self.fault.where:
            return not places or len(places) >= _EVERYWHERE * self.num_places
        return bool(places) and all(map(self._holds, places))

    def _holds(self, layer: str) -> bool:
        """Whether the fault is in a parameter, or in the weight of a layer, of that name."""
        names = layer, f"{layer}.weight"
        return any(fnmatchcase(n, pattern) for n in names for pattern in self.fault.where)

    @property
    def is_in_time(self) -> bool:
        """Whether the blame falls on a step early enough."""
        step = self.culprit.step if self.culprit else None
        return step is not None and step <= LATEST_STEP


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Every fault that was planted, and the healthy twins."""

    group: str
    rows: tuple[Row, ...]
    healthy: tuple[ModeVerdict, ...]
    """Modes without faults, replays and the reference apart."""
    naive_alarms: tuple[str, ...]
    """Healthy modes that the naive test would have raised an alarm on."""
    settings: str
    """Ranks, type and device in a few words."""

    @property
    def counted(self) -> tuple[Row, ...]:
        """Faults that could show."""
        return tuple(row for row in self.rows if not row.excuse)

    @property
    def missed(self) -> tuple[Row, ...]:
        """Faults that could show and were not found."""
        return tuple(row for row in self.counted if not row.is_detected)

    @property
    def unexplained(self) -> tuple[Row, ...]:
        """Missed faults of which it was not known that they would be."""
        return tuple(row for row in self.missed if not (row.redactions or row.known_reason))

    @property
    def false_alarms(self) -> tuple[ModeVerdict, ...]:
        """Healthy modes that did not pass.

        Someone else's mode may leave things out that are then INCONCLUSIVE; that is no alarm.
        """
        return tuple(
            mode
            for mode in self.healthy
            if mode.verdict in FAILURES
            or (mode.verdict is not Verdict.PASS and spec_of(mode.label) is not None)
        )

    def count(self, what: str) -> int:
        """How many of the counted rows have the property `what`."""
        return sum(bool(getattr(row, what)) for row in self.counted)


def matrix_of(group: Group, thresholds: Thresholds) -> Matrix:
    """Compare a group as `compare` does, and read off what it says of each fault.

    The naive test's runs are compared by themselves: they are no part of what finds a fault.
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
    """All regimes that a fault may be found in."""
    found_by: Mapping[str, Set[str]]
    """Labels of the modes that each of them finds fault with by itself."""
    naive: GroupComparison

    def matrix(self) -> Matrix:
        runs = self.probed.group.runs
        labels = {run.label for run in runs}
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
            # Ours report everything, unless they are redacted.
            redactions=redacted or (() if is_ours(mode) else redactions_of(mode, every) or ()),
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
