"""Per-sample norms by parameter: parameters down, steps across, the ranks side by side.

Three dimensions and the mode do not fit one picture, so the page holds a cube for each mode and
draws one slice of it. A value is the share of the limit that the verdict holds it against, kept as
one byte, the logarithm in steps of 1/14 decade.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dpsgd_track.comparison.measure.amount import number
from dpsgd_track.comparison.measure.excess import excess_of
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

LOWEST, PER_DECADE, NOTHING = -8, 14, 255
"""The byte b stands for 10^(LOWEST + b / PER_DECADE), NOTHING for no value, and the byte before it
for a norm of the mode that is NaN or infinite."""


def _limits(
    comparison: GroupComparison, regime: RegimeComparison, base: str, mode: str
) -> dict[int, Floats]:
    """[P] limits of the verdict by step."""
    pair = regime.pair(mode, base)
    assert pair is not None, "a mode that was compared has a pair"
    floor = regime.floor_for(mode, base)
    excess = excess_of(pair.drifts[_NAME], comparison.thresholds, floor)
    return dict(zip(excess.drift.steps.tolist(), excess.limits, strict=True))


def heatmap_charts(comparison: GroupComparison, style: Style) -> list[Chart]:
    """One chart of each regime in which per-sample norms were compared by parameter."""
    cells = sum(map(_cells_of_a_bin, comparison.regimes))
    num_bins = max(1, min(_MOST_BINS, _MOST_CELLS // max(1, cells)))
    return [
        _chart(comparison, regime, heats, style)
        for regime in comparison.regimes
        if (heats := _heats(comparison, regime, num_bins))
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


def _heats(comparison: GroupComparison, regime: RegimeComparison, num_bins: int) -> list[Heat]:
    base, modes = _compared(regime)
    recorded = {run.label: run.trajectory for run in regime.runs if run.trajectory}
    heats = (
        heat(
            regime.name,
            (base, held),
            (mode, recorded[mode]),
            num_bins,
            _limits(comparison, regime, base, mode),
        )
        for mode in modes
        if (held := regime.base_of(mode, base))
    )
    # What is over its limit is looked for first.
    return sorted((each for each in heats if each), key=lambda each: -max(1.0, _worst(each)))


def _worst(of: Heat) -> float:
    """The largest value; infinite where one is not a number in the record."""
    return float(np.nanmax(of.values, initial=0.0))


def as_bytes(values: Floats) -> str:
    """`values` in C order, one byte each, as base64."""
    with np.errstate(divide="ignore"):
        codes = np.rint((np.log10(np.maximum(values, 10.0**LOWEST)) - LOWEST) * PER_DECADE)
    codes = np.where(np.isnan(values), NOTHING, np.clip(codes, 0, NOTHING - 2))
    codes = np.where(np.isinf(values), NOTHING - 1, codes)
    return base64.b64encode(codes.astype(np.uint8).tobytes()).decode("ascii")


def _cube(heats: list[Heat], parameters: list[str], style: Style) -> dict[str, Any]:
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
        "parameters": [escaped(name) for name in parameters],
        "modes": modes,
    }


def _chart(
    comparison: GroupComparison, regime: RegimeComparison, heats: list[Heat], style: Style
) -> Chart:
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
        caption=f"Largest difference of a sample's gradient norm from {base}, in units of the "
        "parameter's limit. Blue is below 1, the limit; orange is above, and so is NaN. "
        + (
            f"The floor is {number(floor)}."
            if floor is not None
            else f"The limit is the threshold of {number(threshold_of(comparison, _NAME))}."
        ),
        figure=figure,
        section="heatmap",
        regime=regime.name,
        min_width=7 * min(44, max(map(len, names))) + min(700, 150 + 5 * widest),
        is_wide=True,
        cube=_cube(heats, names, style),
    )
