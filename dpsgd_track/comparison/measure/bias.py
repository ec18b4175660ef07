"""Bias: the mean error of losses, norms and clipped sums, relative to plain autograd in one type.

In bfloat16, rounding makes single norms wrong by a percent, and nothing on average. A mode that is
wrong on average, because it adds in too few bits or leaves out a small term, hides below the
largest differences. The mode and plain autograd (the reference's replay in the modes' type) compute
from the same rounded weights and the same samples, so what rounding does to both cancels:

    losses: x_i = (l_i - l'_i) / |l'_i|,    norms: x_i = log(n_i / n'_i),
    sums:   x_k = <S, v_k> <S', v_k> - <S', v_k>^2 in units of |S'|^2,

over samples i, and over steps and projections v_k; a dash marks plain autograd. A mean of x is a
bias if it is farther from zero than `Tolerance` and than chance explains:

    |mean x| > d + t(1 - alpha / 2m, n - 1) s / sqrt(n)

with m tests in all. Norms that scatter about plain autograd's by more than twice what those
scatter about float64, and more than chance explains, are wrong as well, if not on average.

A mode that computes in more bits than plain autograd has none of its rounding: where no single
value differs from float64 by more than is tolerated, the mean is plain autograd's own error.

Only steps in which both sides have the same weights are paired: all of a regime with a learning
rate of 0, else the first. A fault that plain autograd shares cancels as well, so the comparison
with float64 stays.

Legend: S steps, N samples of one step, P trainable parameters, K projections, W ranks, M means.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special

from dpsgd_track.comparison.measure.floor import error_of_norms
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import (
    Floats,
    Integers,
    Trajectory,
    sketch_distance,
    sketch_length,
)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Relative biases that never count, since plain autograd has roundings of its own."""

    one: float
    """Of one parameter."""
    total: float
    """Tolerance for the whole norm and the whole sum."""
    loss: float

    def of_model(self, sizes: Integers) -> Tolerance:
        """The same with what norms of parameters of such `sizes`, [P], may be off by in float32."""
        largest, whole = int(sizes.max(initial=0)), int(sizes.sum())
        return Tolerance(
            one=max(self.one, error_of_norms(largest)),
            total=max(self.total, error_of_norms(whole)),
            loss=self.loss,
        )


TOLERANCES = {
    "bfloat16": Tolerance(one=2.0**-10, total=2.0**-12, loss=2.0**-12),
    "float32": Tolerance(one=2e-6, total=5e-7, loss=5e-7),
}
"""By the type that modes compute in."""

FALSE_ALARM = 1e-3
"""Probability that any mean of a comparison fails by chance, were nothing tolerated."""
POWER = 0.95
"""Probability with which a bias of the stated resolution is found."""
FEWEST = 8
"""Least number of independent values of which a mean is tested."""
FEWEST_STEPS = 4
"""Least number of steps over which sums are tested: projections show one step's error exactly, and
say nothing of how much rounding changes it from step to step."""
SCATTER = 0.05
"""Relative error of plain autograd from which on a parameter is left out: its gradient cancels."""
SCATTER_MARGIN = 2.0
"""Multiple of plain autograd's own scatter that never counts; Opacus's Gram form has up to 0.95."""
OUTLIER = 8.0
"""Robust standard deviations, of the mode's errors or of plain autograd's, by which one sample must
differ from the others."""
_COUPLED = 1e-2
"""Probability that values of one rank and step count by chance as depending on each other, in any
of the means."""
VALUES_AT_ONCE = 1 << 20
"""Numbers of one record and field in a block: records of long runs are larger than memory."""

TOTALS = (ObservableName.SAMPLE_LOSS, ObservableName.SAMPLE_NORM, ObservableName.GRAD_NORM)


@dataclass(frozen=True, kw_only=True)
class Bias:
    """Mean relative errors of one observable."""

    observable: ObservableName
    places: tuple[str, ...]
    """[M] parameters; one empty name for a total."""
    mean: Floats
    """[M] NaN if not tested."""
    standard_error: Floats
    """[M]"""
    quantile: Floats
    """[M] multiple of the standard error that chance explains."""
    num: Integers
    """[M] independent values."""
    tolerated: float
    is_exact: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(1, dtype=bool))
    """[M] or [1] True where no value differs from float64 by more than is tolerated."""

    @property
    def limit(self) -> Floats:
        """[M] largest mean that is no bias; NaN if not tested."""
        return self.tolerated + self.quantile * self.standard_error

    @property
    def resolution(self) -> Floats:
        """[M] smallest bias found with probability POWER; infinite if not tested."""
        found = self.limit + float(special.ndtri(POWER)) * self.standard_error
        return np.where(np.isnan(found), np.inf, found)

    @property
    def failing(self) -> NDArray[np.bool_]:
        """[M] means that are biases."""
        return np.asarray((np.abs(self.mean) > self.limit) & ~self.is_exact)

    @property
    def times(self) -> Floats:
        """[M] |mean| / limit, 0 where the mode is exact; NaN if not tested."""
        with np.errstate(invalid="ignore"):
            return np.where(self.is_exact, 0.0, np.abs(self.mean)) / self.limit


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Spread of the norms of each parameter over samples, relative to plain autograd's."""

    places: tuple[str, ...]
    """[P] parameters."""
    std: Floats
    """[P] of the log ratios; NaN if not tested."""
    limit: Floats
    """[P] of the same, from plain autograd's own against float64."""

    @property
    def failing(self) -> NDArray[np.bool_]:
        """[P] parameters over the limit."""
        return np.asarray(self.std > self.limit)


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """The sample that differs most from plain autograd, by more than the others explain."""

    observable: ObservableName
    step: int
    sample: int
    """Global index."""
    value: float
    """Relative difference from plain autograd, less that of the other samples."""
    limit: float
    num: int
    """Samples over the limit."""


@dataclass(frozen=True, kw_only=True)
class Biases:
    """All means of one mode in one regime."""

    steps: Integers
    """[S] steps that were paired."""
    num_samples: int
    by_observable: Mapping[ObservableName, Bias]
    scatter: Scatter | None = None
    """None without the float64 reference."""
    outliers: tuple[Outlier, ...] = ()
    factor_error: float = 0.0
    """Mean relative difference of the clip factors from plain autograd's, which sums inherit."""


def biases_of(
    mode: Trajectory,
    plain: Trajectory,
    exact: Trajectory | None,
    tolerance: Tolerance,
    *,
    stands_still: bool,
) -> Biases | None:
    """Mean errors of `mode` relative to `plain`; None if the two have no sample in common.

    Args:
        mode, plain: aligned with `exact`; steps that one of them lacks are left out.
        exact: the float64 reference, which shows where plain autograd itself scatters.
        stands_still: no step moves the weights, so all can be paired, not the first alone.
    """
    rows = _paired(mode, plain, exact, stands_still=stands_still)
    if rows is None or not rows.num_samples:
        return None
    names = tuple(plain.parameter_names.tolist())
    num_tests = len(TOTALS) + 3 * len(names)
    level = FALSE_ALARM / (2 * num_tests)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        of_sample = {
            ObservableName.SAMPLE_LOSS: _pairwise(_relative, rows.small("sample_loss")),
            ObservableName.SAMPLE_NORM: _pairwise(_log_ratio, rows.small("sample_norm")),
        }
        factors = _log_ratio(*rows.small("clip_factor")[:2])
    tolerated = {
        ObservableName.SAMPLE_LOSS: tolerance.loss,
        ObservableName.SAMPLE_NORM: tolerance.total,
    }
    found = {
        name: _bias(name, ("",), _of_samples(x, rows.rank), tolerated[name], level)
        for name, x in of_sample.items()
    }
    by_parameter = ObservableName.SAMPLE_NORM_BY_PARAMETER
    ratios, plain_ratios = _norms(rows)
    found[by_parameter] = _bias(by_parameter, names, ratios, tolerance.one, level)
    sums, total = _sums(rows)
    found[ObservableName.GRADIENT] = _bias(
        ObservableName.GRADIENT, names, sums, tolerance.one, level
    )
    found[ObservableName.GRAD_NORM] = _bias(
        ObservableName.GRAD_NORM, ("",), total, tolerance.total, level
    )
    far = (_outlier(name, x, rows, tolerated[name]) for name, x in of_sample.items())
    return Biases(
        steps=rows.steps,
        num_samples=rows.num_samples,
        by_observable={name: each for name, each in found.items() if (each.num >= FEWEST).any()},
        scatter=_scatter(names, ratios, plain_ratios, tolerance.one, level),
        outliers=tuple(outlier for outlier in far if outlier),
        factor_error=float(np.nan_to_num(_mean(np.abs(factors)))),
    )


def _pairwise(error: Callable[[Floats, Floats], Floats], sides: Sequence[Floats]) -> list[Floats]:
    """Errors of the mode relative to plain autograd, and of that relative to float64, if known."""
    return [error(ours, exact) for ours, exact in itertools.pairwise(sides)]


def _relative(ours: Floats, plain: Floats) -> Floats:
    return np.asarray((ours - plain) / np.abs(plain))


def _log_ratio(ours: Floats, plain: Floats) -> Floats:
    ratio = np.log(ours / plain)
    return np.where(np.isfinite(ratio), ratio, np.nan)


def _robust_std(values: Floats) -> float:
    # 1.48: the std of a normal variable over its median absolute deviation.
    if not values.size:
        return 0.0
    return 1.48 * float(np.median(np.abs(values - np.median(values))))


def _mean(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The paired steps of the records."""

    sides: Sequence[tuple[Trajectory, Integers]]
    """The mode, plain autograd and, if it was recorded, the float64 reference; with the rows."""
    steps: Integers
    rank: Integers
    """[S, N] rank of each sample in the mode's run, -1 for none."""

    @property
    def num_samples(self) -> int:
        """Samples of all paired steps."""
        return int((self.rank >= 0).sum())

    def small(self, name: str) -> list[Floats]:
        """[S, N] values of every side."""
        return [getattr(side, name)[rows] for side, rows in self.sides]

    def blocks(self, name: str) -> Iterator[tuple[slice, list[Floats]]]:
        """A large field of every side, some steps at a time, with the place of the steps."""
        shape = self.sides[0][0].shape_of(name)
        at_once = max(1, VALUES_AT_ONCE // max(1, math.prod(shape[1:])))
        for start in range(0, len(self.steps), at_once):
            place = slice(start, min(start + at_once, len(self.steps)))
            yield place, [_read(side, name, rows[place]) for side, rows in self.sides]


def _read(side: Trajectory, name: str, rows: Integers) -> Floats:
    first = int(rows.min())
    return np.asarray(side.read(name, first, int(rows.max()) + 1)[rows - first])


def _paired(
    mode: Trajectory, plain: Trajectory, exact: Trajectory | None, *, stands_still: bool
) -> _Rows | None:
    """Steps that all sides have with the same samples; None if their parameters differ."""
    sides = [mode, plain] + ([exact] if exact else [])
    steps = plain.step if stands_still else plain.step[:1]
    for side in sides:
        if not np.array_equal(side.parameter_names, plain.parameter_names):
            return None
        if side.sample_index.shape[1] != plain.sample_index.shape[1]:
            return None
        steps = np.intersect1d(steps, side.step)
    if sides[0].shape_of("gradient_sketch")[1:] != plain.shape_of("gradient_sketch")[1:]:
        return None
    rows = [np.searchsorted(side.step, steps) for side in sides]
    indices = [side.sample_index[row] for side, row in zip(sides, rows, strict=True)]
    same = np.all([(index == indices[0]).all(axis=1) for index in indices], axis=0)
    if not same.any():
        return None
    pairs = tuple(zip(sides, (row[same] for row in rows), strict=True))
    there = indices[0][same] >= 0
    rank = np.where(there, mode.sample_rank[pairs[0][1]], -1)
    return _Rows(sides=pairs, steps=steps[same], rank=rank)


@dataclass(frozen=True, kw_only=True)
class _Draws:
    """Values of M means, summed up by group of values that may depend on each other."""

    mean: Floats
    """[M]"""
    variance: Floats
    """[M] variance of the mean, were all values independent."""
    num: Floats
    """[M] independent values."""
    group_variance: Floats
    """[M] variance of the mean, were only the groups independent."""
    num_groups: Floats
    """[M]"""
    farthest: Floats
    """[M] largest difference of a value from float64; infinite if that is not known."""

    @property
    def std(self) -> Floats:
        """[M] of one value."""
        return np.asarray(np.sqrt(self.variance * self.num))


def _bias(
    observable: ObservableName,
    places: tuple[str, ...],
    draws: _Draws,
    tolerated: float,
    level: float,
) -> Bias:
    """The means with their standard errors.

    Values count as independent unless those of one group are more alike than chance explains.
    Then the groups count, which are far fewer.
    """
    dof = np.stack([draws.num - 1, draws.num_groups - 1])
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = draws.group_variance / draws.variance
        is_coupled = spread > special.fdtri(*dof[::-1], 1 - _COUPLED / len(draws.num))
    quantiles = -special.stdtrit(np.maximum(dof, 1), level)
    error = np.sqrt(np.where(is_coupled, draws.group_variance, draws.variance))
    is_tested = draws.num >= FEWEST
    return Bias(
        observable=observable,
        places=places,
        mean=np.where(is_tested, draws.mean, np.nan),
        standard_error=np.where(is_tested, error, np.nan),
        quantile=np.where(is_coupled, quantiles[1], quantiles[0]),
        num=np.where(is_tested, draws.num, 0).astype(np.int64),
        tolerated=tolerated,
        is_exact=draws.farthest <= tolerated,
    )


class _Tally:
    """Sums of M values of each sample, by rank and step."""

    def __init__(self, num_means: int) -> None:
        self.square = np.zeros(num_means)
        self.farthest = np.full(num_means, -np.inf)
        self.counts: list[Floats] = []
        self.sums: list[Floats] = []

    def take(self, x: Floats, rank: Integers) -> None:
        """Add `x` [S, N, M], where NaN is no value, of samples on `rank` [S, N]."""
        known = np.isfinite(x) & (rank >= 0)[:, :, None]
        values = np.where(known, x, 0.0)
        self.square += np.einsum("snm,snm->m", values, values)
        of_rank = (rank[:, :, None] == np.unique(rank[rank >= 0])).astype(np.float64)
        for kept, each in ((self.counts, known.astype(np.float64)), (self.sums, values)):
            by_group = np.einsum("snw,snm->swm", of_rank, each)
            kept.append(by_group.reshape(-1, x.shape[2]))

    def take_error(self, x: Floats, rank: Integers) -> None:
        """Note differences from float64, of the same shape."""
        there = (rank >= 0)[:, :, None]
        # NaN is no difference that could be small.
        largest = np.where(there, np.abs(np.where(np.isnan(x), np.inf, x)), 0.0).max(axis=(0, 1))
        self.farthest = np.maximum(self.farthest, largest)

    def draws(self) -> _Draws:
        """Mean and variance of each of the M values."""
        counts, sums = np.concatenate(self.counts), np.concatenate(self.sums)
        num, num_groups = counts.sum(axis=0), (counts > 0).sum(axis=0).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = sums.sum(axis=0) / num
            rest = np.maximum(self.square - num * mean**2, 0.0)
            between = np.square(sums - counts * mean).sum(axis=0) / num**2
            return _Draws(
                mean=mean,
                variance=rest / (num - 1) / num,
                num=num,
                group_variance=between * num_groups / (num_groups - 1),
                num_groups=num_groups,
                farthest=np.where(self.farthest < 0, np.inf, self.farthest),
            )


def _of_samples(errors: Sequence[Floats], rank: Integers) -> _Draws:
    """Draws of [S, N] errors; the second are plain autograd's, if float64 is known."""
    tally = _Tally(1)
    tally.take(errors[0][:, :, None], rank)
    if len(errors) > 1:
        tally.take_error((errors[0] + errors[1])[:, :, None], rank)
    return tally.draws()


def _norms(rows: _Rows) -> tuple[_Draws, _Draws | None]:
    """Log ratios of each parameter's norms, and those of plain autograd to float64.

    Parameters whose norms plain autograd scatters are left out.
    """
    num_parameters = len(rows.sides[1][0].parameter_names)
    ours, own = _Tally(num_parameters), _Tally(num_parameters)
    for place, (mode, plain, *exact) in rows.blocks("sample_norm_by_parameter"):
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ours.take(_log_ratio(mode, plain), rows.rank[place])
            for each in exact:
                own.take(_log_ratio(plain, each), rows.rank[place])
                ours.take_error(_log_ratio(mode, each), rows.rank[place])
    draws = ours.draws()
    if not own.sums:
        return draws, None
    plain_draws = own.draws()
    with np.errstate(invalid="ignore"):
        return _without(draws, plain_draws.std > SCATTER), plain_draws


def _scatter(
    places: tuple[str, ...], draws: _Draws, plain: _Draws | None, tolerated: float, level: float
) -> Scatter | None:
    if plain is None:
        return None
    dof = draws.num - 1
    least = np.maximum(plain.std, tolerated)
    explained = SCATTER_MARGIN * np.sqrt(special.fdtri(dof, plain.num - 1, 1 - level))
    return Scatter(
        places=places,
        std=np.where(draws.num >= FEWEST, draws.std, np.nan),
        limit=least * explained,
    )


def _without(draws: _Draws, left_out: NDArray[np.bool_]) -> _Draws:
    return _Draws(**{**vars(draws), "num": np.where(left_out, 0.0, draws.num)})


def _sums(rows: _Rows) -> tuple[_Draws, _Draws]:
    """Relative errors of each parameter's sum along plain autograd's, and of all parameters'.

    Each step counts alike, whatever the length of its sum.
    """
    sizes = rows.sides[1][0].parameter_sizes
    parts: list[Floats] = []
    totals: list[Floats] = []
    scatter: list[Floats] = []
    off: list[tuple[Floats, Floats]] = []
    num_projections = rows.sides[1][0].shape_of("gradient_sketch")[2]
    for _, (mode, plain, *exact) in rows.blocks("gradient_sketch"):
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            error, square = (mode - plain) * plain, plain * plain
            parts.append(_moments(error, square))
            totals.append(_moments(*(np.nansum(each, axis=1)[:, None] for each in (error, square))))
            scatter += [sketch_distance(plain, each) / sketch_length(plain) for each in exact]
            off += [(sketch_distance(mode, each), sketch_length(each)) for each in exact]
    independent = np.where(sizes > 0, np.minimum(sizes, num_projections), num_projections)
    draws = _projected(np.concatenate(parts, axis=1), independent, num_projections)
    whole = np.full(1, num_projections)
    total = _projected(np.concatenate(totals, axis=1), whole, num_projections)
    if scatter:
        spread = np.concatenate(scatter)
        is_known = np.isfinite(spread).any(axis=0)
        typical = np.nanmedian(np.where(is_known, spread, 0.0), axis=0)
        draws = _without(draws, typical > SCATTER)
        errors, lengths = (np.concatenate(each) for each in zip(*off, strict=True))
        draws = replace(draws, farthest=_largest_share(errors, lengths))
        whole_errors, whole_lengths = (
            np.sqrt(np.nansum(np.square(each), axis=1, keepdims=True)) for each in (errors, lengths)
        )
        total = replace(total, farthest=_largest_share(whole_errors, whole_lengths))
    return draws, total


def _largest_share(errors: Floats, lengths: Floats) -> Floats:
    """[M] largest of [S, M] errors over lengths; infinite if one is not known."""
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = errors / lengths
    return np.asarray(np.where(np.isnan(shares), np.inf, shares).max(axis=0))


def _moments(error: Floats, square: Floats) -> Floats:
    """[4, S, M] means over projections of y, y^2, y u and u^2, in units of the mean square.

    Args:
        error: [S, M, K] products whose mean is the error along plain autograd's sum.
        square: [S, M, K] squares whose mean is the squared length of that sum.
    """
    unit = square.mean(axis=2, keepdims=True)
    y, u = error / unit, square / unit
    return np.stack([y.mean(axis=2), *((a * b).mean(axis=2) for a, b in ((y, y), (y, u), (u, u)))])


def _projected(moments: Floats, independent: Integers, num_projections: int) -> _Draws:
    """Draws of [4, S, M] moments; projections of a small tensor repeat each other.

    Args:
        independent: [M] independent ones among the projections.
    """
    known = np.isfinite(moments).all(axis=0)
    y, yy, yu, uu = np.where(known, moments, 0.0)
    num_steps = known.sum(axis=0).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = y.sum(axis=0) / num_steps
        # Of residuals y - mean u; u varies with the projection, which a mean of y alone ignores.
        rest = np.maximum((yy - 2 * mean * yu + mean**2 * uu).sum(axis=0) / num_steps, 0.0)
        num = num_steps * independent
        between = np.square(np.where(known, y - mean, 0.0)).sum(axis=0) / num_steps
        draws = _Draws(
            mean=mean,
            variance=rest / (num - 1),
            num=num,
            group_variance=between / (num_steps - 1),
            num_groups=num_steps,
            farthest=np.full(len(num), np.inf),
        )
    return _without(draws, num_steps < FEWEST_STEPS)


def _outlier(
    observable: ObservableName, errors: Sequence[Floats], rows: _Rows, tolerated: float
) -> Outlier | None:
    """The sample whose error is farthest from the median of all.

    Args:
        errors: [S, N] of the mode, and of plain autograd, if known.
    """
    x = errors[0]
    there = np.isfinite(x) & (rows.rank >= 0)
    if there.sum() < FEWEST:
        return None
    middle = float(np.median(x[there]))
    apart = np.where(there, np.abs(x - middle), -1.0)
    limit = OUTLIER * max(
        tolerated, *(_robust_std(each[there & np.isfinite(each)]) for each in errors)
    )
    row, place = (int(i) for i in np.unravel_index(int(apart.argmax()), apart.shape))
    if apart[row, place] <= limit:
        return None
    record, at = rows.sides[1]
    return Outlier(
        observable=observable,
        step=int(rows.steps[row]),
        sample=int(record.sample_index[at[row], place]),
        value=float(x[row, place] - middle),
        limit=limit,
        num=int((apart > limit).sum()),
    )
