"""Axes, curves, bars and points as SVG, in colours that are legible on white and on black."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

GREY, BLUE, RED = "#7f8c8d", "#2e86c1", "#d64541"
WIDTH = 480
"""Narrow, so that its letters can be read on a telephone as well."""


@dataclass(frozen=True)
class LogScale:
    """Places of positive numbers between two powers of ten."""

    low: int
    high: int
    start: float
    """Place of 10 ** low."""
    end: float

    def __call__(self, value: float) -> float:
        power = min(max(math.log10(value), self.low), self.high) if value > 0 else self.low
        return self.start + (self.end - self.start) * (power - self.low) / (self.high - self.low)

    def powers(self, step: int = 1) -> Sequence[int]:
        return range(self.low, self.high + 1, step)


@dataclass(kw_only=True)
class Picture:
    """A plot with an area of `width` x `height` at (`left`, `top`)."""

    title: str
    """Text for those who do not see it."""
    left: float
    top: float
    width: float
    height: float
    bottom: float = 48.0
    """Room below the area."""
    parts: list[str] = field(default_factory=list)

    def text(
        self, x: float, y: float, words: str, *, color: str = GREY, anchor: str = "start"
    ) -> None:
        place = f'x="{x:.0f}" y="{y:.0f}" fill="{color}" text-anchor="{anchor}"'
        self.parts.append(f"<text {place}>{escape(words)}</text>")

    def line(self, *points: tuple[float, float], color: str = GREY, dashes: str = "none") -> None:
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{at}" fill="none" stroke="{color}" stroke-width="2" '
            f'stroke-dasharray="{dashes}"/>'
        )

    def bar(self, y: float, end: float, color: str) -> None:
        """A bar from the left edge to `end`, around `y`."""
        size = f'width="{max(end - self.left, 1):.1f}" height="16"'
        self.parts.append(f'<rect x="{self.left}" y="{y - 8:.1f}" {size} fill="{color}"/>')

    def dot(self, x: float, y: float, color: str) -> None:
        self.parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}" fill-opacity="0.7"/>'
        )

    def frame(self) -> None:
        """The two axes."""
        bottom, right = self.top + self.height, self.left + self.width
        self.line((self.left, self.top), (self.left, bottom), (right, bottom))

    def x_axis(self, x_of: LogScale, words: str, *, step: int = 1) -> None:
        """Powers of ten below the area, and below them the quantity in words."""
        bottom = self.top + self.height
        for power in x_of.powers(step):
            self.text(x_of(10.0**power), bottom + 18, f"1e{power}", anchor="middle")
        self.text(self.left + self.width / 2, bottom + 40, words, anchor="middle")

    def svg(self) -> str:
        height = self.top + self.height + self.bottom
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
            'font-family="sans-serif" font-size="14">'
        )
        return "\n".join([head, f"<title>{escape(self.title)}</title>", *self.parts, "</svg>", ""])
