"""Per-sample norms by parameter: parameters down, steps across, the ranks side by side.

Three dimensions and the mode do not fit one picture, so the page holds a cube for each mode and
draws one slice of it. Values are kept as one byte each, the logarithm in steps of 1/14 decade.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dpsgd_track.comparison.measure.amount import number
from dpsgd_track.comparison.measure.norm_heatmap import Heat, heat
from dpsgd_track.comparison.result import GroupComparison, RegimeComparison
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import Floats
from dpsgd_track.report.charts.marks import floor_of, threshold_of
from dpsgd_track.report.charts.style import Chart, Style, escaped, layout, name_axis

_MOST_CELLS = 400_000
"""Limit for all cubes of a report together: half a megabyte."""
_MOST_BINS = 60
_NAME = ObservableName.SAMPLE_NORM_BY_PARAMETER

LOWEST, PER_DECADE, NOTHING = -17, 14, 255
"""The byte b stands for 10^(LOWEST + b / PER_DECADE), and NOTHING for no value."""


def heatmap_charts(comparison: GroupComparison, style: Style) -> list[Chart]:
    """One chart of each regime in which per-sample norms were compared by parameter."""
    cells = sum(map(_cells_of_a_bin, comparison.regimes))
    num_bins = max(1, min(_MOST_BINS, _MOST_CELLS // max(1, cells)))
    return [
        _chart(comparison, regime, heats, style)
        for regime in comparison.regimes
        if (heats := _heats(regime, num_bins))
    ]


def _compared(regime: RegimeComparison) -> tuple[str, list[str]]:
    """The baseline that has per-sample norms by parameter, and the modes compared with it."""
    pairs = [pair for pair in regime.pairs if _NAME in pair.drifts]
    base = pairs[0].baseline if pairs else ""
    return base, [pair.mode for pair in pairs if pair.baseline == base]


def _cells_of_a_bin(regime: RegimeComparison) -> int:
    _, modes = _compared(regime)
    chosen = [run.trajectory for run in regime.runs if run.label in modes and run.trajectory]
    return sum(len(t.parameter_names) * len(np.unique(t.sample_rank)) for t in chosen)


def _heats(regime: RegimeComparison, num_bins: int) -> list[Heat]:
    base, modes = _compared(regime)
    recorded = {run.label: run.trajectory for run in regime.runs if run.trajectory}
    heats = (
        heat(regime.name, (base, held), (mode, recorded[mode]), num_bins)
        for mode in modes
        if (held := regime.base_of(mode, base))
    )
    return [each for each in heats if each]


def as_bytes(values: Floats) -> str:
    """`values` in C order, one byte each, as base64."""
    with np.errstate(divide="ignore"):
        codes = np.rint((np.log10(np.maximum(values, 10.0**LOWEST)) - LOWEST) * PER_DECADE)
    codes = np.where(np.isnan(values), NOTHING, np.clip(codes, 0, NOTHING - 1))
    return base64.b64encode(codes.astype(np.uint8).tobytes()).decode("ascii")


def _cube(
    heats: list[Heat], parameters: list[str], style: Style, threshold: float
) -> dict[str, Any]:
    modes = []
    for each in heats:
        values = np.full((*each.values.shape[:2], len(parameters)), np.nan)
        values[..., [parameters.index(name) for name in each.parameters]] = each.values
        modes.append(
            {
                "mode": style.index(each.mode),
                "first": each.first_steps.tolist(),
                "last": each.last_steps.tolist(),
                "ranks": each.ranks.tolist(),
                "bytes": as_bytes(values),
            }
        )
    return {
        "lowest": LOWEST,
        "per_decade": PER_DECADE,
        "nothing": NOTHING,
        "threshold": threshold,
        "parameters": [escaped(name) for name in parameters],
        "modes": modes,
    }


def _chart(
    comparison: GroupComparison, regime: RegimeComparison, heats: list[Heat], style: Style
) -> Chart:
    threshold = threshold_of(comparison, _NAME)
    names = list(dict.fromkeys(name for each in heats for name in each.parameters))
    row_height = max(8, min(22, 1400 // len(names)))
    figure = go.Figure(go.Heatmap(z=[], coloraxis="coloraxis", xgap=1, ygap=1))
    layout(figure, max(270, 130 + row_height * len(names)), showlegend=False)
    figure.update_layout(margin={"t": 40, "r": 90, "b": 50})
    figure.update_yaxes(**name_axis(names, row_height))
    figure.update_xaxes(showgrid=False, zeroline=False)
    base = heats[0].baseline
    floor = floor_of(regime, _NAME, base)
    widest = max(len(each.ranks) * len(each.first_steps) for each in heats)
    return Chart(
        name=f"heatmap_{regime.name}",
        title=f"Parameter by rank and step in {regime.name}",
        caption=f"Largest relative difference of a sample's gradient norm from {base}. "
        f"Blue is below the threshold of {number(threshold)}, orange above"
        + (f"; the floor is {number(floor)}." if floor is not None else "."),
        figure=figure,
        section="heatmap",
        regime=regime.name,
        min_width=7 * min(44, max(map(len, names))) + min(700, 150 + 5 * widest),
        is_wide=True,
        cube=_cube(heats, names, style, threshold),
    )
