"""Elements of the noise in units of sigma C, with their origin and resolution.

Legend: S steps, W ranks, P parameters, M elements of a shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.audit.noise.check import Place
from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.trajectory import UNUSED, Floats, Trajectory

FINE, COARSE = 2.0**-14, 2.0**-5
"""Bounds on the rounding error, in units of sigma C, of an update in float32, even if the sum is a
hundred times the noise; and in bfloat16, if it is no larger than the noise."""
TOO_COARSE = 2.0**-3
"""Rounding error from which on nothing can be said of the noise: weights in bfloat16, of which an
update at a small learning rate is the difference, move by less than their spacing."""
_COARSE_BITS, _COARSE_SHARE = 13, 0.05
"""The difference of two bfloat16 numbers of similar size has no more bits; one in 500 float32
numbers happens to have so few, or 3 % if the sum is a hundred times the noise."""
_COMMON_SHARE = 0.005
"""Share of the most common value of updates that are multiples of a few spacings."""
_FINER_SHARE = 0.02
"""Share of elements that are smaller than the usual spacing, if spacings vary."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Noise of one run, standardised."""

    noise: Floats
    """[S, W, P, M] noise / (sigma C); 0 past the end of a shard."""
    held: NDArray[np.bool_]
    """[W, P, M] False past the end of a shard."""
    steps: tuple[int, ...]
    parameters: tuple[str, ...]
    resolution: float = FINE
    """Elements that are this far apart are not rounded to the same value: FINE, COARSE or more."""

    @cached_property
    def sum_sq(self) -> Floats:
        """[S, W, P] sum of squares."""
        return np.asarray(np.square(self.noise).sum(axis=-1))

    @cached_property
    def num(self) -> NDArray[np.int64]:
        """[S, W, P] number of elements."""
        return np.broadcast_to(self.held.sum(axis=-1), self.sum_sq.shape)

    @cached_property
    def even(self) -> Floats:
        """`noise`, rescaled to std 1 in every step, so that a wrong std shows in no other check."""
        rms = np.sqrt(self.sum_sq.sum(axis=(1, 2)) / np.maximum(self.num.sum(axis=(1, 2)), 1))
        scale = np.divide(1.0, rms, out=np.zeros_like(rms), where=rms > 0)
        return self.noise * scale[:, None, None, None]

    def parts(self) -> Iterator[tuple[list[Place], tuple[int, ...]]]:
        """Parts of many shards each, and the axes of [S, W, P] that are summed over for them."""
        yield [Place()], (0, 1, 2)
        yield [Place.of_parameter(name, "in ") for name in self.parameters], (0, 1)
        yield [Place(text=f"on rank {rank}") for rank in range(self.held.shape[0])], (0, 2)
        yield [Place.of_step(step, "at ") for step in self.steps], (1, 2)

    def place(self, shard: int) -> Place:
        """`model.norm.weight on rank 1 at step 2`, for a flat index into [S, W, P]."""
        s, rank, p = np.unravel_index(shard, self.noise.shape[:3])
        name, step = self.parameters[p], self.steps[s]
        text = f"{name} on rank {rank} at step {step}"
        return Place(text=text, step=step, parameters=(name,))


def samples_of(trajectory: Trajectory) -> Samples | None:
    """Elements of a run's noise; None if it kept none, or was not to add any."""
    raw = trajectory.noise_samples
    if not raw.size or not trajectory.noise_std > 0:
        return None
    held = np.asarray(~np.isnan(raw).all(axis=0))
    noise = raw / trajectory.noise_stds[:, None, None, None]
    return Samples(
        noise=np.where(held, noise, 0.0).astype(np.float64),
        held=held,
        steps=tuple(trajectory.step.tolist()),
        parameters=tuple(trajectory.parameter_names.tolist()),
        resolution=_resolution(trajectory, held),
    )


def _resolution(trajectory: Trajectory, held: NDArray[np.bool_]) -> float:
    """COARSE or more if too many elements have as few bits as a difference of bfloat16 numbers.

    An element is the difference of two updates times the batch size, rounded to float32. The
    updates themselves may be differences of weights over a learning rate: then all are short in
    units of the most common one, which is a spacing, or three, five or seven.
    """
    raw = trajectory.noise_samples[:, held].astype(np.float64)
    z = raw / trajectory.noise_stds[:, None]
    present = np.isfinite(raw) & (raw != 0)
    updates, z = raw[present] / trajectory.expected_batch_size, z[present]
    if not len(updates):
        return FINE
    is_short, lowest = _short(updates)
    size, count = np.unique(np.abs(updates), return_counts=True)
    if count.max() > _COMMON_SHARE * len(updates):
        unit = size[count.argmax()]
        # Numerator and unit are rounded to float32, each.
        tried = [_short(updates / unit * multiple, slack=2.0**-21) for multiple in (1, 3, 5, 7)]
        best = max(tried, key=lambda each: float(each[0].mean()))
        if best[0].mean() >= 1 - _COARSE_SHARE:
            is_short, lowest = best
    if is_short.mean() <= _COARSE_SHARE:
        return FINE
    size = np.abs(z[is_short])
    # About half of all numbers on a grid are odd multiples of its spacing.
    spacing = float(np.quantile(size * lowest[is_short], 0.4))
    # That of weights and sums varies with their size. If it is one, the noise itself was rounded.
    varies = (size < 0.75 * spacing).mean() > _FINER_SHARE
    return max(COARSE, spacing) if varies else COARSE


def _short(updates: Floats, slack: float = 2.0**-23) -> tuple[NDArray[np.bool_], Floats]:
    """Elements of few bits, and the lowest bit of each as a share of the element.

    Args:
        slack: relative error of an element.
    """
    mantissas = np.abs(np.frexp(updates)[0]) * 2.0**_COARSE_BITS
    whole = np.rint(mantissas).astype(np.int64)
    is_short = np.abs(mantissas - whole) <= slack * 2.0**_COARSE_BITS
    return is_short, (whole & -whole) / whole


def num_micro_batches(run: ModeRun, trajectory: Trajectory) -> Floats | None:
    """[S] micro-batches of each rank; None if the run does not record their size."""
    if run.job is None or not trajectory.sample_index.shape[1]:
        return None
    batch_size = run.job.data.batch_size
    ranks = np.where(trajectory.sample_index == UNUSED, UNUSED, trajectory.sample_rank)
    most = [np.bincount(row[row >= 0], minlength=1).max() for row in ranks]
    return np.array([max(1, math.ceil(count / batch_size)) for count in most], np.float64)
