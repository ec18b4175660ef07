"""What the noise of a run promises: epsilon at a delta, by Opacus's accountants.

A step is the Gaussian mechanism with noise multiplier sigma on a sum whose sensitivity is C, the
most that one sample can add to it. Two data sets are neighbours

- with Poisson sampling, where one has a sample that the other lacks. Each step takes each sample
  with probability q, and hides whether it did: sampling amplifies the guarantee.
- with batches in a fixed order, where the gradients of one sample are zero in one of them. The
  order is no secret, so nothing is amplified (q = 1); but a sample takes part in few steps.

Replacing a sample changes the sum by up to 2 C and has no such guarantee at the same epsilon.

The epsilon is that of the weights, to someone who cannot know the noise. It does not cover what
a run records besides, such as losses and norms before noise.
"""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any

import numpy as np

History = tuple[tuple[float, float, int], ...]
"""(sigma, sampling rate q, number of steps) of consecutive steps."""

MAX_PRV_EPSILON = 100.0
"""RDP's epsilon above which PRV is not asked. Opacus 1.6.0 computes e^epsilon in float64: from 709
on it answered too small a number, then failed, and at sigma = 0.01 took 9 minutes to say infinity.
Nothing is promised there anyway."""
MAX_PRV_WORK = 2000.0
"""The same for RDP's epsilon times the square root of the number of steps. PRV takes 0.5 to 2.5 ms
for each unit on one core, so 5 s at this bound."""


def poisson_history(
    noise_multiplier: float, num_steps: int, batch_size: int, num_samples: int
) -> History:
    """What is composed where each step takes each sample with probability batch size / samples.

    Args:
        noise_multiplier: sigma.
        num_steps: steps done.
        batch_size: samples that a step is expected to hold over all ranks.
        num_samples: samples to draw from.
    """
    return ((noise_multiplier, batch_size / num_samples, num_steps),)


def sequential_history(
    noise_multiplier: float, num_steps: int, batch_size: int, num_samples: int | None
) -> History:
    """What is composed where steps take samples in turn, each once an epoch.

    A sample is used once in each of k epochs that have begun. Where a batch does not divide the
    data, one step can hold it m times, from the end of one epoch and the start of the next, and
    hides m C as poorly as m^2 steps hide C. The k uses are then at most k m steps.

    Args:
        noise_multiplier: sigma.
        num_steps: steps done.
        batch_size: samples of a step over all ranks.
        num_samples: samples of an epoch; None where none ever comes again.
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

    orders = _orders()
    spent = sum(_rdp_of_step(sigma, q) * steps for sigma, q, steps in history)
    with warnings.catch_warnings():
        # Where the best order is the first or the last, epsilon is an upper bound all the same.
        warnings.filterwarnings("ignore", message="Optimal order is")
        epsilon, _ = rdp.get_privacy_spent(orders=orders, rdp=spent, delta=delta)
    return float(epsilon)


@lru_cache
def epsilon_prv(history: History, delta: float) -> float | None:
    """Epsilon by composing privacy loss variables (Gopi et al., 2021): tighter than RDP's.

    Args:
        history: sigma > 0.
        delta: between 0 and 1.
    Returns:
        Epsilon; None where it would take too long or be wrong (the bounds above).
    """
    # Unsampled steps are one step with as much noise as all of them: exact, and far cheaper.
    history = tuple(
        (sigma / math.sqrt(steps), q, 1) if q == 1 else (sigma, q, steps)
        for sigma, q, steps in history
    )
    num_steps = sum(steps for _, _, steps in history)
    upper = epsilon_rdp(history, delta)
    if upper > MAX_PRV_EPSILON or upper * math.sqrt(num_steps) > MAX_PRV_WORK:
        return None
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    # At q = 1 it takes the logarithm of 1 - q, rightly minus infinity.
    with np.errstate(divide="ignore"):
        return float(accountant.get_epsilon(delta))


@lru_cache
def _rdp_of_step(sigma: float, q: float) -> Any:
    """[orders] Renyi divergence of one step."""
    from opacus.accountants.analysis import rdp

    return rdp.compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=_orders())


def _orders() -> list[float]:
    from opacus.accountants import RDPAccountant

    return list(RDPAccountant.DEFAULT_ALPHAS)
