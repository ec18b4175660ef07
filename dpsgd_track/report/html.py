"""`report.html` and single charts as HTML, each one file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from dpsgd_track.comparison.result import GroupComparison, iter_not_computed
from dpsgd_track.report.charts import Chart
from dpsgd_track.report.environment import command, environment
from dpsgd_track.report.guarantee import guarantees
from dpsgd_track.report.table import HEADINGS, consistency, floors, rows


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("dpsgd_track.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _plotly() -> Markup:
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())  # the library's own code, not a name from a run


def _data(chart: Chart) -> Markup:
    # Inside a script element only `<` can end it or open a comment.
    return Markup(chart.figure.to_json().replace("<", "\\u003c"))


def html(comparison: GroupComparison, charts: Sequence[Chart]) -> str:
    """The whole report, with `charts` in their order."""
    group = comparison.group
    started = datetime.fromtimestamp(group.start_time_ms / 1000, tz=UTC)
    return (
        _templates()
        .get_template("report.html")
        .render(
            comparison=comparison,
            group=group,
            started=f"{started:%Y-%m-%d %H:%M} UTC",
            headings=HEADINGS,
            rows=rows(comparison),
            guarantees=guarantees(group),
            floors=floors(comparison),
            consistency=consistency(comparison),
            not_computed=[
                (regime, f"{pair.mode} vs {pair.baseline}", name, why)
                for regime, pair in iter_not_computed(comparison)
                for name, why in pair.not_computed.items()
            ],
            environment=environment(group),
            command=command(group),
            charts=charts,
            **_page(group.name),
        )
    )


def chart_html(chart: Chart, group: str) -> str:
    """One chart as a page of its own."""
    return _templates().get_template("chart.html").render(chart=chart, **_page(group))


def _page(group: str) -> dict[str, Any]:
    return {"plotly": _plotly(), "data": _data, "group_name": group}
