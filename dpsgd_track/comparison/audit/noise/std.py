"""Checks that the std of the noise is sigma C: overall, and by parameter, rank and step."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.audit.noise.check import (
    ALPHA,
    NORMAL_95,
    NoiseCheck,
    Place,
    untested,
)
from dpsgd_track.comparison.audit.noise.gaussian import std_interval
from dpsgd_track.comparison.audit.noise.samples import Samples, num_micro_batches
from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.trajectory import Floats, Trajectory

STD, EMPTY_STEP = "std", "std_of_empty_step"
GROUPED = ("std_by_rank", "std_by_step", "std_by_parameter")
BY_SHARD = "std_by_shard"
_NARROW = 0.02
"""Width of an interval that is shown with another digit."""


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Estimates of the std, one for each of several parts of the noise."""

    places: Sequence[Place]
    value: Floats
    low: Floats
    high: Floats
    resolution: float = math.nan
    """As in `NoiseCheck`, of the largest cell."""

    @property
    def excess(self) -> Floats:
        """Factor by which 1 lies outside each interval; more than 1 is out of bounds."""
        with np.errstate(divide="ignore"):
            excess = np.maximum(self.low, 1 / self.high)
        return np.where(np.isnan(excess), np.inf, excess)

    def may_be(self, std: Floats | float) -> NDArray[np.bool_]:
        """True where `std` lies in the interval."""
        return np.asarray((self.low <= std) & (std <= self.high))


def cells_of(
    places: Sequence[Place],
    sum_sq: Floats,
    dof: Floats | NDArray[np.int64],
    alpha: float = ALPHA,
    *,
    rounding: float = 0.0,
) -> Cells:
    """Cells that have elements, at a joint confidence level.

    Args:
        alpha: probability that any of their intervals is wrong.
        rounding: largest error of an element, by which the std may be larger or smaller.
    """
    squares, num = np.ravel(sum_sq), np.ravel(dof).astype(np.float64)
    filled = np.flatnonzero(num > 0)
    squares, num = squares[filled], num[filled]
    alpha /= max(len(filled), 1)
    value, low, high = std_interval(squares, num, alpha)
    if rounding:
        length, error = np.sqrt(squares), rounding * np.sqrt(num)
        _, low, _ = std_interval(np.square(np.maximum(length - error, 0)), num, alpha)
        _, _, high = std_interval(np.square(length + error), num, alpha)
    resolution = _resolution(num, alpha)
    return Cells(
        places=[places[int(i)] for i in filled],
        value=value,
        low=low,
        high=high,
        resolution=resolution,
    )


def _resolution(dof: Floats, alpha: float) -> float:
    """Smallest relative error that is found with a probability of 95 % if it is everywhere."""
    if not len(dof):
        return math.nan
    most = float(dof.max())
    _, _, high = std_interval(np.array([most]), np.array([most]), alpha)
    return float(high[0] - 1) + NORMAL_95 / math.sqrt(2 * most)


def std_check(
    name: str, title: str, cells: Cells, *, likely_cause: str = "", explains_others: bool = False
) -> NoiseCheck:
    """Check of the cell that is farthest out, against 1."""
    excess = cells.excess
    worst = int(excess.argmax())
    num_failed = int((excess > 1).sum())
    place = cells.places[worst]
    value, low, high = (float(v[worst]) for v in (cells.value, cells.low, cells.high))
    of = f" of {place.text}" if place.text else ""
    digits = 3 if high - low > _NARROW else 4
    sentence = f"the std of its noise{of} is {value:.{digits}f} sigma C "
    sentence += f"(interval {low:.{digits}f} to {high:.{digits}f}) where 1 is meant"
    if high == 0:
        sentence = f"its noise{of} is zero where its std should be sigma C"
    if len(excess) > 1 and num_failed:
        sentence += f", and {num_failed} of {len(excess)} are out of bounds"
    if num_failed and likely_cause:
        sentence += f": {likely_cause}"
    return NoiseCheck(
        name=name,
        title=title,
        value=value,
        low=low,
        high=high,
        expected=1.0,
        is_ok=num_failed == 0,
        place=place,
        sentence=sentence,
        num_cells=len(excess),
        num_failed=num_failed,
        explains_others=explains_others,
        resolution=cells.resolution,
    )


def telling(total: Cells, grouped: Mapping[str, Cells], explained: Collection[str]) -> str:
    """Name of the check that explains a failure best; empty if only the smallest parts can.

    Args:
        grouped: by rank, step or parameter.
        explained: those of them whose values fit all of their parts.
    """
    value = float(total.value[0])
    if (total.excess > 1).any() and all(cells.may_be(value).all() for cells in grouped.values()):
        return STD
    shares = {
        name: float((cells.excess > 1).mean())
        for name, cells in grouped.items()
        if name in explained and (cells.excess > 1).any() and not cells.may_be(value).all()
    }
    return min(shares, key=lambda name: shares[name], default="")


def check_std(
    run: ModeRun, trajectory: Trajectory, samples: Samples
) -> tuple[list[NoiseCheck], Cells]:
    """All checks of the std, and the estimate of each parameter."""
    sum_sq, num = samples.sum_sq, samples.num

    def grouped(places: Sequence[Place], *axes: int) -> Cells:
        return cells_of(places, sum_sq.sum(axis=axes), num.sum(axis=axes))

    # Rounding is independent of the noise in large parts; one element it may move to 0.
    by_shard = cells_of(
        list(map(samples.place, range(sum_sq.size))), sum_sq, num, rounding=samples.resolution / 2
    )

    axes = dict(zip(GROUPED, ((0, 2), (1, 2), (0, 1)), strict=True))
    places = (
        [Place(text=f"rank {rank}") for rank in range(sum_sq.shape[1])],
        list(map(Place.of_step, samples.steps)),
        list(map(Place.of_parameter, samples.parameters)),
    )
    cells = {name: grouped(each, *axes[name]) for name, each in zip(GROUPED, places, strict=True)}
    total = grouped([Place()], 0, 1, 2)
    explained = [name for name in GROUPED if _fits(by_shard, sum_sq, num, axes[name])]
    best = telling(total, cells, explained)
    cause = _likely_cause(run, trajectory, cells["std_by_step"])
    checks = [
        std_check(STD, "std of the noise", total, likely_cause=cause, explains_others=best == STD)
    ]
    for name in GROUPED:
        title = name.replace("_", " ")
        said = cause if name == "std_by_step" else _cause_in_some(cells[name])
        check = std_check(name, title, cells[name], likely_cause=said, explains_others=best == name)
        checks.append(check)
    checks.append(std_check(BY_SHARD, "std by parameter, rank and step", by_shard))
    checks.append(_check_empty_step(trajectory, samples))
    return checks, cells["std_by_parameter"]


def _fits(by_shard: Cells, sum_sq: Floats, num: NDArray[np.int64], axes: tuple[int, ...]) -> bool:
    """True if the std of each group, summed over `axes`, fits each of its shards."""
    squares, nums = sum_sq.sum(axis=axes, keepdims=True), num.sum(axis=axes, keepdims=True)
    std = np.broadcast_to(np.sqrt(squares / np.maximum(nums, 1)), num.shape)
    return bool(by_shard.may_be(std[num > 0]).all())


def _check_empty_step(trajectory: Trajectory, samples: Samples) -> NoiseCheck:
    title = "std at a step without samples"
    empty = np.flatnonzero(trajectory.num_samples == 0)
    if not len(empty):
        why = "no step was empty, so that noise on an empty batch was not put to the test"
        return untested(EMPTY_STEP, title, why, expected=1.0)
    places = [Place.of_step(samples.steps[i], "the empty ") for i in empty]
    cells = cells_of(
        places, samples.sum_sq[empty].sum(axis=(1, 2)), samples.num[empty].sum(axis=(1, 2))
    )
    return std_check(EMPTY_STEP, title, cells)


def _likely_cause(run: ModeRun, trajectory: Trajectory, by_step: Cells) -> str:
    """Well-known fault that explains the std of every step; empty for none or more than two."""
    if not len(by_step.value) or len(by_step.value) != trajectory.num_steps:
        return ""
    if (by_step.value < 1e-3).all():
        return "it adds no noise"
    fitting = {
        cause
        for factor, cause in _faults(run, trajectory)
        if ((by_step.low <= factor) & (factor <= by_step.high)).all() and (factor != 1).any()
    }
    return " or ".join(sorted(fitting)) if len(fitting) <= 2 else ""


def _cause_in_some(cells: Cells) -> str:
    """Well-known fault that explains the std of all cells that are out of bounds."""
    wrong = cells.excess > 1
    said = [what for std, what in _TWICE.items() if cells.may_be(std)[wrong].all()]
    return said[0] if len(said) == 1 and wrong.any() else ""


_TWICE = {
    math.sqrt(2): "as if noise were added there twice",
    2.0: "as if the same noise were added there twice",
}
"""Faults of a part of the noise, by the std that they make."""


def _faults(run: ModeRun, trajectory: Trajectory) -> Iterator[tuple[Floats, str]]:
    """(factor [S] on the std of each step, description) of known faults."""
    bounds = trajectory.max_grad_norm
    sigma = trajectory.noise_std / bounds[0]
    # Where every rank holds all parameters, its copies of the noise are kept once.
    W = float(run.job.num_ranks if run.job else trajectory.noise_samples.shape[1])
    divisor = float(trajectory.expected_batch_size)
    before = np.concatenate([bounds[:1], bounds[:-1]])
    yield bounds, "as if it were sigma C^2"
    yield 1 / bounds, "as if C were ignored and it were sigma"
    yield 1 / (sigma * bounds), "as if it were 1, whatever sigma and C"
    yield 1 / np.sqrt(sigma * bounds), "as if sigma C were its variance"
    yield bounds[0] / bounds, "as if C were that of the first step"
    yield before / bounds, "as if C were that of the step before"
    one = np.ones_like(bounds)
    yield one * divisor, "as if calibrated to the sum of the batch but added to its mean"
    yield one / divisor, "as if divided by the batch size once too often"
    yield one * np.sqrt(W), "as if each of the ranks added the whole noise"
    yield one * W, "as if each of the ranks added the same whole noise"
    yield one / np.sqrt(W), "as if the noise of the ranks were averaged over them"
    yield one / math.sqrt(2), "as of a Box-Muller transform without its factor 2"
    yield one / W, "as if the same noise of all ranks were divided by their number"
    micro_batches = num_micro_batches(run, trajectory)
    if micro_batches is not None:
        yield np.sqrt(micro_batches), "as if every micro-batch got the whole noise"
        yield micro_batches, "as if every micro-batch got the same whole noise"
