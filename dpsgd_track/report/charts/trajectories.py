"""Loss and gradient norm of each step, and how far each mode is from the baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dpsgd_track.comparison.measure.amount import number
from dpsgd_track.comparison.measure.observables import relative
from dpsgd_track.comparison.result import GroupComparison, RegimeComparison
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import Floats, Integers, Trajectory
from dpsgd_track.report.charts.curves import drawn, step_axis, whole
from dpsgd_track.report.charts.style import GREY, Chart, Style, layout, plain
from dpsgd_track.report.thinning import kept
from dpsgd_track.store.reader import ModeRun

_BAND_POINTS = 200
_BAND = "rgba(140, 140, 140, 0.28)"


@dataclass(frozen=True, kw_only=True)
class _Quantity:
    name: ObservableName
    """Of the observable whose floor is drawn."""
    alone: str
    """Stem of the file with all regimes."""
    title: str
    axis: str
    caption: str
    values: Callable[[Trajectory], Floats]
    is_relative: bool


_QUANTITIES = (
    _Quantity(
        name=ObservableName.LOSS,
        alone="loss_trajectory",
        title="Loss",
        axis="loss",
        caption="Mean loss of each step.",
        values=lambda t: t.loss,
        is_relative=False,
    ),
    _Quantity(
        name=ObservableName.GRAD_NORM,
        alone="gradient_norm_comparison",
        title="Gradient norm",
        axis="gradient norm",
        caption="Norm of the clipped mean gradient of each step, before noise.",
        values=lambda t: t.grad_norm,
        is_relative=True,
    ),
)


def recorded(regime: RegimeComparison) -> list[tuple[ModeRun, Trajectory]]:
    """The runs of `regime` that recorded a step."""
    return [(r, r.trajectory) for r in regime.runs if r.trajectory and r.trajectory.num_steps]


def trajectory_charts(comparison: GroupComparison, style: Style) -> list[Chart]:
    """One chart of each quantity and regime."""
    return [
        _with_differences(regime, quantity, style)
        for regime in comparison.regimes
        if recorded(regime)
        for quantity in _QUANTITIES
    ]


def all_regimes(comparison: GroupComparison, style: Style) -> list[Chart]:
    """One picture of each quantity, with the regimes below each other."""
    regimes = [regime for regime in comparison.regimes if recorded(regime)]
    return [_stacked(regimes, quantity, style) for quantity in _QUANTITIES] if regimes else []


def _curve(
    figure: go.Figure,
    label: str,
    points: tuple[Integers, Floats],
    style: Style,
    *,
    row: int,
    is_named: bool,
    **meta: Any,
) -> None:
    step, y = points
    at = kept(y, style.most_points)
    figure.add_scatter(
        x=whole(step[at]),
        y=drawn(y[at]),
        showlegend=is_named,
        row=row,
        col=1,
        **style.line(label, len(at), **meta),
    )


def _stacked(regimes: list[RegimeComparison], quantity: _Quantity, style: Style) -> Chart:
    figure = make_subplots(
        rows=len(regimes),
        cols=1,
        subplot_titles=[f"regime {plain(regime.name)}" for regime in regimes],
        vertical_spacing=0.26 / len(regimes),
    )
    shown: set[str] = set()
    for row, regime in enumerate(regimes, 1):
        for run, trajectory in recorded(regime):
            points = trajectory.step, quantity.values(trajectory)
            is_new = run.label not in shown
            meta = {"hover": "value", "quantity": quantity.axis}
            _curve(figure, run.label, points, style, row=row, is_named=is_new, **meta)
            shown.add(run.label)
        figure.update_yaxes(title_text=quantity.axis, row=row, col=1)
        figure.update_xaxes(**_axis([t for _, t in recorded(regime)]), row=row, col=1)
    layout(figure, 110 + 320 * len(regimes))
    figure.update_layout(margin={"t": 36})
    return Chart(
        name=quantity.alone,
        title=quantity.title,
        caption=quantity.caption,
        figure=figure,
        alone=True,
    )


def _with_differences(regime: RegimeComparison, quantity: _Quantity, style: Style) -> Chart:
    runs = recorded(regime)
    held = {run.label: regime.base_of(run.label) for run, _ in runs}
    others = [(run, t, base) for run, t in runs if (base := held[run.label]) and base is not t]
    base = next((base for _, _, base in others), None)
    measured = known.of(quantity.name) if (known := regime.floor()) else None
    figure = make_subplots(
        rows=2 if others else 1,
        cols=1,
        shared_xaxes=True,
        row_heights=[0.58, 0.42] if others else [1],
        vertical_spacing=0.07,
    )
    if base and measured is not None:
        _band(figure, base, quantity, measured, both=bool(others))
    for run, trajectory in runs:
        points = trajectory.step, quantity.values(trajectory)
        meta = {"hover": "value", "quantity": quantity.axis}
        _curve(figure, run.label, points, style, row=1, is_named=True, **meta)
    figure.update_yaxes(title_text=quantity.axis, row=1, col=1)
    for run, trajectory, own_base in others:
        points = _difference(own_base, trajectory, quantity)
        differs: dict[str, Any] = {"hover": "difference", "floor": measured}
        differs["base"] = plain(regime.baseline)
        _curve(figure, run.label, points, style, row=2, is_named=False, **differs)
    if others:
        figure.update_yaxes(title_text="difference", exponentformat="e", row=2, col=1)
    axis = _axis([t for _, t in runs])
    figure.update_xaxes(**axis, row=2 if others else 1, col=1)
    layout(figure, 500 if others else 340)
    return Chart(
        name=f"trajectory_{regime.name}_{quantity.name}",
        title=f"{quantity.title} in {regime.name}",
        caption=quantity.caption + _below(regime, quantity, measured, bool(others)),
        figure=figure,
        section="trajectories",
        regime=regime.name,
    )


def _axis(trajectories: list[Trajectory]) -> dict[str, Any]:
    return step_axis(min(t.step[0] for t in trajectories), max(t.step[-1] for t in trajectories))


def _below(
    regime: RegimeComparison, quantity: _Quantity, measured: float | None, has_difference: bool
) -> str:
    kind = "relative " if quantity.is_relative else ""
    if not has_difference:
        return " There is no baseline to take a difference from." * (not regime.baseline)
    band = (
        "no floor was measured"
        if measured is None
        else f"grey: the measured floor, ±{number(measured)}"
    )
    return f" Below: {kind}difference from {regime.baseline} ({band})."


def _scale(base: Floats, quantity: _Quantity) -> Floats:
    """What a relative difference of 1 is; as `drift.relative` takes it."""
    if not quantity.is_relative:
        return np.ones_like(base)
    largest = float(np.nanmax(np.abs(base), initial=0.0))
    return np.maximum(np.abs(base), 1e-3 * largest)


def _difference(
    base: Trajectory, other: Trajectory, quantity: _Quantity
) -> tuple[Integers, Floats]:
    """Signed, at the steps that both have."""
    common, i, j = np.intersect1d(base.step, other.step, return_indices=True)
    ours, theirs = quantity.values(base)[i], quantity.values(other)[j]
    with np.errstate(invalid="ignore", over="ignore"):
        difference = theirs - ours
        if quantity.is_relative:
            difference = relative(ours, difference, np.nanmax(np.abs(ours), initial=0.0))
    return common, np.where(np.isfinite(difference), difference, np.nan)


def _band(
    figure: go.Figure, base: Trajectory, quantity: _Quantity, measured: float, *, both: bool
) -> None:
    y = quantity.values(base)
    known = np.isfinite(y)
    at = np.flatnonzero(known)[kept(y[known], _BAND_POINTS)]
    if not at.size:
        return
    x, centre = base.step[at], y[at]
    with np.errstate(over="ignore"):
        half = measured * _scale(y[known], quantity)[np.searchsorted(np.flatnonzero(known), at)]
    areas = [(1, x, centre - half, centre + half)]
    if both:
        ends = np.array([x[0], x[-1]])
        areas.append((2, ends, np.full(2, -measured), np.full(2, measured)))
    for row, across, low, high in areas:
        figure.add_scatter(
            x=whole(np.concatenate([across, across[::-1]])),
            y=drawn(np.concatenate([high, low[::-1]])),
            mode="lines",
            fill="toself",
            fillcolor=_BAND,
            line={"color": GREY, "width": 1},
            name=f"floor ±{number(measured)}",
            legendgroup="floor",
            showlegend=row == 1,
            hoverinfo="skip",
            row=row,
            col=1,
        )
