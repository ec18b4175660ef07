"""Right numbers of samples that were changed in a simple way: shifted, capped, rounded, mixed.

The constant is the one that agrees best.

Legend: S steps, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import Fitted, Hypothesis, Prediction
from dpsgd_track.record.trajectory import Floats

_ALIKE, _FLOAT32, _ENOUGH_SAMPLES = 1e-3, 1e-6, 8
"""Relative spread of one constant, rounding error of a number, and samples to fit a constant."""
_MOST_ON_GRID = 0.95
"""Least share of numbers on a grid: one in the middle of two may go either way."""
Of = Callable[[Facts], Floats]


def changed(of: Of, of_theirs: Of) -> Sequence[Hypothesis]:
    """Simple changes of the right numbers.

    Args:
        of: the right numbers, [S, N].
        of_theirs: what the mode recorded.
    """

    def told(sentence: str, predict: Callable[[Facts, Floats, Floats], Prediction]) -> Hypothesis:
        return Hypothesis(
            sentence=sentence, predict=lambda facts: predict(facts, of(facts), of_theirs(facts))
        )

    return (
        told("{} is added to each of them", _with_addend),
        told("they are sqrt(n^2 + {}) in place of n", _with_addend_to_squares),
        told("they are never above {}", lambda f, n, t: _bounded(f, n, t, np.nanmax, np.minimum)),
        told("they are never below {}", lambda f, n, t: _bounded(f, n, t, np.nanmin, np.maximum)),
        told("they are rounded to {}", _on_a_grid),
        told("they are smoothed: {}", _smoothed),
        told(
            "squares are added up over the samples of a micro-batch, one after the other",
            lambda f, n, t: f.by_batch(n, lambda own: np.sqrt(np.square(own).cumsum(axis=0))),
        ),
        told(
            "each is the largest so far in its micro-batch",
            lambda f, n, t: f.by_batch(n, lambda own: np.maximum.accumulate(own, axis=0)),
        ),
    )


def _differences(facts: Facts, right: Floats, theirs: Floats) -> Floats:
    off = (theirs - right)[facts.rows]
    return np.asarray(off[np.isfinite(off)])


def _one_constant(values: Floats) -> float | None:
    """The constant that all `values` are, up to the rounding of small ones."""
    if values.size < _ENOUGH_SAMPLES:
        return None
    constant = float(np.median(values))
    return constant if abs(constant) > 0 else None


def _with_addend(facts: Facts, right: Floats, theirs: Floats) -> Prediction:
    addend = _one_constant(_differences(facts, right, theirs))
    return None if addend is None else Fitted(right + addend, f"{addend:.3g}")


def _with_addend_to_squares(facts: Facts, right: Floats, theirs: Floats) -> Prediction:
    addend = _one_constant(_differences(facts, np.square(right), np.square(theirs)))
    if addend is None:
        return None
    squares = np.square(right) + addend
    return Fitted(np.sqrt(np.maximum(squares, 0.0)), f"{addend:.3g}")


def _bounded(
    facts: Facts,
    right: Floats,
    theirs: Floats,
    extreme: Callable[..., float],
    bounded: Callable[[Floats, float], Floats],
) -> Prediction:
    """Right numbers that are cut at the mode's largest or smallest one."""
    there = theirs[facts.rows]
    at = float(extreme(there)) if np.isfinite(there).any() else np.nan
    if np.sum(np.abs(there / at - 1) < _FLOAT32) < 2:
        return None
    return Fitted(np.asarray(bounded(right, at)), f"{at:.3g}")


def _on_a_grid(facts: Facts, right: Floats, theirs: Floats) -> Prediction:
    for decimals in (1, 2, 3, 4):
        off = np.abs(np.round(right, decimals) - theirs)[facts.rows]
        off = off[np.isfinite(off)]
        size = np.nanmax(np.abs(theirs[facts.rows]), initial=1.0)
        if off.size and float(np.mean(off < _FLOAT32 * size)) > _MOST_ON_GRID:
            return Fitted(theirs, f"{decimals} decimal{'s' * (decimals > 1)}")
    return None


def _smoothed(facts: Facts, right: Floats, theirs: Floats) -> Prediction:
    """A share of other numbers in the right ones, the same of all."""
    rows, best, least = facts.rows, None, np.inf
    for values, said in _others(facts, right):
        along, off = (values - right)[rows], (theirs - right)[rows]
        used = np.isfinite(along) & np.isfinite(off)
        square = float(np.square(along[used]).sum())
        if used.sum() < _ENOUGH_SAMPLES or not square:
            continue
        share = float((along * off)[used].sum()) / square
        mixed = right + share * np.where(np.isfinite(values), values - right, 0.0)
        error = float(np.nanmax(np.abs(mixed - theirs)[rows], initial=0.0))
        if 0.005 < abs(share) < 0.995 and error < least:
            best, least = Fitted(mixed, f"{share:.3g} of each is {said}"), error
    return best


def _others(facts: Facts, right: Floats) -> Sequence[tuple[Floats, str]]:
    means = facts.by_batch(right, lambda own: np.broadcast_to(own.mean(axis=0), own.shape))
    before = np.concatenate([np.full_like(right[:1], np.nan), right[:-1]])
    found: list[tuple[Floats, str]] = [
        (before, "that of the sample at its place in the step before"),
        (
            np.broadcast_to(np.nanmean(right, axis=1, keepdims=True), right.shape),
            "the mean of the step",
        ),
    ]
    if means is not None:
        found.append((means, "the mean of its micro-batch"))
        found += _of_batches_before(facts, right, means)
    return found


def _of_batches_before(facts: Facts, right: Floats, means: Floats) -> Sequence[tuple[Floats, str]]:
    """Numbers of the micro-batch before on the same rank, in steps before as well."""
    at_place, of_mean = np.full_like(right, np.nan), np.full_like(right, np.nan)
    last: dict[int, tuple[Floats, float]] = {}
    for batch in facts.micro_batches:
        if batch.rank in last:
            values, mean = last[batch.rank]
            length = min(len(values), len(batch.places))
            at_place[batch.row, batch.places[:length]] = values[:length]
            of_mean[batch.row, batch.places] = mean
        if len(batch.places):
            own = right[batch.row, batch.places]
            last[batch.rank] = own, float(means[batch.row, batch.places[0]])
    return (
        (at_place, "that of the sample at its place in the micro-batch before"),
        (of_mean, "the mean of the micro-batch before"),
    )
