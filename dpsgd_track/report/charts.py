"""Plotly figures of a comparison.

Curves of modes that agree coincide exactly, so every mode has its own colour, dash and marker,
and markers shrink from mode to mode: the ones below stay visible around the ones above.
Names are escaped, because Plotly reads a subset of HTML in every text.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dpsgd_track.comparison.drift import OBSERVABLES, Pair
from dpsgd_track.comparison.result import GroupComparison, RegimeComparison
from dpsgd_track.comparison.verdict import number
from dpsgd_track.report.table import main_regime, rows
from dpsgd_track.report.thinning import kept
from dpsgd_track.tracking.reader import ModeRun
from dpsgd_track.tracking.trajectory import Floats, Integers, Trajectory

ZERO = 1e-17
"""Where an exact zero is drawn on a logarithmic axis."""

# Okabe and Ito (2008), without black and yellow, which vanish on dark and on light ground.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "pentagon", "cross")
_DRIFT_CHARTS = ("loss", "grad_norm", "sample_norm", "gradient")
_HOVER = "%{fullData.name}<br>step %{x}<br>%{text}<extra></extra>"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure with what is said about it."""

    name: str
    """Identifier, and the file's stem where it is written alone."""
    title: str
    caption: str
    figure: go.Figure
    min_width: int = 0
    """Pixels below which it scrolls sideways instead of shrinking."""
    alone: bool = False
    """Whether it is also written as files of its own."""


@dataclass(frozen=True, kw_only=True)
class _Style:
    """How each mode is drawn, the same in all charts."""

    order: tuple[str, ...]

    @classmethod
    def of(cls, comparison: GroupComparison) -> _Style:
        return cls(order=tuple(dict.fromkeys(run.label for run in comparison.group.runs)))

    def colour(self, label: str) -> str:
        return _COLOURS[self.order.index(label) % len(_COLOURS)]

    def line(self, label: str, num_steps: int) -> dict[str, Any]:
        i = self.order.index(label)
        size = max(4, 15 - 11 * i / max(1, len(self.order) - 1))
        # More markers than this would merge into a band.
        every = max(1, num_steps // 40)
        return {
            "mode": "lines+markers",
            "line": {
                "color": self.colour(label),
                "dash": _DASHES[i % len(_DASHES)],
                "width": max(1.5, 4 - 0.5 * i),
            },
            "marker": {
                "symbol": f"{_MARKERS[i % len(_MARKERS)]}-open",
                "size": [size if step % every == 0 else 0 for step in range(num_steps)],
                "line": {"width": 1.5},
            },
            "name": plain(label),
            "legendgroup": str(i),
        }


def plain(text: str) -> str:
    """`text` such that Plotly shows it letter by letter."""
    return html.escape(text, quote=False)


def figures(comparison: GroupComparison) -> tuple[Chart, ...]:
    """Every chart that the comparison has data for."""
    style = _Style.of(comparison)
    made = _headline_charts(comparison, style)
    for regime in comparison.regimes:
        made += [
            _drift_chart(comparison, regime, name, style)
            for name in _DRIFT_CHARTS
            if any(name in pair.drifts for pair in _against_baseline(regime))
        ]
        if any(_layers(pair) for pair in _against_baseline(regime)):
            made.append(_layer_heatmap(regime))
    made += [*_cost_charts(comparison, style)]
    return tuple(made)


def _headline_charts(comparison: GroupComparison, style: _Style) -> list[Chart]:
    charts = [
        _trajectories(
            comparison,
            style,
            ("loss", lambda t: t.loss),
            name="loss_trajectory",
            title="Loss trajectories",
            caption="Mean loss of each step. Where modes agree, their curves coincide.",
        ),
        _trajectories(
            comparison,
            style,
            ("gradient norm", lambda t: t.grad_norm),
            name="gradient_norm_comparison",
            title="Gradient norms",
            caption="Norm of the clipped mean gradient of each step, before noise.",
        ),
        _final_loss(comparison, style),
    ]
    return [chart for chart in charts if chart]


def _layout(figure: go.Figure, height: int, **more: Any) -> go.Figure:
    figure.update_layout(
        height=height,
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 70, "r": 24, "t": 30, "b": 60},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        hoverlabel={"namelength": -1},
        **more,
    )
    figure.update_xaxes(automargin=True, title_standoff=8)
    figure.update_yaxes(automargin=True, title_standoff=8)
    return figure


def _drawn(regime: RegimeComparison) -> list[tuple[ModeRun, Trajectory]]:
    return [(r, r.trajectory) for r in regime.runs if r.trajectory and r.trajectory.num_steps]


def _trajectories(
    comparison: GroupComparison,
    style: _Style,
    quantity: tuple[str, Callable[[Trajectory], Floats]],
    *,
    name: str,
    title: str,
    caption: str,
) -> Chart | None:
    axis, values = quantity
    regimes = [regime for regime in comparison.regimes if _drawn(regime)]
    if not regimes:
        return None
    figure = make_subplots(
        rows=len(regimes),
        cols=1,
        subplot_titles=[f"regime {plain(regime.name)}" for regime in regimes],
        vertical_spacing=0.26 / len(regimes),
    )
    shown: set[str] = set()
    for row, regime in enumerate(regimes, 1):
        for run, trajectory in _drawn(regime):
            shown_steps = kept(values(trajectory))
            y = values(trajectory)[shown_steps]
            figure.add_scatter(
                x=trajectory.step[shown_steps],
                y=y,
                # A text for each point would be larger than the curve.
                hovertemplate=_HOVER.replace("%{text}", f"{axis} %{{y:.9~g}}"),
                showlegend=run.label not in shown,
                row=row,
                col=1,
                **style.line(run.label, len(y)),
            )
            shown.add(run.label)
        figure.update_yaxes(title_text=axis, row=row, col=1)
        figure.update_xaxes(title_text="step", row=row, col=1)
    _layout(figure, 110 + 320 * len(regimes))
    return Chart(name=name, title=title, caption=caption, figure=figure, alone=True)


def _bars(
    style: _Style, labels: list[str], values: list[float], shown: list[str], axis: str
) -> go.Figure:
    figure = go.Figure(
        go.Bar(
            y=[plain(label) for label in labels],
            x=values,
            orientation="h",
            text=shown,
            textposition="auto",
            textangle=0,
            marker_color=[style.colour(label) for label in labels],
            hovertemplate="%{y}<br>%{text}<extra></extra>",
        )
    )
    _layout(figure, 110 + 34 * len(labels), showlegend=False)
    figure.update_yaxes(autorange="reversed", type="category")
    # Room for a value that stands outside its bar.
    longest = max((value for value in values if np.isfinite(value)), default=0.0)
    figure.update_xaxes(title_text=axis, range=[0, 1.3 * longest or 1])
    return figure


def _final_loss(comparison: GroupComparison, style: _Style) -> Chart | None:
    main = main_regime(comparison)
    if main is None or not _drawn(main):
        return None
    labels = [run.label for run, _ in _drawn(main)]
    losses = [float(t.loss[-1]) for _, t in _drawn(main)]
    shown = [f"{loss:.6f}" for loss in losses]
    return Chart(
        name="final_loss_comparison",
        title="Final loss",
        caption=f"Loss at the last step of regime {main.name}.",
        figure=_bars(style, labels, losses, shown, "loss at the last step"),
        alone=True,
    )


def _against_baseline(regime: RegimeComparison) -> list[Pair]:
    return [pair for pair in regime.pairs if pair.baseline == regime.baseline]


def _drift_chart(
    comparison: GroupComparison, regime: RegimeComparison, name: str, style: _Style
) -> Chart:
    observable = OBSERVABLES[name]
    threshold = float(getattr(comparison.thresholds, observable.threshold))
    known = regime.floor()
    floor = known.of(name) if known else None
    figure = go.Figure()
    lines = [threshold, *([max(floor, ZERO)] if floor is not None else [])]
    heights = list(lines)
    pairs = [pair for pair in _against_baseline(regime) if name in pair.drifts]
    for pair in pairs:
        drift = pair.drifts[name]
        shown = kept(drift.per_step)
        values, where = drift.per_step[shown], drift.where_per_step
        y = np.where(np.isfinite(values), np.maximum(values, ZERO), np.nan)
        heights += y[np.isfinite(y)].tolist()
        figure.add_scatter(
            x=drift.steps[shown],
            y=y,
            text=[
                f"{'0, bitwise equal' if value == 0 else number(value)}<br>{plain(where[row])}"
                for value, row in zip(values.tolist(), shown.tolist(), strict=True)
            ],
            hovertemplate=_HOVER,
            **style.line(pair.mode, len(y)),
        )
    steps = np.concatenate([pair.drifts[name].steps for pair in pairs])
    steps.sort()
    _limit(figure, steps, threshold, f"threshold {number(threshold)}", "dash")
    if floor is not None:
        _limit(figure, steps, max(floor, ZERO), f"floor {number(floor)}", "dot")
    _layout(figure, 430, showlegend=True)
    kind = "relative" if observable.is_relative else "absolute"
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text=f"{kind} difference", **_log_axis(heights))
    zero = " Drawn at 0: bitwise equal." if min(heights) <= ZERO else ""
    return Chart(
        name=f"drift_{regime.name}_{name}",
        title=f"Drift of the {observable.title} in {regime.name}",
        caption=f"Largest difference from {regime.baseline} at each step.{zero}"
        + ("" if floor is not None else " No floor was measured."),
        figure=figure,
    )


def _limit(figure: go.Figure, steps: Integers, y: float, text: str, dash: str) -> None:
    # In the legend its label covers no curve.
    figure.add_scatter(
        x=[steps[0], steps[-1]],
        y=[y, y],
        mode="lines",
        line={"dash": dash, "color": "#8C8C8C", "width": 2.5},
        name=text,
        hovertemplate="%{fullData.name}<extra></extra>",
    )


def _log_axis(heights: list[float]) -> dict[str, Any]:
    low = int(np.floor(np.log10(min(heights))))
    high = int(np.ceil(np.log10(max(heights)))) + 1
    every = max(1, (high - low) // 8)
    powers = [power for power in range(low, high + 1, every) if 10.0**power > ZERO * 5]
    has_zero = min(heights) <= ZERO
    return {
        "type": "log",
        "range": [low - 0.5, high],
        "tickvals": [*([ZERO] if has_zero else []), *(10.0**power for power in powers)],
        "ticktext": [*(["0"] if has_zero else []), *(f"1e{power:+03d}" for power in powers)],
    }


def _layers(pair: Pair) -> dict[str, float]:
    drift = pair.drifts.get("layer_grad_norm")
    return dict(drift.by_item) if drift else {}


def _layer_heatmap(regime: RegimeComparison) -> Chart:
    pairs = [pair for pair in _against_baseline(regime) if _layers(pair)]
    layers = list(dict.fromkeys(layer for pair in pairs for layer in _layers(pair)))
    drift = np.array([[_layers(pair).get(layer, np.nan) for pair in pairs] for layer in layers])
    shown = [["" if np.isnan(v) else number(float(v)) for v in line] for line in drift]
    figure = go.Figure(
        go.Heatmap(
            x=[plain(pair.mode) for pair in pairs],
            y=[plain(layer) for layer in layers],
            z=np.log10(np.clip(drift, ZERO, 1e300)),
            text=shown,
            texttemplate="%{text}",
            textfont={"size": 11},
            hovertemplate="%{x}<br>%{y}<br>%{text}<extra></extra>",
            colorscale="Cividis",
            zmin=-9,
            zmax=0,
            xgap=1,
            ygap=1,
            colorbar={
                "title": {"text": "relative", "side": "right"},
                "tickvals": list(range(-9, 1, 3)),
                "ticktext": ["≤1e-09", "1e-06", "1e-03", "≥1"],
                "thickness": 12,
            },
        )
    )
    _layout(figure, 140 + 22 * len(layers), showlegend=False)
    figure.update_layout(margin={"r": 80})
    figure.update_xaxes(type="category", side="top", tickangle=0)
    figure.update_yaxes(type="category", autorange="reversed", dtick=1, tickfont={"size": 11})
    longest = max(map(len, layers))
    return Chart(
        name=f"layers_{regime.name}",
        title=f"Gradient norm by layer in {regime.name}",
        caption=f"Largest relative difference from {regime.baseline} over all steps.",
        figure=figure,
        min_width=7 * longest + 130 * len(pairs) + 120,
    )


def _cost_charts(comparison: GroupComparison, style: _Style) -> list[Chart]:
    table = [row for row in rows(comparison) if row.label in style.order]
    timed = [(row, row.step_time_ms) for row in table if row.step_time_ms is not None]
    sized = [(row, row.peak_memory_gib) for row in table if row.peak_memory_gib is not None]
    charts = []
    if timed:
        labels, times = [row.label for row, _ in timed], [time for _, time in timed]
        shown = [
            f"{time:.4g} ms" + (f", {row.overhead:.2f}×" if row.overhead else "")
            for row, time in timed
        ]
        charts.append(
            Chart(
                name="step_time",
                title="Step time",
                caption="Median over the recorded steps, the slowest rank's; × that of no_dp.",
                figure=_bars(style, labels, times, shown, "ms a step"),
            )
        )
    if sized:
        labels, sizes = [row.label for row, _ in sized], [size for _, size in sized]
        shown = [f"{size:.3g} GiB" for size in sizes]
        charts.append(
            Chart(
                name="peak_memory",
                title="Peak memory",
                caption="Largest rank's; on CPU the resident set of the process.",
                figure=_bars(style, labels, sizes, shown, "GiB"),
            )
        )
    return charts
