"""The curves of a private training as one HTML file: loss, clip fraction and epsilon by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from dpsgd_track.comparison.measure.amount import number
from dpsgd_track.config import require
from dpsgd_track.record.trajectory import Floats
from dpsgd_track.report.charts.style import Chart, layout
from dpsgd_track.report.html import training_html
from dpsgd_track.step_metrics import StepMetrics


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One of the curves, drawn below the one before over the same steps."""

    metric: str
    """Attribute of `StepMetrics` that is drawn."""
    title: str
    colour: str
    hover: str
    """Plotly's format of a value."""
    is_noisy: bool = True
    """True for what depends on the samples drawn."""
    axis: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of its vertical axis."""


_PANELS = (
    _Panel(metric="loss", title="loss", colour="#1f82c4", hover=".3f"),
    _Panel(
        metric="clip_fraction",
        title="samples clipped",
        colour="#D55E00",
        hover=".0%",
        axis={"tickformat": ".0%", "range": [0, 1.04]},
    ),
    _Panel(metric="epsilon", title="epsilon", colour="#009E73", hover=".2f", is_noisy=False),
)
"""From top to bottom."""
_GAP = 0.1
"""Between panels, as a share of the height."""
_SMOOTHED_OVER = 12
"""A smoothed curve averages this part of the training: 1 / 12."""
_FEWEST_SMOOTHED = 24
"""Steps from which on curves are smoothed."""


def write_training_page(
    steps: Sequence[StepMetrics], path: str | Path, *, title: str = "Private training"
) -> Path:
    """Write the curves of a training as an interactive page, one file that needs no network.

    The page shows losses and clip fractions of training samples, which are not private.

    Args:
        steps: of `PrivateTraining.step_metrics`, one a step, or `PrivateTrainer.history`.
        path: of the HTML file.
        title: heading of the page.

    Returns:
        `path`, for `mlflow.log_artifact`.

    Raises:
        ValueError: there is no step.
    """
    require(len(steps) > 0, "steps", steps, "the metrics of one step at least")
    page = training_html(_chart(steps), title, facts(steps))
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def facts(steps: Sequence[StepMetrics]) -> list[str]:
    """The outcome of a training in a few words each."""
    last = steps[-1]
    losses = np.array([each.loss for each in steps])
    losses = smoothed(losses) if len(steps) >= _FEWEST_SMOOTHED else losses
    return [
        f"{last.step:,} step{'s' * (last.step != 1)}",
        f"epsilon {last.epsilon:.2f} at delta {last.delta:g}",
        f"loss {number(losses[0])} at first, {number(losses[-1])} at the end",
    ]


def _chart(steps: Sequence[StepMetrics]) -> Chart:
    figure = go.Figure()
    is_smoothed = len(steps) >= _FEWEST_SMOOTHED
    height = (1 - _GAP * (len(_PANELS) - 1)) / len(_PANELS)
    for row, panel in enumerate(_PANELS):
        number_of_axis = str(row + 1) if row else ""
        for trace in _curves(steps, panel, is_smoothed):
            figure.add_trace(trace.update(yaxis=f"y{number_of_axis}"))
        top = 1 - row * (height + _GAP)
        domain = {"domain": [max(0.0, top - height), top], "rangemode": "tozero"}
        figure.update_layout({f"yaxis{number_of_axis}": {**domain, **panel.axis}})
        figure.add_annotation(
            text=f"<b>{panel.title}</b>",
            font={"color": panel.colour, "size": 14},
            showarrow=False,
            **{"xref": "paper", "x": 0, "xanchor": "left"},
            **{"yref": "paper", "y": top, "yanchor": "bottom", "yshift": 4},
        )
    layout(figure, 720, hovermode="x unified", hoversubplots="axis", showlegend=False)
    figure.update_layout(margin={"l": 56, "t": 34})
    figure.update_xaxes(
        title_text="step", anchor=f"y{len(_PANELS)}", unifiedhovertitle_text="step %{x}"
    )
    bold = "Faint: each step. Bold: the mean of neighbouring steps. " * is_smoothed
    return Chart(
        name="training",
        title="Step by step",
        caption=f"{bold}Drag to enlarge a part; a double click restores the whole.",
        figure=figure,
        is_wide=True,
    )


def _curves(steps: Sequence[StepMetrics], panel: _Panel, is_smoothed: bool) -> list[go.Scatter]:
    """A panel's values, and the smoothed ones in front of them where they are noisy."""
    x = np.array([each.step for each in steps], dtype=np.int32)
    y = np.array([getattr(each, panel.metric) for each in steps], dtype=np.float64)
    is_faint = panel.is_noisy and is_smoothed
    curve = go.Scatter(
        x=x,
        y=y.astype(np.float32),
        name=panel.title,
        mode="lines" if is_smoothed else "lines+markers",
        line={"color": panel.colour, "width": 1.2 if is_faint else 3},
        opacity=0.45 if is_faint else 1.0,
        hovertemplate=f"%{{y:{panel.hover}}}",
    )
    if not is_faint:
        return [curve]
    bold = {"color": panel.colour, "width": 3}
    mean = go.Scatter(x=x, y=smoothed(y).astype(np.float32), line=bold, hoverinfo="skip")
    return [curve, mean.update(name=panel.title, mode="lines")]


def smoothed(values: Floats) -> Floats:
    """Mean of the values around each, those that are not finite left out; fewer at the ends."""
    half = max(1, len(values) // _SMOOTHED_OVER // 2)
    kernel = np.ones(2 * half + 1)
    is_finite = np.isfinite(values)
    sums = np.convolve(np.where(is_finite, values, 0.0), kernel, mode="same")
    counts = np.convolve(is_finite.astype(np.float64), kernel, mode="same")
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
