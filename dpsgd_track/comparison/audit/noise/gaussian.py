"""Bounds on statistics of independent normal numbers of mean zero, exact where a formula is known.

Each function returns how far an estimate may lie from its expected value; with probability `alpha`
it lies farther. All take arrays, one test per element.
"""

from __future__ import annotations

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


def kurtosis_bounds(num: int, alpha: float) -> tuple[float, float]:
    """Smallest and largest E[z^4] / E[z^2]^2 of `num` values, 20 at least.

    Source: Anscombe and Glynn, 1983, "Distribution of the kurtosis statistic b2 for normal
    samples".
    """
    n = float(num)
    mean = 3 * (n - 1) / (n + 1)
    variance = 24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    skewness = 6 * (n * n - 5 * n + 2) / ((n + 7) * (n + 9))
    skewness *= np.sqrt(6 * (n + 3) * (n + 5) / (n * (n - 2) * (n - 3)))
    a = 6 + 8 / skewness * (2 / skewness + np.sqrt(1 + 4 / skewness**2))
    z = -special.ndtri(alpha / 2)
    bounds = []
    for side in (-z, z):
        root = 1 - 2 / (9 * a) - side * np.sqrt(2 / (9 * a))
        x = ((1 - 2 / a) / root**3 - 1) / np.sqrt(2 / (a - 4)) if root > 0 else np.inf
        bounds.append(float(mean + x * np.sqrt(variance)))
    return bounds[0], bounds[1]


def beyond(distance: ArrayLike) -> Floats:
    """Probability that |z| is larger than `distance`."""
    return np.asarray(2 * special.ndtr(-np.asarray(distance, np.float64)))


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
