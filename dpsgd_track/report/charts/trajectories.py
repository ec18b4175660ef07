"""Loss and gradient norm of each step, and their differences from the baseline."""

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
from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import Floats, Integers, Trajectory
from dpsgd_track.report.charts.curves import drawn, step_axis, whole
from dpsgd_track.report.charts.marks import add_crosses, add_floor, floor_of
from dpsgd_track.report.charts.style import Chart, Style, escaped, layout
from dpsgd_track.report.thinning import kept

_BAND_POINTS = 200
_FLOOR = {"legendgroup": "floor", "col": 1}


@dataclass(frozen=True, kw_only=True)
class _Quantity:
    name: ObservableName
    """Observable whose floor is drawn."""
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
    """The runs of `regime` that recorded at least one step."""
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
    """One picture of each quantity, with the regimes stacked vertically."""
    regimes = [regime for regime in comparison.regimes if recorded(regime)]
    return [_stacked(regimes, quantity, style) for quantity in _QUANTITIES] if regimes else []


def _curve(
    figure: go.Figure,
    label: str,
    points: tuple[Integers, Floats],
    style: Style,
    *,
    row: int,
    **meta: Any,
) -> None:
    step, y = points
    at = kept(y, style.most_points)
    figure.add_scatter(
        x=whole(step[at]),
        y=drawn(y[at]),
        row=row,
        col=1,
        **style.line(label, len(at), **meta),
    )


def _values(
    figure: go.Figure,
    label: str,
    trajectory: Trajectory,
    quantity: _Quantity,
    style: Style,
    row: int = 1,
) -> None:
    points = trajectory.step, quantity.values(trajectory)
    meta = {"hover": "value", "quantity": quantity.axis}
    _curve(figure, label, points, style, row=row, **meta)


def _stacked(regimes: list[RegimeComparison], quantity: _Quantity, style: Style) -> Chart:
    figure = make_subplots(
        rows=len(regimes),
        subplot_titles=[f"regime {escaped(regime.name)}" for regime in regimes],
        vertical_spacing=0.26 / len(regimes),
    )
    for row, regime in enumerate(regimes, 1):
        for run, trajectory in recorded(regime):
            _values(figure, run.label, trajectory, quantity, style, row)
        _crosses(figure, recorded(regime), quantity, style, row)
        figure.update_yaxes(title_text=quantity.axis, row=row)
        figure.update_xaxes(**_axis(recorded(regime)), row=row)
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
    others = [
        (run.label, t, base)
        for run, t in runs
        if (base := regime.base_of(run.label)) and base is not t
    ]
    measured = floor_of(regime, quantity.name)
    figure = make_subplots(
        rows=2 if others else 1,
        shared_xaxes=True,
        row_heights=[0.58, 0.42] if others else [1],
        vertical_spacing=0.07,
    )
    if others and measured is not None:
        _bands(figure, others[0][2], quantity, measured)
    for run, trajectory in runs:
        _values(figure, run.label, trajectory, quantity, style)
    _crosses(figure, runs, quantity, style)
    figure.update_yaxes(title_text=quantity.axis, row=1)
    meta = {"hover": "difference", "floor": measured, "base": escaped(regime.baseline)}
    for label, trajectory, base in others:
        points = _difference(base, trajectory, quantity)
        _curve(figure, label, points, style, row=2, **meta)
    if others:
        figure.update_yaxes(title_text="difference", exponentformat="e", row=2)
    figure.update_xaxes(**_axis(runs), row=2 if others else 1)
    layout(figure, 500 if others else 340)
    return Chart(
        name=f"trajectory_{regime.name}_{quantity.name}",
        title=f"{quantity.title} in {regime.name}",
        caption=quantity.caption + _below(regime, quantity, measured, bool(others)),
        figure=figure,
        section="trajectories",
        regime=regime.name,
    )


def _crosses(
    figure: go.Figure,
    runs: list[tuple[ModeRun, Trajectory]],
    quantity: _Quantity,
    style: Style,
    row: int = 1,
) -> None:
    """Marks NaN and infinity, at the height of the largest number."""
    every = np.concatenate([quantity.values(t) for _, t in runs])
    top = float(every[np.isfinite(every)].max(initial=0.0))
    for run, trajectory in runs:
        steps = trajectory.step[~np.isfinite(quantity.values(trajectory))]
        if len(steps):
            says = f"not finite from step {steps[0]} on", "NaN or infinity"
            add_crosses(figure, run.label, steps, top, style, says, row=row, col=1)


def _axis(runs: list[tuple[ModeRun, Trajectory]]) -> dict[str, Any]:
    return step_axis(min(t.step[0] for _, t in runs), max(t.step[-1] for _, t in runs))


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


def _difference(
    base: Trajectory, other: Trajectory, quantity: _Quantity
) -> tuple[Integers, Floats]:
    """Signed difference at the steps that both have."""
    common, i, j = np.intersect1d(base.step, other.step, return_indices=True)
    ours, theirs = quantity.values(base)[i], quantity.values(other)[j]
    with np.errstate(invalid="ignore", over="ignore"):
        difference = theirs - ours
        if quantity.is_relative:
            difference = relative(ours, difference, np.nanmax(np.abs(ours), initial=0.0))
    return common, np.where(np.isfinite(difference), difference, np.nan)


def _bands(figure: go.Figure, base: Trajectory, quantity: _Quantity, measured: float) -> None:
    y = quantity.values(base)
    finite = np.flatnonzero(np.isfinite(y))
    at = finite[kept(y[finite], _BAND_POINTS)]
    if not at.size:
        return
    x, centre = base.step[at], y[at]
    half = np.full(len(at), measured)
    if quantity.is_relative:
        with np.errstate(divide="ignore", over="ignore"):
            half /= relative(centre, np.ones(len(at)), np.abs(y[finite]).max())
    add_floor(figure, whole(x), centre - half, centre + half, measured, row=1, **_FLOOR)
    ends, high = whole(x[[0, -1]]), np.repeat(measured, 2)
    add_floor(figure, ends, -high, high, measured, row=2, **_FLOOR)
