"""Epsilon is Opacus's, never below the exact one, and computed from what was really composed."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq
from scipy.stats import norm

from dpsgd_track.config import (
    ACCURACY,
    CLIP,
    TRAIN,
    DataConfig,
    JobConfig,
    ModelConfig,
    PerformanceConfig,
    RegimeConfig,
)
from dpsgd_track.privacy.accounting import (
    History,
    epsilon_prv,
    epsilon_rdp,
    poisson_history,
    sequential_history,
)
from dpsgd_track.training.loop import RegimeRun

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


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _run(mode: str = "reference", regime: str = TRAIN, num_iter: int = 6, **job: Any) -> RegimeRun:
    sigma = 0.0 if regime == CLIP else 2.0
    settings = RegimeConfig(
        name=regime,
        num_iter=num_iter,
        noise_multiplier=sigma,
        max_grad_norms=(1.0,) * num_iter,
        noise_matched=regime == ACCURACY,
    )
    config = JobConfig(
        mode=mode,
        model=ModelConfig(name="llama-tiny"),
        data=DataConfig(seq_length=4),
        performance=PerformanceConfig(),
        regimes=(settings,),
        **job,
    )
    return RegimeRun(config, settings, torch.device("cpu"))


@pytest.mark.usefixtures("alone")
def test_each_recorded_step_is_accounted_for() -> None:
    run = _run(delta=1e-6)
    # Of 7 samples, the fourth batch of 2 takes one again, maybe one that it has already.
    run.slicer.dataset.num_samples = 7
    steps = list(run.steps())
    accounted = dict(run.accounting())
    assert list(accounted) == list(range(len(steps)))
    for step, metrics in accounted.items():
        history = sequential_history(2.0, step + 1, 2, 7)
        assert metrics["epsilon_rdp"] == epsilon_rdp(history, 1e-6)
        assert metrics["accounting/sigma"] == 2.0
        assert metrics["accounting/sampling_rate"] == 1.0
        assert metrics["accounting/steps"] == history[0][2]
    assert [m["accounting/steps"] for m in accounted.values()] == [1, 1, 1, 4, 4, 4]
    assert [s for s, m in accounted.items() if "epsilon_prv" in m] == [0, 1, 3, 5]


@pytest.mark.usefixtures("alone")
def test_what_does_not_protect_is_not_accounted_for() -> None:
    for mode, regime in (("reference", CLIP), ("no_dp", TRAIN), ("no_dp", ACCURACY)):
        run = _run(mode, regime, num_iter=1)
        list(run.steps())
        assert not list(run.accounting()), (mode, regime)


@pytest.mark.usefixtures("alone")
def test_own_noise_can_come_from_the_operating_system_and_matched_noise_cannot() -> None:
    keys = [_run(noise_from=source).noise_key for source in ("os", "os", "seed", "seed")]
    assert len(set(keys[:3])) == 3
    assert keys[2] == keys[3] == "42/reference"
    assert _run(regime=ACCURACY, noise_from="os").noise_key == "42/common"


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
