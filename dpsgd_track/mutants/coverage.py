"""Coverage of a user's mode: the mutants of each class that a comparison of it could detect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpsgd_track.mutants.catalogue import KINDS
from dpsgd_track.mutants.choice import is_ours
from dpsgd_track.mutants.matrix import Matrix, Row

if TYPE_CHECKING:
    from rich.console import Console


def coverage(matrix: Matrix) -> list[str]:
    """One line per class of mutants; none if only built-in modes were tested."""
    is_foreign = any(not is_ours(row.mode) or row.redactions for row in matrix.rows)
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
    lines = [f"not {', '.join(names)}: {why}" for why, names in reasons.items()]
    return "; ".join([line, *lines])


def _why(row: Row) -> str:
    if row.excuse:
        return row.excuse
    if row.redactions:
        *most, last = (redaction.in_words for redaction in row.redactions)
        return f"the mode tells {', '.join(most)}{' and ' * bool(most)}{last}"
    return f"the comparison said {row.verdict}"


def print_coverage(matrix: Matrix, console: Console) -> None:
    """Print the lines under a heading."""
    from rich.text import Text

    lines = coverage(matrix)
    if lines:
        console.print(Text("Faults of the mode that the comparison would find, class by class:"))
        for line in lines:
            console.print(Text(f"  {line}"))
