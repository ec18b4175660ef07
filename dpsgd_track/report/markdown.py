"""`report.md`: the pull request comment, verdict first and details folded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dpsgd_track.comparison.measure.amount import number
from dpsgd_track.comparison.profile import Profile, profile_of
from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.record.run import Group
from dpsgd_track.report import profile_table
from dpsgd_track.report.brief import brief
from dpsgd_track.report.environment import command, environment
from dpsgd_track.report.guarantee import guarantees
from dpsgd_track.report.stages import accepted, advised, stage_tables, told
from dpsgd_track.report.table import (
    HEADINGS,
    consistency,
    floors,
    not_computed,
    rows,
    without_replays,
)
from dpsgd_track.visible_text import visible

LIMIT = 65_536
"""Characters that a code host accepts in one comment."""
_RESERVED = 1000
"""Characters reserved for the line that names the omitted sections."""

_ICONS = {"PASS": "✅", "DRIFT": "🟠", "BUG": "❌", "INCONCLUSIVE": "❔"}
_LONGEST_SENTENCE, _LONGEST_CELL = 600, 120
_MOST_ROWS, _MOST_LADDERS = 60, 6


def prose(text: str, longest: int = _LONGEST_SENTENCE) -> str:
    """`text` on one line, with markup, mentions and links made inert."""
    # Names stay readable in the source as well: only active characters are escaped.
    line = visible(" ".join(text.split()))
    line = line if len(line) <= longest else f"{line[: longest - 1]}…"
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", line)
    # A zero-width space keeps a name from becoming a mention or a bare link.
    return re.sub(r"(@|:(?=//)|www(?=\.))", "\\1\u200b", line, flags=re.IGNORECASE)


def _table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = list(lines)
    if not rows:
        return ""
    table = [heading, ["---"] * len(heading)]
    table += [[prose(cell, _LONGEST_CELL) for cell in line] for line in rows[:_MOST_ROWS]]
    return "\n".join(f"| {' | '.join(line)} |" for line in table) + _more(len(rows))


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items[:_MOST_ROWS]) + _more(len(items))


def _more(count: int) -> str:
    left = count - _MOST_ROWS
    return f"\n\n_And {left} more in report.html._" if left > 0 else ""


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _lines(comparison: GroupComparison, link: str, since: str) -> str:
    """Verdict, what, where, how sure, cost, and where to look further.

    Args:
        link: address of the report; empty if it has none.
        since: what changed since the group before; empty if there is none.
    """
    short, do = brief(comparison), advised(comparison).do.rstrip(".")
    heading = f"## {_ICONS[comparison.verdict]} {comparison.verdict}: {do[:1].lower()}{do[1:]}"
    name = f"report.html of group {prose(comparison.group.name)}"
    again = command(comparison.group)
    report = f"[{name}]({link})" if link else name
    lines = [
        ("What", prose(short.what)),
        ("Where", prose(short.where)),
        ("How sure", prose(short.how_sure)),
        ("Cost", " ".join(filter(None, [prose(short.cost), prose(since)]))),
        ("Report", f"{report}.{' To run the same again:' * bool(again)}"),
    ]
    told = "\n".join(f"- **{title}:** {text}" for title, text in lines)
    return "\n\n".join(filter(None, [heading, told, _code(again)]))


def note(comparison: GroupComparison, since: str = "") -> str:
    """The verdict and the table of modes, for the note of the group run.

    Args:
        since: what changed since the group before; empty if there is none.
    """
    seen = prose(comparison.seen.sentence)
    return f"{_lines(comparison, '', since)}\n\n{_modes(comparison)}\n\n{seen}\n"


def _modes(comparison: GroupComparison) -> str:
    """The table of modes, and what is to be said of it."""
    modes, replays = without_replays(rows(comparison))
    worst_first = sorted(modes, key=lambda row: -row.verdict.severity)
    table = _table(
        HEADINGS,
        (
            [row.cells[0], f"{_ICONS[row.verdict]} {row.cells[1]}", *row.cells[2:]]
            for row in (modes if len(worst_first) <= _MOST_ROWS else worst_first)
        ),
    )
    notes = (replays, *guarantees(comparison.group), *comparison.not_compared)
    return "\n\n".join([table, *(prose(sentence) for sentence in notes if sentence)])


def _ladders(comparison: GroupComparison) -> list[str]:
    """A table of stages for each mode with a failed stage."""
    return [
        f"**{prose(line.label)}** in {prose(table.regime)}, against {prose(table.against)}"
        + (f": it {prose(line.culprit.sentence)}." if line.culprit else "")
        + "\n\n"
        + _table(
            ("stage", "status", "value", "of its limit", "where"),
            (
                (cell.stage, f"{cell.symbol} {cell.status}", cell.value, cell.multiple, cell.about)
                for cell in line.cells
            ),
        )
        for table in stage_tables(comparison)
        for line in table.lines
        if line.is_wrong
    ][:_MOST_LADDERS]


def markdown(comparison: GroupComparison, link: str = "", since: str = "") -> str:
    """The whole comment, shorter than LIMIT characters: six lines, and the rest folded.

    A section that no longer fits is omitted as a whole, and the last line says so.

    Args:
        link: address of the report; empty if it has none.
        since: what changed since the group before; empty if there is none.
    """
    return _with_sections(f"{_lines(comparison, link, since)}\n", _sections(comparison))


def _with_sections(text: str, sections: Iterable[tuple[str, str]]) -> str:
    left_out: list[str] = []
    for title, body in sections:
        section = f"\n{_folded(title, body)}\n" if body else ""
        if len(text) + len(section) + _RESERVED > LIMIT:
            left_out.append(title)
        else:
            text += section
    if left_out:
        names = ", ".join(dict.fromkeys(left_out))
        text += f"\n_Left out for length: {names}. report.html has everything._\n"
    return text


def profile_note(profile: Profile, group: Group) -> str:
    """The table of a profile, for the note of a group that holds nothing else."""
    state = "Profile, incomplete" if profile.incomplete else "Profile"
    facts = prose(", ".join(profile_table.facts(profile, group)))
    name = f"Group **{prose(group.name)}**" + f": {facts}" * bool(facts)
    parts = [f"## {state}", prose(profile.sentence), _costs(profile), name]
    return "\n\n".join(parts) + "\n"


def profile_markdown(profile: Profile, group: Group) -> str:
    """The whole comment on a group that holds only a profile, as `markdown`."""
    folded = (
        ("How each layer's norm was found", _plans(profile)),
        ("Reproduce", _code(command(group))),
        ("Environment", _table(("setting", "value"), environment(group))),
    )
    return _with_sections(profile_note(profile, group), folded)


def _costs(profile: Profile) -> str:
    incomplete = _list([prose(sentence) for sentence in profile.incomplete])
    best = _list([prose(sentence) for sentence in profile_table.best(profile)])
    table = _table(profile_table.HEADINGS, profile_table.rows(profile))
    return "\n\n".join(part for part in (incomplete, best, table, profile_table.LEGEND) if part)


def _plans(profile: Profile) -> str:
    return _table(profile_table.PLAN_HEADINGS, profile_table.plans(profile))


def _sections(comparison: GroupComparison) -> list[tuple[str, str]]:
    """(title, body), the most important first."""
    ladders = "\n\n".join(_ladders(comparison))
    profile = profile_of(comparison.group)
    why = [f"**{verdict}** {prose(line)}" for verdict, line in told(comparison)]
    findings = [
        f"**{f.verdict}**{' (waived)' * bool(f.waiver)} {prose(f'{mode.label}: {f.sentence}')}"
        for mode in comparison.modes
        for f in mode.others
    ]
    skipped = [
        prose(f"{regime}: {pair}: {name} {why}")
        for regime, pair, name, why in not_computed(comparison)
    ]
    limits = ("regime", "observable", "floor", "threshold", "largest of all pairs")
    spread = ("regime", "modes", "observable", "mean", "std", "max")
    differing = _table(("setting", "before", "after"), comparison.environment_differences)
    return [
        ("Stages that went wrong", ladders),
        ("Modes", _modes(comparison)),
        ("Speed and memory", _costs(profile) if profile else ""),
        ("What would have been seen", prose(comparison.seen.sentence)),
        ("Why, mode by mode", _list(why)),
        (f"{len(findings)} more finding{'s' * (len(findings) != 1)}", _list(findings)),
        ("Waivers", _waivers(comparison)),
        ("Noise audit", _audits(comparison)),
        ("What differs between the two groups", differing),
        ("Thresholds and the measured numerical floor", _table(limits, floors(comparison))),
        ("Consistency analysis", _table(spread, consistency(comparison))),
        ("Not computed, so not compared", _list(skipped)),
        ("Environment", _table(("setting", "value"), environment(comparison.group))),
        ("How each layer's norm was found", _plans(profile) if profile else ""),
    ]


def _waivers(comparison: GroupComparison) -> str:
    lines = [
        (m.label, str(f.observable), number(f.value), f.waiver.reason, str(f.waiver.expires))
        for m, f in accepted(comparison)
        if f.waiver
    ]
    table = _table(("mode", "observable", "drift", "reason", "until"), lines)
    notes = _list([prose(line) for line in comparison.waiver_notes])
    return "\n\n".join(part for part in (table, notes) if part)


def _audits(comparison: GroupComparison) -> str:
    lines = [
        (audit.regime, audit.mode, check.title, "ok" if check.is_ok else "failed", check.sentence)
        for regime in comparison.regimes
        for audit in regime.audits.values()
        for check in audit.checks
    ]
    return _table(("regime", "mode", "check", "result", "found"), lines)


def _code(text: str) -> str:
    if not text:
        return ""
    text = visible(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"
