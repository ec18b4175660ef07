"""Records in which a mistake is made, and the verdict on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from dpsgd_track.comparison.result import ModeVerdict
from dpsgd_track.config import DataConfig
from dpsgd_track.record.trajectory import Trajectory
from tests.support.synthetic_group import (
    compared,
    healthy_runs,
    job,
    mode_run,
    setup,
    trajectory,
    with_run,
)

MODE = "flash_fsdp"
SGD = setup("clip", optimizer="sgd", learning_rate=0.0, micro_batches=2)
TRAINED = setup("accuracy", optimizer="sgd", learning_rate=0.1, micro_batches=2)


def base() -> Trajectory:
    """Twelve samples on two ranks, each in two micro-batches of three samples."""
    t = trajectory(noise_std=0.0, samples=12, layers=5)
    still = np.repeat(t.weight_sketch[:1], t.num_steps, axis=0)
    # All but the last parameter are weights of linear layers.
    linear = np.array([name.removesuffix(".weight") for name in t.parameter_names[:-1]])
    return replace(t, layer_names=linear, weight_sketch=still, noised_sketch=t.gradient_sketch)


def with_job(regime: Any) -> dict[str, Any]:
    planned = job(MODE, regime, data=DataConfig(batch_size=3, seq_length=17), num_ranks=2)
    return {"job": planned, "setup": regime}


def found(wrong: Trajectory, ours: Trajectory | None = None) -> ModeVerdict:
    """The verdict on `wrong` in the clip regime."""
    ours = ours or base()
    runs = [r for r in healthy_runs() if r.regime == "clip"]
    runs = with_run(runs, mode_run("reference", "clip", ours))
    runs = with_run(runs, mode_run("flash_fsdp_fuse", "clip", ours))
    runs = with_run(runs, mode_run(MODE, "clip", wrong, **with_job(SGD)))
    runs.append(mode_run("reference", "clip", ours, replay="plain"))
    return next(mode for mode in compared(runs).modes if mode.label == MODE)


def summed(t: Trajectory, weights: Any) -> Trajectory:
    """`t` with a sum of other weights, [S, N] or [S, N, P], and all that follows from it."""
    weights = np.asarray(weights, dtype=float)
    weights = weights[..., None] if weights.ndim == 2 else weights
    total = (weights[..., None] * t.sample_sketch).sum(axis=1)
    length = np.sqrt(np.square(total).mean(axis=2).sum(axis=1))
    return replace(
        t,
        gradient_sketch=total,
        noised_sketch=total,
        grad_norm=length / t.expected_batch_size,
        grad_norm_noised=length / t.expected_batch_size,
    )


def with_total(t: Trajectory, norm: Any) -> Trajectory:
    """`t` with other total norms, and the factors and the sum that follow from them."""
    factor = np.minimum(1.0, t.max_grad_norm[:, None] / norm)
    return summed(replace(t, sample_norm=norm, clip_factor=factor), factor)


def with_factors(t: Trajectory, factor: Any) -> Trajectory:
    """`t` with other clip factors, and the sum that follows from them."""
    return summed(replace(t, clip_factor=factor), factor)
