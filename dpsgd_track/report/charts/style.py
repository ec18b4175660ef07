"""Common style of all charts, and the colour, dash and marker of each mode.

Curves of modes that agree coincide exactly, so every mode has its own colour, dash and marker,
and markers shrink from mode to mode: the ones below stay visible around the ones above.
Names are escaped, because Plotly reads a subset of HTML in every text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from dpsgd_track.comparison.result import GroupComparison, RegimeComparison
from dpsgd_track.record.run import Group
from dpsgd_track.report.charts.curves import points_of_each
from dpsgd_track.visible_text import visible

# Okabe and Ito (2008), without black and yellow, which vanish on dark and light backgrounds.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SVG_DASHES = {
    "solid": "",
    "dash": "7 3",
    "dot": "2 3",
    "dashdot": "7 3 2 3",
    "longdash": "11 3",
    "longdashdot": "11 3 2 3",
}
_MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "star", "pentagon", "cross")
_DENSE = 200  # points above which thick lines merge
_MOST_MARKERS = 40  # more would merge into a band

_LONGEST_TICK, _COLUMN, _MOST_LINES = 44, 18, 4

_RULE = "#d5dae0"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure with its heading and caption."""

    name: str
    """Identifier, and stem of its own file if it has one."""
    title: str
    caption: str
    figure: go.Figure
    section: str = ""
    """Section of the report; empty if it is only written as a file of its own."""
    regime: str = ""
    """Its regime; empty for a chart of all regimes."""
    min_width: int = 0
    """Pixels below which it scrolls sideways instead of shrinking."""
    is_wide: bool = False
    """True to take the whole width where two charts would fit side by side."""
    alone: bool = False
    """True to write it as files of its own as well."""
    cube: Mapping[str, Any] = field(default_factory=dict)
    """Numbers that the page draws one slice at a time; see `heatmap`."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """Style of each mode, the same in all charts."""

    order: tuple[str, ...]
    """Labels, in the launcher's order."""
    most_points: int
    """Most points of one curve."""

    @classmethod
    def of(cls, comparison: GroupComparison) -> Style:
        """The style for all charts of `comparison`."""
        return cls(
            order=_labels(comparison.group),
            most_points=points_of_each(sum(map(_curves_of, comparison.regimes))),
        )

    @classmethod
    def of_group(cls, group: Group) -> Style:
        """The style for the charts of a group that holds only a profile."""
        return cls(order=_labels(group), most_points=points_of_each(1))

    def index(self, label: str) -> int:
        """Index of the mode, by which the page's filter identifies it."""
        return self.order.index(label)

    def colour(self, label: str) -> str:
        """As `#rrggbb`."""
        return _COLOURS[self.index(label) % len(_COLOURS)]

    def dash(self, label: str) -> str:
        """Plotly's name for the dash pattern."""
        return _DASHES[self.index(label) % len(_DASHES)]

    def svg_dash(self, label: str) -> str:
        """The dash pattern in SVG; empty for a solid line."""
        return _SVG_DASHES[self.dash(label)]

    def symbol(self, label: str) -> str:
        """Plotly's name for the filled marker."""
        return _MARKERS[self.index(label) % len(_MARKERS)]

    def of_mode(self, label: str, **meta: Any) -> dict[str, Any]:
        """Keyword arguments for a mode's trace by which the page can filter it."""
        return {
            "name": escaped(label),
            "legendgroup": str(self.index(label)),
            "meta": {"mode": self.index(label), **meta},
        }

    def line(self, label: str, num_points: int, **meta: Any) -> dict[str, Any]:
        """A curve with markers."""
        i = self.index(label)
        thickest = 4 if num_points <= _DENSE else 2
        return {
            "mode": "lines+markers",
            "line": {
                "color": self.colour(label),
                "dash": self.dash(label),
                "width": max(1.2, thickest - 0.5 * i),
            },
            "marker": {
                "symbol": f"{self.symbol(label)}-open",
                "size": max(4, 15 - 11 * i / max(1, len(self.order) - 1)),
                "maxdisplayed": _MOST_MARKERS,
                "line": {"width": 1.5},
            },
            **self.of_mode(label, **meta),
        }


def _labels(group: Group) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run.label for run in (*group.runs, *group.timed_runs)))


def _curves_of(regime: RegimeComparison) -> int:
    """Approximate number of curves: two trajectories with differences, six drifts."""
    return 4 * len(regime.runs) + 6 * len(regime.pairs)


def escaped(text: str) -> str:
    """`text` escaped so that Plotly shows it literally."""
    return html.escape(visible(text), quote=False)


def short(name: str) -> str:
    """`name` for an axis: only the end of a long name, which tells parameters apart."""
    return escaped(name if len(name) <= _LONGEST_TICK else f"…{name[1 - _LONGEST_TICK :]}")


def wrapped(name: str) -> str:
    """`name` in lines above a column, broken after a separator where there is one."""
    lines = re.findall(
        rf".{{1,{_COLUMN}}}(?:(?<=[_:.\-])|$)|.{{1,{_COLUMN}}}", visible(name), re.DOTALL
    )
    return "<br>".join(html.escape(line, quote=False) for line in lines[:_MOST_LINES])


def name_axis(names: Sequence[str], row_height: float) -> dict[str, Any]:
    """An axis with the names of rows, the first on top; as many as fit are shown."""
    every = max(1, round(13 / row_height + 0.49))
    places = list(range(0, len(names), every))
    return {
        "tickvals": places,
        "ticktext": [short(names[place]) for place in places],
        "range": [len(names) - 0.5, -0.5],
        "tickfont": {"size": 11},
        "showgrid": False,
        "zeroline": False,
    }


def layout(figure: go.Figure, height: int, **more: Any) -> go.Figure:
    """`figure` in the common style, `height` pixels high; its legend lists each mode once."""
    named: set[str] = set()
    for trace in figure.data:
        if trace.legendgroup in named:
            trace.showlegend = False
        elif trace.legendgroup:
            named.add(trace.legendgroup)
    # A Plotly template would add thousands of characters to every chart of the page.
    figure.update_layout(
        height=height,
        template=go.layout.Template(),
        font={"family": "system-ui, sans-serif", "size": 13},
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        margin={"l": 70, "r": 24, "t": 16, "b": 60},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0},
        hoverlabel={"namelength": -1, "align": "left"},
        **more,
    )
    axis = {"automargin": True, "title_standoff": 8, "gridcolor": _RULE, "zerolinecolor": _RULE}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure
