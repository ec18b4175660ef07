"""Cost of each mode: memory and time versus sequence length, ratios, and memory versus time.

A point that ran out of memory is a cross above all that was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dpsgd_track.comparison.profile import Cost, CostStatus, Profile, Spread
from dpsgd_track.report.charts.marks import GREY, error_bars
from dpsgd_track.report.charts.style import Chart, Style, escaped, layout
from dpsgd_track.report.profile_table import three_digits, times

SECTION = "profile"
_chart = partial(Chart, section=SECTION, alone=True)
_wide_chart = partial(_chart, is_wide=True)
_SEVERAL_TIMES = 4
_MOST_NAMES = 6
_PLACES = (
    "middle left",
    "bottom center",
    "middle right",
    "top center",
    "bottom right",
    "bottom center",
    "top right",
)
"""Positions of point labels, mode by mode, so that few overlap."""
_MANY_TIMES = 20
"""Ratio of largest to smallest time from which on an axis is logarithmic."""


@dataclass(frozen=True, kw_only=True)
class _Quantity:
    name: str
    title: str
    axis: str
    caption: str
    value: Callable[[Cost], Spread | None]
    unit: str
    may_be_logarithmic: bool = False

    def said(self, found: Spread) -> str:
        """A value as text."""
        return f"{three_digits(found.median)} {self.unit}"


_QUANTITIES = (
    _Quantity(
        name="profile_memory",
        title="Peak memory",
        axis="GiB",
        caption="Largest rank's, of the recorded steps; on CPU the process's resident set.",
        value=lambda cost: _alone(cost.peak_memory_gib),
        unit="GiB",
    ),
    _Quantity(
        name="profile_step_time",
        title="Step time",
        axis="ms a step",
        caption="Median of the steps that were not tracked, slowest rank's; bars: p20 to p80.",
        value=lambda cost: cost.step_time_ms,
        unit="ms",
        may_be_logarithmic=True,
    ),
)


def profile_charts(profile: Profile, style: Style) -> list[Chart]:
    """Every chart of a profile."""
    draw = _against_length if len(_lengths(profile.costs)) > 1 else _at_one_length
    return [
        *(draw(profile, quantity, style) for quantity in _QUANTITIES),
        *_ratios(profile, style),
        *_memory_against_time(profile, style),
    ]


def _lengths(costs: Sequence[Cost]) -> list[int]:
    return sorted({cost.seq_length for cost in costs})


def _batch_sizes(profile: Profile) -> list[int]:
    return list(dict.fromkeys(B for _, B in profile.shapes))


def _point_name(cost: Cost, profile: Profile) -> str:
    """The dimensions in which shapes differ; the mode if all have one shape."""
    length = f"T={cost.seq_length}" if len(_lengths(profile.costs)) > 1 else ""
    size = f"B={cost.batch_size}" if len(_batch_sizes(profile)) > 1 else ""
    return ", ".join(filter(None, (length, size))) or escaped(cost.label)


def _told(cost: Cost, said: str) -> str:
    lines = [escaped(cost.label), f"T={cost.seq_length}, B={cost.batch_size}", said]
    return "<br>".join([*lines, *map(escaped, cost.notes)])


def _against_length(profile: Profile, quantity: _Quantity, style: Style) -> Chart:
    sizes = _batch_sizes(profile)
    is_stacked = len(sizes) > 1
    titles = [f"B = {B} samples a micro-batch and rank" for B in sizes]
    figure = make_subplots(
        rows=len(sizes),
        subplot_titles=titles if is_stacked else None,
        vertical_spacing=0.26 / len(sizes),
    )
    for row, batch_size in enumerate(sizes, 1):
        costs = [cost for cost in profile.costs if cost.batch_size == batch_size]
        _curves(figure, costs, quantity, style, row)
    layout(figure, 110 + 290 * len(sizes), showlegend=True)
    figure.update_layout(margin={"t": 36} if is_stacked else {})
    lost = any(cost.status is CostStatus.OUT_OF_MEMORY for cost in profile.costs)
    return _chart(
        name=quantity.name,
        title=f"{quantity.title} against sequence length",
        caption=quantity.caption + " ✕: out of memory." * lost,
        figure=figure,
    )


def _at_one_length(profile: Profile, quantity: _Quantity, style: Style) -> Chart:
    """Bars, for profiles of a single sequence length."""
    figure = go.Figure()
    has_sizes = len(_batch_sizes(profile)) > 1
    largest = 0.0
    for cost in profile.costs:
        value = quantity.value(cost)
        largest = max(largest, value.p80 if value else 0.0)
        text = quantity.said(value) if value else ""
        name = f"{cost.label}, B={cost.batch_size}" if has_sizes else cost.label
        _bar(figure, cost, style, value, (text, text or cost.status), name=name)
    layout(figure, 110 + 34 * len(profile.costs), showlegend=False, barmode="overlay")
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(title_text=quantity.axis, range=[0, 1.35 * largest or 1])
    return _chart(
        name=quantity.name,
        title=f"{quantity.title} at T={profile.shapes[0][0]}",
        caption=quantity.caption,
        figure=figure,
    )


def _bar(
    figure: go.Figure,
    cost: Cost,
    style: Style,
    value: Spread | None,
    said: tuple[str, str],
    *,
    name: str = "",
    beyond: float = 0.0,
    **cell: int,
) -> None:
    """Adds a bar with its spread.

    Args:
        said: hover text, and the text beside the bar, its spread and `beyond`.
    """
    look = {"y": [escaped(name or cost.label)], **style.of_mode(cost.label), **cell}
    has_spread = value is not None and value.p80 > value.p20
    figure.add_bar(
        x=[value.median if value else 0],
        orientation="h",
        error_x=_whiskers([value], color=GREY) if value and has_spread else None,
        marker_color=style.colour(cost.label),
        customdata=[_told(cost, said[0])],
        hovertemplate="%{customdata}<extra></extra>",
        **look,
    )
    figure.add_scatter(
        x=[max(value.p80, beyond) if value else beyond],
        mode="text",
        text=[f"  {said[1]}"],
        textposition="middle right",
        hoverinfo="skip",
        **look,
    )


def _whiskers(values: Sequence[Spread], **more: Any) -> dict[str, Any]:
    median, p20, p80 = np.array([(v.median, v.p20, v.p80) for v in values]).T
    return error_bars(median, p20, p80, thickness=1.2, **more)


def _curves(
    figure: go.Figure,
    costs: Sequence[Cost],
    quantity: _Quantity,
    style: Style,
    row: int,
) -> None:
    measured = [(cost, value) for cost in costs if (value := quantity.value(cost))]
    largest = max((value.p80 for _, value in measured), default=1.0)
    smallest = min((value.p20 for _, value in measured), default=1.0)
    is_log = quantity.may_be_logarithmic and largest > _MANY_TIMES * smallest > 0
    for label in dict.fromkeys(cost.label for cost, _ in measured):
        own = [(cost, value) for cost, value in measured if cost.label == label]
        figure.add_scatter(
            x=[cost.seq_length for cost, _ in own],
            y=[value.median for _, value in own],
            error_y=_whiskers([value for _, value in own]),
            text=[_told(cost, quantity.said(value)) for cost, value in own],
            hovertemplate="%{text}<extra></extra>",
            row=row,
            col=1,
            **style.line(label, len(own)),
        )
    top = _lost(figure, costs, style, (largest, is_log), row)
    lengths = _lengths(costs)
    several = {"type": "log"}
    alone = {"type": "linear", "range": [lengths[0] - 1, lengths[0] + 1]}
    figure.update_xaxes(
        title_text="sequence length (tokens)",
        tickvals=lengths,
        ticktext=[f"{length:,}" for length in lengths],
        **(several if len(lengths) > 1 else alone),
        row=row,
    )
    scale = _log_scale([smallest, largest]) if is_log else {"range": [0, 1.06 * top or 1]}
    figure.update_yaxes(title_text=quantity.axis, **scale, row=row)


def _lost(
    figure: go.Figure,
    costs: Sequence[Cost],
    style: Style,
    scale: tuple[float, bool],
    row: int,
) -> float:
    """Adds a cross for each point that ran out of memory; returns the height of the highest."""
    top, is_log = scale
    above: dict[int, int] = {}
    heights = [top]
    for cost in costs:
        if cost.status is not CostStatus.OUT_OF_MEMORY:
            continue
        # Several at one length are stacked.
        place = above[cost.seq_length] = above.get(cost.seq_length, 0) + 1
        heights.append(top * (1.25**place if is_log else 1 + 0.08 * place))
        figure.add_scatter(
            x=[cost.seq_length],
            y=[heights[-1]],
            mode="markers",
            marker={"symbol": "x", "size": 11, "color": style.colour(cost.label)},
            text=[_told(cost, "")],
            hovertemplate="%{text}<extra></extra>",
            row=row,
            col=1,
            **style.of_mode(cost.label),
        )
    return max(heights)


def _ratios(profile: Profile, style: Style) -> list[Chart]:
    private = [cost for cost in profile.costs if not cost.is_baseline]
    if not private:
        return []
    shapes = list(dict.fromkeys(cost.shape for cost in private))
    count = max(sum(cost.shape == shape for cost in private) for shape in shapes)
    # In pixels: bars, and between two rows the ticks of one and the title of the next.
    bars, between = 30 * count + 10, 70
    total = len(shapes) * bars + (len(shapes) - 1) * between
    figure = make_subplots(
        rows=len(shapes),
        cols=2,
        shared_yaxes=True,
        horizontal_spacing=0.05,
        vertical_spacing=between / total if len(shapes) > 1 else 0,
        subplot_titles=[
            f"{what}, T={T}, B={B}" for T, B in shapes for what in ("step time", "peak memory")
        ],
    )
    for cost in private:
        _ratio_bars(figure, cost, style, shapes.index(cost.shape) + 1)
    largest = (
        max((cost.time_ratio.p80 for cost in private if cost.time_ratio), default=1.0),
        max((cost.memory_ratio for cost in private if cost.memory_ratio), default=1.0),
    )
    is_all_there = all(cost.time_ratio for cost in private)
    for col, most in enumerate(largest, 1):
        # Room for the figure beside the longest bar, and for text beside the baseline's line.
        figure.update_xaxes(range=[0, max(1.18 * most, 1.18 if is_all_there else 1.5)], col=col)
        figure.update_xaxes(title_text="× baseline", row=len(shapes), col=col)
    figure.add_vline(x=1, line={"color": GREY, "width": 2, "dash": "dash"})
    layout(figure, total + 36 + 60, showlegend=False, barmode="overlay")
    figure.update_layout(margin={"t": 36, "b": 60})
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    chart = _wide_chart(
        name="profile_overhead",
        title="Overhead over ordinary training",
        caption="Over the baseline's runs right before and right after; thin bars: p20 to p80 "
        "of the mode's steps. Dashed: as much as the baseline.",
        figure=figure,
        min_width=620,
    )
    return [chart]


def _ratio_bars(figure: go.Figure, cost: Cost, style: Style, row: int) -> None:
    time, memory = cost.time_ratio, cost.memory_ratio
    why = str(cost.status) if cost.status is not CostStatus.MEASURED else "no baseline"
    base = cost.baseline.label if cost.baseline else ""
    for col, ratio, said in (
        (1, time, f"step time {times(time)} × {base}" if time else why),
        (2, _alone(memory), f"peak memory {memory:.3f} × {base}" if memory else why),
    ):
        beside = f"{ratio.median:.2f}×" if ratio else why
        # Not on the baseline's line, which would cross it out.
        _bar(figure, cost, style, ratio, (said, beside), beyond=1.0, row=row, col=col)


def _alone(value: float | None) -> Spread | None:
    return None if value is None else Spread(median=value, p20=value, p80=value, num_steps=1)


def _scale(values: Sequence[float]) -> dict[str, Any]:
    """An axis on which points of several lengths do not crowd into a corner."""
    if max(values) < _SEVERAL_TIMES * min(values):
        return {"rangemode": "tozero"}
    return _log_scale(values)


def _log_scale(values: Sequence[float]) -> dict[str, Any]:
    low, high = np.floor(np.log10(min(values))), np.ceil(np.log10(max(values)))
    ticks = [digit * 10.0**power for power in range(int(low), int(high) + 1) for digit in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks]}


def _memory_against_time(profile: Profile, style: Style) -> list[Chart]:
    measured = [
        (cost, cost.step_time_ms.median, cost.peak_memory_gib)
        for cost in profile.costs
        if cost.step_time_ms and cost.peak_memory_gib
    ]
    if not measured:
        return []
    figure = go.Figure()
    # More names than these would lie over each other; the pointer tells them too.
    mode = "markers+text+lines" if len(measured) <= _MOST_NAMES else "markers+lines"
    for label in dict.fromkeys(cost.label for cost, _, _ in measured):
        own = [entry for entry in measured if entry[0].label == label]
        look = style.line(label, len(own))
        figure.add_scatter(
            x=[ms for _, ms, _ in own],
            y=[gib for _, _, gib in own],
            text=[_point_name(cost, profile) for cost, _, _ in own],
            textposition=_PLACES[style.index(label) % len(_PLACES)],
            textfont={"size": 10, "color": style.colour(label)},
            customdata=[_told(cost, f"{ms:.4g} ms, {gib:.3g} GiB") for cost, ms, gib in own],
            hovertemplate="%{customdata}<extra></extra>",
            **{**look, "mode": mode, "line": {**look["line"], "width": 1}},
        )
    layout(figure, 480, showlegend=True)
    figure.update_xaxes(title_text="ms a step", **_scale([ms for _, ms, _ in measured]))
    figure.update_yaxes(title_text="GiB", **_scale([gib for _, _, gib in measured]))
    chart = _wide_chart(
        name="profile_memory_against_time",
        title="Peak memory against step time",
        caption="A point for each mode and shape; lines join the shapes of a mode. Down and "
        "to the left is better.",
        figure=figure,
        min_width=560,
    )
    return [chart]
