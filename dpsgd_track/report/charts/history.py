"""Drifts and costs of the groups of an experiment, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dpsgd_track.record.judged import JudgedGroup
from dpsgd_track.report.charts.marks import add_limit
from dpsgd_track.report.charts.style import Chart, Style, escaped, layout

_SMALLEST = 1e-3
"""Shares of a limit below it are drawn there."""


def history_charts(groups: Sequence[JudgedGroup], stages: Sequence[str]) -> list[Chart]:
    """The drift of each stage beside its limit, and the cost of each mode where it is known."""
    drifts = _chart(
        groups,
        [stage for stage in stages if any(stage in group.drifts for group in groups)],
        lambda group: {name: max(value, _SMALLEST) for name, value in group.drifts.items()},
        name="history_drifts",
        title="Drift by stage, as a share of its limit",
        caption=f"The largest drift of any mode in each group. Above 1 is too much; {_SMALLEST:g} "
        "and less is drawn at the bottom.",
    )
    places = np.arange(len(groups))
    add_limit(drifts.figure, places, np.ones(len(groups)), "limit", dash="dash", width=1.5)
    drifts.figure.update_yaxes(type="log", dtick=1, title_text="drift / limit")
    labels = list(dict.fromkeys(label for group in groups for label in group.costs))
    if not labels:
        return [drifts]
    costs = _chart(
        groups,
        labels,
        lambda group: group.costs,
        name="history_costs",
        title="Cost by mode",
        caption="Step time over that of ordinary training, at the shape where it is largest.",
    )
    costs.figure.update_yaxes(title_text="× time", rangemode="tozero")
    return [drifts, costs]


def _chart(
    groups: Sequence[JudgedGroup],
    labels: Sequence[str],
    values: Callable[[JudgedGroup], Mapping[str, float]],
    **about: Any,
) -> Chart:
    style = Style(order=tuple(labels), most_points=len(groups))
    figure = go.Figure()
    for label in labels:
        figure.add_scatter(
            x=list(range(len(groups))),
            y=[values(group).get(label) for group in groups],
            customdata=[escaped(f"{group.name}, {group.shown_revision}") for group in groups],
            hovertemplate="%{customdata}<br>%{fullData.name}: %{y:.3g}<extra></extra>",
            **style.line(label, len(groups)),
        )
    layout(figure, 420)
    places = range(0, len(groups), max(1, len(groups) // 12))
    figure.update_xaxes(
        tickvals=list(places),
        ticktext=[escaped(groups[place].shown_revision) for place in places],
        title_text="revision",
    )
    return Chart(figure=figure, is_wide=True, **about)
