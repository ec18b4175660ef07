"""Elements of the noise in units of sigma C, where they are from, and what the run was asked for.

Legend: S steps, W ranks, P parameters, M elements of a shard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.tracking.reader import ModeRun
from dpsgd_track.tracking.trajectory import UNUSED, Floats, Trajectory


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Noise of one run, standardised."""

    noise: Floats
    """[S, W, P, M] noise / (sigma C); 0 past the end of a shard."""
    held: NDArray[np.bool_]
    """[W, P, M] False past the end of a shard."""
    steps: tuple[int, ...]
    parameters: tuple[str, ...]

    @cached_property
    def sum_sq(self) -> Floats:
        """[S, W, P]"""
        return np.asarray(np.square(self.noise).sum(axis=-1))

    @cached_property
    def num(self) -> NDArray[np.int64]:
        """[S, W, P] elements behind each."""
        return np.broadcast_to(self.held.sum(axis=-1), self.sum_sq.shape)

    @cached_property
    def even(self) -> Floats:
        """`noise` with the std of every step made 1, so that a wrong std shows as nothing else."""
        rms = np.sqrt(self.sum_sq.sum(axis=(1, 2)) / np.maximum(self.num.sum(axis=(1, 2)), 1))
        scale = np.divide(1.0, rms, out=np.zeros_like(rms), where=rms > 0)
        return self.noise * scale[:, None, None, None]

    def place(self, step: int, rank: int, parameter: int) -> str:
        """`model.norm.weight on rank 1 at step 2`."""
        return f"{self.parameters[parameter]} on rank {rank} at step {self.steps[step]}"


def noise_std(trajectory: Trajectory) -> Floats:
    """[S] sigma C of each step."""
    bounds = trajectory.max_grad_norm
    return np.asarray(trajectory.noise_std * bounds / bounds[0])


def samples_of(trajectory: Trajectory) -> Samples | None:
    """None for a run that kept no elements of its noise, or was to add none."""
    raw = trajectory.noise_samples
    if not raw.size or not trajectory.noise_std > 0:
        return None
    held = np.asarray(~np.isnan(raw).all(axis=0))
    noise = raw / noise_std(trajectory)[:, None, None, None]
    return Samples(
        noise=np.where(held, noise, 0.0).astype(np.float64),
        held=held,
        steps=tuple(trajectory.step.tolist()),
        parameters=tuple(trajectory.parameter_names.tolist()),
    )


def num_micro_batches(run: ModeRun, trajectory: Trajectory) -> Floats | None:
    """[S] micro-batches that each rank did; None where the run does not say how large they are."""
    batch_size = run.params.get("data.batch_size", "")
    if not batch_size.isdigit() or not trajectory.sample_index.shape[1]:
        return None
    ranks = np.where(trajectory.sample_index == UNUSED, UNUSED, trajectory.sample_rank)
    most = [np.bincount(row[row >= 0], minlength=1).max() for row in ranks]
    return np.array([max(1, math.ceil(count / int(batch_size))) for count in most], np.float64)
