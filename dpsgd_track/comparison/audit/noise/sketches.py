"""Checks of the noise of a run that kept projections but no elements of it.

A projection of n independent normal elements with random signs is normal with n times their
variance. The K projections of one parameter are independent only as far as their signs are
orthogonal: the eigenvalues of the signs' Gram matrix over n lie below (1 + sqrt(K / n))^2, and sum
to K. A sum of squares with such weights spreads at most as one with fewer, equal weights does, so
each parameter counts as K / (1 + sqrt(K / n))^2 independent squares, and never less than one.

Legend: S steps, P parameters, K projections, n elements of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.audit.noise.check import NoiseCheck, Place
from dpsgd_track.comparison.audit.noise.correlation import correlation_check, correlations, pairs_of
from dpsgd_track.comparison.audit.noise.std import STD, Cells, cells_of, std_check, telling
from dpsgd_track.record.trajectory import Floats, Trajectory, sketch_length

_SMALLEST = 1e-3
"""Noise that is smaller relative to the gradient is lost in the rounding of their float32 sum."""
_MANY = 16
"""Least number of elements per projection of a parameter that counts in totals: small parameters
would make the interval of all as wide as their own."""

_BLOCK = 256
"""Steps per block: the sketches of a long run are larger than memory."""
_MOST_STEPS = 64
"""Largest number of steps that are compared pairwise."""


def check_sketches(trajectory: Trajectory) -> tuple[list[NoiseCheck], Cells] | None:
    """Checks, and the std of each parameter; None if nothing can be said."""
    sizes = trajectory.parameter_sizes
    if not (trajectory.noise_std > 0 and len(sizes) and (sizes > 0).all()):
        return None
    S, K = trajectory.num_steps, trajectory.shape_of("gradient_sketch")[-1]
    blocks = []
    for start in range(0, S, _BLOCK):
        y = _standardised(trajectory, start, start + _BLOCK)
        if y is None:
            return None
        blocks.append(np.square(y).sum(axis=-1))
    sum_sq = np.concatenate(blocks)
    dof = independent_squares(sizes.astype(np.float64), K)
    is_counted = sizes >= _MANY * K
    if not is_counted.any():
        is_counted[:] = True
    parameters = list(map(Place.of_parameter, trajectory.parameter_names.tolist()))
    by_parameter = _cells(parameters, sum_sq, K, dof, 0)
    counted = sum_sq[:, is_counted], dof[is_counted]
    checks = [*_check_std(trajectory, *counted, K, by_parameter)]
    if S > 1:
        checks.append(_check_steps(trajectory, is_counted, float(dof[is_counted].min())))
    return checks, by_parameter


def _standardised(trajectory: Trajectory, start: int, stop: int) -> Floats | None:
    """[rows, P, K] noise of std 1 at steps from row `start` on; None if it is unknown."""
    gradient, noised = (
        trajectory.read(name, start, stop) for name in ("gradient_sketch", "noised_sketch")
    )
    scale = trajectory.noise_stds[start:stop, None] * np.sqrt(trajectory.parameter_sizes)
    if not np.isfinite(noised).all() or (scale < _SMALLEST * sketch_length(gradient)).any():
        return None
    return np.asarray((noised - gradient) / scale[..., None])


def independent_squares(sizes: Floats, num_projections: int) -> Floats:
    """[P] least number of independent squares that a parameter's K squares are worth."""
    K = num_projections
    return np.maximum(K / np.square(1 + np.sqrt(K / sizes)), 1.0)


def _cells(
    places: list[Place], sum_sq: Floats, K: int, dof: Floats, axis: int | tuple[int, ...]
) -> Cells:
    """Estimates from sums of K squares, [S, P], over `axis`."""
    num = np.broadcast_to(dof, sum_sq.shape).sum(axis=axis)
    # The mean square is known; it is worth `num` squares.
    count = np.full(sum_sq.shape, float(K)).sum(axis=axis)
    return cells_of(places, sum_sq.sum(axis=axis) / count * num, num)


def _check_std(
    trajectory: Trajectory, sum_sq: Floats, dof: Floats, K: int, by_parameter: Cells
) -> Iterator[NoiseCheck]:
    steps = list(map(Place.of_step, trajectory.step.tolist()))
    # In a total, all parameters are taken to be as bad as the worst of them.
    least = np.full_like(dof, dof.min())
    total = _cells([Place()], sum_sq, K, least, (0, 1))
    by_step = _cells(steps, sum_sq, K, least, 1)
    found = {STD: total, "std_by_step": by_step, "std_by_parameter": by_parameter}
    grouped = {name: cells for name, cells in found.items() if name != STD}
    best = telling(total, grouped, grouped)
    for name, cells in found.items():
        title = "std of the noise" if name == STD else name.replace("_", " ")
        yield std_check(name, title, cells, explains_others=best == name)


def _check_steps(trajectory: Trajectory, is_counted: NDArray[np.bool_], dof: float) -> NoiseCheck:
    """Correlation of steps: the first ones, and others spread over the run."""
    S = trajectory.num_steps
    spread = np.linspace(0, S - 1, min(S, _MOST_STEPS // 2)).astype(int)
    chosen = np.unique(np.concatenate([np.arange(min(S, _MOST_STEPS // 2)), spread]))
    found = [_standardised(trajectory, row, row + 1) for row in chosen.tolist()]
    rows = np.stack([y[0, is_counted].ravel() for y in found if y is not None])
    value, num = correlations(rows, np.ones(rows.shape, dtype=bool))
    pairs = pairs_of(map(Place.of_step, trajectory.step[chosen].tolist()))
    worth = int(dof * is_counted.sum())
    return correlation_check("steps", pairs, value, np.full_like(num, worth))
