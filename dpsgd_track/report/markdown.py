"""`report.md`: the comment for a pull request, verdict first and details folded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dpsgd_track.comparison.result import GroupComparison, iter_not_computed
from dpsgd_track.report.environment import command, environment
from dpsgd_track.report.guarantee import guarantees
from dpsgd_track.report.table import HEADINGS, consistency, floors, rows, waived

LIMIT = 65_536
"""Characters that a code host accepts in one comment."""

_ICONS = {"PASS": "✅", "DRIFT": "🟠", "BUG": "❌", "INCONCLUSIVE": "❔"}
_CUT = "\n\n_Cut to the length of one comment; report.html has everything._\n"


def _prose(text: str) -> str:
    # Names stay readable in the source as well: only what could act is escaped.
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", line)
    # A zero-width space keeps a mention and a bare link from being made out of a name.
    return re.sub(r"(@|:(?=//)|www(?=\.))", "\\1\u200b", line, flags=re.IGNORECASE)


def _table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    table = [heading, ["---"] * len(heading)]
    table += [[_prose(cell) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def note(comparison: GroupComparison) -> str:
    """The verdict and the table of modes: what the group run's note shows."""
    table = _table(
        HEADINGS,
        (
            [row.cells[0], f"{_ICONS[row.verdict]} {row.cells[1]}", *row.cells[2:]]
            for row in rows(comparison)
        ),
    )
    verdict = f"## {_ICONS[comparison.verdict]} {comparison.verdict}"
    said = comparison.sentence.removeprefix(f"{comparison.verdict}: ")
    name = f"Group **{_prose(comparison.group.name)}**"
    promised = [_prose(sentence) for sentence in guarantees(comparison.group)]
    return "\n\n".join([verdict, _prose(said), table, *promised, name]) + "\n"


def markdown(comparison: GroupComparison) -> str:
    """The whole comment, shorter than LIMIT characters."""
    why = "\n".join(f"- **{mode.verdict}** {_prose(mode.sentence)}" for mode in comparison.modes)
    all_findings = "\n".join(
        f"- **{f.verdict}**{' (waived)' * bool(f.waiver)} {_prose(f'{mode.label}: {f.sentence}')}"
        for mode in comparison.modes
        for f in mode.findings
    )
    skipped = "\n".join(
        f"- {_prose(f'{regime}: {pair.mode} vs {pair.baseline}: {name} {why}')}"
        for regime, pair in iter_not_computed(comparison)
        for name, why in pair.not_computed.items()
    )
    differing = _table(("setting", "before", "after"), comparison.environment_differences)
    differing *= bool(comparison.environment_differences)
    details = [
        ("Why, mode by mode", why),
        ("All findings", all_findings),
        ("Waivers", "\n".join(f"- {_prose(sentence)}" for sentence in waived(comparison))),
        (
            "Thresholds and the measured numerical floor",
            _table(
                ("regime", "observable", "floor", "threshold", "largest of all pairs"),
                floors(comparison),
            ),
        ),
        (
            "Consistency analysis",
            _table(
                ("regime", "modes", "observable", "mean", "std", "max"), consistency(comparison)
            ),
        ),
        ("Not computed, so not compared", skipped),
        ("Environments that differ", differing),
        ("Environment", _table(("setting", "value"), environment(comparison.group))),
        ("Reproduce", _code(command(comparison.group))),
    ]
    text = note(comparison)
    for title, body in details:
        section = "\n" + _folded(title, body) + "\n" if body else ""
        if len(text) + len(section) + len(_CUT) >= LIMIT:
            return text[: LIMIT - len(_CUT) - 1] + _CUT
        text += section
    return text


def _code(text: str) -> str:
    if not text:
        return ""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"
