"""Right numbers of samples that were changed in a simple way: shifted, capped, rounded, mixed.

The constant is the one that agrees best.

Legend: S steps, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import Fitted, Hypothesis, Prediction
from dpsgd_track.record.trajectory import Floats

_FLOAT32, _ENOUGH_SAMPLES = 1e-6, 8
"""Rounding error of a number, and samples to fit a constant."""
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
        told("they are {}", _to_decimals),
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


def _with_addend(facts: Facts, right: Floats, theirs: Floats) -> Prediction:
    """The right numbers and the constant that is most often added to them."""
    off = (theirs - right)[facts.rows]
    off = off[np.isfinite(off)]
    addend = float(np.median(off)) if off.size >= _ENOUGH_SAMPLES else 0.0
    return Fitted(right + addend, f"{addend:.3g}") if addend else None


def _with_addend_to_squares(facts: Facts, right: Floats, theirs: Floats) -> Prediction:
    found = _with_addend(facts, np.square(right), np.square(theirs))
    if not isinstance(found, Fitted):
        return None
    return Fitted(np.sqrt(np.maximum(found.values, 0.0)), found.shown)


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


def _to_decimals(facts: Facts, right: Floats, theirs: Floats) -> Prediction:
    size = np.nanmax(np.abs(theirs[facts.rows]), initial=1.0)
    return on_a_grid(facts, theirs, decimals_of(right), allowed=_FLOAT32 * size)


def decimals_of(right: Floats) -> Sequence[tuple[Floats, str]]:
    """Numbers that are rounded to a few decimals."""
    return [(np.round(right, k), f"rounded to {k} decimal{'s' * (k > 1)}") for k in (1, 2, 3, 4)]


def on_a_grid(
    facts: Facts, theirs: Floats, grids: Iterable[tuple[Floats, str]], *, allowed: float
) -> Prediction:
    """The recorded numbers, if nearly all are one of the grids'.

    Args:
        theirs: recorded, [S, N].
        grids: right numbers that were rounded in some way, and that way in words.
        allowed: error up to which a number is on a grid.
    """
    for values, said in grids:
        off = np.abs(values - theirs)[facts.rows]
        off = off[np.isfinite(off)]
        if off.size and float(np.mean(off < allowed)) > _MOST_ON_GRID:
            return Fitted(theirs, said)
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
