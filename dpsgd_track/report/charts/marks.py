"""Marks that belong to no mode: thresholds, floors, and error bars."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from dpsgd_track.comparison.measure.drift import OBSERVABLES
from dpsgd_track.comparison.result import GroupComparison, RegimeComparison
from dpsgd_track.comparison.verdict import number
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import Floats, Integers
from dpsgd_track.report.charts.curves import drawn, whole
from dpsgd_track.report.charts.style import Style, escaped
from dpsgd_track.report.thinning import kept

GREY = "#8C8C8C"
"""Colour of floors and thresholds, which belong to no mode."""

RED = "#D0341B"
"""Colour of NaN and infinity, readable on dark and on light ground."""


def threshold_of(comparison: GroupComparison, observable: ObservableName) -> float:
    """Largest acceptable drift of `observable`."""
    return float(getattr(comparison.thresholds, OBSERVABLES[observable].threshold))


def floor_of(
    regime: RegimeComparison, observable: ObservableName, baseline: str = ""
) -> float | None:
    """Error of `observable` due to rounding alone; None if not measured."""
    floor = regime.floor(baseline)
    return floor.of(observable) if floor else None


def add_floor(
    figure: go.Figure, x: NDArray[Any], low: Floats, high: Floats, floor: float, **more: Any
) -> None:
    """Adds a grey area over `x`, labelled with the floor."""
    figure.add_scatter(
        x=np.concatenate([x, x[::-1]]),
        y=drawn(np.concatenate([high, low[::-1]])),
        mode="lines",
        fill="toself",
        fillcolor="rgba(140, 140, 140, 0.28)",
        line={"color": GREY, "width": 1},
        name=f"floor ±{number(floor)}",
        hoverinfo="skip",
        **more,
    )


def add_limit(
    figure: go.Figure, steps: Integers, y: Any, name: str, *, dash: str, width: float, **more: Any
) -> None:
    """Adds a grey line of the limit for all modes, labelled `name`."""
    figure.add_scatter(
        x=whole(steps),
        y=y,
        mode="lines",
        line={"dash": dash, "color": GREY, "width": width},
        name=name,
        **{"hovertemplate": "%{fullData.name}<extra></extra>", **more},
    )


def add_crosses(
    figure: go.Figure,
    mode: str,
    x: NDArray[Any],
    height: float,
    style: Style,
    says: tuple[str, str],
    **more: Any,
) -> None:
    """Adds a red cross at each `x` in which a value of `mode` is NaN or infinite.

    Args:
        says: what the legend and what the pointer tells of them, beside the mode.
    """
    at = kept(np.zeros(len(x)), style.most_points)
    figure.add_scatter(
        x=whole(x[at]) if np.issubdtype(x.dtype, np.integer) else drawn(x[at]),
        y=np.full(len(at), height),
        mode="markers",
        marker={"symbol": "x", "size": 11, "color": RED},
        hovertemplate=f"%{{x}}<br>%{{fullData.name}}<br>{says[1]}<extra></extra>",
        **{
            **style.of_mode(mode),
            "name": f"{escaped(mode)}: {says[0]}",
            # An entry of its own in the legend.
            "legendgroup": None,
        },
        **more,
    )


def error_bars(value: Floats, low: Floats, high: Floats, **more: Any) -> dict[str, Any]:
    """Bars from `low` to `high` around `value`."""
    return {
        "type": "data",
        "symmetric": False,
        "array": drawn(high - value),
        "arrayminus": drawn(value - low),
        "width": 3,
        **more,
    }
