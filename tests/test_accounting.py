"""Epsilon is Opacus's, never below the exact one, and computed from what was really composed."""

from __future__ import annotations

import math
import time
from collections import Counter
from itertools import product

import numpy as np
import pytest
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from dpsgd_track.privacy.accounting import (
    History,
    epsilon_prv,
    epsilon_rdp,
    poisson_history,
    sequential_history,
)

DELTA = 1e-5


def exact_epsilon(sigma: float) -> float:
    """Of the Gaussian mechanism alone (Balle and Wang, 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        low, high = norm.logcdf([0.5 / sigma - epsilon * sigma, -0.5 / sigma - epsilon * sigma])
        return float(math.exp(low) - math.exp(epsilon + high) - DELTA)

    return float(brentq(excess, 0.0, 1.0 / sigma**2 + 20 / sigma))


def _of_opacus(accountant: RDPAccountant | PRVAccountant, history: History) -> float:
    accountant.history = list(history)
    with np.errstate(divide="ignore"):
        return float(accountant.get_epsilon(DELTA))


HISTORIES = (
    ((4.0, 1.0, 1),),
    ((0.7, 1.0, 10),),
    ((1.0, 0.01, 1000),),
    ((1.0, 0.01, 64), (2.0, 0.02, 32)),
)


@pytest.mark.parametrize("history", HISTORIES, ids=str)
def test_epsilon_is_that_of_opacus(history: History) -> None:
    assert epsilon_rdp(history, DELTA) == pytest.approx(
        _of_opacus(RDPAccountant(), history), rel=1e-12
    )
    # PRV promises epsilon to 0.01.
    assert epsilon_prv(history, DELTA) == pytest.approx(
        _of_opacus(PRVAccountant(), history), abs=0.02
    )


@pytest.mark.parametrize(("sigma", "steps"), list(product((0.3, 1.0, 4.0), (1, 7))))
def test_epsilon_is_never_below_the_exact_one(sigma: float, steps: int) -> None:
    exact = exact_epsilon(sigma / math.sqrt(steps))
    history = ((sigma, 1.0, steps),)
    prv = epsilon_prv(history, DELTA)
    assert prv is not None
    assert exact <= prv <= exact + 0.03
    assert prv <= epsilon_rdp(history, DELTA) <= 1.15 * exact
    # The test has power: 3/2 of the noise would be found to promise less than it is said to.
    assert exact > epsilon_rdp(((1.5 * sigma, 1.0, steps),), DELTA)


@pytest.mark.parametrize(
    "history",
    [((0.01, 1.0, 1),), ((0.029, 1.0, 1),), ((0.2, 0.01, 1000),), ((1.0, 0.01, 100_000),)],
    ids=str,
)
def test_what_would_take_long_or_be_wrong_is_not_asked(
    history: History,
) -> None:
    began = time.monotonic()
    assert epsilon_prv(history, DELTA) is None
    assert math.isfinite(epsilon_rdp(history, DELTA))
    assert time.monotonic() - began < 5.0


def test_poisson_sampling_amplifies_by_the_share_of_the_data() -> None:
    assert poisson_history(1.0, 30, 8, 400) == ((1.0, 0.02, 30),)


def test_batches_in_a_fixed_order_claim_no_amplification() -> None:
    assert sequential_history(1.0, 30, 8, 10**9) == ((1.0, 1.0, 1),)
    assert sequential_history(1.0, 30, 8, None) == ((1.0, 1.0, 1),)
    assert sequential_history(1.0, 51, 8, 400) == ((1.0, 1.0, 2),)


def _most_work(num_steps: int, batch_size: int, num_samples: int) -> int:
    """Largest sum, over the steps, of the square of how often one sample is in the step.

    By trying each choice of the sample's place in each epoch.
    """
    num_epochs = -(-num_steps * batch_size // num_samples)
    worst = 0
    for places in product(range(num_samples), repeat=num_epochs):
        indices = [epoch * num_samples + place for epoch, place in enumerate(places)]
        uses = Counter(index // batch_size for index in indices)
        worst = max(worst, sum(m * m for step, m in uses.items() if step < num_steps))
    return worst


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5])
def test_no_order_of_the_samples_does_worse_than_is_accounted_for(
    batch_size: int, num_samples: int
) -> None:
    for num_steps in range(1, 6):
        if (num_steps * batch_size) / num_samples > 6:
            continue
        ((_, q, steps),) = sequential_history(1.0, num_steps, batch_size, num_samples)
        worst = _most_work(num_steps, batch_size, num_samples)
        assert q == 1.0
        assert worst <= steps
        if num_samples % batch_size == 0:
            assert steps == worst
