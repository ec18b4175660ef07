"""Drift of each mode from the baseline at each step, as a share of the limit of the verdict.

A limit belongs to an item: drawn is the item that is nearest to its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dpsgd_track.comparison.measure.amount import number
from dpsgd_track.comparison.measure.drift import OBSERVABLES, Drift, Pair
from dpsgd_track.comparison.measure.excess import excess_of
from dpsgd_track.comparison.measure.finite import NotFinite, not_finite_in
from dpsgd_track.comparison.measure.observables import Charted
from dpsgd_track.comparison.result import GroupComparison, RegimeComparison
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import Integers
from dpsgd_track.report.charts.curves import ZERO, above_zero, drawn, log_axis, step_axis, whole
from dpsgd_track.report.charts.marks import add_crosses, add_limit, floor_of, threshold_of
from dpsgd_track.report.charts.style import Chart, Style, escaped, layout, name_axis, wrapped
from dpsgd_track.report.thinning import kept

_LAYERS = ObservableName.LAYER_GRAD_NORM
LIMIT = "limit"


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
            if any(name in pair.drifts or _broken(regime, pair, name) for pair in pairs)
            and _is_drawn(regime, pairs, name)
        ]
        if any(_layers(pair) for pair in pairs):
            charts.append(_layer_heatmap(comparison, regime, style))
    return charts


def _broken(regime: RegimeComparison, pair: Pair, name: ObservableName) -> bool:
    return _compared(regime, pair, name).not_finite is not None


def _is_drawn(regime: RegimeComparison, pairs: list[Pair], name: ObservableName) -> bool:
    charted = OBSERVABLES[name].charted
    if charted is Charted.IF_DIFFERENT:
        return any(
            _broken(regime, pair, name) or (name in pair.drifts and pair.drifts[name].max > 0)
            for pair in pairs
        )
    return charted is Charted.ALWAYS


def _compared(regime: RegimeComparison, pair: Pair, name: ObservableName) -> _Shown:
    """Curve of one observable of a pair."""
    drift = pair.drifts.get(name)
    mode = next(run.trajectory for run in regime.runs if run.label == pair.mode)
    base = regime.base_of(pair.mode, pair.baseline)
    first = not_finite_in(name, mode, base) if mode and base else None
    return _Shown(pair=pair, drift=drift, not_finite=first)


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """One observable of one pair."""

    pair: Pair
    drift: Drift | None
    """None if nothing finite was compared."""
    not_finite: NotFinite | None
    """The first value of the mode that is NaN or infinite, and must not be."""

    @property
    def steps(self) -> Integers:
        """[S] steps of the pair."""
        return self.pair.aligned.baseline.step

    def broken_steps(self) -> Integers:
        """Steps in which the mode's values are not finite, from the first on."""
        first, steps = self.not_finite, self.steps
        if first is None:
            return steps[:0]
        is_bad: NDArray[np.bool_] = np.ones(len(steps), dtype=bool)
        if self.drift:
            matrix = self.drift.matrix
            is_used = np.isfinite(matrix).any(axis=0) | (not self.drift.observable.may_be_absent)
            is_bad = np.asarray((~np.isfinite(matrix) & is_used).any(axis=1))
        return steps[(is_bad & (steps > first.step)) | (steps == first.step)]


def _drift_chart(
    comparison: GroupComparison, regime: RegimeComparison, name: ObservableName, style: Style
) -> Chart:
    observable = OBSERVABLES[name]
    figure = go.Figure()
    every = [_compared(regime, pair, name) for pair in against_baseline(regime)]
    every = [each for each in every if each.drift or each.not_finite]
    heights = [1.0]
    for each in every:
        heights += _curve(figure, comparison, regime, each, style)
    steps = np.concatenate([each.steps for each in every])
    ends = np.array([steps.min(), steps.max()])
    # In the legend, its label covers no curve.
    add_limit(figure, ends, np.ones(2), LIMIT, dash="dash", width=2.5)
    axis = log_axis(heights)
    for each in every:
        _mark_not_finite(figure, each, 10.0 ** (axis["range"][1] - 0.3), style)
    layout(figure, 400, showlegend=True)
    figure.update_xaxes(**step_axis(int(ends[0]), int(ends[1])))
    figure.update_yaxes(title_text="difference / its limit", **axis)
    return Chart(
        name=f"drift_{regime.name}_{name}",
        title=f"Drift of the {observable.title} in {regime.name}",
        caption=_caption(comparison, regime, name, heights, every),
        figure=figure,
        section="drift",
        regime=regime.name,
    )


def _caption(
    comparison: GroupComparison,
    regime: RegimeComparison,
    name: ObservableName,
    heights: list[float],
    every: list[_Shown],
) -> str:
    threshold, floor = threshold_of(comparison, name), floor_of(regime, name)
    kind = {"layer": "layer", "parameter": "parameter", "sample": "sample"}
    item = kind.get(OBSERVABLES[name].items, "")
    said = f"Difference from {regime.baseline}" + f", of the {item} nearest its limit" * bool(item)
    said += " at each step, as a share of that limit: "
    said += (
        f"the most that rounding explains. Floor {number(floor)}, threshold {number(threshold)}."
        if floor is not None
        else f"the threshold of {number(threshold)}, as no floor was measured."
    )
    said += " Drawn at 0: bitwise equal." * (min(heights) <= ZERO)
    return said + " A cross marks NaN or infinity." * any(each.not_finite for each in every)


def _curve(
    figure: go.Figure,
    comparison: GroupComparison,
    regime: RegimeComparison,
    shown: _Shown,
    style: Style,
) -> list[float]:
    """Adds the curve and returns its heights."""
    pair, drift = shown.pair, shown.drift
    if drift is None:
        return []
    name = drift.observable.name
    floor = regime.floor_for(pair.mode, pair.baseline)
    excess = excess_of(drift, comparison.thresholds, floor)
    rows, nearest = np.arange(len(drift.steps)), excess.nearest
    limits = excess.limits[rows, nearest]
    # Where rounding explains anything, nothing is compared.
    y = above_zero(np.where(np.isfinite(limits), excess.by_item[rows, nearest] / limits, np.nan))
    at = kept(y, style.most_points)
    places, more = _wheres([excess.place(row, int(nearest[row])) for row in at.tolist()])
    if np.isfinite(limits).all() and len(set(limits.tolist())) == 1:
        more["limits"] = float(limits[0])
    else:
        more["limits"] = drawn(limits[at])
    more["floor"] = floor.of(name) if floor else None
    more["threshold"] = threshold_of(comparison, name)
    figure.add_scatter(
        x=whole(drift.steps[at]),
        y=drawn(y[at]),
        customdata=places,
        **style.line(pair.mode, len(at), hover="drift", **more),
    )
    return y[np.isfinite(y)].tolist()


def _mark_not_finite(figure: go.Figure, shown: _Shown, height: float, style: Style) -> None:
    """Adds a cross at each step in which the mode's value is NaN or infinite."""
    first, steps = shown.not_finite, shown.broken_steps()
    if first is None or not len(steps):
        return
    where = f"first at step {first.step}{f', {escaped(first.where)}' * bool(first.where)}"
    said = f"{number(first.value)} from step {first.step} on"
    add_crosses(figure, shown.pair.mode, steps, height, style, says=(said, where))


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


def _layers(pair: Pair) -> Mapping[str, float]:
    return pair.drifts[_LAYERS].by_item if _LAYERS in pair.drifts else {}


def _shares(
    comparison: GroupComparison, regime: RegimeComparison, pair: Pair
) -> dict[str, tuple[float, str]]:
    """By layer, the largest share of its limit over the steps, and what is said of it."""
    shown = _compared(regime, pair, _LAYERS)
    drift = pair.drifts[_LAYERS]
    floor = regime.floor_for(pair.mode, pair.baseline)
    excess = excess_of(drift, comparison.thresholds, floor)
    shares = excess.by_item / excess.limits
    known = np.where(np.isnan(shares) | np.isinf(excess.limits), -1.0, shares)
    broken = np.isin(drift.steps, shown.broken_steps())[:, None] & ~np.isfinite(excess.by_item)
    known[broken & np.isfinite(excess.by_item).any(axis=0)] = np.inf
    found = {}
    for column, row in enumerate(known.argmax(axis=0).tolist()):
        if (share := float(known[row, column])) < 0:
            continue
        value, limit = (float(of[row, column]) for of in (excess.by_item, excess.limits))
        said = f"step {drift.steps[row]}<br>{number(value)}, limit {number(limit)}"
        found[drift.items[column]] = share, said
    return found


def _share(value: float) -> str:
    """The share of a limit in a cell; empty where nothing was compared."""
    if np.isnan(value):
        return ""
    return "NaN" if np.isinf(value) else number(value)


def _layer_heatmap(comparison: GroupComparison, regime: RegimeComparison, style: Style) -> Chart:
    pairs = [pair for pair in against_baseline(regime) if _layers(pair)]
    by_pair = [_shares(comparison, regime, pair) for pair in pairs]
    layers = list(dict.fromkeys(layer for pair in pairs for layer in _layers(pair)))
    figure = go.Figure()
    # One trace per mode, so that the filter can hide its column.
    for column, (pair, shares) in enumerate(zip(pairs, by_pair, strict=True)):
        values = [shares.get(layer, (np.nan, "nothing compared")) for layer in layers]
        figure.add_heatmap(
            x=[column - 0.5, column + 0.5],
            y=np.arange(len(layers), dtype=np.int32),
            z=np.log10(np.clip([v for v, _ in values], ZERO, 1e30)).astype(np.float32)[:, None],
            text=[[_share(value)] for value, _ in values],
            texttemplate="%{text}",
            textfont={"size": 11},
            customdata=[
                [f"{escaped(layer)}<br>{said}"]
                for layer, (_, said) in zip(layers, values, strict=True)
            ],
            hovertemplate="%{fullData.name}<br>%{customdata}<br>%{text} × limit<extra></extra>",
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            **style.of_mode(pair.mode),
        )
    layout(figure, max(250, 110 + 22 * len(layers)), showlegend=False)
    more_lines = max(wrapped(pair.mode).count("<br>") for pair in pairs)
    margin = {"t": 40 + 14 * more_lines, "r": 90, "b": 20}
    figure.update_layout(margin=margin, meta={"shares": True})
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
        caption=f"Largest difference from {regime.baseline} over all steps, in units of the "
        "layer's limit. Blue is below 1, the limit; orange is above.",
        figure=figure,
        section="drift",
        regime=regime.name,
        min_width=7 * min(44, max(map(len, layers))) + 130 * len(pairs) + 120,
        is_wide=True,
    )
