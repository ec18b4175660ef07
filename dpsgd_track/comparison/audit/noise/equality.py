"""Checks that no element of the noise is zero or equal to another.

The probability that two elements are equal by chance depends on how finely they are rounded, which
is unknown: an element is the difference of two sums and has the grid of both. But correct noise is
positive as often as negative. So among the pairs of elements of one size, as many are equal as are
opposite, and given the sizes only the signs are random: the check is exact on any grid that treats
both signs alike. A copy shows among the equal pairs only.

Legend: S steps, W ranks, P parameters, M elements of a shard, T values of the bound's parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from dpsgd_track.comparison.audit.noise.check import ALPHA, NoiseCheck, Place, untested
from dpsgd_track.comparison.audit.noise.gaussian import share_interval
from dpsgd_track.comparison.audit.noise.samples import COARSE, Samples
from dpsgd_track.record.trajectory import Floats

ZEROS, EQUAL_VALUES = "zeros", "equal_values"
_DENSITY_AT_0 = 1 / math.sqrt(2 * math.pi)
_FINE_WIDTHS = (2.0**-22, 2.0**-18, 2.0**-14)
"""Bin widths in units of sigma C: elements of one size differ by less. Copies differ by the
rounding of the sums that they were added to."""
_LARGEST_BIN = 256
"""Larger bins are skipped, since equality tells little in them."""
_PARAMETERS = np.geomspace(1e-5, 8, 56)
"""[T] parameters of the bound; it holds for any, and is tightest near the optimum."""

Integers = NDArray[np.int64]


def check_zeros(samples: Samples) -> NoiseCheck:
    """Check for elements that are exactly zero, over everything and by part.

    A shard without any noise is left out: its std reports that.
    """
    if samples.resolution >= COARSE:
        return _untested_zeros()
    held = samples.held & samples.noise.any(axis=-1, keepdims=True)
    is_zero = held & (samples.noise == 0)
    places, counts, nums = [], [], []
    for some, axes in samples.parts():
        places += some
        counts.append(np.ravel(is_zero.sum(axis=(*axes, 3))))
        nums.append(np.ravel(held.sum(axis=(*axes, 3))))
    count, num = np.concatenate(counts), np.concatenate(nums)
    filled = np.flatnonzero(num)
    places, count, num = [places[int(i)] for i in filled], count[filled], num[filled]
    low, _ = share_interval(count, count, num, 2 * ALPHA / len(num))
    expected = _DENSITY_AT_0 * samples.resolution
    worst = int(low.argmax())
    most, n = int(count[worst]), int(num[worst])
    return NoiseCheck(
        name=ZEROS,
        title="share of zeros",
        value=most / max(n, 1),
        low=float(low[worst]),
        high=1.0,
        expected=expected,
        is_ok=bool((low <= expected).all()),
        place=places[worst],
        sentence=f"{most} of its {n} elements{places[worst].suffix} are exactly 0 where rounding "
        f"explains {n * expected:.2g}",
        num_cells=len(places),
        num_failed=int((low > expected).sum()),
    )


def _untested_zeros() -> NoiseCheck:
    return untested(
        ZEROS,
        "share of zeros",
        "its updates are of a low precision, where small noise beside a large sum is rounded to 0, "
        "so that single zeros were not looked for",
    )


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """One way to group the elements that are compared with each other."""

    name: str
    """Name in a sentence."""
    group: Integers
    """Group of each element."""
    num_groups: int


@dataclass(frozen=True, kw_only=True)
class _Bins:
    """Bins of elements of one group and one size, with 2 to _LARGEST_BIN elements each."""

    group: Integers
    size: Integers
    num: Integers
    surplus: Floats
    """Number of equal pairs minus opposite ones."""


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """A group, or all groups of a kind together."""

    kind: _Kind
    width: float
    group: int | None
    """None for all."""
    surplus: float
    num_pairs: float
    reach: float
    """Largest surplus that chance explains."""

    @property
    def excess(self) -> float:
        """Surplus relative to its limit; more than 1 is out of bounds."""
        return abs(self.surplus) / self.reach


def check_equal_values(samples: Samples) -> NoiseCheck:
    """Compare the numbers of equal and opposite pairs, from single shards up to the whole run."""
    present = np.flatnonzero(samples.held & (samples.noise != 0))
    values = samples.noise.ravel()[present]
    values = values / math.sqrt(float(np.square(values).mean()))
    kinds = list(_kinds(samples, present))
    widths = (samples.resolution,) if samples.resolution >= COARSE else _FINE_WIDTHS

    def cells(alpha: float) -> list[_Cell]:
        return [c for width in widths for kind in kinds for c in _cells(values, width, kind, alpha)]

    # The sizes decide which cells can fail, and given the sizes only the signs are random.
    can_fail = [cell.num_pairs > cell.reach for cell in cells(ALPHA)]
    num_cells = max(sum(can_fail), 1)
    every = cells(ALPHA / num_cells)
    found = [cell for cell, can in zip(every, can_fail, strict=True) if can] or every[:1]
    worst = max(found, key=lambda cell: cell.excess)
    num_failed = sum(cell.excess > 1 for cell in found)
    pairs = max(worst.num_pairs, 1.0)
    share, reach = (1 + worst.surplus / pairs) / 2, worst.reach / pairs / 2
    first, second = (present[i] for i in _example(values, worst))
    return NoiseCheck(
        name=EQUAL_VALUES,
        title="share of equal pairs, not opposite ones",
        value=share,
        low=max(share - reach, 0.0),
        high=min(share + reach, 1.0),
        expected=0.5,
        is_ok=num_failed == 0,
        place=samples.place(first // samples.noise.shape[-1]) if num_failed else Place(),
        sentence=_sentence(samples, worst, first, second),
        num_cells=num_cells,
        num_failed=num_failed,
        # Noise that is not symmetric has more equal pairs too, and not much fewer opposite ones.
        explains_others=num_failed > 0 and abs(worst.surplus) > pairs / 2,
    )


def _kinds(samples: Samples, present: Integers) -> Iterator[_Kind]:
    S, W, P, M = samples.noise.shape
    s, w, p = np.unravel_index(present // M, (S, W, P))
    yield _Kind(name=" in one shard", group=(s * W + w) * P + p, num_groups=S * W * P)
    yield _Kind(name=" in one parameter at one step", group=s * P + p, num_groups=S * P)
    yield _Kind(name=" on one rank at one step", group=s * W + w, num_groups=S * W)
    yield _Kind(name=" at one step", group=s, num_groups=S)
    yield _Kind(name="", group=np.zeros_like(s), num_groups=1)


def _sizes(values: Floats, width: float) -> Integers:
    return np.floor(np.abs(values) / width).astype(np.int64)


def _bins(values: Floats, width: float, group: Integers) -> _Bins:
    size = _sizes(values, width)
    order = np.lexsort((size, group))
    group, size = group[order], size[order]
    is_first = np.append(True, (np.diff(group) != 0) | (np.diff(size) != 0))
    starts = np.flatnonzero(is_first)
    num = np.diff(np.append(starts, len(order)))
    total = np.add.reduceat(np.sign(values[order]), starts)
    kept = (num >= 2) & (num <= _LARGEST_BIN)
    starts, num, total = starts[kept], num[kept], total[kept]
    return _Bins(group=group[starts], size=size[starts], num=num, surplus=(total**2 - num) / 2)


def _cells(values: Floats, width: float, kind: _Kind, alpha: float) -> Iterator[_Cell]:
    """All groups of `kind` together, and each that has a pair of one size."""
    bins = _bins(values, width, kind.group)
    groups, index = np.unique(bins.group, return_inverse=True)
    surplus = np.bincount(index, bins.surplus, len(groups))
    num_pairs = np.bincount(index, bins.num * (bins.num - 1) / 2, len(groups))
    moments = np.stack(
        [[np.bincount(index, row[bins.num], len(groups)) for row in side] for side in log_moments()]
    )
    rows = zip(
        [None, *groups.tolist()],
        np.append(surplus.sum(), surplus),
        np.append(num_pairs.sum(), num_pairs),
        np.moveaxis(np.append(moments.sum(axis=-1, keepdims=True), moments, axis=-1), -1, 0),
        strict=True,
    )
    for group, more, pairs, (equal, opposite) in rows:
        moment = equal if more >= 0 else opposite
        yield _Cell(
            kind=kind,
            width=width,
            group=group,
            surplus=float(more),
            num_pairs=float(pairs),
            reach=float(((moment - math.log(alpha / 2)) / _PARAMETERS).min()),
        )


@lru_cache(maxsize=1)
def log_moments() -> Floats:
    """[2, T, _LARGEST_BIN + 1] log E exp(t x) of the surplus x, and of -x, by number of elements m.

    The signs are independent and even. If k are positive, (2 k - m)^2 / 2 - m / 2 is the surplus.
    Chernoff: the surplus of all bins is larger than (sum of these + log(1 / alpha)) / t with a
    probability of alpha at most, for any t > 0.
    """
    found = np.zeros((2, len(_PARAMETERS), _LARGEST_BIN + 1))
    for m in range(2, _LARGEST_BIN + 1):
        k = np.arange(m + 1)
        log_probability = (
            special.gammaln(m + 1)
            - special.gammaln(k + 1)
            - special.gammaln(m - k + 1)
            - m * math.log(2)
        )
        surplus = ((2 * k - m) ** 2 - m) / 2
        for side, sign in enumerate((1, -1)):
            exponents = log_probability + sign * _PARAMETERS[:, None] * surplus
            found[side, :, m] = special.logsumexp(exponents, axis=1)
    return found


def _example(values: Floats, cell: _Cell) -> tuple[int, int]:
    """Two elements that are equal, or opposite if there are too many opposite pairs."""
    bins = _bins(values, cell.width, cell.kind.group)
    if not len(bins.num):
        return 0, 0
    side = 1 if cell.surplus >= 0 else -1
    of_group = np.bincount(bins.group, side * bins.surplus)
    group = int(of_group.argmax()) if cell.group is None else cell.group
    at = int(np.where(bins.group == group, side * bins.surplus, -np.inf).argmax())
    is_member = cell.kind.group == bins.group[at]
    members = np.flatnonzero(is_member & (_sizes(values, cell.width) == bins.size[at]))
    positive = values[members] > 0
    if side < 0:
        return int(members[positive.argmax()]), int(members[(~positive).argmax()])
    usual = members[positive == (2 * positive.sum() >= len(members))]
    return int(usual[0]), int(usual[-1])


def _sentence(samples: Samples, cell: _Cell, first: int, second: int) -> str:
    value, other = (float(samples.noise.ravel()[i]) for i in (first, second))
    equal, opposite = (round((cell.num_pairs + sign * cell.surplus) / 2) for sign in (1, -1))
    M = samples.noise.shape[-1]
    places = [samples.place(element // M).text for element in (first, second)]
    where = (
        f"elements {first % M} and {second % M} kept of {places[0]}"
        if places[0] == places[1]
        else f"one of {places[0]} and one of {places[1]}"
    )
    relation = "both" if cell.surplus >= 0 else f"{other:.5g} and"
    return (
        f"{equal} pairs of elements of its noise{cell.kind.name} are equal and {opposite} "
        f"opposite, where chance makes as many of either: {where} are {relation} {value:.5g} "
        "sigma C"
    )
