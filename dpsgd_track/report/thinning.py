"""Thins long series without losing their extremes."""

from __future__ import annotations

import numpy as np

from dpsgd_track.record.trajectory import Floats, Integers

MOST = 800
"""Most points kept of a series: about as many as a chart has pixels."""


def kept(values: Floats, most: int = MOST) -> Integers:
    """Indices of the points of `values` to show: all of a short series, else at most `most`.

    The first and the last point, and the smallest and the largest of each of as many equal bins as
    fit: a curve through them covers the same pixels. Infinities count as extremes; NaN is kept
    only where a bin has nothing else, so that a gap stays a gap.

    Args:
        values: [S].
        most: at least 4.
    Returns:
        Ascending indices.
    """
    count = len(values)
    if count <= most:
        return np.arange(count)
    num_bins = (most - 2) // 2
    bins = np.arange(count) * num_bins // count
    starts = np.searchsorted(bins, np.arange(num_bins))
    chosen = [np.array([0, count - 1])]
    for sign in (1.0, -1.0):
        # Sorted within each bin, NaN first: the last is the extreme, the earliest of equal ones.
        rank = np.where(np.isnan(values), -np.inf, sign * values)
        order = np.lexsort((-np.arange(count), ~np.isnan(values), rank, bins))
        chosen.append(order[np.append(starts[1:], count) - 1])
    return np.unique(np.concatenate(chosen))
