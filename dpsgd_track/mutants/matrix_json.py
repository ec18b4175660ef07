"""`faults.json`: the detection matrix as a typed document for programs."""

from __future__ import annotations

from dataclasses import dataclass

from dpsgd_track.comparison.result import ModeVerdict
from dpsgd_track.comparison.verdict import Verdict
from dpsgd_track.mutants.matrix import Matrix, Row
from dpsgd_track.record.codec import Codec
from dpsgd_track.record.stages import ObservableName, Stage


@dataclass(frozen=True, kw_only=True)
class FaultEntry:
    """One fault in one mode."""

    fault: str
    """Name in the catalogue."""
    kind: str
    mode: str
    """The mode that the fault was planted in."""
    label: str
    """`mode+fault`, as in the group."""
    verdict: Verdict
    is_detected: bool
    """True if the verdict fails a review."""
    stage: Stage | None
    """The stage that is blamed; null, like the other fields of the blame, if none is."""
    regime: str | None
    step: int | None
    """The step that is blamed; null before the first step as well."""
    layers: tuple[str, ...]
    """Layers or parameters that are blamed, worst first."""
    observable: ObservableName | None
    """The observable that showed it."""
    expected_stage: Stage
    """The stage of the fault."""
    expected_layers: tuple[str, ...]
    """Patterns of the parameters at fault; empty if all are."""
    has_right_stage: bool
    has_right_place: bool
    """True if the right stage is blamed, and no layer without the fault."""
    naive_saw: bool
    """True if, without clipping, loss or gradient norm exceeded its fixed threshold."""
    found_in: tuple[str, ...]
    """Regimes that detect the fault on their own."""
    excuse: str
    """Reason why the fault cannot show in this mode; empty if it can."""
    redactions: tuple[str, ...]
    """Fields that the mode does not report, or was kept from reporting."""
    stand_in_for: str
    """The user's mode that lacks the code at fault, for which `mode` stands in; else empty."""
    sentence: str


@dataclass(frozen=True, kw_only=True)
class HealthyEntry:
    """A mode in which no fault was planted."""

    mode: str
    """Its label."""
    verdict: Verdict
    sentence: str


@dataclass(frozen=True, kw_only=True)
class MatrixDocument:
    """The comparison's verdict on each fault planted in a group."""

    group: str
    """Name of the run group."""
    settings: str
    """Ranks, type and device in a few words."""
    rows: tuple[FaultEntry, ...]
    healthy: tuple[HealthyEntry, ...]


MATRIX = Codec(MatrixDocument, "dpsgd-track/faults", 3)
"""Writes and reads `faults.json`; `MATRIX.json_schema()` is its JSON schema."""


def matrix_json(matrix: Matrix) -> str:
    """The matrix as JSON text."""
    document = MatrixDocument(
        group=matrix.group,
        settings=matrix.settings,
        rows=tuple(map(_row, matrix.rows)),
        healthy=tuple(map(_healthy, matrix.healthy)),
    )
    return MATRIX.dumps(document, indent=2) + "\n"


def _row(row: Row) -> FaultEntry:
    culprit = row.culprit
    return FaultEntry(
        fault=row.fault.name,
        kind=row.fault.kind,
        mode=row.mode,
        label=row.label,
        verdict=row.verdict,
        is_detected=row.is_detected,
        stage=culprit.stage if culprit else None,
        regime=culprit.regime if culprit else None,
        step=culprit.step if culprit else None,
        layers=culprit.places if culprit else (),
        observable=culprit.observable if culprit else None,
        expected_stage=row.fault.stage,
        expected_layers=row.fault.where,
        has_right_stage=row.has_right_stage,
        has_right_place=row.has_right_place,
        naive_saw=row.naive_saw,
        found_in=row.found_in,
        excuse=row.excuse,
        redactions=tuple(row.redactions),
        stand_in_for=row.stand_in_for,
        sentence=row.sentence,
    )


def _healthy(mode: ModeVerdict) -> HealthyEntry:
    return HealthyEntry(mode=mode.label, verdict=mode.verdict, sentence=mode.sentence)
