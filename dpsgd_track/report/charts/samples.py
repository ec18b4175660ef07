"""Each sample's gradient norm versus the baseline's."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from dpsgd_track.comparison.measure.alignment import align
from dpsgd_track.comparison.measure.amount import number
from dpsgd_track.comparison.result import GroupComparison, RegimeComparison
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import Floats, Integers, Trajectory
from dpsgd_track.report.charts.curves import drawn, whole
from dpsgd_track.report.charts.marks import add_crosses, add_floor, floor_of, threshold_of
from dpsgd_track.report.charts.style import Chart, Style, escaped, layout

_MOST_SAMPLES = 500
"""Most samples drawn of one mode."""
_NAME = ObservableName.SAMPLE_NORM


def sample_charts(comparison: GroupComparison, style: Style) -> list[Chart]:
    """One chart of each regime in which per-sample norms were compared."""
    return [chart for regime in comparison.regimes if (chart := _chart(comparison, regime, style))]


def _chart(comparison: GroupComparison, regime: RegimeComparison, style: Style) -> Chart | None:
    pairs = [pair for pair in regime.pairs if _NAME in pair.drifts]
    if not pairs:
        return None
    base = pairs[0].baseline
    recorded = {run.label: run.trajectory for run in regime.runs if run.trajectory}
    figure = go.Figure()
    total, most, reach, top = 0, 0, [np.inf, 0.0], 0.0
    undefined: dict[str, Floats] = {}
    for mode in (pair.mode for pair in pairs if pair.baseline == base):
        base_run = regime.base_of(mode, base)
        if base_run is None:
            continue
        norms, ratios, told, lost = _samples(base_run, recorded[mode])
        if lost.size:
            undefined[mode] = lost
        if not norms.size:
            continue
        chosen, top = _chosen(ratios), max(top, float(ratios.max()))
        total, most = total + len(ratios), max(most, len(ratios))
        reach = [min(reach[0], norms.min()), max(reach[1], norms.max())]
        _points(figure, mode, norms[chosen], ratios[chosen], told[chosen], style)
    for mode, lost in undefined.items():
        said = f"{len(lost)} norms that are NaN or infinite"
        add_crosses(figure, mode, lost, top, style, says=(said, "finite in the baseline"))
    if not total and not undefined:
        return None
    threshold, floor = threshold_of(comparison, _NAME), floor_of(regime, _NAME, base)
    if floor is not None:
        high = np.repeat(floor, 2)
        add_floor(figure, drawn(np.array(reach)), -high, high, floor)
    layout(figure, 460, showlegend=True)
    figure.update_xaxes(title_text=f"gradient norm in {escaped(base)}")
    figure.update_yaxes(title_text="ratio - 1", exponentformat="e")
    thinned = (
        f" Drawn: {_MOST_SAMPLES:,} of {most:,} samples a mode, the farthest off among them."
        if most > _MOST_SAMPLES
        else ""
    )
    return Chart(
        name=f"samples_{regime.name}",
        title=f"Sample by sample in {regime.name}",
        caption=f"Ratio to {base} less 1. Filled: clipped by the mode; open: not clipped. "
        f"The threshold is ±{number(threshold)}; "
        + (f"grey: the floor, ±{number(floor)}." if floor is not None else "no floor was measured.")
        + thinned,
        figure=figure,
        section="samples",
        regime=regime.name,
        is_wide=True,
    )


def _samples(base: Trajectory, mode: Trajectory) -> tuple[Floats, Floats, Integers, Floats]:
    """The samples of a mode beside the baseline's.

    Returns:
        [M] baseline's norms; [M] ratio - 1; [M, 4] step, sample, rank, 1 if clipped; and the
        baseline's norms of samples whose norm is not finite in the mode.
    """
    pair = align(base, mode)
    ours, theirs = pair.baseline.sample_norm, pair.other.sample_norm
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = theirs / ours - 1
        clipped = pair.other.clip_factor < 1
    rows, columns = np.nonzero(np.isfinite(ratios))
    labels = np.stack(
        [
            pair.baseline.step[rows],
            pair.baseline.sample_index[rows, columns],
            pair.other.sample_rank[rows, columns],
            clipped[rows, columns],
        ],
        axis=1,
    )
    is_lost = np.isfinite(ours) & ~np.isfinite(theirs) & ~np.isnan(theirs).all()
    return ours[rows, columns], ratios[rows, columns], labels, ours[is_lost]


def _chosen(ratios: Floats) -> Integers:
    """Indices to draw: half with the largest deviations, half spread evenly over the run."""
    if len(ratios) <= _MOST_SAMPLES:
        return np.arange(len(ratios))
    half = _MOST_SAMPLES // 2
    farthest = np.argpartition(-np.abs(ratios), half)[:half]
    evenly = np.linspace(0, len(ratios) - 1, half).astype(int)
    return np.unique([*farthest, *evenly])


def _points(
    figure: go.Figure, mode: str, norms: Floats, ratios: Floats, told: Integers, style: Style
) -> None:
    is_clipped = told[:, 3] == 1
    for which, clipped in ((~is_clipped, False), (is_clipped, True)):
        if not which.any():
            continue
        figure.add_scatter(
            x=drawn(norms[which]),
            y=drawn(ratios[which]),
            customdata=whole(told[which, :3]),
            mode="markers",
            marker={
                "symbol": style.symbol(mode) + "-open" * (not clipped),
                "color": style.colour(mode),
                "size": 7,
                "line": {"width": 1.2, "color": style.colour(mode)},
            },
            **style.of_mode(mode, hover="sample", clipped=clipped),
        )
