"""Losses of samples as other functions of the losses of their targets.

Legend: S steps, N samples, T targets, n samples that are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import Fitted, Hypothesis, Prediction
from dpsgd_track.comparison.diagnose.hypotheses.places import chosen_places
from dpsgd_track.record.trajectory import Floats

_FITS = 5e-5
"""Relative error up to which losses are equal."""
_ENOUGH = 8
"""Samples that a function is told from."""
_PARAMETERS = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
_MOST_TOLD = 4


def of_targets(facts: Facts) -> Prediction:
    """The samples' losses by the first function that agrees in all of them."""
    losses = facts.ours.sample_target_loss.astype(np.float64)
    if not losses.shape[-1]:
        return None
    theirs, right = facts.theirs.sample_loss, facts.ours.sample_loss
    chosen = np.zeros(right.shape, dtype=bool)
    with np.errstate(invalid="ignore"):
        off = np.abs(theirs - right) > _FITS * np.abs(right)
    chosen[facts.rows] = off[facts.rows]
    if chosen.sum() < _ENOUGH or not np.isfinite(losses[chosen]).any(axis=1).all():
        return None
    own, observed = losses[chosen], theirs[chosen]
    # Positions beyond the last one of any sample are no positions.
    own = own[:, : int(np.flatnonzero(np.isfinite(losses).any(axis=(0, 1))).max()) + 1]
    num_T = np.isfinite(own).sum(axis=1)
    # They are right only if the mean of them is the loss.
    if np.abs(np.nanmean(own, axis=1) / right[chosen] - 1).max() > _FITS:
        return None
    for values, said in _functions(own, num_T, observed):
        if np.all(np.abs(values - observed) <= _FITS * np.abs(observed)):
            predicted = right.astype(np.float64).copy()
            predicted[chosen] = values
            return Fitted(predicted, said)
    return None


def _functions(own: Floats, num: Floats, observed: Floats) -> Iterator[tuple[Floats, str]]:
    """Losses [n] that a mistake makes of those of targets [n, T], and it in words."""
    yield from _statistics(own)
    yield from _weighed(own)
    for change, said in _of_each():
        yield np.nanmean(change(own), axis=1), f"the mean over targets of {said}"
    yield from _fitted(own, observed)
    yield from _by_place(own, num, observed)


def _statistics(own: Floats) -> Iterator[tuple[Floats, str]]:
    yield np.nanmax(own, axis=1), "the largest of the targets' losses, not their mean"
    yield np.nanmin(own, axis=1), "the smallest of the targets' losses, not their mean"
    yield np.nanmedian(own, axis=1), "the median of the targets' losses, not their mean"
    yield np.sqrt(np.nanmean(own**2, axis=1)), "the root mean square of the targets' losses"
    yield np.log(np.nanmean(np.exp(own), axis=1)), "the logarithm of the targets' mean perplexity"
    yield np.exp(np.nanmean(own, axis=1)), "perplexities, the exponential of the right ones"
    yield from _of_largest(own)
    mean = np.nanmean(own, axis=1)
    yield mean**2, "squared"
    yield np.sqrt(mean), "the root of the right ones"
    yield 1 - np.exp(-mean), "1 - exp(-l) of the right ones l"
    yield mean / np.log(2), "in bits rather than nats"


def _of_largest(own: Floats) -> Iterator[tuple[Floats, str]]:
    """Means over the largest or the smallest targets' losses."""
    ordered, num = np.sort(own, axis=1), np.isfinite(own).sum(axis=1)
    rank = np.arange(own.shape[1])[None]
    for share, said in ((2, "half"), (4, "quarter")):
        for count in (np.maximum(num // share, 1), -(-num // share)):
            is_high = (rank >= (num - count)[:, None]) & (rank < num[:, None])
            for chosen, which in ((is_high, "largest"), (rank < count[:, None], "smallest")):
                total = np.where(chosen, np.nan_to_num(ordered), 0.0).sum(axis=1)
                yield total / count, f"means over the {which} {said} of the targets' losses"


def _weighed(own: Floats) -> Iterator[tuple[Floats, str]]:
    """Means with weights by a target's place among all positions, or among the sample's own."""
    is_there, width = np.isfinite(own), own.shape[1]
    among = np.cumsum(is_there, axis=1) - 1
    backwards = is_there.sum(axis=1, keepdims=True) - 1 - among
    values = np.where(is_there, own, 0.0)
    for place, said in (
        (np.broadcast_to(np.arange(width), own.shape), "position"),
        (among, "place among the sample's targets"),
        (backwards, "place among the sample's targets from the last one back"),
    ):
        for weight, how in (
            (place + 1.0, f"proportional to the {said}"),
            (1.0 / (place + 1.0), f"that fall as 1 over the {said}"),
        ):
            weights = np.where(is_there, weight, 0.0)
            total = (values * weights).sum(axis=1)
            yield total / weights.sum(axis=1), f"means with weights {how}"
            count = is_there.sum(axis=1)
            yield total / count, f"sums with weights {how}, over the number of targets"
    for kind, place in (("position", np.arange(width)[None]), ("target", among)):
        for mask, said in chosen_places(width, kind):
            weights = np.where(is_there, mask[np.clip(place, 0, width - 1)], 0.0)
            yield from _subsets(values, weights, is_there, said)
    half = is_there.sum(axis=1, keepdims=True)
    for said, weights in (
        ("the second half of each sample's targets", among >= half // 2),
        ("the second half of each sample's targets", among >= -(-half // 2)),
        ("the second half of each sample's tokens", among >= (half + 1) // 2 - 1),
        ("the first half of each sample's targets", among < half // 2),
        ("the first half of each sample's targets", among < -(-half // 2)),
    ):
        yield from _subsets(
            values, np.where(is_there, weights, False).astype(float), is_there, said
        )
    for skipped in range(1, 6):
        weights = np.where(is_there & (backwards >= skipped), 1.0, 0.0)
        said = f"all but the last {skipped} targets of each sample"
        yield from _subsets(values, weights, is_there, said)


def _subsets(
    values: Floats, weights: Floats, is_there: np.ndarray, said: str
) -> Iterator[tuple[Floats, str]]:
    total, num = (values * weights).sum(axis=1), weights.sum(axis=1)
    with np.errstate(all="ignore"):
        # A sample of which nothing is left has a loss of 0.
        yield np.where(num > 0, total / num, 0.0), f"means over {said} alone"
        yield (
            total / is_there.sum(axis=1),
            f"sums over {said} alone, divided by the number of all targets",
        )


def _of_each() -> Iterator[tuple[Callable[[Floats], Floats], str]]:
    """Functions of a target's loss l, where p = exp(-l) is its probability."""
    for gamma in _PARAMETERS:
        yield (
            partial(_focal, gamma=gamma),
            f"(1 - p)^{gamma:g} l, the focal loss with gamma {gamma:g}",
        )
    for q in (0.1, 0.3, 0.5, 0.7, 0.9):
        yield (
            partial(_generalised, q=q),
            f"(1 - p^{q:g}) / {q:g}, the generalised cross-entropy",
        )
    yield (lambda x: 1 - np.exp(-x)), "1 - p, the probability of an error"
    yield (lambda x: x**2), "squared losses"
    yield np.sqrt, "the roots of losses"
    yield (lambda x: np.exp(x) - 1), "exp(l) - 1"
    yield np.log1p, "log(1 + l)"


def _focal(losses: Floats, gamma: float) -> Floats:
    return np.asarray(losses * (1 - np.exp(-losses)) ** gamma)


def _generalised(losses: Floats, q: float) -> Floats:
    return np.asarray((1 - np.exp(-q * losses)) / q)


def _mean_of(change: Callable[[Floats, float], Floats], own: Floats, constant: float) -> Floats:
    return np.asarray(np.nanmean(change(own, constant), axis=1))


def _fading(own: Floats, is_mean: bool, rate: float) -> Floats:
    """Losses of targets [n, T], weighed by a power of the rate by position."""
    is_there = np.isfinite(own)
    weights = np.where(is_there, rate ** np.arange(own.shape[1])[None], 0.0)
    below = weights.sum(axis=1) if is_mean else is_there.sum(axis=1)
    return np.asarray((np.nan_to_num(own) * weights).sum(axis=1) / below)


def _fitted(own: Floats, observed: Floats) -> Iterator[tuple[Floats, str]]:
    """Functions with a constant that is chosen to agree best in the median."""
    for is_mean in (True, False):
        fading = partial(_fading, own, is_mean)
        rate = _root(fading, observed, 0.3, 1.7)
        if rate is not None:
            kind = "means" if is_mean else "sums, over the number of targets,"
            yield fading(rate), f"{kind} with weights {rate:.4g}^t by the position t"
    for change, said in (
        (np.minimum, "min(l, {}): losses of targets are capped"),
        (np.maximum, "max(l, {}): losses of targets have a floor"),
    ):
        found = _root(
            partial(_mean_of, change, own), observed, float(np.nanmin(own)), float(np.nanmax(own))
        )
        if found is not None:
            yield (
                np.nanmean(change(own, found), axis=1),
                f"the mean over targets of {said.format(f'{found:.4g}')}",
            )


def _root(
    values: Callable[[float], Floats], observed: Floats, low: float, high: float
) -> float | None:
    """The constant for which the mean of the values [n] is that of the observed ones."""
    wanted = float(observed.mean())
    if not (values(low).mean() - wanted) * (values(high).mean() - wanted) < 0:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        if (values(middle).mean() - wanted) * (values(high).mean() - wanted) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _by_place(own: Floats, num: Floats, observed: Floats) -> Iterator[tuple[Floats, str]]:
    """Targets weighed by their position as agrees best, over the number of all targets."""
    table = np.nan_to_num(own) / num[:, None]
    is_used = np.abs(table).max(axis=0) > 0
    if len(table) < 1.5 * is_used.sum() + _ENOUGH:
        return
    weights = np.zeros(table.shape[1])
    weights[is_used] = np.linalg.lstsq(table[:, is_used], observed, rcond=1e-8)[0]
    places = np.flatnonzero(is_used & (np.abs(weights - 1) > 1e-2))
    if np.ptp(weights[is_used]) < 1e-2:
        # All alike, they say nothing of positions.
        return
    shown = ", ".join(f"{weights[k]:.3g} at position {k}" for k in places[:_MOST_TOLD])
    more = f" and so on at {len(places) - _MOST_TOLD} more" * (len(places) > _MOST_TOLD)
    yield table @ weights, f"sums in which targets count by their position: {shown}{more}"


OF_TARGETS = Hypothesis(sentence="they are {}", predict=of_targets)
"""Losses as another function of those of targets."""
