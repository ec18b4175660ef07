"""The ladder of stages as tables: which stage of which mode went wrong, in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpsgd_track.comparison.diagnose.culprit import Culprit
from dpsgd_track.comparison.diagnose.ladder import Rung, StageStatus
from dpsgd_track.comparison.measure.amount import number
from dpsgd_track.comparison.measure.drift import OBSERVABLES
from dpsgd_track.comparison.result import GroupComparison, ModeVerdict
from dpsgd_track.comparison.verdict import Finding, Verdict
from dpsgd_track.record.stages import Stage

SYMBOLS = {
    StageStatus.OK: "✓",
    StageStatus.INTRODUCED: "✗",
    StageStatus.INHERITED: "↳",
    StageStatus.NOT_COMPARED: "–",
    StageStatus.NOT_TESTED: "–",
}
"""Symbol of each status, which tells it apart without colour."""

VERDICT_SYMBOLS = {
    Verdict.PASS: "✓",
    Verdict.DRIFT: "≈",
    Verdict.BUG: "✗",
    Verdict.INCONCLUSIVE: "?",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One rung, in words."""

    stage: Stage
    status: StageStatus
    symbol: str
    value: str = ""
    """`3.1e-08`; empty where there is none."""
    multiple: str = ""
    """`0.03 × limit`; empty where there is no limit."""
    about: str = ""
    """Observable, step and location of the value."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """All stages of one mode."""

    label: str
    cells: tuple[Cell, ...]
    """One for each stage."""
    culprit: Culprit | None
    """Culprit that this comparison shows, unless the mode's own sentence names it already."""
    is_wrong: bool
    """True if a stage of the mode went wrong."""


@dataclass(frozen=True, kw_only=True)
class StageTable:
    """All modes compared with one baseline in one regime, those that went wrong first."""

    regime: str
    against: str
    lines: tuple[Line, ...]

    @property
    def is_wrong(self) -> bool:
        """True if a stage of any mode went wrong."""
        return any(line.is_wrong for line in self.lines)

    @property
    def summary(self) -> str:
        """One sentence without a full stop."""
        wrong = [line.label for line in self.lines if line.is_wrong]
        if wrong:
            return f"a stage went wrong in {', '.join(wrong)}"
        cells = [cell for line in self.lines for cell in line.cells]
        idle = (StageStatus.NOT_COMPARED, StageStatus.NOT_TESTED)
        compared = sum(cell.status not in idle for cell in cells)
        modes = f"{len(self.lines)} mode{'s' * (len(self.lines) != 1)}"
        return f"all {compared} compared stages of {modes} are ok"


def stage_tables(comparison: GroupComparison) -> tuple[StageTable, ...]:
    """One table for each regime and baseline, those in which a stage went wrong first."""
    keys = dict.fromkeys(key for mode in comparison.modes for key in mode.ladders)
    order = [regime.name for regime in comparison.regimes]
    tables = [
        StageTable(
            regime=regime,
            against=against,
            lines=_lines(comparison, (regime, against)),
        )
        for regime, against in sorted(keys, key=lambda key: order.index(key[0]))
    ]
    return tuple(sorted(tables, key=lambda table: not table.is_wrong))


def _lines(comparison: GroupComparison, key: tuple[str, str]) -> tuple[Line, ...]:
    lines = [_line(mode, key) for mode in comparison.modes if key in mode.ladders]
    return tuple(sorted(lines, key=lambda line: not line.is_wrong))


def _line(mode: ModeVerdict, key: tuple[str, str]) -> Line:
    rungs = {rung.stage: rung for rung in mode.ladders[key]}
    absent = StageStatus.NOT_COMPARED
    cells = tuple(_cell(rungs.get(stage, Rung(stage=stage, status=absent))) for stage in Stage)
    wrong = (StageStatus.INTRODUCED, StageStatus.INHERITED)
    return Line(
        label=mode.label,
        cells=cells,
        culprit=None if key == _key_of(mode.culprit) else mode.culprits.get(key),
        is_wrong=any(cell.status in wrong for cell in cells),
    )


def _key_of(culprit: Culprit | None) -> tuple[str, str] | None:
    """Regime and baseline of the comparison that shows `culprit`."""
    return (culprit.regime, culprit.against) if culprit else None


def _cell(rung: Rung) -> Cell:
    title = OBSERVABLES[rung.observable].title if rung.observable else ""
    step = f"step {rung.step}" if rung.step is not None and rung.step >= 0 else ""
    floor = f"floor {number(rung.floor)}" if rung.floor is not None else ""
    return Cell(
        stage=rung.stage,
        status=rung.status,
        symbol=SYMBOLS[rung.status],
        value="" if rung.value is None else number(rung.value),
        multiple=multiple(rung.value, rung.limit),
        about=", ".join(part for part in (title, step, rung.where, floor) if part),
    )


def multiple(value: float | None, limit: float | None) -> str:
    """`value` in units of `limit`: `0.03 × limit`; empty where either is unknown."""
    if value is None or limit is None or math.isnan(value):
        return ""
    if limit == 0:
        return "0 × limit" if value == 0 else "over a limit of 0"
    share = value / limit
    if 0 < share < 0.01:
        return "< 0.01 × limit"
    return f"{share:.2g} × limit" if share < 100 or share >= 1e6 else f"{share:,.0f} × limit"


def accepted(comparison: GroupComparison) -> list[tuple[ModeVerdict, Finding]]:
    """Findings covered by a waiver, each with its mode."""
    return [(m, finding) for m in comparison.modes for finding in m.findings if finding.waiver]


def more(mode: ModeVerdict) -> str:
    """Number of findings that the sentence of `mode` omits: `3 more findings`; empty for none."""
    count = len(mode.others)
    return f"{count} more finding{'s' * (count > 1)}" if count else ""


def told(comparison: GroupComparison) -> list[tuple[Verdict, str]]:
    """A line on each mode but the leading one, which the verdict describes."""
    return [
        (mode.verdict, _with_more(mode.sentence, more(mode)))
        for mode in comparison.modes
        if mode is not comparison.leading
    ]


def headline(comparison: GroupComparison) -> str:
    """The verdict's sentence, with the number of findings that it leaves out."""
    leading = comparison.leading
    return _with_more(comparison.sentence, more(leading) if leading else "")


def capitalised(comparison: GroupComparison) -> str:
    """The verdict's sentence, beginning with a capital unless it begins with a mode's name."""
    said = comparison.sentence.removeprefix(f"{comparison.verdict}: ")
    if any(said.startswith(mode.label) for mode in comparison.modes):
        return said
    return said[:1].upper() + said[1:]


def _with_more(sentence: str, left_out: str) -> str:
    return f"{sentence} ({left_out})" if left_out else sentence


_UNEXPLAINED = "Rounding does not explain it."


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Advice to the reviewer of a change."""

    do: str
    """A sentence."""
    why: str = ""
    """A reason or a next step, in one or two sentences."""


def advised(comparison: GroupComparison) -> Advice:
    """The advice that goes with a verdict."""
    match comparison.verdict:
        case Verdict.PASS:
            waived = len(accepted(comparison))
            why = f"{waived} accepted drifts are listed under Waivers." if waived else ""
            return Advice(do="Safe to merge as far as these runs show.", why=why)
        case Verdict.BUG:
            culprit = comparison.leading.culprit if comparison.leading else None
            # The evidence of a culprit says already how much rounding explains.
            is_told = culprit is not None and culprit.floor is not None
            return Advice(do="Do not merge.", why="" if is_told else _UNEXPLAINED)
        case Verdict.DRIFT:
            return Advice(
                do="Look before you merge.",
                why="If the change is meant to alter results, say so in the review; if not, treat "
                "it as a bug.",
            )
    return Advice(
        do="Do not merge on this evidence.",
        why="Nothing was shown either way. Remove the cause that is named, run the group again "
        "and compare again.",
    )


def advice(comparison: GroupComparison) -> str:
    """Advice to the reviewer of the change, in one to three sentences."""
    given = advised(comparison)
    return f"{given.do} {given.why}".strip()
