"""`summary.txt`, and the same table in the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dpsgd_track.comparison.profile import Profile, profile_of
from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.comparison.verdict import Verdict
from dpsgd_track.record.judged import JudgedGroup
from dpsgd_track.record.run import Group
from dpsgd_track.report import history, profile_table
from dpsgd_track.report.columns import in_columns
from dpsgd_track.report.guarantee import guarantees
from dpsgd_track.report.stages import headline, told
from dpsgd_track.report.table import (
    ABSENT,
    HEADINGS,
    consistency,
    rows,
    spreads,
    waived,
    without_replays,
)
from dpsgd_track.visible_text import visible

if TYPE_CHECKING:
    from rich.console import Console

_COLOURS = {"PASS": "green", "DRIFT": "yellow", "BUG": "red", "INCONCLUSIVE": "magenta"}
_LOG_WIDTH = 160
_FIRST_TO_GO = (
    "mean grad norm",
    "Δ grad norm",
    "Δ sample norm",
    "Δ clipped sum",
    "final loss",
    "Δ loss",
)
_FIRST_OF_HISTORY_TO_GO = (
    "started (UTC)",
    "updated weights",
    "clip factors",
    "loss",
    "noise",
    "clipped sum",
    "per-sample norms",
)
_FIRST_OF_PROFILE_TO_GO = ("tokens/s", "tracking", "peak GiB", "× memory", "B", "T")


def summary(comparison: GroupComparison) -> str:
    """The table of modes, the consistency analysis, and the verdict in sentences."""
    modes, replays = without_replays(rows(comparison))
    table = [
        (row.label, _six(row.final_loss), _six(row.mean_grad_norm), row.status) for row in modes
    ]
    lines = told(comparison)
    parts = [
        f"Group {comparison.group.name}",
        _columns(("mode", "final loss", "average gradient norm", "status"), table),
        *_consistency_analysis(comparison),
        *filter(None, (replays,)),
        "Differences over the steps",
        _columns(("regime", "modes", "observable", "mean", "std", "max"), consistency(comparison))
        if any(regime.pairs for regime in comparison.regimes)
        else "Nothing to compare.",
        *_differing(comparison),
        *guarantees(comparison.group),
        *comparison.not_compared,
        f"Verdict: {comparison.verdict}",
        *(["\n".join(f"{verdict:<12}  {line}" for verdict, line in lines)] if lines else []),
        *(["Waivers\n" + "\n".join(waived(comparison))] if waived(comparison) else []),
        *(_costs(profile) if (profile := profile_of(comparison.group)) else []),
        *filter(None, (comparison.seen.sentence,)),
        headline(comparison),
    ]
    return "\n\n".join(visible(part) for part in parts) + "\n"


def _six(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.6f}"


def _consistency_analysis(comparison: GroupComparison) -> list[str]:
    """Two lines on how far final losses and average gradient norms of all modes lie apart."""
    lines = [
        (
            f"{name}:",
            f"mean {each.mean:.6f}",
            f"std {each.std:.6f}",
            f"max diff {each.max_diff:.6f}",
        )
        for name, each in spreads(comparison).items()
    ]
    return ["CONSISTENCY ANALYSIS\n" + "\n".join(in_columns(lines))] if lines else []


def profile_summary(profile: Profile, group: Group) -> str:
    """The table of a group that holds only a profile."""
    facts = ", ".join(profile_table.facts(profile, group))
    parts = [f"Group {group.name}", facts, *_costs(profile), profile.sentence]
    return "\n\n".join(visible(part) for part in parts if part) + "\n"


def _costs(profile: Profile) -> list[str]:
    layers = profile_table.plans(profile)
    return [
        "Speed and memory",
        _columns(profile_table.HEADINGS, profile_table.rows(profile)),
        "\n".join((*profile.incomplete, *profile_table.best(profile))),
        profile_table.LEGEND,
        *([_columns(profile_table.PLAN_HEADINGS, layers)] if layers else []),
    ]


def _differing(comparison: GroupComparison) -> list[str]:
    lines = comparison.environment_differences
    return [_columns(("environment", "before", "after"), lines)] if lines else []


def _columns(heading: Sequence[str], table: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heading, *table, strict=True)]
    return "\n".join(in_columns([heading, ["-" * width for width in widths], *table]))


def print_table(comparison: GroupComparison, console: Console) -> None:
    """Print the table of modes and the verdict; names are shown literally."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(comparison.group.name)))
    modes, replays = without_replays(rows(comparison))
    shown = [[visible(cell) for cell in row.cells] for row in modes]
    widths = _fitting(HEADINGS, shown, console.width, _FIRST_TO_GO)
    for i, width in widths.items():
        justify: Any = "left" if i < 2 else "right"
        table.add_column(HEADINGS[i], justify=justify, width=width)
    for mode, row in zip(modes, shown, strict=True):
        cells = [Text(row[i]) for i in widths]
        cells[1].stylize(_COLOURS[mode.verdict])
        table.add_row(*cells)
    console.print(table)
    # The viewer of a log wraps its lines.
    soft = not console.is_terminal
    wrong = [line for line in told(comparison) if line[0] is not Verdict.PASS]
    for verdict, said in wrong:
        line = Text(f"{verdict:<12}  ", style=_COLOURS[verdict])
        line.append(visible(said), style="default")
        console.print(line, soft_wrap=soft)
    seen = filter(None, (comparison.seen.sentence,))
    floor = filter(None, (replays,))
    notes = (*comparison.not_compared, *comparison.waiver_notes)
    for sentence in [*floor, *guarantees(comparison.group), *notes, *seen]:
        console.print(Text(visible(sentence)), soft_wrap=soft)
    print_verdict(comparison, console)


def print_verdict(comparison: GroupComparison, console: Console) -> None:
    """Print the verdict in its one sentence."""
    print_sentence(headline(comparison), console, f"bold {_COLOURS[comparison.verdict]}")


def print_sentence(sentence: str, console: Console, style: str = "") -> None:
    """Print a sentence; names in it are shown literally."""
    from rich.text import Text

    # The viewer of a log wraps its lines.
    console.print(Text(visible(sentence), style=style), soft_wrap=not console.is_terminal)


def print_history(groups: Sequence[JudgedGroup], console: Console) -> None:
    """Print the table of groups, and what changed in the last; names are shown literally."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    shown = [[visible(cell) for cell in history.cells(group)] for group in groups]
    fitting = _fitting(history.HEADINGS, shown, console.width, _FIRST_OF_HISTORY_TO_GO)
    for i, width in fitting.items():
        justify: Any = "left" if i <= history.VERDICT else "right"
        table.add_column(history.HEADINGS[i], justify=justify, width=width)
    for group, row in zip(groups, shown, strict=True):
        cells = [Text(cell) for cell in row]
        cells[history.VERDICT].stylize(_COLOURS[history.verdict_of(group)])
        for i, stage in enumerate(history.STAGES, history.VERDICT + 1):
            if group.drifts.get(stage, 0.0) > 1:
                cells[i].stylize("red")
        table.add_row(*(cells[i] for i in fitting))
    console.print(table)
    said = [history.since(*groups[-2:])] if len(groups) > 1 else []
    for sentence in (history.LEGEND, *said):
        console.print(Text(visible(sentence)), soft_wrap=not console.is_terminal)


def print_profile(profile: Profile, name: str, console: Console) -> None:
    """Print the table of a profile, then its missing runs; names are shown literally."""
    from rich.table import Table
    from rich.text import Text

    shared = {
        heading: values.pop()
        for heading, values in (
            ("T", {cost.seq_length for cost in profile.costs}),
            ("B", {cost.batch_size for cost in profile.costs}),
        )
        if len(values) == 1
    }
    title = ", ".join([visible(name), *(f"{name}={value}" for name, value in shared.items())])
    table = Table(title=Text(title))
    # Notes are sentences, which follow the table.
    headings = profile_table.HEADINGS[:-1]
    lines = [[visible(cell) for cell in row[:-1]] for row in profile_table.rows(profile)]
    first_to_go = (*shared, *_FIRST_OF_PROFILE_TO_GO)
    widths = _fitting(headings, lines, console.width, first_to_go)
    for i, width in widths.items():
        justify: Any = "right" if i in profile_table.NUMBERS else "left"
        table.add_column(headings[i], justify=justify, width=width)
    shape = None
    for cost, line in zip(profile.costs, lines, strict=True):
        if shape not in (None, cost.shape):
            table.add_section()
        shape = cost.shape
        table.add_row(*(Text(line[i]) for i in widths))
    console.print(table)
    noted = [
        f"{cost.label}, T={cost.seq_length}, B={cost.batch_size}: {'; '.join(cost.notes)}."
        for cost in profile.costs
        if cost.notes
    ]
    for sentence in (*noted, *profile.incomplete, profile.sentence):
        console.print(Text(visible(sentence)), soft_wrap=not console.is_terminal)


def console_width() -> int | None:
    """Width of the terminal; None for a log file, in which no column has to be left out."""
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else _LOG_WIDTH


def _fitting(
    headings: Sequence[str], shown: list[list[str]], width: int, first_to_go: Sequence[str]
) -> dict[int, int]:
    """Non-empty columns that fit `width`, each with its own width.

    Headings are broken before a column is left out; the report has every column.
    """

    def longest(i: int, heading: list[str]) -> int:
        return max(len(text) for text in [*heading, *(row[i] for row in shown)])

    def fits(widths: dict[int, int]) -> bool:
        # Each column has a space on both sides and one border; the table has one more.
        return 1 + sum(3 + each for each in widths.values()) <= width

    columns = [i for i in range(len(headings)) if i < 2 or any(row[i] != ABSENT for row in shown)]
    widths = {i: longest(i, [headings[i]]) for i in columns}
    if not fits(widths):
        widths = {i: longest(i, headings[i].split()) for i in columns}
    for name in first_to_go:
        if fits(widths):
            break
        widths.pop(headings.index(name), None)
    return widths
