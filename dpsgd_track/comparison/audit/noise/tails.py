"""Checks that as many elements are large as in normal noise.

The Kolmogorov-Smirnov distance misses one element in a hundred, but epsilon depends on the tails.
"""

from __future__ import annotations

import numpy as np

from dpsgd_track.comparison.audit.noise.check import ALPHA, NoiseCheck, Place
from dpsgd_track.comparison.audit.noise.gaussian import beyond, log_beyond, share_interval
from dpsgd_track.comparison.audit.noise.samples import Samples
from dpsgd_track.record.trajectory import Floats

TAILS = "tails"
_LEVELS = (2.5, 3.0, 3.5)
"""In units of sigma C; the largest element of each part is a level too."""


def check_tails(samples: Samples) -> NoiseCheck:
    """Check the counts beyond each level, and the largest element, over everything and by part.

    If the largest of n is m, none of n is beyond m, and one is at m or beyond. Both are as rare as
    they would be for a level chosen in advance.
    """
    size, rounding = np.abs(samples.even), samples.resolution / 2
    held = samples.held & samples.noise.any(axis=(1, 2, 3), keepdims=True)
    counts = np.stack([held.sum(axis=-1), *_beyond_levels(np.where(held, size, 0.0), rounding)])
    largest = np.where(held, size, 0.0).max(axis=-1)
    places, cells = [], []
    for some, axes in samples.parts():
        places += some * (len(_LEVELS) + 1)
        num, *beyond_levels = counts.sum(axis=tuple(axis + 1 for axis in axes)).reshape(
            len(counts), -1
        )
        for i, level in enumerate(_LEVELS):
            few, many = beyond_levels[2 * i : 2 * i + 2]
            cells.append(np.stack([num, np.full(num.shape, level), few, many]))
        most = np.ravel(largest.max(axis=axes))
        cells.append(np.stack([num, most, np.ones(num.shape), np.zeros(num.shape)]))
    every = np.concatenate(cells, axis=1)
    filled = np.flatnonzero(every[0] > 0)
    return _judged([places[int(i)] for i in filled], every[:, filled], rounding)


def _beyond_levels(size: Floats, rounding: float) -> list[Floats]:
    """[S, W, P] per level: number of elements surely beyond it, and number possibly beyond it."""
    return [
        np.asarray((size > level + side * rounding).sum(axis=-1))
        for level in _LEVELS
        for side in (1, -1)
    ]


def _judged(places: list[Place], cells: Floats, rounding: float) -> NoiseCheck:
    """Check of the cell that is farthest out of its bounds.

    Args:
        cells: [4, len(places)] elements, level, those surely beyond it, those that may be.
        rounding: largest error of an element.
    """
    num, level, few, many = cells
    low, high = share_interval(few, many, num, ALPHA / len(places))
    # For the largest element, rounding is in the level and not in the counts.
    is_largest = few > many
    low_level = np.where(is_largest, level - rounding, level)
    high_level = np.where(is_largest, level + rounding, level)
    # Of logarithms: the share beyond a large element is 0 in float64.
    with np.errstate(divide="ignore"):
        too_many = np.log(low) - log_beyond(low_level)
        too_few = log_beyond(high_level) - np.log(high)
    excess = np.maximum(too_many, too_few)
    worst = int(excess.argmax())
    n, at, is_few = int(num[worst]), float(level[worst]), too_few[worst] > too_many[worst]
    count = int(many[worst] if is_few else few[worst])
    share = float(beyond(at))
    expected = f"{n * share:.0f}" if n * share >= 10 else f"{n * share:.2g}"
    return NoiseCheck(
        name=TAILS,
        title="share of large elements",
        value=count / n,
        low=min(float(low[worst]), share) if excess[worst] <= 0 else float(low[worst]),
        high=max(float(high[worst]), share) if excess[worst] <= 0 else float(high[worst]),
        expected=share,
        is_ok=bool((excess <= 0).all()),
        place=places[worst],
        sentence=f"{count or 'none'} of its {n} elements{places[worst].suffix} "
        f"{'is' if count <= 1 else 'are'} beyond {at:.3g} sigma C where {expected} are expected",
        num_cells=len(places),
        num_failed=int((~(excess <= 0)).sum()),
    )
