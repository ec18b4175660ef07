"""Bounds on statistics of independent normal numbers of mean zero, exact where a formula is known.

Each function returns how far an estimate may lie from its expected value; with probability `alpha`
it lies farther. All take arrays, one test per element.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Floats = NDArray[np.float64]


def std_interval(sum_sq: ArrayLike, dof: ArrayLike, alpha: float) -> tuple[Floats, Floats, Floats]:
    """Estimate of the std, and the ends of its confidence interval.

    Args:
        sum_sq: sum of squares: std^2 times a chi-square variable.
        dof: degrees of freedom of that variable.
    """
    squares, shape = np.asarray(sum_sq, np.float64), np.asarray(dof, np.float64) / 2
    # A chi-square variable is twice a gamma variable.
    least, most = (2 * f(shape, alpha / 2) for f in (special.gammaincinv, special.gammainccinv))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(squares / (2 * shape)), np.sqrt(squares / most), np.sqrt(squares / least)


def correlation_bound(num: ArrayLike, alpha: float) -> Floats:
    """Largest |r| between two vectors of `num` elements, their means known to be zero.

    If either is normal, r^2 has a beta distribution: the direction of a normal vector is uniform.
    """
    shape = (np.asarray(num, np.float64) - 1) / 2
    bound = np.sqrt(special.betainccinv(0.5, np.maximum(shape, 0.5), alpha))
    return np.asarray(np.where(shape > 0, bound, 1.0))


def kolmogorov_distance(values: Floats) -> float:
    """Largest distance between the distribution of `values` and that of normal(0, 1)."""
    below = special.ndtr(np.sort(values))
    ranks = np.arange(len(values) + 1) / len(values)
    return float(np.maximum(ranks[1:] - below, below - ranks[:-1]).max())


def kolmogorov_bound(num: int, alpha: float) -> float:
    """Largest such distance; conservative, since the distribution for any `num` lies below the
    limiting one.
    """
    return float(special.kolmogi(alpha) / np.sqrt(num))


@lru_cache(maxsize=4096)
def hermite_bound(order: int, num: int, alpha: float) -> tuple[float, float]:
    """Least and largest mean of `num` values of a Hermite polynomial of normal numbers.

    H_3(z) = z^3 - 3 z has the skewness as its mean, and H_4(z) = z^4 - 6 z^2 + 3 the kurtosis less
    3. Their means are normal only where `num` is large: a single large z moves them. So with a
    probability of alpha / 2 some |z| is larger than a; and as long as none is, Chernoff's bound
    holds: mean > x has a probability of exp(num (log E exp(t H(z)) - t x)) at most, for any t > 0.
    """
    largest = float(-special.ndtri(alpha / 4 / num))
    nodes, weights = np.polynomial.legendre.leggauss(256)
    z = nodes * largest
    density = weights * largest * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    values = z**3 - 3 * z if order == 3 else z**4 - 6 * z**2 + 3
    cost = math.log(4 / alpha) / num
    # The best t for a normal mean, of variance order! / num, and others around it.
    ts = math.sqrt(2 * cost / math.factorial(order)) * np.geomspace(1 / 32, 2, 48)
    low, high = (
        float(((special.logsumexp(side * ts[:, None] * values, 1, density) + cost) / ts).min())
        for side in (-1, 1)
    )
    return -low, high


def beyond(distance: ArrayLike) -> Floats:
    """Probability that |z| is larger than `distance`."""
    return np.asarray(2 * special.ndtr(-np.asarray(distance, np.float64)))


def log_beyond(distance: ArrayLike) -> Floats:
    """Logarithm of `beyond`, which is 0 in float64 from 38.5 on."""
    return np.asarray(math.log(2) + special.log_ndtr(-np.asarray(distance, np.float64)))


def share_interval(
    few: ArrayLike, many: ArrayLike, num: ArrayLike, alpha: float
) -> tuple[Floats, Floats]:
    """Exact confidence interval of a probability, given the counts in `num` draws.

    Args:
        few: the least possible count, which determines the lower end.
        many: the largest possible count, which determines the upper end.
    Source:
        Clopper and Pearson, 1934, "The use of confidence or fiducial limits".
    """
    least, most, n = (np.asarray(v, np.float64) for v in (few, many, num))
    low = special.betaincinv(np.maximum(least, 1), n - least + 1, alpha / 2)
    high = special.betainccinv(most + 1, np.maximum(n - most, 1), alpha / 2)
    return np.where(least > 0, low, 0.0), np.where(most < n, high, 1.0)
