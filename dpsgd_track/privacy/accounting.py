"""Epsilon of a history of noisy steps, by the accountants of Opacus and dp-accounting.

A step is the Gaussian mechanism with noise multiplier sigma on a sum of sensitivity C. Two data
sets are neighbours

- with Poisson sampling, if one has a sample that the other lacks. Each step takes each sample with
  probability q in secret: sampling amplifies the guarantee.
- with batches in a fixed order, if the gradients of one sample are zero in one of them. The order
  is no secret, so nothing is amplified (q = 1); but a sample takes part in few steps.

Replacing a sample changes the sum by up to 2 C: the same epsilon does not cover it.

Epsilon is that of the weights, for an observer who does not know the noise. It does not cover other
records of a run, such as losses and norms before noise.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.special import gammaln

History = tuple[tuple[float, float, int], ...]
"""(sigma, sampling rate q, number of steps) of consecutive steps."""

MAX_PRV_EPSILON = 100.0
"""RDP's epsilon above which PRV is not computed. Opacus 1.6.0 computes e^epsilon in float64: from
709 on its result was too small, then it failed, and at sigma = 0.01 it took 9 minutes to return
infinity. Such an epsilon promises nothing anyway."""
MAX_PRV_WORK = 2000.0
"""Product of RDP's epsilon and the square root of the number of steps above which PRV is not
computed. PRV takes 0.5 to 2.5 ms per unit on one core, so 5 s at this bound."""
MAX_SETTINGS = 20
"""Number of different pairs of sigma and q above which PRV and PLD are not computed. Each takes PRV
up to 0.4 s and PLD up to 2 s, or 10 s at a sigma as low as 0.3."""
MIN_PRV_DELTA_PER_STEP = 100 * float(np.finfo(np.float64).eps)
"""Delta per step below which PRV is not computed. Opacus raises a Fourier transform in float64 to
the number of steps, and counts the rounding errors as probability. At a hundredth of this bound its
epsilon was 0.06 below PLD's; above the bound it kept the error of 0.01 that it promises."""
MAX_PLD_EPSILON = 100.0
"""RDP's epsilon above which PLD is not computed: its grid has 10,000 points per unit."""
FRACTIONAL_MOMENTS = (1e-7, 1e6)
"""Range of log A in which Opacus computes fractional orders. It adds numbers near 1 with an error
of about 1e-15, which is visible in smaller results, where it has also failed."""
MAX_FRACTIONAL_SIGMA = 100.0
"""Sigma above which Opacus does not compute them: the number of its terms grows with sigma."""


def poisson_history(
    noise_multiplier: float, num_steps: int, batch_size: int, num_samples: int
) -> History:
    """History of steps that take each sample with probability batch size / samples.

    Args:
        noise_multiplier: sigma.
        num_steps: steps taken.
        batch_size: samples that a step is expected to hold over all ranks.
        num_samples: samples that batches are drawn from.
    """
    return ((noise_multiplier, batch_size / num_samples, num_steps),)


def sequential_history(
    noise_multiplier: float, num_steps: int, batch_size: int, num_samples: int | None
) -> History:
    """History of steps that take the samples in order, each once an epoch.

    A sample is used once in each of the k epochs that have begun. If the batch size does not divide
    the number of samples, one step can use it m times, at the end of one epoch and the start of the
    next. Such a step hides m C as poorly as m^2 steps hide C, so the k uses count as k m steps.

    Args:
        noise_multiplier: sigma.
        num_steps: steps taken.
        batch_size: samples of a step over all ranks.
        num_samples: samples of an epoch; None if no sample is ever repeated.
    """
    if num_samples is None:
        return ((noise_multiplier, 1.0, 1),)
    num_epochs = -(-num_steps * batch_size // num_samples)
    # How far into an epoch a step can begin.
    latest = num_samples - math.gcd(batch_size, num_samples)
    epochs_in_a_step = (latest + batch_size - 1) // num_samples + 1
    return ((noise_multiplier, 1.0, num_epochs * min(epochs_in_a_step, num_epochs)),)


@lru_cache
def epsilon_rdp(history: History, delta: float) -> float:
    """Epsilon by Renyi differential privacy (Mironov, 2017; Mironov et al., 2019): never too small.

    Args:
        history: sigma > 0.
        delta: between 0 and 1.
    """
    from opacus.accountants.analysis import rdp

    spent = sum(_rdp_of_step(sigma, q) * steps for sigma, q, steps in _merged(history))
    with warnings.catch_warnings():
        # If the best order is the first or the last, epsilon is still an upper bound.
        warnings.filterwarnings("ignore", message="Optimal order is")
        epsilon, _ = rdp.get_privacy_spent(orders=list(_orders()), rdp=spent, delta=delta)
    # Near delta = 1 the formula gives negative numbers.
    return max(0.0, float(epsilon))


@lru_cache
def epsilon_prv(history: History, delta: float) -> float | None:
    """Epsilon by composing privacy loss variables (Gopi et al., 2021): tighter than RDP's.

    Args:
        history: sigma > 0.
        delta: between 0 and 1.
    Returns:
        Epsilon; None if it would take too long or be wrong (the bounds above).
    """
    history = _merged(history)
    if delta < MIN_PRV_DELTA_PER_STEP * _num_steps(history) or len(history) > MAX_SETTINGS:
        return None
    upper = epsilon_rdp(history, delta)
    work = upper * math.sqrt(_num_steps(history)) * len(history)
    if upper > MAX_PRV_EPSILON or work > MAX_PRV_WORK:
        return None
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    # At q = 1 it takes the logarithm of 0, correctly minus infinity.
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        # Opacus takes the width of its grid from RDP.
        warnings.filterwarnings("ignore", message="Optimal order is")
        try:
            # Near delta = 1 the formula gives negative numbers.
            return max(0.0, float(accountant.get_epsilon(delta)))
        except (RuntimeError, ValueError):
            # Opacus's own checks of its precision have failed.
            return None


@lru_cache
def epsilon_pld(history: History, delta: float) -> float | None:
    """Epsilon by dp-accounting's privacy loss distributions, rounded up: never too small.

    Neighbours are data sets of which one has a sample that the other lacks. The grid has steps of
    1e-4, which overestimates epsilon if a single step spends less than that: up to 4 times at
    q = 1e-4.

    Args:
        history: sigma > 0.
        delta: between 0 and 1.
    Returns:
        Epsilon; None if it would take too long or too much memory (the bounds above), or if delta
        is too small for the grid.
    Raises:
        ImportError: dp-accounting is not installed.
    """
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant

    history = _merged(history)
    if len(history) > MAX_SETTINGS or epsilon_rdp(history, delta) > MAX_PLD_EPSILON:
        return None
    accountant = PLDAccountant()
    for sigma, q, steps in history:
        step = dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(sigma))
        accountant.compose(step, steps)
    epsilon = float(accountant.get_epsilon(delta))
    return epsilon if math.isfinite(epsilon) else None


def _num_steps(history: History) -> int:
    return sum(steps for _, _, steps in history)


def _merged(history: History) -> History:
    """`history` with one entry for each pair of sigma and q: epsilon does not depend on the order.

    Steps that are not sampled become one equivalent step: exact, and far cheaper for accountants
    that compose numerically.
    """
    num_steps: dict[tuple[float, float], int] = {}
    unsampled = 0.0
    for sigma, q, steps in history:
        if q == 1:
            unsampled = math.hypot(unsampled, math.sqrt(steps) / sigma)
        else:
            num_steps[sigma, q] = num_steps.get((sigma, q), 0) + steps
    sampled = tuple((sigma, q, steps) for (sigma, q), steps in num_steps.items())
    return (((1 / unsampled, 1.0, 1),) if unsampled else ()) + sampled


@lru_cache(maxsize=4096)
def _rdp_of_step(sigma: float, q: float) -> Any:
    """[orders] Renyi divergence of one step, log A(order) / (order - 1)."""
    orders = np.array(_orders())
    with np.errstate(over="ignore", divide="ignore"):
        if q == 1:
            return orders / np.float64(sigma) / sigma / 2
        return _at_orders(_log_moments(sigma, q), sigma, q) / (orders - 1)


def _log_moments(sigma: float, q: float) -> Any:
    """[last order + 1] log A(n) at integer n (Mironov et al., 2019, section 3.3).

    A(n) is the sum over i of b_i e^((i^2 - i) / (2 sigma^2)), where the binomial weights b_i add
    up to 1. Only the excess over 1 is summed here, and log1p taken of it, so that a tiny excess
    keeps its precision.
    """
    last = math.ceil(_orders()[-1])
    n, i = np.arange(last + 1.0)[:, None], np.arange(last + 1.0)[None, :]
    is_term = (i >= 2) & (i <= n)
    # Entries outside of the sum are computed too, from arguments out of range.
    with np.errstate(invalid="ignore"):
        log_weight = gammaln(n + 1) - gammaln(i + 1) - gammaln(n - i + 1)
        log_weight += i * math.log(q) + (n - i) * math.log1p(-q)
        exponent = (i * i - i) / 2 / sigma / sigma
        log_excess = exponent + np.log(-np.expm1(-exponent))
        log_terms = np.where(is_term, log_weight + log_excess, -np.inf)
    return np.logaddexp(0.0, np.logaddexp.reduce(log_terms, axis=1))


def _at_orders(moments: Any, sigma: float, q: float) -> Any:
    """[orders] log A, from its values at integer orders.

    log A is convex in the order (van Erven and Harremoes, 2014, corollary 2), so that its chords
    are upper bounds. They replace fractional orders at which Opacus is not precise.
    """
    from opacus.accountants.analysis import rdp

    orders = np.array(_orders())
    below = orders.astype(int)
    fraction = orders - below
    is_integer = fraction == 0
    above = np.where(is_integer, below, below + 1)
    with np.errstate(invalid="ignore"):
        # NaN if log A is infinite; integer orders do not use the chord.
        chord = (1 - fraction) * moments[below] + fraction * moments[above]
    log_a = np.where(is_integer, moments[below], chord)
    least, most = FRACTIONAL_MOMENTS
    is_precise = ~is_integer & (least <= log_a) & (log_a <= most) & (sigma <= MAX_FRACTIONAL_SIGMA)
    precise = orders[is_precise]
    if len(precise):
        divergence = rdp.compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=list(precise))
        log_a[is_precise] = divergence * (precise - 1)
    return log_a


@lru_cache
def _orders() -> tuple[float, ...]:
    from opacus.accountants import RDPAccountant

    return tuple(RDPAccountant.DEFAULT_ALPHAS)
