"""Facts that a hypothesis may use: the two records, and the constants of the run.

Legend: S steps, N samples, P parameters, Q wrong parameters, K projections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.trajectory import UNUSED, Floats, Integers, Trajectory


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The samples of one micro-batch of one rank."""

    row: int
    """Row of the step."""
    rank: int
    number: int
    """Position among its rank's micro-batches of the step, from 0."""
    places: Integers
    """Columns of its samples, in the order of their global index."""


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A quantity of the run that a factor may be equal to."""

    symbol: str
    value: float | Floats
    """One number, or [S]."""
    meaning: str

    @property
    def text(self) -> str:
        """`W (the number of ranks)`."""
        return f"{self.symbol} ({self.meaning})" if self.meaning else self.symbol


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """Two aligned records of the same steps."""

    ours: Trajectory
    """The baseline's."""
    theirs: Trajectory
    """The mode's."""
    run: ModeRun
    """The mode's run."""
    rows: Integers
    """Rows in which a hypothesis has to agree; the others tell what came before."""
    columns: Integers
    """[Q] columns of the wrong parameters; all if the error is not in particular ones."""

    @property
    def rate(self) -> float:
        """Learning rate; NaN if unknown."""
        return self.run.setup.learning_rate if self.run.setup else math.nan

    @property
    def divisor(self) -> float:
        """Expected batch size."""
        return float(self.theirs.expected_batch_size)

    @property
    def bound(self) -> Floats:
        """[S, 1] C."""
        return self.theirs.max_grad_norm[:, None]

    @cached_property
    def norm(self) -> Floats:
        """[S, N] norms that the factors were computed from: the mode's own, if it reports them."""
        return _own(self.theirs.sample_norm, self.ours.sample_norm)

    @cached_property
    def by_parameter(self) -> Floats:
        """[S, N, P] norms that the totals were computed from, as `norm`."""
        return _own(self.theirs.sample_norm_by_parameter, self.ours.sample_norm_by_parameter)

    @cached_property
    def factor(self) -> Floats:
        """[S, N] factors that the sum was computed with, as `norm`."""
        return _own(self.theirs.clip_factor, self.ours.clip_factor)

    @cached_property
    def has_sketches(self) -> bool:
        """True if the baseline recorded projections of each sample's gradient."""
        return self.ours.shape_of("sample_sketch")[-1] > 0

    def weighted(self, weights: Floats) -> Floats:
        """[S, Q, K] sum of the baseline's gradients with other factors.

        Args:
            weights: [S, N], or [S, N, Q].
        """
        gradients = self.ours.sample_sketch[:, :, self.columns].astype(np.float64)
        weights = weights if weights.ndim == 3 else weights[..., None]
        return np.asarray(np.nansum(gradients * weights[..., None], axis=1))

    def sum_of_batch(self, batch: MicroBatch) -> Floats:
        """[Q, K] sum of the baseline's clipped gradients over the samples of a micro-batch."""
        gradients = self.ours.sample_sketch[batch.row, batch.places][:, self.columns]
        factors = self.factor[batch.row, batch.places]
        return np.asarray(np.einsum("n,nqk->qk", factors, gradients.astype(np.float64)))

    def own_rows(self, weights: Floats) -> Floats | None:
        """[S, Q, K] sum in which the rows of each rank are of its own samples alone.

        Args:
            weights: [S, N].
        Returns:
            None where no rows were recorded.
        """
        if not self.ours.shape_of("sample_shard_sketch")[-1]:
            return None
        rows = self.ours.sample_shard_sketch[:, :, self.columns].astype(np.float64)
        return np.asarray(np.nansum(rows * weights[..., None, None], axis=1))

    @property
    def recorded_sum(self) -> Floats:
        """[S, Q, K] the mode's clipped sum."""
        return np.asarray(self.theirs.gradient_sketch[:, self.columns])

    @cached_property
    def right_sum(self) -> Floats:
        """[S, Q, K] sum that the mode's own factors make of right gradients."""
        if self.has_sketches:
            return self.weighted(self.factor)
        return np.asarray(self.ours.gradient_sketch[:, self.columns])

    @cached_property
    def noise(self) -> Floats:
        """[S, Q, K] the baseline's noise."""
        ours = self.ours
        return np.asarray((ours.noised_sketch - ours.gradient_sketch)[:, self.columns])

    @cached_property
    def micro_batches(self) -> tuple[MicroBatch, ...]:
        """All micro-batches of all ranks, in the order of a step; none if they are not recorded."""
        return tuple(self._micro_batches())

    def _micro_batches(self) -> Iterator[MicroBatch]:
        t = self.theirs
        for row in range(t.num_steps):
            ranks, numbers = t.sample_rank[row], t.sample_micro_batch[row]
            for rank in sorted(set(ranks.tolist()) - {UNUSED}):
                for number in sorted(set(numbers[ranks == rank].tolist()) - {UNUSED}):
                    places = np.flatnonzero((ranks == rank) & (numbers == number))
                    places = places[np.argsort(t.sample_index[row, places])]
                    yield MicroBatch(row=row, rank=rank, number=number, places=places)

    def by_batch(self, values: Floats, change: Callable[[Floats], Floats]) -> Floats | None:
        """`values` [S, N, ...], with those of each micro-batch replaced by `change` of them."""
        if not self.micro_batches:
            return None
        changed = values.copy()
        for batch in self.micro_batches:
            changed[batch.row, batch.places] = change(values[batch.row, batch.places])
        return changed

    @cached_property
    def full_size(self) -> int:
        """Samples of a full micro-batch."""
        if self.run.job:
            return self.run.job.data.batch_size
        return max((len(batch.places) for batch in self.micro_batches), default=0)

    @cached_property
    def counts(self) -> Integers:
        """[S] samples of each step."""
        return self.theirs.num_samples

    def quantities(self) -> tuple[Quantity, ...]:
        """Quantities that a factor may be equal to; those that are 1 or unknown are left out."""
        W = K = b = T = math.nan
        if self.run.job and self.run.setup:
            W, K = float(self.run.job.num_ranks), float(self.run.setup.micro_batches)
            b, T = float(self.run.job.data.batch_size), float(self.run.job.data.seq_length)
        C, P = self.theirs.max_grad_norm, float(len(self.ours.parameter_names))
        sigma = self.run.setup.noise_multiplier if self.run.setup else math.nan
        known = (
            ("2", 2.0, ""),
            ("10", 10.0, ""),
            ("W", W, "the number of ranks"),
            ("sqrt(W)", math.sqrt(W), "W ranks"),
            ("W^2", W * W, "W ranks"),
            ("K", K, "the number of micro-batches"),
            ("sqrt(K)", math.sqrt(K), "K micro-batches"),
            ("K_t", self._most_micro_batches(), "the number of micro-batches of the step"),
            ("b", b, "the samples of a micro-batch"),
            ("B", W * K * b, "the expected batch size"),
            ("sqrt(B)", math.sqrt(W * K * b), "B the expected batch size"),
            ("W b", W * b, "the samples of a micro-batch on all ranks"),
            ("K b", K * b, "the samples of a rank"),
            ("W K", W * K, "ranks times micro-batches"),
            ("|batch|", self.counts.astype(np.float64), "the samples that the step really has"),
            ("|batch|/B", self.counts / self.divisor, "the samples that are there over B"),
            ("C", C, "the clipping bound"),
            ("C^2", C**2, "C the clipping bound"),
            ("sigma", sigma, "the noise multiplier"),
            ("sigma C", sigma * C, "the std of the noise"),
            ("sqrt(2)", math.sqrt(2), ""),
            ("sqrt(T)", math.sqrt(T), "T the sequence length"),
            ("T", T, "the sequence length"),
            ("T-1", T - 1, "T the sequence length"),
            ("P", P, "the number of parameters"),
        )
        return tuple(Quantity(symbol=s, value=v, meaning=m) for s, v, m in known if _tells(v))

    def noise_quantities(self) -> tuple[Quantity, ...]:
        """Quantities that the noise alone may be multiplied by, besides those of `quantities`."""
        P = math.sqrt(len(self.ours.parameter_names))
        sizes = self.ours.parameter_sizes
        D = float(sizes.sum()) if len(sizes) and (sizes > 0).all() else math.nan
        known = (
            ("sqrt(P)", P, "P the number of parameters"),
            ("sqrt(D)", math.sqrt(D), "D the number of all weights"),
            ("D", D, "the number of all weights"),
        )
        return tuple(Quantity(symbol=s, value=v, meaning=m) for s, v, m in known if _tells(v))

    def _most_micro_batches(self) -> Floats:
        """[S] micro-batches of each step on the rank that has most."""
        return self.theirs.sample_micro_batch.max(axis=1, initial=-1) + 1.0


def _own(theirs: Floats, ours: Floats) -> Floats:
    return ours if np.isnan(theirs).all() else theirs


def _tells(value: float | Floats) -> bool:
    """False of a quantity that is unknown or 1."""
    values: NDArray[np.float64] = np.atleast_1d(np.asarray(value, dtype=np.float64))
    is_known = np.isfinite(values) & (values > 0)
    return bool(is_known.any()) and not bool(np.all(np.abs(values[is_known] - 1) < 0.02))
