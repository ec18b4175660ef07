"""Which classes of faults the comparison could not have seen in someone else's mode, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpsgd_track.mutants import KINDS
from dpsgd_track.mutants.choice import is_ours
from dpsgd_track.mutants.matrix import Matrix, Row
from dpsgd_track.mutants.redaction import title

if TYPE_CHECKING:
    from rich.console import Console


def coverage(matrix: Matrix) -> list[str]:
    """One line for each class of faults; none where no mode but ours was put to the test."""
    is_foreign = any(not is_ours(row.mode) or row.mutes for row in matrix.rows)
    if not is_foreign:
        return []
    return [line for kind in KINDS if (line := _line(matrix, kind))]


def _line(matrix: Matrix, kind: str) -> str:
    rows = [row for row in matrix.rows if row.fault.kind == kind]
    if not rows:
        return ""
    unseen = [row for row in rows if row.excuse or not row.is_detected]
    line = f"{kind}: {len(rows) - len(unseen)} of {len(rows)} would be found"
    reasons: dict[str, list[str]] = {}
    for row in unseen:
        reasons.setdefault(_why(row), []).append(row.fault.name)
    said = [f"not {', '.join(names)}: {why}" for why, names in reasons.items()]
    return "; ".join([line, *said])


def _why(row: Row) -> str:
    if row.excuse:
        return row.excuse
    if row.mutes:
        *most, last = (title(name) for name in row.mutes)
        return f"the mode tells {', '.join(most)}{' and ' * bool(most)}{last}"
    return f"the comparison said {row.verdict}"


def print_coverage(matrix: Matrix, console: Console) -> None:
    """The lines, under a heading."""
    from rich.text import Text

    lines = coverage(matrix)
    if lines:
        console.print(Text("What the comparison could see in the mode, class by class:"))
        for line in lines:
            console.print(Text(f"  {line}"))
