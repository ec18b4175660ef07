"""Draw a wrong and a right mode beside the floor and the limit, as in docs/verdict.md.

    python benchmarks/floor_picture.py docs/floor.svg

The curves are a sketch, not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 215, 28, 50
STEPS = 10
LOW, HIGH = -8.0, -3.0
"""Powers of ten at the ends of the axis of drifts."""
CURVES: tuple[tuple[str, str, str, int, Callable[[int], float]], ...] = (
    ("wrong mode: DRIFT or BUG", "#d64541", "", 0, lambda step: -4.6 + 0.09 * step),
    ("limit = margin x floor", "#7f8c8d", "6 4", 0, lambda step: -5.5 + 0.07 * step),
    ("right mode: PASS", "#2e86c1", "", -6, lambda step: -6.2 + 0.07 * step + 0.12 * (-1) ** step),
    ("floor: largest replay", "#7f8c8d", "", 6, lambda step: -6.55 + 0.07 * step),
)
"""Label, colour, dashes, shift of the label, and the power of ten of the drift at a step."""


def x_of(step: int) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * step / (STEPS - 1)


def y_of(power: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (HIGH - power) / (HIGH - LOW)


def text(x: float, y: float, words: str, *, color: str = "#7f8c8d", anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" fill="{color}" text-anchor="{anchor}">{words}</text>'


def picture() -> str:
    """The drawing as SVG, in colours that are legible on white and on black."""
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="15">',
        "<title>Drift over steps: floor, limit, a right and a wrong mode</title>",
        f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#7f8c8d"/>',
        text((LEFT + right) / 2, bottom + 40, "step (a sketch)", anchor="middle"),
        text(LEFT - 8, TOP - 10, "drift", anchor="end"),
    ]
    parts += [text(x_of(step), bottom + 20, str(step), anchor="middle") for step in range(STEPS)]
    parts += [
        text(LEFT - 8, y_of(power) + 4, f"1e{power}", anchor="end")
        for power in range(int(LOW), int(HIGH))
    ]
    for label, color, dashes, shift, power_of in CURVES:
        points = " ".join(f"{x_of(step):.1f},{y_of(power_of(step)):.1f}" for step in range(STEPS))
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2" '
            f'stroke-dasharray="{dashes or "none"}"/>',
            text(right + 8, y_of(power_of(STEPS - 1)) + 5 + shift, label, color=color),
        ]
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(), encoding="utf-8")
