"""Reduces the points and the precision of curves to what a page can show."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.record.trajectory import Floats

_MOST_POINTS, _LEAST_POINTS = 1000, 200
"""Bounds on the points of a curve: more would merge on any screen, fewer would hide events."""

_POINTS_OF_A_PAGE = 115_000
"""At eight bytes each, this keeps the page below 6 MB beside Plotly's own code."""

ZERO = 1e-17
"""Position of an exact zero on a logarithmic axis."""

_LARGEST = 1e38  # within float32's range


def points_of_each(num_curves: int) -> int:
    """Most points of each curve on a page with `num_curves`."""
    return max(_LEAST_POINTS, min(_MOST_POINTS, _POINTS_OF_A_PAGE // max(1, num_curves)))


def drawn(values: NDArray[Any]) -> NDArray[np.float32]:
    """`values` with seven digits, which the page stores in six characters each."""
    return np.clip(values, -_LARGEST, _LARGEST).astype(np.float32)


def whole(values: NDArray[Any]) -> NDArray[Any]:
    """Integers, such as steps, in the smallest type that holds them."""
    largest = int(np.abs(values).max(initial=0))
    fitting = next((t for t in (np.int8, np.int16) if largest <= np.iinfo(t).max), np.int32)
    return values.astype(fitting)


def above_zero(values: Floats) -> Floats:
    """`values` for a logarithmic axis: non-finite ones are not drawn, and 0 becomes ZERO."""
    return np.where(np.isfinite(values), np.maximum(values, ZERO), np.nan)


def step_axis(first: int, last: int) -> dict[str, Any]:
    """An axis of steps, with ticks at whole steps alone."""
    few = {"dtick": 1} if last - first < 12 else {}
    return {"title_text": "step", **few}


def _power(power: int) -> str:
    """`0.01`, `1`, `1000`, or `1e-07`."""
    return f"{10.0**power:g}" if -3 <= power <= 3 else f"1e{power:+03d}"


def log_axis(heights: list[float]) -> dict[str, Any]:
    """A logarithmic axis that holds `heights`, with a tick for 0 where one is ZERO."""
    low = int(np.floor(np.log10(min(heights))))
    high = int(np.ceil(np.log10(max(heights)))) + 1
    every = max(1, -(-(high - low) // 8))
    powers = [power for power in range(low, high + 1, every) if 10.0**power > ZERO * 5]
    has_zero = min(heights) <= ZERO
    return {
        "type": "log",
        "range": [low - 0.5, high],
        "tickvals": [*([ZERO] if has_zero else []), *(10.0**power for power in powers)],
        "ticktext": [*(["0"] if has_zero else []), *(_power(power) for power in powers)],
    }
