"""Drift of each mode from the baseline at each step, with threshold and floor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dpsgd_track.comparison.measure.amount import number
from dpsgd_track.comparison.measure.drift import OBSERVABLES, Drift, Pair
from dpsgd_track.comparison.measure.floor import limits_of
from dpsgd_track.comparison.measure.observables import Charted
from dpsgd_track.comparison.result import GroupComparison, RegimeComparison
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.report.charts.curves import ZERO, above_zero, drawn, log_axis, step_axis, whole
from dpsgd_track.report.charts.marks import add_limit, floor_of, threshold_of
from dpsgd_track.report.charts.style import Chart, Style, escaped, layout, name_axis, wrapped
from dpsgd_track.report.thinning import kept

_LAYERS = ObservableName.LAYER_GRAD_NORM


def against_baseline(regime: RegimeComparison) -> list[Pair]:
    """The pairs shown in charts."""
    return [pair for pair in regime.pairs if pair.baseline == regime.baseline]


def drift_charts(comparison: GroupComparison, style: Style) -> list[Chart]:
    """One chart of each observable and regime, then one of all layers."""
    charts = []
    for regime in comparison.regimes:
        pairs = against_baseline(regime)
        charts += [
            _drift_chart(comparison, regime, name, style)
            for name in OBSERVABLES
            if any(name in pair.drifts for pair in pairs) and _is_drawn(pairs, name)
        ]
        if any(_layers(pair) for pair in pairs):
            charts.append(_layer_heatmap(comparison, regime, style))
    return charts


def _is_drawn(pairs: list[Pair], name: ObservableName) -> bool:
    charted = OBSERVABLES[name].charted
    if charted is Charted.IF_DIFFERENT:
        return any(pair.drifts[name].max > 0 for pair in pairs if name in pair.drifts)
    return charted is Charted.ALWAYS


def _drift_chart(
    comparison: GroupComparison, regime: RegimeComparison, name: ObservableName, style: Style
) -> Chart:
    observable = OBSERVABLES[name]
    threshold, floor = threshold_of(comparison, name), floor_of(regime, name)
    figure = go.Figure()
    heights = [threshold, *([max(floor, ZERO)] if floor is not None else [])]
    pairs = [pair for pair in against_baseline(regime) if name in pair.drifts]
    for pair in pairs:
        heights += _curve(figure, pair, pair.drifts[name], (threshold, floor), style)
    every = np.concatenate([pair.drifts[name].steps for pair in pairs])
    ends = np.array([every.min(), every.max()])
    for limit, kind, dash in ((threshold, "threshold", "dash"), (floor, "floor", "dot")):
        if limit is not None:
            # In the legend, its label covers no curve.
            y = np.repeat(max(limit, ZERO), 2)
            add_limit(figure, ends, y, f"{kind} {number(limit)}", dash=dash, width=2.5)
    heights += _limit_of_rounding(figure, pairs[0].drifts[name], regime, style)
    layout(figure, 400, showlegend=True)
    kind = "relative" if observable.is_relative else "absolute"
    figure.update_xaxes(**step_axis(int(ends[0]), int(ends[1])))
    figure.update_yaxes(title_text=f"{kind} difference", **log_axis(heights))
    zero = " Drawn at 0: bitwise equal." if min(heights) <= ZERO else ""
    return Chart(
        name=f"drift_{regime.name}_{name}",
        title=f"Drift of the {observable.title} in {regime.name}",
        caption=f"Largest difference from {regime.baseline} at each step.{zero}"
        + ("" if floor is not None else " No floor was measured."),
        figure=figure,
        section="drift",
        regime=regime.name,
    )


def _curve(
    figure: go.Figure,
    pair: Pair,
    drift: Drift,
    held_against: tuple[float, float | None],
    style: Style,
) -> list[float]:
    """Adds the curve and returns its heights."""
    y = above_zero(drift.per_step)
    at = kept(y, style.most_points)
    places, more = _wheres([drift.where_per_step[place] for place in at])
    threshold, floor = held_against
    figure.add_scatter(
        x=whole(drift.steps[at]),
        y=drawn(y[at]),
        customdata=places,
        **style.line(pair.mode, len(at), hover="drift", threshold=threshold, floor=floor, **more),
    )
    return y[np.isfinite(y)].tolist()


def _wheres(names: list[str]) -> tuple[NDArray[Any] | None, dict[str, Any]]:
    """A number for each name, and the data by which the page restores the names."""
    if not any(names):
        return None, {}
    # Samples are many, and their names differ only by a number.
    numbered = [re.fullmatch(r"(\D*)(\d{1,9})", name, re.ASCII) for name in names]
    prefixes = {match.group(1) for match in numbered if match}
    if len(prefixes) == 1 and all(numbered):
        numbers = np.array([int(match.group(2)) for match in numbered if match])
        return whole(numbers), {"prefix": escaped(prefixes.pop())}
    known, places = np.unique(names, return_inverse=True)
    return whole(places), {"names": list(map(escaped, known.tolist()))}


def _limit_of_rounding(
    figure: go.Figure, drift: Drift, regime: RegimeComparison, style: Style
) -> list[float]:
    """Adds the verdict's limit for the drift, the largest of all layers; returns its heights."""
    limits = limits_of(drift, regime.floor())
    if limits is None:
        return []
    y = limits.max(axis=1)
    y[~np.isfinite(y)] = np.nan  # where rounding explains anything
    at = kept(y, style.most_points)
    add_limit(
        figure,
        drift.steps[at],
        drawn(y[at]),
        "limit of rounding",
        dash="longdash",
        width=1.5,
        hovertemplate="limit of rounding %{y:.2~g}<extra></extra>",
    )
    return y[np.isfinite(y)].tolist()


def _layers(pair: Pair) -> Mapping[str, float]:
    return pair.drifts[_LAYERS].by_item if _LAYERS in pair.drifts else {}


def _layer_heatmap(comparison: GroupComparison, regime: RegimeComparison, style: Style) -> Chart:
    pairs = [pair for pair in against_baseline(regime) if _layers(pair)]
    layers = list(dict.fromkeys(layer for pair in pairs for layer in _layers(pair)))
    figure = go.Figure()
    # One trace per mode, so that the filter can hide its column.
    for column, pair in enumerate(pairs):
        values = [_layers(pair).get(layer, np.nan) for layer in layers]
        figure.add_heatmap(
            x=[column - 0.5, column + 0.5],
            y=np.arange(len(layers), dtype=np.int32),
            z=np.log10(np.clip(np.array(values), ZERO, 1e300)).astype(np.float32)[:, None],
            text=[["" if np.isnan(value) else number(value)] for value in values],
            texttemplate="%{text}",
            textfont={"size": 11},
            customdata=[[escaped(layer)] for layer in layers],
            hovertemplate="%{fullData.name}<br>%{customdata}<br>%{text}<extra></extra>",
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            **style.of_mode(pair.mode),
        )
    threshold = threshold_of(comparison, _LAYERS)
    # The page colours it as the heatmap of parameters, by the threshold.
    layout(figure, max(250, 110 + 22 * len(layers)), showlegend=False)
    more_lines = max(wrapped(pair.mode).count("<br>") for pair in pairs)
    margin = {"t": 40 + 14 * more_lines, "r": 90, "b": 20}
    figure.update_layout(margin=margin, meta={"threshold": threshold})
    figure.update_xaxes(
        side="top",
        tickangle=0,
        tickvals=list(range(len(pairs))),
        ticktext=[wrapped(pair.mode) for pair in pairs],
        range=[-0.5, len(pairs) - 0.5],
        showgrid=False,
        zeroline=False,
    )
    figure.update_yaxes(**name_axis(layers, 22))
    return Chart(
        name=f"layers_{regime.name}",
        title=f"Gradient norm by layer in {regime.name}",
        caption=f"Largest relative difference from {regime.baseline} over all steps. "
        f"Blue is below the threshold of {number(threshold)}, orange above.",
        figure=figure,
        section="drift",
        regime=regime.name,
        min_width=7 * min(44, max(map(len, layers))) + 130 * len(pairs) + 120,
        is_wide=True,
    )
