"""Plotly figures of a comparison, one subject per file."""

from __future__ import annotations

from dpsgd_track.comparison.profile import profile_of
from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.report.charts.curves import ZERO
from dpsgd_track.report.charts.drift import drift_charts
from dpsgd_track.report.charts.final_loss import final_loss
from dpsgd_track.report.charts.heatmap import heatmap_charts
from dpsgd_track.report.charts.noise import noise_charts
from dpsgd_track.report.charts.profile import profile_charts
from dpsgd_track.report.charts.samples import sample_charts
from dpsgd_track.report.charts.style import Chart, Style
from dpsgd_track.report.charts.trajectories import all_regimes, trajectory_charts

__all__ = ["ZERO", "Chart", "Style", "figures", "profile_charts"]


def figures(comparison: GroupComparison) -> tuple[Chart, ...]:
    """Every chart that the comparison has data for."""
    style = Style.of(comparison)
    made = (
        all_regimes,
        final_loss,
        trajectory_charts,
        drift_charts,
        heatmap_charts,
        sample_charts,
        noise_charts,
    )
    charts = [chart for make in made for chart in make(comparison, style)]
    profile = profile_of(comparison.group)
    # Times of a few instrumented steps without warm-up are no measure of cost.
    return (*charts, *(profile_charts(profile, style) if profile else ()))
