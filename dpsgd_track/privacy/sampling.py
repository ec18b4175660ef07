"""Poisson sampling: each step takes each sample with probability q, independently.

The draw of step k is a function of a key and k alone. So ranks with the same key agree on it, a
training that is resumed with its seed continues the very draws, and no step repeats another's.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_KEY_BYTES = 32

Indices = NDArray[np.int64]


def poisson_draw(random: np.random.Generator, num_samples: int, sample_rate: float) -> Indices:
    """Indices of the samples drawn, each with probability `sample_rate`, in ascending order."""
    return np.flatnonzero(random.random(num_samples) < sample_rate)


def split_over_ranks(indices: Indices, num_ranks: int) -> list[Indices]:
    """A slice of `indices` for each rank, as equal as possible; the first is the largest."""
    return np.array_split(indices, num_ranks)


def num_micro_batches(largest_slice: int, batch_size: int) -> int:
    """Micro-batches that every rank runs, at least 1.

    Every rank takes part in every collective, so all run as many as the largest slice needs.
    """
    return max(1, math.ceil(largest_slice / batch_size))


@dataclass(frozen=True, kw_only=True)
class PoissonSampler:
    """Draws a rank's samples of each step, in micro-batches."""

    key: str
    """Secret of the draws; ranks share it."""
    num_samples: int
    """Samples of the data set (N)."""
    sample_rate: float
    """q, above 0 and at most 1."""
    rank: int
    num_ranks: int
    batch_size: int | None = None
    """Most samples of a micro-batch; None for one micro-batch a step."""

    def global_draw(self, step: int) -> Indices:
        """Indices of all ranks' samples of `step`, in ascending order."""
        # Noise has the name of a step in the place of "sampling", so that none is of the same bits.
        name = f"{self.key}/sampling/{step}".encode()
        digest = hashlib.blake2b(name, digest_size=_KEY_BYTES).digest()
        random = np.random.Generator(np.random.SFC64(int.from_bytes(digest, "little")))
        return poisson_draw(random, self.num_samples, self.sample_rate)

    def micro_batches(self, step: int) -> list[list[int]]:
        """Indices of this rank's samples of `step`: as many lists on every rank, some empty."""
        slices = split_over_ranks(self.global_draw(step), self.num_ranks)
        size = self.batch_size or max(1, len(slices[0]))
        indices = slices[self.rank].tolist()
        starts = range(0, size * num_micro_batches(len(slices[0]), size), size)
        return [indices[start : start + size] for start in starts]


class Draw:
    """The samples that one step has to consist of on this rank."""

    def __init__(self, sampler: PoissonSampler, step: int) -> None:
        self.sample_rate = sampler.sample_rate
        self.micro_batches = sampler.micro_batches(step)
        self.num_samples = sum(map(len, self.micro_batches))
        self.num_unread = len(self.micro_batches)
        """Micro-batches that the loop has not taken yet."""
        self.is_taken = False
        """True once the step was taken."""
        self.is_left = False
        """True if the loop was left since."""

    def refuse_unless_added(self, num_added: int) -> None:
        """Raise unless the step consists of the draw.

        Args:
            num_added: samples of this rank that were added to the step's sum.
        """
        if self.num_unread:
            raise RuntimeError(
                f"step() with {self.num_unread} of the step's {len(self.micro_batches)} "
                "micro-batches left: expected all that private.loader drew for the step. Call "
                "backward() for each, or epsilon would be another's."
            )
        if num_added != self.num_samples:
            raise RuntimeError(
                f"step() with {num_added} samples added: expected the {self.num_samples} that "
                "private.loader drew for the step, each once. Call backward() for each micro-batch."
            )

    def refuse_unless_taken(self) -> None:
        """Raise unless the step was taken, when the loop asks for the next draw."""
        if not self.is_taken:
            raise RuntimeError(
                "private.loader: expected optimizer.step() before the next draw. Call it once for "
                "every draw, also for one without samples; or epsilon would be another's."
            )


class OpenDraw:
    """The draw of the current step, if the loop is over a loader of this package."""

    def __init__(self) -> None:
        self._draw: Draw | None = None

    def open(self, draw: Draw) -> None:
        """Have the next step consist of `draw`."""
        self._draw = draw

    @property
    def is_in_pass(self) -> bool:
        """True within a loop that draws batches."""
        return self._draw is not None and not self._draw.is_left

    def close(self, draw: Draw) -> None:
        """Note that the loop of `draw` was left; its samples may have been added already."""
        draw.is_left = True
        if draw.is_taken or draw.num_unread == len(draw.micro_batches):
            self.drop_left()

    def drop_left(self) -> None:
        """Forget a draw whose loop was left, as the step begins anew."""
        if self._draw is not None and self._draw.is_left:
            self._draw = None

    def of_step(self, num_added: int) -> Draw | None:
        """The draw that the step consists of; None if the loop has brought other batches.

        Raises:
            RuntimeError: samples of the draw are missing, or others were added.
        """
        if self._draw is None or self._draw.is_taken:
            return None
        self._draw.refuse_unless_added(num_added)
        return self._draw
