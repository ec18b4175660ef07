"""Distributions other than the normal one that noise may have been drawn from by mistake.

Legend: n elements.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from dpsgd_track.comparison.audit.noise.check import ALPHA
from dpsgd_track.comparison.audit.noise.gaussian import kolmogorov_bound
from dpsgd_track.comparison.audit.noise.samples import FINE, Samples
from dpsgd_track.record.trajectory import Floats

_FEWEST, _LARGE = 512, 100
"""Elements that a distribution is told from, in all and of a part with a std of its own."""
_LITTLE, _SPREAD = 0.02, 0.5
"""Relative error of a std that is told as right, and spread of those of parts that have one."""
_DEVIATIONS = 5.0
"""Standard deviations by which the sum of a part may be off."""
_SHIFTED = 0.05
"""Least mean, in units of sigma C, that explains a wrong std."""
_FORMS = (
    ("uniform", stats.uniform(-(3**0.5), 12**0.5)),
    ("a Laplace distribution", stats.laplace(0, 0.5**0.5)),
    ("logistic", stats.logistic(0, 3**0.5 / np.pi)),
    ("triangular", stats.triang(0.5, -(6**0.5), 2 * 6**0.5)),
    ("Student's t with 3 degrees of freedom", stats.t(3, 0, 3**-0.5)),
    ("Student's t with 4 degrees of freedom", stats.t(4, 0, 2**-0.5)),
    ("Student's t with 5 degrees of freedom", stats.t(5, 0, 0.6**0.5)),
    ("the absolute value of normal noise", stats.halfnorm()),
)
"""Distributions whose root mean square is 1."""


def other_form(samples: Samples) -> str:
    """The distribution of noise that is not normal, as a sentence; empty if it is none of these."""
    if samples.resolution > FINE:
        return ""
    if said := _shifted(samples):
        return said
    flat, rms = _standardised(samples)
    if len(flat) < _FEWEST:
        return ""
    if said := _cut_off(samples):
        return said
    reach = kolmogorov_bound(len(flat), ALPHA)
    if _distance(flat, stats.norm()) <= reach:
        return ""
    for name, form in _FORMS:
        for sign in (1, -1):
            if _distance(sign * flat, form) <= reach:
                is_one = bool(rms.max() < (1 + _SPREAD) * rms.min())
                scale = float(np.sqrt(np.square(rms).mean()))
                shown = f", with std {scale:.3g} sigma C" * (is_one and abs(scale - 1) > _LITTLE)
                return f"its noise is not normal but {name}{shown}"
    return ""


def _standardised(samples: Samples) -> tuple[Floats, Floats]:
    """[n] elements of large parts, in units of their part's root mean square, and those of parts.

    Parts of several stds are no distribution of their own.
    """
    elements, sizes = [], []
    for s, p in np.ndindex(samples.noise.shape[0], samples.noise.shape[2]):
        part = samples.noise[s, :, p][samples.held[:, p]]
        if len(part) >= _LARGE and part.all():
            size = float(np.sqrt(np.square(part).mean()))
            elements.append(part / size)
            sizes.append(size)
    return np.concatenate([np.empty(0), *elements]), np.array(sizes)


def _shifted(samples: Samples) -> str:
    """Normal noise about one mean that is not zero, in all steps and parameters alike."""
    mean = float(samples.noise[:, samples.held].mean())
    num, total = samples.num, samples.noise.sum(axis=-1)
    for axes in ((1, 2), (0, 1)):
        nums, totals = num.sum(axis=axes), total.sum(axis=axes)
        known = nums > 0
        if (np.abs(totals - mean * nums)[known] > _DEVIATIONS * np.sqrt(nums[known])).any():
            return ""
    flat = samples.noise[:, samples.held]
    flat = flat[flat != 0]
    if len(flat) < _FEWEST:
        return ""
    reach = kolmogorov_bound(len(flat), ALPHA)
    if abs(mean) < _SHIFTED or _distance(flat, stats.norm(mean, 1.0)) > reach:
        return ""
    return f"the mean of its noise is {mean:.3g} sigma C, with the right std about that mean"


def _cut_off(samples: Samples) -> str:
    """Normal noise of which no element is beyond a bound."""
    flat = samples.noise[:, samples.held]
    flat = flat[flat != 0]
    num, most = len(flat), float(np.abs(flat).max(initial=0.0))
    if num < _FEWEST or not most > 0:
        return ""
    rms = float(np.sqrt(np.square(flat).mean()))
    expected = float(num * 2 * stats.norm.sf(most))
    if min(expected, num * 2 * stats.norm.sf(most / rms)) < _MISSED:
        return ""
    inner = flat[np.abs(flat) < most * (1 - _AT_BOUND)]
    reach = kolmogorov_bound(len(inner), ALPHA)
    if len(inner) < _FEWEST or _distance(inner, stats.truncnorm(-most, most)) > reach:
        return ""
    is_clamped = num - len(inner) >= _MISSED / 2
    how = f"clamped to [-{most:.3g}, {most:.3g}]" if is_clamped else f"drawn anew beyond {most:.3g}"
    return (
        f"its noise is normal but {how} sigma C: none of {num:,} elements is larger, where "
        f"{expected:.0f} are expected"
    )


_MISSED, _AT_BOUND = 25, 1e-3
"""Elements that have to be missing beyond a bound, or that lie on it, and their relative
distance from it."""


def _distance(flat: Floats, form: stats.rv_continuous) -> float:
    """Kolmogorov-Smirnov distance of [n] elements."""
    return float(stats.ks_1samp(flat, form.cdf).statistic)
