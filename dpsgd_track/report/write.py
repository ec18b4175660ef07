"""Writes every file of the report into one folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dpsgd_track.comparison.profile import Profile, profile_of
from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.record.run import Group
from dpsgd_track.report.annotations import workflow_commands
from dpsgd_track.report.charts import Chart, Style, figures, profile_charts
from dpsgd_track.report.drift_json import drift_json
from dpsgd_track.report.html import chart_html, html, profile_html
from dpsgd_track.report.junit import junit
from dpsgd_track.report.markdown import markdown, profile_markdown
from dpsgd_track.report.png import PngSkipped, write_png
from dpsgd_track.report.profile_json import profile_json
from dpsgd_track.report.profile_table import profile_csv
from dpsgd_track.report.text import profile_summary, summary

_LONGEST = 80


def folder_name(group: str) -> str:
    """`group` as a valid folder name: no separators, no leading dots, not too long.

    A changed name carries a digest of the original, so that two groups never share a folder.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", group).lstrip(".-")[:_LONGEST]
    if safe == group:
        return safe
    return f"{safe or 'group'}-{hashlib.sha256(group.encode()).hexdigest()[:8]}"


def write_report(
    comparison: GroupComparison,
    folder: Path,
    png: bool = True,
    tell: Callable[[str], None] = print,
    link: str = "",
    since: str = "",
) -> list[Path]:
    """Write the report into `folder`, which is created, and return the files.

    PNGs of an earlier report are removed.

    Args:
        tell: called with one line if pictures were asked for and could not be drawn.
        link: address at which the report will be found, for the comment; empty if it has none.
        since: what changed since the group before, for the comment; empty if there is none.
    """
    drawn = figures(comparison)
    texts = {
        "report.html": html(comparison, drawn),
        "report.md": markdown(comparison, link, since),
        "summary.txt": summary(comparison),
        "drift.json": drift_json(comparison),
        "junit.xml": junit(comparison),
        "annotations.txt": workflow_commands(comparison),
    }
    if profile := profile_of(comparison.group):
        texts |= _figures_of(profile, comparison.group)
    return _write(folder, comparison.group.name, texts, drawn, png, tell)


def write_profile(
    profile: Profile,
    group: Group,
    folder: Path,
    png: bool = True,
    tell: Callable[[str], None] = print,
) -> list[Path]:
    """As `write_report`, for a group that holds only a profile."""
    drawn = profile_charts(profile, Style.of_group(group))
    texts = {
        "report.html": profile_html(profile, group, drawn),
        "report.md": profile_markdown(profile, group),
        "summary.txt": profile_summary(profile, group),
        **_figures_of(profile, group),
    }
    return _write(folder, group.name, texts, drawn, png, tell)


def _figures_of(profile: Profile, group: Group) -> dict[str, str]:
    return {
        "profile.csv": profile_csv(profile, group),
        "profile.json": profile_json(profile, group),
    }


def _write(
    folder: Path,
    group: str,
    texts: Mapping[str, str],
    drawn: Sequence[Chart],
    png: bool,
    tell: Callable[[str], None],
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    charts = [chart for chart in drawn if chart.alone]
    alone = {f"{chart.name}.html": chart_html(chart, group) for chart in charts}
    files = []
    for name, text in {**texts, **alone}.items():
        files.append(folder / name)
        files[-1].write_text(text, encoding="utf-8")
    for chart in charts:
        (folder / f"{chart.name}.png").unlink(missing_ok=True)
    if png:
        try:
            files += write_png(charts, folder)
        except PngSkipped as skipped:
            tell(str(skipped))
    return files
