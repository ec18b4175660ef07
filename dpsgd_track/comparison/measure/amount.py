"""Format of numbers in sentences and tables."""

from __future__ import annotations

import math


def number(value: float | None) -> str:
    """`value` to two or three significant digits: `3.1e-08`, `0.0123`, `not measured`."""
    if value is None or math.isnan(value):
        return "not measured" if value is None else "NaN"
    if value == 0 or 1e-2 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
    return f"{value:.1e}"


def share(value: float) -> str:
    """A fraction in words: `19 %`, `0.01 %`, `4e-06`, `25 times`."""
    if 1e-4 <= value < 10:
        return f"{100 * value:.{2 if value < 1 else 3}g} %"
    return f"{value:.2g} times" if value >= 10 else f"{value:.2g}"
