"""What projections tell of the noise of a run that kept no elements of it.

A projection of n independent normal elements with random signs is normal with n times their
variance. The K projections of one parameter are independent only as far as their signs are
orthogonal: the eigenvalues of the signs' Gram matrix over n lie below (1 + sqrt(K / n))^2, and sum
to K. A sum of squares with such weights spreads at most as one with fewer, equal weights does, so
each parameter counts as K / (1 + sqrt(K / n))^2 independent squares, and never less than one.

Legend: S steps, P parameters, K projections, n elements of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from dpsgd_track.comparison.noise.check import NoiseCheck
from dpsgd_track.comparison.noise.correlation import correlation_check, correlations
from dpsgd_track.comparison.noise.samples import noise_std
from dpsgd_track.comparison.noise.std import STD, Cells, cells_of, std_check, telling
from dpsgd_track.tracking.trajectory import Floats, Trajectory

_SMALLEST = 1e-3
"""Noise that is smaller beside the gradient drowns in the rounding of their sum in float32."""
_MANY = 16
"""A parameter with so many elements for each projection counts in totals: small ones would make
the interval of all as wide as their own."""


def check_sketches(trajectory: Trajectory) -> tuple[list[NoiseCheck], Cells] | None:
    """Checks, and the std of each parameter; None where nothing can be said."""
    sizes = trajectory.parameter_sizes
    if not (trajectory.noise_std > 0 and len(sizes) and (sizes > 0).all()):
        return None
    gradient, noised = trajectory.gradient_sketch, trajectory.noised_sketch
    scale = noise_std(trajectory)[:, None] * np.sqrt(sizes)
    size = np.sqrt(np.mean(np.square(gradient), axis=-1))
    if not np.isfinite(noised).all() or (scale < _SMALLEST * size).any():
        return None
    y = (noised - gradient) / scale[..., None]
    dof = independent_squares(sizes.astype(np.float64), y.shape[-1])
    is_counted = sizes >= _MANY * y.shape[-1]
    if not is_counted.any():
        is_counted[:] = True
    by_parameter = _cells(list(trajectory.parameter_names), y, dof, 0)
    return list(_checks(trajectory, y[:, is_counted], dof[is_counted], by_parameter)), by_parameter


def independent_squares(sizes: Floats, num_projections: int) -> Floats:
    """[P] how many independent squares the K of a parameter are worth at least."""
    K = num_projections
    return np.maximum(K / np.square(1 + np.sqrt(K / sizes)), 1.0)


def _cells(labels: list[str], y: Floats, dof: Floats, axis: int | tuple[int, ...]) -> Cells:
    """Estimates from y [S, P, K], over `axis` of [S, P]."""
    S, P, K = y.shape
    sum_sq = np.square(y).sum(axis=-1)
    num = np.broadcast_to(dof, (S, P)).sum(axis=axis)
    # The mean square is what is known; it is worth `num` squares.
    count = np.broadcast_to(float(K), (S, P)).sum(axis=axis)
    return cells_of(labels, sum_sq.sum(axis=axis) / count * num, num)


def _checks(
    trajectory: Trajectory, y: Floats, dof: Floats, by_parameter: Cells
) -> Iterator[NoiseCheck]:
    steps = [f"step {step}" for step in trajectory.step.tolist()]
    # In a total, all parameters are taken to be as bad as the worst of them.
    least = np.full_like(dof, dof.min())
    total, by_step = _cells([""], y, least, (0, 1)), _cells(steps, y, least, 1)
    found = {STD: total, "std_by_step": by_step, "std_by_parameter": by_parameter}
    grouped = {name: cells for name, cells in found.items() if name != STD}
    best = telling(total, grouped, grouped)
    for name, cells in found.items():
        title = "std of the noise" if name == STD else name.replace("_", " ")
        yield std_check(name, title, cells, explains_others=best == name)
    if len(steps) > 1:
        rows = y.reshape(len(steps), -1)
        value, num = correlations(rows, np.ones(rows.shape, dtype=bool))
        labels = [f"{a} and {b}" for a, b in combinations(steps, 2)]
        yield correlation_check("steps", labels, value, np.full_like(num, int(least.sum())))
