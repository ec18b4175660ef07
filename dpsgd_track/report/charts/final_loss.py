"""Final loss of each mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.report.charts.style import Chart, Style, escaped, layout
from dpsgd_track.report.charts.trajectories import recorded
from dpsgd_track.report.table import main_regime


def final_loss(comparison: GroupComparison, style: Style) -> list[Chart]:
    """The loss at the last step of the main regime, only written as a file of its own."""
    if (main := main_regime(comparison)) is None:
        return []
    losses = {run.label: float(t.loss[-1]) for run, t in recorded(main)}
    return _bars(
        style,
        {label: (loss, f"{loss:.6f}") for label, loss in losses.items()},
        "loss at the last step",
        name="final_loss_comparison",
        title="Final loss",
        caption=f"Loss at the last step of regime {main.name}.",
        alone=True,
    )


def _bars(
    style: Style, bars: Mapping[str, tuple[float, str]], axis: str, **about: Any
) -> list[Chart]:
    """A chart with a bar and a label for each mode; no chart without bars."""
    if not bars:
        return []
    figure = go.Figure()
    # One trace per mode, so that the filter can hide its bar.
    for label, (value, shown) in bars.items():
        figure.add_bar(
            y=[escaped(label)],
            x=[value],
            orientation="h",
            text=[shown],
            textposition="auto",
            textangle=0,
            marker_color=style.colour(label),
            hovertemplate="%{y}<br>%{text}<extra></extra>",
            **style.of_mode(label),
        )
    layout(figure, 110 + 34 * len(bars), showlegend=False, barmode="overlay")
    figure.update_yaxes(autorange="reversed", type="category")
    # Room for a value that stands outside its bar.
    longest = max((value for value, _ in bars.values() if np.isfinite(value)), default=0.0)
    figure.update_xaxes(title_text=axis, range=[0, 1.3 * longest or 1])
    return [Chart(figure=figure, **about)]
