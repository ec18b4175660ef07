"""What each mode costs, and where its loss ended."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.report.charts.style import Chart, Style, layout, plain
from dpsgd_track.report.charts.trajectories import recorded
from dpsgd_track.report.table import main_regime, rows


def cost_charts(comparison: GroupComparison, style: Style) -> list[Chart]:
    """Step time and peak memory."""
    table = [row for row in rows(comparison) if row.label in style.order]
    times = {row.label: row.step_time_ms for row in table if row.step_time_ms is not None}
    sizes = {row.label: row.peak_memory_gib for row in table if row.peak_memory_gib is not None}
    overhead = {row.label: row.overhead for row in table}
    charts = []
    if times:
        shown = {
            label: f"{time:.4g} ms" + (f", {over:.2f}×" if (over := overhead[label]) else "")
            for label, time in times.items()
        }
        charts.append(
            Chart(
                name="step_time",
                title="Step time",
                caption="Median over the recorded steps, the slowest rank's; × that of no_dp.",
                figure=_bars(style, times, shown, "ms a step"),
                section="cost",
            )
        )
    if sizes:
        shown = {label: f"{size:.3g} GiB" for label, size in sizes.items()}
        charts.append(
            Chart(
                name="peak_memory",
                title="Peak memory",
                caption="Largest rank's; on CPU the resident set of the process.",
                figure=_bars(style, sizes, shown, "GiB"),
                section="cost",
            )
        )
    return charts


def final_loss(comparison: GroupComparison, style: Style) -> list[Chart]:
    """The loss at the last step of the main regime, which is only written alone."""
    main = main_regime(comparison)
    if main is None or not recorded(main):
        return []
    losses = {run.label: float(t.loss[-1]) for run, t in recorded(main)}
    shown = {label: f"{loss:.6f}" for label, loss in losses.items()}
    return [
        Chart(
            name="final_loss_comparison",
            title="Final loss",
            caption=f"Loss at the last step of regime {main.name}.",
            figure=_bars(style, losses, shown, "loss at the last step"),
            alone=True,
        )
    ]


def _bars(style: Style, values: dict[str, float], shown: dict[str, str], axis: str) -> go.Figure:
    figure = go.Figure()
    # A trace a mode, so that the filter takes out its bar.
    for label, value in values.items():
        figure.add_bar(
            y=[plain(label)],
            x=[value],
            orientation="h",
            text=[shown[label]],
            textposition="auto",
            textangle=0,
            marker_color=style.colour(label),
            hovertemplate="%{y}<br>%{text}<extra></extra>",
            **style.of_mode(label),
        )
    layout(figure, 110 + 34 * len(values), showlegend=False, barmode="overlay")
    figure.update_yaxes(autorange="reversed", type="category")
    # Room for a value that stands outside its bar.
    longest = max((value for value in values.values() if np.isfinite(value)), default=0.0)
    figure.update_xaxes(title_text=axis, range=[0, 1.3 * longest or 1])
    return figure
