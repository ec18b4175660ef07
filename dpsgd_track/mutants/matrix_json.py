"""`faults.json`: the detection matrix for programs, in one typed document."""

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
    """What it was planted in."""
    label: str
    """`mode+fault`, as the group has it."""
    verdict: Verdict
    is_detected: bool
    """Whether the verdict is one that fails a review."""
    stage: Stage | None
    """The stage that is blamed; null, like all that is said of it, where none is."""
    regime: str | None
    step: int | None
    """null before the first step, too."""
    layers: tuple[str, ...]
    """Layers or parameters that are blamed, worst first."""
    observable: ObservableName | None
    """What showed it."""
    expected_stage: Stage
    """The stage that the fault is in."""
    expected_layers: tuple[str, ...]
    """Patterns of the parameters that it is in; empty where it is everywhere."""
    has_right_stage: bool
    has_right_place: bool
    """Right stage, and no layer blamed that the fault is not in."""
    naive_saw: bool
    """Whether loss or gradient norm passed its fixed threshold where nothing is clipped."""
    found_in: tuple[str, ...]
    """Regimes that would have found it without the others."""
    excuse: str
    """Why it could not show in this mode; empty where it could."""
    redactions: tuple[str, ...]
    """What the mode does not report, or was kept from reporting."""
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
    """What the comparison of a group said of each fault that was planted in it."""

    group: str
    """Name of the run group."""
    settings: str
    """Ranks, type and device in a few words."""
    rows: tuple[FaultEntry, ...]
    healthy: tuple[HealthyEntry, ...]


MATRIX = Codec(MatrixDocument, "dpsgd-track/faults", 2)
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
        sentence=row.sentence,
    )


def _healthy(mode: ModeVerdict) -> HealthyEntry:
    return HealthyEntry(mode=mode.label, verdict=mode.verdict, sentence=mode.sentence)
