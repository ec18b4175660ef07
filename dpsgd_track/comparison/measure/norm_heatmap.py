"""Differences of per-sample gradient norms from a baseline's, by parameter, step and rank.

Legend: S steps, N samples of one step, B bins of steps, R ranks, P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.measure.alignment import Aligned, align
from dpsgd_track.comparison.measure.observables import relative
from dpsgd_track.record.trajectory import UNUSED, Floats, Integers, Trajectory


@dataclass(frozen=True, kw_only=True)
class Heat:
    """Largest relative differences of one mode."""

    regime: str
    baseline: str
    mode: str
    first_steps: Integers
    """[B] first step of each bin."""
    last_steps: Integers
    """[B] last step of each bin."""
    ranks: Integers
    """[R] ranks of the mode's run, ascending."""
    parameters: tuple[str, ...]
    """P names."""
    values: Floats
    """[B, R, P] largest relative difference of a sample's norm, or its largest share of the limit;
    infinite where the mode's norm is not finite, NaN if nothing was compared."""


def heat(
    regime: str,
    baseline: tuple[str, Trajectory],
    mode: tuple[str, Trajectory],
    num_bins: int,
    limits: Mapping[int, Floats] | None = None,
) -> Heat | None:
    """Compare per-sample norms by parameter of a labelled `mode` with a labelled `baseline`.

    Differences are relative in the sense of `observables.relative`, so that they can be compared
    with the threshold and floor of the observable `sample_norm_by_parameter`.

    Args:
        num_bins: largest number of bins, each of equally many steps.
        limits: [P] limits by step; values are then shares of them, and other steps are left out.
    Returns:
        None if the two have no such norms in common.
    """
    pair = align(baseline[1], mode[1])
    S = pair.baseline.num_steps
    ranks = np.unique(pair.other.sample_rank[pair.other.sample_rank != UNUSED])
    if not S or not ranks.size or not len(pair.baseline.parameter_names):
        return None
    edges = np.linspace(0, S, min(S, num_bins) + 1).astype(int)
    bins = list(pairwise(edges.tolist()))
    step = pair.baseline.step
    units = np.ones((S, len(pair.baseline.parameter_names)))
    if limits is not None:
        units[:] = np.nan
        for row, each in enumerate(step.tolist()):
            units[row] = limits.get(each, np.nan)
    absent = _absent(pair.other, bins)
    values = np.stack(
        [_by_rank(pair, ranks, slice(start, stop), units, absent) for start, stop in bins]
    )
    if np.isnan(values).all():
        return None
    return Heat(
        regime=regime,
        baseline=baseline[0],
        mode=mode[0],
        first_steps=step[edges[:-1]],
        last_steps=step[edges[1:] - 1],
        ranks=ranks,
        parameters=tuple(pair.baseline.parameter_names.tolist()),
        values=values,
    )


def _absent(mode: Trajectory, bins: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """[P] parameters whose norms the mode does not compute."""
    blocks = (mode.read("sample_norm_by_parameter", *each) for each in bins)
    return np.logical_and.reduce([np.isnan(block).all(axis=(0, 1)) for block in blocks])


def _by_rank(
    pair: Aligned, ranks: Integers, rows: slice, units: Floats, absent: NDArray[np.bool_]
) -> Floats:
    """[R, P] largest difference in `rows`, in units [S, P]."""
    ours, theirs = (
        side.read("sample_norm_by_parameter", rows.start, rows.stop)
        for side in (pair.baseline, pair.other)
    )
    held_by = pair.other.sample_rank[rows]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        total = np.sqrt(np.nansum(np.square(ours), axis=2, keepdims=True))
        difference = relative(ours, np.abs(theirs - ours), total) / units[rows, None]
    known = np.where(np.isnan(difference), -1.0, difference)
    # What rounding may explain wholly is not compared.
    known[np.broadcast_to(np.isinf(units[rows, None]), known.shape)] = -1.0
    known[np.isfinite(ours) & ~np.isfinite(theirs) & ~absent] = np.inf
    largest = np.stack([known[held_by == rank].max(axis=0, initial=-1.0) for rank in ranks])
    return np.where(largest < 0, np.nan, largest)
