"""Tells a mode's own noise from the noise that its baseline adds, by their projections.

In a regime where all modes add the common noise, a user's mode may still draw its own. Noise of its
own has the right std and is not correlated with the baseline's. Common noise that is scaled, left
out or mixed with other noise is no such noise: it has another std, or is correlated.

Legend: S steps, P parameters, K projections, n elements of a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.audit.noise.check import ALPHA, Place
from dpsgd_track.comparison.audit.noise.gaussian import correlation_bound
from dpsgd_track.comparison.audit.noise.sketches import independent_squares
from dpsgd_track.comparison.audit.noise.std import cells_of
from dpsgd_track.record.trajectory import Floats, Trajectory, sketch_length

_SMALLEST = 1e-4
"""Smaller noise, relative to the clipped sum, is not known well enough: float32 rounds the sum of
both by up to 6e-8."""
_MOST_STEPS = 64
"""Steps that are read at most: the sketches of a long run are larger than memory."""
_FEWEST = 16.0
"""Fewest independent squares whose correlation is tested; fewer prove nothing."""
_TELLING = 0.8
"""Largest correlation that chance may explain, overall, for the test to have power."""


@dataclass(frozen=True, kw_only=True)
class OwnNoise:
    """Noise that is right in size, and independent of the baseline's."""

    std: tuple[float, float, float]
    """Its std in units of sigma C, and the ends of the confidence interval."""
    correlation: float
    """Its correlation with the baseline's noise."""


def own_noise(baseline: Trajectory, mode: Trajectory) -> OwnNoise | None:
    """The noise of `mode` if it is its own; None if it is not, or if the records cannot tell.

    Args:
        baseline, mode: records with equal parameters in the same order.
    """
    names = baseline.parameter_names.tolist(), mode.parameter_names.tolist()
    sizes = mode.parameter_sizes.astype(np.float64)
    steps, ours, theirs = np.intersect1d(baseline.step, mode.step, return_indices=True)
    if names[0] != names[1] or not len(steps) or not (sizes > 0).all():
        return None
    if baseline.shape_of("gradient_sketch")[1:] != mode.shape_of("gradient_sketch")[1:]:
        return None
    a, is_known_a = _standardised(baseline, ours[:_MOST_STEPS])
    b, is_known_b = _standardised(mode, theirs[:_MOST_STEPS])
    worth = np.where(is_known_a & is_known_b, independent_squares(sizes, a.shape[-1]), 0.0)
    std = _std_if_right(b, worth)
    correlation = _correlation_if_none(a, b, worth)
    if std is None or correlation is None:
        return None
    return OwnNoise(std=std, correlation=correlation)


def _standardised(t: Trajectory, rows: NDArray[np.int64]) -> tuple[Floats, NDArray[np.bool_]]:
    """[S, P, K] noise of std 1, and [S, P] True where it is known."""
    gradient, noised = (
        np.stack([t.read(name, row, row + 1)[0] for row in rows.tolist()])
        for name in ("gradient_sketch", "noised_sketch")
    )
    scale = t.noise_stds[rows, None] * np.sqrt(t.parameter_sizes)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        noise = (noised - gradient) / scale[..., None]
        is_known = (scale > 0) & (scale >= _SMALLEST * sketch_length(gradient))
        is_known &= np.isfinite(noise).all(axis=-1)
    return np.where(is_known[..., None], noise, 0.0), is_known


def _grouped(values: Floats) -> list[Floats]:
    """Sums of [S, P] `values` over everything, by step and by parameter."""
    return [values.sum(keepdims=True).ravel(), values.sum(axis=1), values.sum(axis=0)]


def _std_if_right(noise: Floats, worth: Floats) -> tuple[float, float, float] | None:
    """The std and its interval; None if it is not 1, overall or in any step or parameter."""
    squares = worth * np.square(noise).mean(axis=-1)
    found = [
        cells_of([Place()] * len(num), sums, num)
        for sums, num in zip(_grouped(squares), _grouped(worth), strict=True)
    ]
    if any(not len(cells.value) or (cells.excess > 1).any() for cells in found):
        return None
    overall = found[0]
    return float(overall.value[0]), float(overall.low[0]), float(overall.high[0])


def _correlation_if_none(a: Floats, b: Floats, worth: Floats) -> float | None:
    """The correlation over everything; None if chance does not explain it, or explains any."""
    kept = worth > 0
    products, ours, theirs = (
        _grouped(np.where(kept, worth * (x * y).mean(axis=-1), 0.0))
        for x, y in ((a, b), (a, a), (b, b))
    )
    overall = 0.0
    for which, num in enumerate(_grouped(worth)):
        scale = np.sqrt(ours[which] * theirs[which])
        value = np.divide(products[which], scale, out=np.zeros_like(scale), where=scale > 0)
        bound = correlation_bound(num, ALPHA / len(num))
        if ((np.abs(value) > bound) & (num >= _FEWEST)).any() or (
            which == 0 and bound[0] > _TELLING
        ):
            return None
        overall = overall if which else float(value[0])
    return overall
