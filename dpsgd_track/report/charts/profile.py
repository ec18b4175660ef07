"""What each mode costs: memory and time against sequence length, ratios, and one against the other.

A point that ran out of memory is a cross above all that was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dpsgd_track.comparison.profile import Cost, CostStatus, Profile, Spread
from dpsgd_track.report.charts.style import GREY, Chart, Style, layout, plain
from dpsgd_track.report.profile_table import three_digits, times

SECTION = "profile"
_SEVERAL_TIMES = 4
_PLACES = (
    "middle left",
    "bottom center",
    "middle right",
    "top center",
    "bottom right",
    "bottom center",
    "top right",
)
"""Of a point's label, mode by mode, so that few lie on each other."""
_MANY_TIMES = 20
"""Largest over smallest time from which on an axis is logarithmic."""


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
        """A value as it is shown."""
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
    has_lengths = len({T for T, _ in profile.shapes}) > 1
    draw = _against_length if has_lengths else _at_one_length
    charts = [draw(profile, quantity, style) for quantity in _QUANTITIES]
    charts += _ratios(profile, style)
    charts += _memory_against_time(profile, style)
    return charts


def _point_name(cost: Cost, profile: Profile) -> str:
    """The shape, as far as it tells points apart; the mode where all have one shape."""
    if len(profile.shapes) == 1:
        return plain(cost.label)
    parts = []
    if len({T for T, _ in profile.shapes}) > 1:
        parts.append(f"T={cost.seq_length}")
    if len({B for _, B in profile.shapes}) > 1:
        parts.append(f"B={cost.batch_size}")
    return ", ".join(parts)


def _against_length(profile: Profile, quantity: _Quantity, style: Style) -> Chart:
    batch_sizes = list(dict.fromkeys(B for _, B in profile.shapes))
    figure = make_subplots(
        rows=len(batch_sizes),
        cols=1,
        subplot_titles=[f"B = {B} samples a micro-batch and rank" for B in batch_sizes]
        if len(batch_sizes) > 1
        else None,
        vertical_spacing=0.26 / len(batch_sizes),
    )
    named: set[str] = set()
    for row, batch_size in enumerate(batch_sizes, 1):
        costs = [cost for cost in profile.costs if cost.batch_size == batch_size]
        _curves(figure, costs, quantity, style, row, named)
    layout(figure, 110 + 290 * len(batch_sizes), showlegend=True)
    if len(batch_sizes) > 1:
        figure.update_layout(margin={"t": 36})
    return Chart(
        name=quantity.name,
        title=f"{quantity.title} against sequence length",
        caption=quantity.caption + _crosses(profile),
        figure=figure,
        section=SECTION,
        alone=True,
    )


def _at_one_length(profile: Profile, quantity: _Quantity, style: Style) -> Chart:
    """Bars, where there is no length to draw against."""
    figure = go.Figure()
    has_sizes = len({B for _, B in profile.shapes}) > 1
    largest = 0.0
    for cost in profile.costs:
        value = quantity.value(cost)
        largest = max(largest, value.p80 if value else 0.0)
        name = f"{cost.label}, B={cost.batch_size}" if has_sizes else cost.label
        figure.add_bar(
            y=[plain(name)],
            x=[value.median if value else 0],
            orientation="h",
            error_x=_whisker(value),
            marker_color=style.colour(cost.label),
            customdata=[_told(cost, quantity.said(value) if value else "")],
            hovertemplate="%{customdata}<extra></extra>",
            **style.of_mode(cost.label),
        )
        figure.add_scatter(
            y=[plain(name)],
            x=[value.p80 if value else 0],
            mode="text",
            text=[f"  {quantity.said(value) if value else cost.status}"],
            textposition="middle right",
            hoverinfo="skip",
            **style.of_mode(cost.label),
        )
    layout(figure, 110 + 34 * len(profile.costs), showlegend=False, barmode="overlay")
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(title_text=quantity.axis, range=[0, 1.35 * largest or 1])
    return Chart(
        name=quantity.name,
        title=f"{quantity.title} at T={profile.shapes[0][0]}",
        caption=quantity.caption,
        figure=figure,
        section=SECTION,
        alone=True,
    )


def _crosses(profile: Profile) -> str:
    lost = any(cost.status is CostStatus.OUT_OF_MEMORY for cost in profile.costs)
    return " ✕: out of memory." * lost


def _curves(
    figure: go.Figure,
    costs: Sequence[Cost],
    quantity: _Quantity,
    style: Style,
    row: int,
    named: set[str],
) -> None:
    known = [(cost, value) for cost in costs if (value := quantity.value(cost))]
    largest = max((value.p80 for _, value in known), default=1.0)
    smallest = min((value.p20 for _, value in known), default=1.0)
    is_log = quantity.may_be_logarithmic and largest > _MANY_TIMES * smallest > 0
    for label in dict.fromkeys(cost.label for cost in costs):
        own = [(cost, value) for cost, value in known if cost.label == label]
        if not own:
            continue
        figure.add_scatter(
            x=[cost.seq_length for cost, _ in own],
            y=[value.median for _, value in own],
            error_y=_error(value for _, value in own),
            text=[_told(cost, quantity.said(value)) for cost, value in own],
            hovertemplate="%{text}<extra></extra>",
            showlegend=label not in named,
            row=row,
            col=1,
            **style.line(label, len(own)),
        )
        named.add(label)
    top = _lost(figure, costs, style, (largest, is_log), row, named)
    lengths = sorted({cost.seq_length for cost in costs})
    figure.update_xaxes(
        title_text="sequence length (tokens)",
        type="log" if len(lengths) > 1 else "linear",
        tickvals=lengths,
        ticktext=[f"{length:,}" for length in lengths],
        **({"range": [lengths[0] - 1, lengths[0] + 1]} if len(lengths) == 1 else {}),
        row=row,
        col=1,
    )
    scale = {"type": "log"} if is_log else {"range": [0, 1.06 * top or 1]}
    figure.update_yaxes(title_text=quantity.axis, **scale, row=row, col=1)


def _error(values: Any) -> dict[str, Any]:
    found: list[Spread] = list(values)
    return {
        "type": "data",
        "symmetric": False,
        "array": [value.p80 - value.median for value in found],
        "arrayminus": [value.median - value.p20 for value in found],
        "thickness": 1.2,
        "width": 3,
    }


def _whisker(value: Spread | None) -> dict[str, Any] | None:
    """The spread on a bar; None where there is none to see."""
    has_spread = value is not None and value.p80 > value.p20
    return {**_error([value]), "color": GREY} if has_spread else None


def _told(cost: Cost, said: str) -> str:
    lines = [plain(cost.label), f"T={cost.seq_length}, B={cost.batch_size}", said]
    return "<br>".join([*lines, *map(plain, cost.notes)])


def _lost(
    figure: go.Figure,
    costs: Sequence[Cost],
    style: Style,
    scale: tuple[float, bool],
    row: int,
    named: set[str],
) -> float:
    """Adds a cross for each point that ran out of memory; returns the height of the highest."""
    top, is_log = scale
    above: dict[int, int] = {}
    heights = [top]
    for cost in costs:
        if cost.status is not CostStatus.OUT_OF_MEMORY:
            continue
        # Several at one length stand above each other.
        place = above[cost.seq_length] = above.get(cost.seq_length, 0) + 1
        heights.append(top * (1.25**place if is_log else 1 + 0.08 * place))
        figure.add_scatter(
            x=[cost.seq_length],
            y=[heights[-1]],
            mode="markers",
            marker={"symbol": "x", "size": 11, "color": style.colour(cost.label)},
            text=[_told(cost, "")],
            hovertemplate="%{text}<extra></extra>",
            showlegend=cost.label not in named,
            row=row,
            col=1,
            **style.of_mode(cost.label),
        )
        named.add(cost.label)
    return max(heights)


def _ratios(profile: Profile, style: Style) -> list[Chart]:
    held = [cost for cost in profile.costs if not cost.is_baseline]
    if not held:
        return []
    shapes = list(dict.fromkeys(cost.shape for cost in held))
    count = max(sum(cost.shape == shape for cost in held) for shape in shapes)
    # In pixels: bars, and between two rows of them the ticks of one and the title of the other.
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
    for row, shape in enumerate(shapes, 1):
        for cost in (cost for cost in held if cost.shape == shape):
            _ratio_bars(figure, cost, style, row)
    largest = (
        max((cost.time_ratio.p80 for cost in held if cost.time_ratio), default=1.0),
        max((cost.memory_ratio for cost in held if cost.memory_ratio), default=1.0),
    )
    is_all_there = all(cost.time_ratio for cost in held)
    for col, most in enumerate(largest, 1):
        # Room for the figure beside the longest bar, and for words beside the baseline's line.
        figure.update_xaxes(range=[0, max(1.18 * most, 1.18 if is_all_there else 1.5)], col=col)
        figure.update_xaxes(title_text="× baseline", row=len(shapes), col=col)
    figure.add_vline(x=1, line={"color": GREY, "width": 2, "dash": "dash"})
    layout(figure, total + 36 + 60, showlegend=False, barmode="overlay")
    figure.update_layout(margin={"t": 36, "b": 60})
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    return [
        Chart(
            name="profile_overhead",
            title="Overhead over ordinary training",
            caption="Over the baseline's runs right before and right after; thin bars: p20 to p80 "
            "of the mode's steps. Dashed: as much as the baseline.",
            figure=figure,
            section=SECTION,
            is_wide=True,
            min_width=620,
            alone=True,
        )
    ]


def _ratio_bars(figure: go.Figure, cost: Cost, style: Style, row: int) -> None:
    time, memory = cost.time_ratio, cost.memory_ratio
    why = str(cost.status) if cost.status is not CostStatus.MEASURED else "no baseline"
    base = cost.baseline.label if cost.baseline else ""
    for col, ratio, said in (
        (1, time, f"step time {times(time)} × {base}" if time else why),
        (2, _alone(memory), f"peak memory {memory:.3f} × {base}" if memory else why),
    ):
        figure.add_bar(
            y=[plain(cost.label)],
            x=[ratio.median if ratio else 0],
            orientation="h",
            error_x=_whisker(ratio),
            marker_color=style.colour(cost.label),
            customdata=[_told(cost, said)],
            hovertemplate="%{customdata}<extra></extra>",
            row=row,
            col=col,
            **style.of_mode(cost.label),
        )
        # Beside the spread and the baseline's line, which would strike through it.
        figure.add_scatter(
            y=[plain(cost.label)],
            x=[max(ratio.p80, 1.0) if ratio else 1.0],
            mode="text",
            text=[f"  {ratio.median:.2f}×" if ratio else f"  {why}"],
            textposition="middle right",
            hoverinfo="skip",
            row=row,
            col=col,
            **style.of_mode(cost.label),
        )


def _alone(value: float | None) -> Spread | None:
    return None if value is None else Spread(median=value, p20=value, p80=value, num_steps=1)


def _scale(values: Sequence[float]) -> dict[str, Any]:
    """An axis on which points of several lengths do not crowd in a corner."""
    if max(values) < _SEVERAL_TIMES * min(values):
        return {"rangemode": "tozero"}
    low, high = np.floor(np.log10(min(values))), np.ceil(np.log10(max(values)))
    ticks = [digit * 10.0**power for power in range(int(low), int(high) + 1) for digit in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks]}


def _memory_against_time(profile: Profile, style: Style) -> list[Chart]:
    known = [cost for cost in profile.costs if cost.step_time_ms and cost.peak_memory_gib]
    if not known:
        return []
    figure = go.Figure()
    spans = [cost.step_time_ms.median for cost in known if cost.step_time_ms]
    for label in dict.fromkeys(cost.label for cost in known):
        own = [cost for cost in known if cost.label == label]
        found = [(c, c.step_time_ms.median, c.peak_memory_gib) for c in own if c.step_time_ms]
        look = style.line(label, len(own))
        look["mode"] = "markers+text+lines"
        look["line"] = {**look["line"], "width": 1}
        place = _PLACES[style.index(label) % len(_PLACES)]
        figure.add_scatter(
            x=[time for _, time, _ in found],
            y=[memory for _, _, memory in found],
            text=[_point_name(cost, profile) for cost, _, _ in found],
            textposition=place,
            textfont={"size": 10, "color": style.colour(label)},
            customdata=[_told(c, f"{time:.4g} ms, {gib:.3g} GiB") for c, time, gib in found],
            hovertemplate="%{customdata}<extra></extra>",
            **look,
        )
    layout(figure, 480, showlegend=True)
    sizes = [cost.peak_memory_gib for cost in known if cost.peak_memory_gib]
    figure.update_xaxes(title_text="ms a step", **_scale(spans))
    figure.update_yaxes(title_text="GiB", **_scale(sizes))
    return [
        Chart(
            name="profile_memory_against_time",
            title="Peak memory against step time",
            caption="A point for each mode and shape; lines join the shapes of a mode. Down and "
            "to the left is better.",
            figure=figure,
            section=SECTION,
            is_wide=True,
            min_width=560,
            alone=True,
        )
    ]
