"""Checks that the noise is normal with mean zero, and that no value occurs again and again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from dpsgd_track.comparison.audit.noise.check import ALPHA, NoiseCheck, Place
from dpsgd_track.comparison.audit.noise.gaussian import (
    correlation_bound,
    hermite_bound,
    kolmogorov_bound,
    kolmogorov_distance,
)
from dpsgd_track.comparison.audit.noise.samples import Samples
from dpsgd_track.record.trajectory import Floats

REPETITION = "repetition"
MEAN = "mean"
SHAPE = (MEAN, "distribution", "kurtosis")
_FEWEST_FOR_KURTOSIS = 1000
"""Fewest elements whose kurtosis is checked: that of fewer rests on the largest alone."""
_REPEATED, _REPEATED_SHARE = 8, 0.05
"""Largest number and share of a shard's elements that may be equal, unless rounding makes more
equal. By chance, two may be in float32, and nine of 256 in bfloat16."""
_DENSITY_AT_0 = 1 / math.sqrt(2 * math.pi)

Bools = NDArray[np.bool_]


def check_shape(samples: Samples) -> Iterator[NoiseCheck]:
    """All checks of this module; of noise that is zero everywhere only the first.

    A step without any noise is left out: its std reports that.
    """
    yield _check_mean(samples)
    if samples.noise.any():
        has_noise = np.asarray(samples.noise.any(axis=(1, 2, 3), keepdims=True))
        present = samples.held & has_noise
        yield _check_distribution(samples.even[present])
        if present.sum() >= _FEWEST_FOR_KURTOSIS:
            yield _check_kurtosis(samples, samples.noise[present], has_noise)
        yield _check_repetition(samples)


def _check_mean(samples: Samples) -> NoiseCheck:
    total, num = samples.noise.sum(axis=-1), samples.num
    places, sums, squares, nums = [], [], [], []
    for some, axes in samples.parts():
        places += some
        sums.append(np.ravel(total.sum(axis=axes)))
        squares.append(np.ravel(samples.sum_sq.sum(axis=axes)))
        nums.append(np.ravel(num.sum(axis=axes)))
    n = np.concatenate(nums)
    filled = np.flatnonzero(n)
    n, places = n[filled], [places[int(i)] for i in filled]
    mean = np.concatenate(sums)[filled] / n
    # The mean over the root mean square is the correlation with a vector of ones.
    bound = correlation_bound(n, ALPHA / len(n)) * np.sqrt(np.concatenate(squares)[filled] / n)
    excess = np.divide(np.abs(mean), bound, out=np.zeros_like(mean), where=bound > 0)
    worst = int(excess.argmax())
    value, reach = float(mean[worst]), float(bound[worst])
    return NoiseCheck(
        name=MEAN,
        title="mean of the noise",
        value=value,
        low=value - reach,
        high=value + reach,
        expected=0.0,
        is_ok=bool((excess <= 1).all()),
        place=places[worst],
        sentence=f"the mean of its noise{places[worst].suffix} is {value:.4f} sigma C where chance "
        f"explains {reach:.4f}",
        num_cells=len(n),
        num_failed=int((~(excess <= 1)).sum()),
    )


def _check_distribution(flat: Floats) -> NoiseCheck:
    value, reach = kolmogorov_distance(flat), kolmogorov_bound(len(flat), ALPHA)
    return NoiseCheck(
        name="distribution",
        title="distance from the normal distribution",
        value=value,
        low=max(value - reach, 0.0),
        high=value + reach,
        expected=0.0,
        is_ok=value <= reach,
        sentence=f"the distribution of its noise is {value:.4f} from the normal one "
        f"(Kolmogorov-Smirnov; chance explains {reach:.4f})",
        num_failed=int(not value <= reach),
    )


def _check_kurtosis(samples: Samples, flat: Floats, has_noise: Bools) -> NoiseCheck:
    places, found = [Place()], [flat]
    for p, name in enumerate(samples.parameters):
        held = samples.held[:, p] & has_noise[:, :, 0]
        if held.sum() >= _FEWEST_FOR_KURTOSIS:
            places.append(Place.of_parameter(name, "in "))
            found.append(samples.noise[:, :, p][held])
    bounds = [hermite_bound(4, len(v), ALPHA / len(found)) for v in found]
    away = [float((v**4 - 6 * v**2).mean() + 3) for v in found]
    excess = np.array(
        [d / (high if d > 0 else low) for d, (low, high) in zip(away, bounds, strict=True)]
    )
    worst = int(excess.argmax())
    (low, high), kurtosis = bounds[worst], 3 + away[worst]
    return NoiseCheck(
        name="kurtosis",
        title="kurtosis of the noise",
        value=kurtosis,
        low=kurtosis - high,
        high=kurtosis - low,
        expected=3.0,
        is_ok=bool((excess <= 1).all()),
        place=places[worst],
        sentence=f"the kurtosis of its noise{places[worst].suffix} is {kurtosis:.3f} where normal "
        f"noise has 3 and chance explains {3 + low:.3f} to {3 + high:.3f}",
        num_cells=len(found),
        num_failed=int((~(excess <= 1)).sum()),
    )


def _check_repetition(samples: Samples) -> NoiseCheck:
    S, W, P, _ = samples.noise.shape
    worst, place, count, num, value, num_failed = 0.0, Place(), 0, 0, 0.0, 0
    share, alpha = samples.resolution * _DENSITY_AT_0, ALPHA / (S * W * P)
    for shard, (s, w, p) in enumerate(np.ndindex(S, W, P)):
        values = samples.noise[s, w, p, samples.held[w, p]]
        if not values.any():
            continue  # an empty shard, or one without noise, which its std reports
        unique, counts = np.unique(values, return_counts=True)
        most = int(counts.max())
        excess = most / _most_equal(len(values), share, alpha)
        num_failed += excess > 1
        if excess > worst:
            worst, place, count, num = excess, samples.place(shard), most, len(values)
            value = float(unique[counts.argmax()])
    limit = _most_equal(num, share, alpha)
    return NoiseCheck(
        name=REPETITION,
        title="share of one value in a shard",
        value=count / num,
        low=max(count - limit, 0) / num,
        high=min(count + limit, num) / num,
        expected=0.0,
        is_ok=worst <= 1,
        place=place,
        sentence=f"the value {value:.3g} stands {count} times among {num} elements of its noise "
        f"in {place.text}",
        num_cells=S * W * P,
        num_failed=num_failed,
    )


@lru_cache(maxsize=1024)
def _most_equal(num: int, share: float, alpha: float) -> float:
    """Largest number of equal elements; chance makes more with a probability of alpha at most.

    Args:
        share: probability of the most likely value.
    """
    counts = np.arange(1, num)
    # That of `count` or more, all over the few likeliest values.
    chance = special.betainc(counts, num - counts + 1, min(share, 1.0)) / share
    can_be = counts[chance > alpha]
    return max(_REPEATED, _REPEATED_SHARE * num, float(can_be.max(initial=0)))
