"""Checks that the noise is independent between ranks, steps, parameters and elements.

Legend: S steps, W ranks, P parameters, M elements of a shard, R rows that are compared with each
other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.audit.noise.check import ALPHA, NoiseCheck, Place, untested
from dpsgd_track.comparison.audit.noise.gaussian import correlation_bound
from dpsgd_track.comparison.audit.noise.samples import Samples
from dpsgd_track.record.trajectory import Floats

CORRELATION = "correlation_of_"
"""Prefix of the names of checks, one for each kind of pairs."""
REUSE = "reuse"
_CONSECUTIVE = 128
"""This many kept elements are the leading ones of a shard, at equal positions in shards of any
size."""
SAME = 0.99
"""Correlation from which on two parts of the noise are called the same."""
_LAGS = 64
_FEWEST = 16
"""Least number of elements for comparing two shards; fewer prove nothing, even if equal."""
_FEWEST_PRODUCTS = 256
"""Least number for which the correlation of neighbours is distributed as that of two vectors."""
_ROWS_AT_ONCE = 512

Bools = NDArray[np.bool_]


def check_correlations(samples: Samples) -> Iterator[NoiseCheck]:
    """All checks of this module."""
    ranks = [Place(text=f"rank {rank}") for rank in range(samples.num.shape[1])]
    steps = list(map(Place.of_step, samples.steps))
    held = np.broadcast_to(samples.held, samples.even.shape)
    if len(ranks) > 1:
        yield _check_pairs("ranks", ranks, samples, held, axis=1)
    if len(steps) > 1:
        yield _check_pairs("steps", steps, samples, held, axis=0)
    if len(samples.parameters) > 1:
        rows = np.moveaxis(samples.even, 2, 0).reshape(len(samples.parameters), -1)
        kept = np.moveaxis(held, 2, 0).reshape(len(samples.parameters), -1)
        value, num = correlations(rows, kept)
        places = pairs_of(map(Place.of_parameter, samples.parameters))
        yield correlation_check("parameters", places, value, num)
    if samples.even.shape[-1] > 1:
        yield _check_neighbours(samples)
    yield _check_reuse(samples)


def correlations(rows: Floats, held: Bools) -> tuple[Floats, NDArray[np.int64]]:
    """Correlation of each pair of R rows over the elements that both hold, and their number.

    Args:
        rows: [R, N], 0 where not held; their means are known to be zero.
    Returns:
        [R (R - 1) / 2] each, in the order of `itertools.combinations`.
    """
    weights = held.astype(np.float64)
    num = weights @ weights.T
    squares = np.square(rows) @ weights.T
    scale = np.sqrt(squares * squares.T)
    value = np.divide(rows @ rows.T, scale, out=np.zeros_like(num), where=scale > 0)
    pairs = np.triu_indices(len(rows), k=1)
    return value[pairs], num[pairs].astype(np.int64)


def correlation_check(
    kind: str, places: Sequence[Place], value: Floats, num: NDArray[np.int64]
) -> NoiseCheck:
    """Check of the pair whose correlation is least likely by chance.

    Pairs with too few elements in common to tell anything are left out; so are their places.
    """
    can_fail = np.flatnonzero(num >= _FEWEST)
    if not len(can_fail):
        return _untested(kind)
    places = [places[int(pair)] for pair in can_fail]
    value, num = value[can_fail], num[can_fail]
    bound = correlation_bound(num, ALPHA / len(value))
    excess = np.abs(value) / bound
    worst = _first_largest(excess)
    return _check(
        f"{CORRELATION}{kind}",
        f"correlation of {kind}",
        (float(value[worst]), float(bound[worst])),
        places[worst],
        len(value),
        int((~(excess <= 1)).sum()),
    )


def _untested(kind: str) -> NoiseCheck:
    return untested(
        f"{CORRELATION}{kind}",
        f"correlation of {kind}",
        f"no two {kind} have {_FEWEST} elements in common, so that they were not compared",
    )


def _check(
    name: str,
    title: str,
    found: tuple[float, float],
    place: Place,
    num_cells: int,
    num_failed: int,
) -> NoiseCheck:
    value, reach = found
    sentence = f"the correlation of its noise between {place.text} is {value:.3f} where chance "
    sentence += f"explains {reach:.3f}"
    if num_failed and value > SAME:
        sentence += ": they are the same"
    if num_failed > 1:
        sentence += f" ({num_failed} of {num_cells} are out of bounds)"
    return NoiseCheck(
        name=name,
        title=title,
        value=value,
        low=max(value - reach, -1.0),
        high=min(value + reach, 1.0),
        expected=0.0,
        is_ok=num_failed == 0,
        place=place,
        sentence=sentence,
        num_cells=num_cells,
        num_failed=num_failed,
    )


def _check_pairs(
    kind: str, parts: Sequence[Place], samples: Samples, held: Bools, *, axis: int
) -> NoiseCheck:
    """Correlate all `parts` along `axis`, over everything and for each parameter separately."""
    every = np.moveaxis(samples.even, axis, 0)
    kept = np.moveaxis(held, axis, 0)
    shape = (len(parts), -1)
    found = [correlations(every.reshape(shape), kept.reshape(shape))]
    pairs = pairs_of(parts)
    places = [*pairs]
    for p, name in enumerate(samples.parameters):
        found.append(correlations(every[:, :, p].reshape(shape), kept[:, :, p].reshape(shape)))
        places += [replace(q, text=f"{q.text} in {name}", parameters=(name,)) for q in pairs]
    value, num = map(np.concatenate, zip(*found, strict=True))
    check = correlation_check(kind, places, value, num)
    if check.is_ok or abs(check.value) > SAME:
        return check
    # Kept elements behind the leading ones are at other positions in shards of other sizes.
    leading = every[..., :_CONSECUTIVE].reshape(shape), kept[..., :_CONSECUTIVE].reshape(shape)
    if correlations(*leading)[0].max() <= SAME:
        return check
    return replace(check, sentence=f"{check.sentence}: their shards begin with the same numbers")


def pairs_of(parts: Iterable[Place]) -> list[Place]:
    """Pairs of `parts`, in the order of `correlations`."""
    return [Place.of_pair(first, second) for first, second in combinations(parts, 2)]


def _check_neighbours(samples: Samples) -> NoiseCheck:
    """Correlate elements of a shard that are 1 to _LAGS apart, over everything and by parameter."""
    P = len(samples.parameters)
    first = np.moveaxis(samples.even[..., :_CONSECUTIVE], 2, 0)
    held = np.moveaxis(np.broadcast_to(samples.held, samples.even.shape)[..., :_CONSECUTIVE], 2, 0)
    lags = range(1, min(_LAGS, first.shape[-1] - 1) + 1)
    value, num = np.zeros((len(lags), P + 1)), np.zeros((len(lags), P + 1), dtype=np.int64)
    axes = (1, 2, 3)
    for row, lag in enumerate(lags):
        here, there = first[..., :-lag], first[..., lag:]
        both = held[..., :-lag] & held[..., lag:]
        sums = [
            np.append(total, total.sum())
            for total in (
                (here * there * both).sum(axis=axes),
                (np.square(here) * both).sum(axis=axes),
                (np.square(there) * both).sum(axis=axes),
                both.sum(axis=axes),
            )
        ]
        scale = np.sqrt(sums[1] * sums[2])
        value[row] = np.divide(sums[0], scale, out=np.zeros(P + 1), where=scale > 0)
        num[row] = sums[3]
    places = []
    for lag in lags:
        apart = f"elements {lag} apart"
        places += [Place.of_parameter(name, f"{apart} in ") for name in samples.parameters]
        places.append(Place(text=apart))
    # Fewer tell nothing: `correlation_check` leaves them out.
    num[num < _FEWEST_PRODUCTS] = 0
    return correlation_check("neighbours", places, value.ravel(), num.ravel())


def _check_reuse(samples: Samples) -> NoiseCheck:
    """Correlate the leading elements of any two shards of any parameter, rank and step."""
    S, W, P, _ = samples.even.shape
    rows = samples.even[..., :_CONSECUTIVE].reshape(S * W * P, -1)
    held = np.broadcast_to(samples.held, samples.even.shape)[..., :_CONSECUTIVE]
    weights = held.reshape(len(rows), -1).astype(np.float64)
    # Only shards with enough elements can fail.
    num_long = int((weights.sum(axis=1) >= _FEWEST).sum())
    num_pairs = max(num_long * (num_long - 1) // 2, 1)
    bound = correlation_bound(np.arange(_CONSECUTIVE + 1), ALPHA / num_pairs)
    bound[:_FEWEST] = np.inf
    squares, worst, num_failed = np.square(rows), (0.0, 0, 0, 0.0, np.inf), 0
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = slice(start, start + _ROWS_AT_ONCE)
        scale = np.sqrt((squares[some] @ weights.T) * (weights[some] @ squares.T))
        value = np.divide(rows[some] @ rows.T, scale, out=np.zeros_like(scale), where=scale > 0)
        reach = bound[(weights[some] @ weights.T).astype(np.int64)]
        excess = np.triu(np.abs(value) / reach, k=start + 1)
        num_failed += int((~(excess <= 1)).sum())
        i, j = np.unravel_index(_first_largest(excess), excess.shape)
        if excess[i, j] > worst[0]:
            worst = (excess[i, j], start + int(i), int(j), value[i, j], reach[i, j])
    place = Place.of_pair(*map(samples.place, worst[1:3]))
    found = (float(worst[3]), float(worst[4]))
    title = "correlation of any two shards"
    return _check(REUSE, title, found, place, num_pairs, num_failed)


def _first_largest(excess: Floats) -> int:
    """Flat index of the first of the largest values, robust to rounding that varies by machine."""
    return int(excess.round(9).argmax())
