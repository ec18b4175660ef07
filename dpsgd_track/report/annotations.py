"""`annotations.txt`: failures as GitHub's workflow commands, one per line."""

from __future__ import annotations

from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.comparison.verdict import Verdict, worst
from dpsgd_track.visible_text import visible

MOST = 10
"""Most annotations of each level: GitHub shows no more for one step."""

_LEVELS = {Verdict.BUG: "error", Verdict.DRIFT: "error", Verdict.INCONCLUSIVE: "warning"}


def workflow_commands(comparison: GroupComparison) -> str:
    """One line for each mode and regime that does not pass; the last counts those left out."""
    messages: dict[str, list[tuple[str, str]]] = {"error": [], "warning": []}
    for mode in comparison.modes:
        for regime in dict.fromkeys(finding.regime for finding in mode.findings):
            if not (findings := mode.counted(regime)):
                continue
            verdict = worst(finding.verdict for finding in findings)
            title = f"{verdict}: {mode.label} in {regime}"
            messages[_LEVELS[verdict]].append((title, mode.reason(regime)))
    if not comparison.modes:
        messages["warning"].append(("INCONCLUSIVE", comparison.sentence))
    lines = [
        _command(level, title, message)
        for level, entries in messages.items()
        for title, message in _shortened(entries)
    ]
    return "".join(f"{line}\n" for line in lines)


def _shortened(entries: list[tuple[str, str]]) -> list[tuple[str, str]]:
    if len(entries) <= MOST:
        return entries
    left = len(entries) - MOST + 1
    return [*entries[: MOST - 1], (f"{left} more", "They stand in report.html.")]


def _command(level: str, title: str, message: str) -> str:
    # A colon or a comma would end a property; a line feed would begin another command.
    name = _escaped(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={name}::{_escaped(message)}"


def _escaped(text: str) -> str:
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return visible(text)
