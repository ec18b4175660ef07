"""Records of the noise regime, sound and faulty, and what the audit says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dpsgd_track.comparison.audit.noise import NoiseAudit, audit, judge_noise
from dpsgd_track.config import NOISE
from dpsgd_track.launcher.regimes import NOISE_BOUNDS, NOISE_SIGMA
from dpsgd_track.record.noise_draws import NoiseDraws
from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.trajectory import UNUSED, Trajectory
from tests.support.synthetic_group import job, mode_run, setup, trajectory

SIZES = (256 * 64, 64 * 64, 64 * 64, 64, 64 * 170, 170 * 64, 64, 128, 3, 1, 300)
C = np.array(NOISE_BOUNDS)
NUM_SAMPLES = (12, 11, 0, 1)
Floats = np.ndarray[Any, np.dtype[np.float64]]
Fault = Callable[[Floats, np.random.Generator], Floats]


def noisy(
    fault: Fault = lambda z, rng: z,
    *,
    ranks: int = 2,
    seed: int = 0,
    sizes: tuple[int, ...] = SIZES,
    sigma: float = NOISE_SIGMA,
) -> Trajectory:
    """A record of the noise regime; `fault` changes its noise in units of sigma C, [S, W, P, M]."""
    rng = np.random.default_rng(seed)
    S, P = len(C), len(sizes)
    z = fault(rng.standard_normal((S, ranks, P, 256)), rng)
    for p, size in enumerate(sizes):
        chunk = -(-size // ranks)
        for w in range(ranks):
            z[:, w, p, max(0, min(chunk, size - w * chunk)) :] = np.nan
    t = trajectory(steps=S, samples=12, layers=P - 1, noise_std=sigma * C[0])
    index = t.sample_index.copy()
    for row, count in zip(index, NUM_SAMPLES, strict=True):
        row[count:] = UNUSED
    return replace(
        t,
        noise_samples=(z * (sigma * C)[:, None, None, None]).astype(np.float32),
        max_grad_norm=C,
        sample_index=index,
        clip_factor=np.minimum(1, C[:, None] / t.sample_norm),
        grad_norm=np.zeros(S),  # shorter than the sum of any parts
    )


def run_of(record: Trajectory | None, regime: str = NOISE, **more: Any) -> ModeRun:
    regime_of_two = setup(regime, replay=more.get("replay", ""))
    settings = {"job": job("flash_fsdp", regime_of_two), **more}
    return mode_run("flash_fsdp", regime, record, **settings)


def audited(record: Trajectory) -> NoiseAudit:
    found = audit(run_of(record))
    assert found is not None
    return found


def sentences(record: Trajectory) -> list[str]:
    run = run_of(record)
    return [finding.sentence for finding in judge_noise(run, audit(run))]


DRAWN_SIZES = (3000, 3000, 2000, 2000, 1000, 33, 1)
"""Elements of a rank's shards, [P]."""


def draws_of(
    fault: Fault = lambda z, rng: z,
    *,
    num_steps: int = 53,
    ranks: int = 2,
    seed: int = 0,
    sizes: Sequence[int] = DRAWN_SIZES,
    significant_bits: int = 24,
) -> NoiseDraws:
    """Sums over noise-only steps; `fault` changes the noise of each in units of sigma C."""
    rng = np.random.default_rng(seed)
    total, before = None, None
    for _ in range(num_steps):
        z = rng.standard_normal((ranks, len(sizes), max(sizes)))
        z = fault(z, rng).astype(np.float32).astype(np.float64)
        for row, size in enumerate(sizes):
            z[:, row, size:] = np.nan
        units = (1.0,) if total is None else ()
        step = NoiseDraws.of_step(z, before, units=units, significant_bits=significant_bits)
        total, before = step if total is None else total + step, z
    assert total is not None
    return total
