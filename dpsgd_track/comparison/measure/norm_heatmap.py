"""Differences of per-sample gradient norms from a baseline's, by parameter, step and rank.

Legend: S steps, N samples of one step, B bins of steps, R ranks, P trainable parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

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
    """[B, R, P] largest relative difference of a sample's norm; NaN if there is none."""


def heat(
    regime: str,
    baseline: tuple[str, Trajectory],
    mode: tuple[str, Trajectory],
    num_bins: int,
) -> Heat | None:
    """Compare per-sample norms by parameter of a labelled `mode` with a labelled `baseline`.

    Differences are relative in the sense of `observables.relative`, so that they can be compared
    with the threshold and floor of the observable `sample_norm_by_parameter`.

    Args:
        num_bins: largest number of bins, each of equally many steps.
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
    values = np.stack([_by_rank(pair, ranks, start, stop) for start, stop in bins])
    if np.isnan(values).all():
        return None
    step = pair.baseline.step
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


def _by_rank(pair: Aligned, ranks: Integers, start: int, stop: int) -> Floats:
    """[R, P] largest difference in the steps from row `start` to before row `stop`."""
    ours, theirs = (
        side.read("sample_norm_by_parameter", start, stop) for side in (pair.baseline, pair.other)
    )
    held_by = pair.other.sample_rank[start:stop]
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.sqrt(np.nansum(np.square(ours), axis=2, keepdims=True))
        difference = relative(ours, np.abs(theirs - ours), total)
    known = np.where(np.isnan(difference), -1.0, difference)
    largest = np.stack([known[held_by == rank].max(axis=0, initial=-1.0) for rank in ranks])
    return np.where(largest < 0, np.nan, largest)
