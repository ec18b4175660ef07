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

_FEWEST = 256
_LITTLE = 0.02
"""Relative error of a std that is told as right."""
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
    ("a Cauchy distribution", stats.cauchy()),
    ("the absolute value of normal noise", stats.halfnorm()),
)
"""Distributions, of std 1 where they have one about 0."""


def other_form(samples: Samples) -> str:
    """The distribution of noise that is not normal, as a sentence; empty if it is none of these."""
    flat = samples.noise[:, samples.held]
    flat = flat[flat != 0]
    if len(flat) < _FEWEST or samples.resolution > FINE:
        return ""
    if said := _shifted(samples, flat):
        return said
    reach = kolmogorov_bound(len(flat), ALPHA)
    scale = float(np.sqrt(np.square(flat).mean()))
    if _distance(flat / scale, stats.norm()) <= reach:
        return ""
    for name, form in _FORMS:
        unit = 1.0 if name.startswith("a Cauchy") else scale
        for sign in (1, -1):
            if _distance(sign * flat / unit, form) <= reach:
                of_std = "" if abs(scale - 1) < _LITTLE else f", with std {scale:.3g} sigma C"
                return f"its noise is not normal but {name}{of_std}"
    return ""


def _shifted(samples: Samples, flat: Floats) -> str:
    """Normal noise about a mean that is not zero."""
    mean = float(flat.mean())
    reach = kolmogorov_bound(len(flat), ALPHA)
    if abs(mean) < _SHIFTED or _distance(flat, stats.norm(mean, 1.0)) > reach:
        return ""
    if _distance(flat, stats.norm()) <= reach:
        return ""
    return (
        f"its noise is not about zero: its mean is {mean:.3g} sigma C, with the right std about "
        "that mean"
    )


def _distance(flat: Floats, form: stats.rv_continuous) -> float:
    """Kolmogorov-Smirnov distance of [n] elements."""
    return float(stats.ks_1samp(flat, form.cdf).statistic)
