"""Forms of faulty noise that explain its failed checks, told in place of them.

They are looked for where a check has failed only, so they need no bound on false alarms; each
demands far more than chance makes.

Legend: S steps, W ranks, P parameters, M elements of a shard, L lag.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.audit.noise.check import NoiseCheck, Place
from dpsgd_track.comparison.audit.noise.other_forms import other_form
from dpsgd_track.comparison.audit.noise.samples import FINE, Samples
from dpsgd_track.record.trajectory import Floats

STRUCTURE = "structure"
_CLOSE = 4 * FINE
"""Elements that differ by less, in units of sigma C, are taken for equal."""
_EXACT, _FEW_COPIES = 2.0**-20, 3
"""Distance below which two of 256 normal numbers are in one of a hundred steps, and how many pairs
of a step are no sign of copies."""
_LEADING = 128
"""This many kept elements of a large shard are its first ones."""
_FEWEST = 16
"""Least number of repeated elements in a shard."""
_MOST_VALUES, _VALUES_SHARE = 1024, 1 / 16
"""Most different values of noise that takes few, in all and as a share of the elements."""
_OF_NORMAL = 0.5
"""Most values as a share of those of normal noise of the same stds."""
_LEAST_SHARE_OF_STEP, _SPREAD = 0.25, 0.15
"""Least share of a step's noise in the next one's, and how much it may vary over the steps."""


def explanation(samples: Samples) -> NoiseCheck | None:
    """The first form that the noise has, as a check that failed; None for no known form."""
    forms: tuple[Callable[[Samples], tuple[str, Place] | None], ...] = (
        _few_values,
        _zeros_at_the_end,
        _repeated,
        _other_distribution,
        _carried_over,
    )
    for form in forms:
        if found := form(samples):
            sentence, place = found
            return NoiseCheck(
                name=STRUCTURE,
                title="known form of faulty noise",
                value=1.0,
                low=1.0,
                high=1.0,
                expected=0.0,
                is_ok=False,
                place=place,
                sentence=sentence,
                num_failed=1,
                explains_others=True,
            )
    return None


def _other_distribution(samples: Samples) -> tuple[str, Place] | None:
    said = other_form(samples)
    return (said, Place()) if said else None


def _few_values(samples: Samples) -> tuple[str, Place] | None:
    """Noise from a table, or of signs alone."""
    if samples.resolution > FINE:
        return None
    flat = samples.noise[:, samples.held]
    flat = flat[flat != 0]
    num = _num_values(flat)
    if not 1 < num <= min(_MOST_VALUES, _VALUES_SHARE * flat.size):
        return None
    # Noise of a small std has few values on any grid.
    sizes = np.sqrt(samples.sum_sq / np.maximum(samples.num, 1))[..., None]
    normal = np.random.default_rng(0).standard_normal(samples.noise.shape) * sizes
    if num > _OF_NORMAL * _num_values(normal[:, samples.held]):
        return None
    return f"its noise takes {num} different values only, in {flat.size:,} elements", Place()


def _num_values(flat: Floats) -> int:
    """Different values of elements, [n]."""
    values = np.unique(np.rint(flat / _CLOSE))
    # A value that lies between two bins falls into both.
    return int((np.diff(values, prepend=-np.inf) > 1).sum())


def _zeros_at_the_end(samples: Samples) -> tuple[str, Place] | None:
    """Noise that ends before the last elements of its shards."""
    ends: list[tuple[int, int]] = []
    """(elements with noise, elements) of shards that have some without."""
    places: list[str] = []
    for w, p in np.ndindex(samples.held.shape[:2]):
        num = int(samples.held[w, p].sum())
        is_zero = (samples.noise[:, w, p, :num] == 0).all(axis=0)
        if not is_zero.any() or is_zero.all():
            continue
        end = int(np.argmax(is_zero))
        # Of a large shard the positions behind the leading ones are not known.
        if not is_zero[end:].all() or (num == samples.held.shape[-1] and end >= _LEADING):
            return None
        ends.append((end, num))
        places.append(samples.parameters[p])
    if sum(num - end for end, num in ends) < 4:
        return None
    first = {end for end, _ in ends}
    unit = math.gcd(*first)
    # One end is a multiple of any of its divisors.
    is_round = len(first) > 1 or unit.bit_count() == 1
    if is_round and all(num - end < unit for end, num in ends):
        said = f"the last elements, past the last multiple of {unit}, have no noise"
    elif len(first) == 1 and len(ends) > 1:
        said = f"the first {unit} elements of a shard alone have noise"
    else:
        said = "the last elements have no noise"
    return f"{said} {_in(samples, places)}", _place(samples, places)


def _repeated(samples: Samples) -> tuple[str, Place] | None:
    """Noise that was drawn for a part of a parameter, and repeated."""
    W = samples.held.shape[0]
    found = {
        name: lag
        for p, name in enumerate(samples.parameters)
        if (lag := _lag(samples, p)) is not None
    }
    if not found:
        return None
    whole = {
        found[name]
        for p, name in enumerate(samples.parameters)
        if name in found and _is_whole(samples, p)
    }
    # Of large shards longer distances are not known.
    more = [
        name
        for p, name in enumerate(samples.parameters)
        if name not in found and any(_has_copies(samples.noise[:, w, p]) for w in range(W))
    ]
    lags, places = {*found.values()}, [*found]
    if whole == {_HALF} and min(lags) >= 0:
        said = "the second half of its noise repeats the first"
    elif min(lags) < 0:
        each = f"{-max(lags)} elements" if len(lags) == 1 else "several elements"
        said = f"one number of its noise stands for {each} in a row, as if drawn once for a row,"
    else:
        each = f"every {max(lags)} elements" if len(lags) == 1 else "at some distance"
        said = f"its noise repeats {each}, as if one row were drawn for all,"
    said = f"{said} {_in(samples, places)}"
    if whole == {_HALF} and min(lags) >= 0:
        said += ", as where two ranks draw the same noise for their shards"
    if more:
        said += f"; copies at distances that are not known are in {len(more)} more"
    return said, _place(samples, places + more)


_HALF = 0
"""In place of a lag: half of the elements."""


def _lag(samples: Samples, p: int) -> int | None:
    """Distance at which a parameter's elements repeat; minus the length of runs of equal ones."""
    lags = {_lag_of(rows, is_whole=is_whole) for rows, is_whole in _shards(samples, p)}
    return lags.pop() if len(lags) == 1 else None


def _is_whole(samples: Samples, p: int) -> bool:
    """True if all elements of a parameter's shards are known, and so if their half is."""
    return all(is_whole for _, is_whole in _shards(samples, p))


def _shards(samples: Samples, p: int) -> Iterator[tuple[Floats, bool]]:
    """Consecutive elements of a parameter's shards on each rank, [S, N]; True for all of them."""
    M = samples.held.shape[-1]
    for w in range(samples.held.shape[0]):
        num = int(samples.held[w, p].sum())
        if num:
            is_whole = num < M
            yield samples.noise[:, w, p, : num if is_whole else min(num, _LEADING)], is_whole


def _lag_of(rows: Floats, *, is_whole: bool) -> int | None:
    num = rows.shape[-1]
    if num < 2 * _FEWEST or not rows.any():
        return None
    if (run := _length_of_runs(rows)) > 1:
        return -run
    for lag in range(2, num - _FEWEST + 1):
        if _are_equal(rows[:, lag:], rows[:, :-lag]):
            # Of an odd number of elements the first half is the larger.
            return _HALF if is_whole and 2 * lag - num in (0, 1) else lag
    return None


def _length_of_runs(rows: Floats) -> int:
    """Number of equal elements in a row, where all but the last have as many."""
    is_change = np.flatnonzero((np.abs(np.diff(rows, axis=-1)) > _CLOSE).any(axis=0)) + 1
    if not len(is_change) or len(is_change) > rows.shape[-1] // 2:
        return 1
    length = int(is_change[0])
    expected = np.arange(length, rows.shape[-1], length)
    return length if np.array_equal(is_change, expected) else 1


def _has_copies(rows: Floats) -> bool:
    """True if more elements of a step are equal than chance makes, [S, M]."""
    gaps = np.diff(np.sort(np.where(rows == 0, np.nan, rows), axis=-1), axis=-1)
    return bool(((gaps <= _EXACT).sum(axis=-1) > _FEW_COPIES).any())


def _are_equal(some: Floats, others: Floats) -> bool:
    return bool((np.abs(some - others) <= _CLOSE).all())


def _carried_over(samples: Samples) -> tuple[str, Place] | None:
    """Noise that holds a part of that of the step before."""
    rows = samples.noise[:, samples.held]
    squares = np.square(rows[:-1]).sum(axis=1)
    if len(rows) < 3 or not squares.all():
        return None
    share: NDArray[np.float64] = (rows[1:] * rows[:-1]).sum(axis=1) / squares
    is_alike = share.max() - share.min() <= _SPREAD
    # What is drawn once for all steps is another fault.
    is_same = _are_equal(rows[1:], rows[:-1])
    if not is_alike or is_same or np.abs(share).min() < _LEAST_SHARE_OF_STEP:
        return None
    times = f"{share.min():.2f} to {share.max():.2f}"
    sums_up = ", so that it adds up from step to step" if share.min() > 0.9 else ""
    said = f"the noise of each step holds {times} times that of the step before{sums_up}"
    return said, Place(step=samples.steps[1])


def _in(samples: Samples, names: list[str]) -> str:
    names = [*dict.fromkeys(names)]
    num = len(names)
    if num == len(samples.parameters):
        return "in all parameters"
    return f"in {names[0]}" if num == 1 else f"in {num} of {len(samples.parameters)} parameters"


def _place(samples: Samples, names: list[str]) -> Place:
    names = [*dict.fromkeys(names)]
    return Place() if len(names) == len(samples.parameters) else Place(parameters=tuple(names))
