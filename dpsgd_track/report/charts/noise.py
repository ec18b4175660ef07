"""Noise scale of each parameter, as a multiple of its expected value."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from dpsgd_track.comparison.audit.noise import NoiseAudit
from dpsgd_track.comparison.result import GroupComparison, RegimeComparison
from dpsgd_track.report.charts.curves import drawn
from dpsgd_track.report.charts.marks import GREY, error_bars
from dpsgd_track.report.charts.style import Chart, Style, escaped, layout, name_axis

_MOST_PARAMETERS = 40


def noise_charts(comparison: GroupComparison, style: Style) -> list[Chart]:
    """One chart of each regime whose noise was audited by parameter."""
    return [
        _chart(regime, audits, style)
        for regime in comparison.regimes
        if (audits := [audit for audit in regime.audits.values() if audit.by_parameter])
    ]


def _shown(audits: list[NoiseAudit]) -> tuple[list[str], int]:
    """The parameters that are drawn, in the model's order, and their total number."""
    farthest: dict[str, float] = {}
    for audit in audits:
        for name, estimate, low, high in audit.by_parameter:
            # Ranked by the distance from 1 in units of each parameter's own interval.
            off = abs(estimate - 1) / max(high - low, 1e-12)
            off = off if np.isfinite(off) else np.inf
            farthest[name] = max(farthest.get(name, 0.0), off)
    worst = sorted(farthest, key=lambda name: -farthest[name])[:_MOST_PARAMETERS]
    return [name for name in farthest if name in worst], len(farthest)


def _reach(audits: list[NoiseAudit]) -> tuple[list[float], bool]:
    """The range of the axis, and whether it cuts an interval.

    It holds every estimate and most intervals. That of a parameter with one element spans decades
    and would leave no room for the others.
    """
    every = np.array([entry[1:] for audit in audits for entry in audit.by_parameter])
    estimates = every[np.isfinite(every[:, 0]), 0].tolist()
    width = np.nanquantile(every[:, 2] - every[:, 1], 0.75)
    low = min(1.0, *estimates) - width
    high = max(1.0, *estimates) + width
    is_cut = bool((every[:, 1] < low).any() or (every[:, 2] > high).any())
    if not is_cut:
        low, high = float(np.nanmin(every[:, 1])), float(np.nanmax(every[:, 2]))
    margin = 0.04 * (high - low)
    return [max(0.0, low - margin), high + margin], is_cut


def _chart(regime: RegimeComparison, audits: list[NoiseAudit], style: Style) -> Chart:
    names, total = _shown(audits)
    figure = go.Figure()
    for place, audit in enumerate(audits):
        entries = [entry for entry in audit.by_parameter if entry[0] in names]
        ratio, low, high = (np.array([entry[i] for entry in entries]) for i in (1, 2, 3))
        # Modes are placed side by side for each parameter.
        shift = (place - (len(audits) - 1) / 2) * 0.7 / len(audits)
        figure.add_scatter(
            x=drawn(ratio),
            y=drawn(np.array([names.index(entry[0]) for entry in entries]) + shift),
            error_x=error_bars(ratio, low, high, thickness=1.5),
            mode="markers",
            marker={
                "symbol": style.symbol(audit.mode),
                "color": style.colour(audit.mode),
                "size": 8,
            },
            **style.of_mode(
                audit.mode, hover="noise", names=[escaped(entry[0]) for entry in entries]
            ),
        )
    figure.add_scatter(
        x=[1, 1],
        y=[-0.5, len(names) - 0.5],
        mode="lines",
        line={"color": GREY, "width": 2, "dash": "dash"},
        name="as it should be",
        hoverinfo="skip",
    )
    row_height = max(18, 9 * len(audits))
    layout(figure, 150 + row_height * len(names), showlegend=True)
    reach, is_cut = _reach(audits)
    figure.update_xaxes(title_text="std of the noise / (sigma C)", range=reach)
    figure.update_yaxes(**name_axis(names, row_height))
    left_out = f" Drawn: the {len(names)} farthest from 1 of {total}." if total > len(names) else ""
    return Chart(
        name=f"noise_{regime.name}",
        title=f"Size of the noise by parameter in {regime.name}",
        caption="Estimate and confidence interval; 1 is sigma C."
        + " An interval that reaches the edge goes on beyond it." * is_cut
        + left_out,
        figure=figure,
        section="noise",
        regime=regime.name,
        min_width=560,
        is_wide=True,
    )
