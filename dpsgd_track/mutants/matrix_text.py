"""The matrix as a table for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dpsgd_track.config import PROBE_NOISE, PROBES
from dpsgd_track.mutants.catalogue import KINDS
from dpsgd_track.mutants.matrix import LATEST_STEP, Matrix, Row
from dpsgd_track.mutants.mutant import PLAUSIBLE
from dpsgd_track.report.markdown import prose

if TYPE_CHECKING:
    from rich.console import Console

_YES, _NO = "✓", "✗"


def summary(matrix: Matrix) -> list[str]:
    """Key figures of the matrix, one sentence each, without a full stop."""
    rows = matrix.counted
    lines = [
        f"{_fraction(matrix.count('is_detected'), rows)} faults found",
        f"{_fraction(matrix.count('has_right_stage'), rows)} with the right stage blamed, "
        f"{_fraction(matrix.count('has_right_place'), rows)} with the right stage and layer",
        f"{_fraction(matrix.count('is_in_time'), rows)} blamed on step {LATEST_STEP} at the "
        "latest, or on the first that the fault shows at",
        f"{len(matrix.false_alarms)} false alarms on {len(matrix.healthy)} healthy modes",
        f"{_fraction(matrix.count('naive_saw'), rows)} seen by a test of loss and gradient norm "
        f"without clipping, which raises {len(matrix.naive_alarms)} false alarms",
    ]
    alone = [f"{sum(r in row.found_in for row in rows)} by {r}" for r in PROBES]
    lines.append(f"regimes by themselves would find {', '.join(alone)}")
    of_noise = [row for row in rows if row.fault.kind == "noise"]
    if of_noise:
        audited = sum(PROBE_NOISE in row.found_in for row in of_noise)
        lines.append(
            f"of the {len(of_noise)} faults of the noise, the audit of a mode's own noise finds "
            f"{audited} by itself"
        )
    excused = len(matrix.rows) - len(rows)
    return [
        *_stand_ins(matrix),
        *lines,
        *([f"{excused} {'fault' if excused == 1 else 'faults'} could not show"] if excused else []),
    ]


def outcome(matrix: Matrix) -> str:
    """The group's name, the share of faults found, those missed, and false alarms, on one line."""
    parts = [f"{_fraction(matrix.count('is_detected'), matrix.counted)} faults found"]
    if matrix.missed:
        parts.append(f"missed {', '.join(row.label for row in matrix.missed)}")
    parts.append(f"{len(matrix.false_alarms)} false alarms on {len(matrix.healthy)} healthy modes")
    return f"{matrix.group}: {'; '.join(parts)}"


def _stand_ins(matrix: Matrix) -> list[str]:
    """Sentence on stand-ins, if some faults were not planted in the user's mode."""
    rows = [row for row in matrix.rows if row.stand_in_for]
    if not rows:
        return []
    (theirs,), modes = {row.stand_in_for for row in rows}, {row.mode for row in rows}
    own = sum(row.mode == theirs for row in matrix.rows)
    return [
        f"{own} {_faults(own)} planted in {theirs} itself, and {len(rows)} in "
        f"{' and '.join(sorted(modes))} as a stand-in that reports as little, since only our own "
        "modes have the code at fault"
    ]


def _faults(number: int) -> str:
    return "fault was" if number == 1 else "faults were"


def _fraction(number: int, rows: tuple[Row, ...]) -> str:
    percent = f" ({number / len(rows):.0%})" if rows else ""
    return f"{number} of {len(rows)}{percent}"


def print_matrix(matrix: Matrix, console: Console) -> None:
    """Print the table, the missed faults and the key figures."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{matrix.group}: {matrix.settings}")
    for heading in ("fault", "mode", "verdict", "step", "blamed", "shown by", "naive test"):
        table.add_column(heading, overflow="fold")
    for row in matrix.rows:
        style = "" if row.has_right_place and row.is_detected else "yellow"
        style = style if row.is_detected or row.excuse else "red"
        table.add_row(*map(Text, _cells(row)), style=style)
    console.print(table)
    for line in [*_exceptions(matrix), *summary(matrix)]:
        console.print(Text(line))


def _cells(row: Row) -> tuple[str, ...]:
    culprit = row.culprit
    if row.excuse:
        return row.fault.name, _planted_in(row), "could not show", "", row.excuse, "", ""
    return (
        row.fault.name,
        _planted_in(row),
        str(row.verdict),
        "" if culprit is None or culprit.step is None else str(culprit.step),
        f"{_blamed(row)} {_YES if row.has_right_place else _NO}",
        (culprit.observable or "") if culprit else "",
        "sees it" if row.naive_saw else "misses it",
    )


def _planted_in(row: Row) -> str:
    return f"{row.mode} (stand-in)" if row.stand_in_for else row.mode


def _blamed(row: Row) -> str:
    if row.culprit is None:
        return "nothing"
    places = row.culprit.places
    more = f" and {len(places) - 2} more" * (len(places) > 2)
    return ", ".join([row.culprit.stage, *places[:2]]) + more


def _exceptions(matrix: Matrix) -> list[str]:
    """False alarms and missed faults, a line each."""
    lines = [f"FALSE ALARM {mode.sentence}" for mode in matrix.false_alarms]
    lines += [f"MISSED {row.label}: {row.verdict}, {_with_reason(row)}" for row in matrix.missed]
    return lines


def markdown(matrix: Matrix, command: str) -> str:
    """The page of the documentation."""
    parts = [
        "# Faults that are found",
        "These tables say of each known fault if a comparison finds it, and where it puts the "
        f"blame. They are made by `{command}` ({matrix.settings}). Each fault was planted in a "
        "correct mode, which then ran on the probe and was compared like any other.",
        "\n".join(f"- {line}" for line in summary(matrix)),
    ]
    for kind, about in KINDS.items():
        rows = [row for row in matrix.rows if row.fault.kind == kind]
        if rows:
            parts += [f"## {kind.capitalize()}", about, _table(rows)]
    missed = [row for row in matrix.counted if not row.is_detected]
    misplaced = [row for row in matrix.counted if row.is_detected and not row.has_right_place]
    parts += ["## Not found", _listed(missed, "Every fault was found.")]
    parts += ["## Found, and blamed on another place", _listed(misplaced, "None.")]
    parts += ["## Healthy modes", "\n".join(f"- {prose(m.sentence)}" for m in matrix.healthy)]
    return "\n\n".join(parts) + "\n"


def _table(rows: Iterable[Row]) -> str:
    lines = [
        "| fault | computation | needs | planted in | verdict | step | blamed | naive test |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name, _, verdict, step, blamed, _, naive = _cells(row)
        mode = f"`{row.mode}`{', a stand-in' if row.stand_in_for else ''}"
        source = "" if row.fault.source == PLAUSIBLE else f" [{prose(row.fault.source)}]"
        what = f"**{prose(row.fault.title)}**{source}: {prose(row.fault.formula)}"
        needs = prose(", ".join(row.fault.needs)) or "nothing"
        told = (verdict, step, prose(blamed), naive)
        cells = (f"`{name}`", what, needs, mode, *told)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _listed(rows: list[Row], none: str) -> str:
    return "\n".join(f"- `{row.label}`: {prose(_with_reason(row))}" for row in rows) or none


def _with_reason(row: Row) -> str:
    return f"{row.known_reason}. {row.sentence}" if row.known_reason else row.sentence
