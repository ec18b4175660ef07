"""Collects the steps of one regime into its trajectory and into a rank's metrics."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.record.names import (
    CLIP_FACTOR,
    LAYER_GRAD_NORM,
    LAYER_WEIGHT_NORM,
    SAMPLE_NORM,
)
from dpsgd_track.record.noise_draws import NoiseDraws
from dpsgd_track.record.trajectory import SAMPLE_COLUMNS, SCALAR_METRICS, UNUSED, Trajectory
from dpsgd_track.training.observe import GatheredSamples, Measured


@dataclass(frozen=True, kw_only=True)
class StepObservation:
    """Measurements of one step."""

    step: int
    samples: GatheredSamples
    gradient: Measured
    """The clipped sum."""
    moved_sketch: NDArray[np.float64]
    part_sketch: NDArray[np.float64]
    """[V, P, K] sketch of the wrong clipped sum of each `SumFormula`; K may be 0."""
    noised: Measured
    """(Clipped sum + noise) / expected batch size."""
    weights_before: Measured
    weights_after: Measured
    noise: NDArray[np.float32]
    """[W, P, M] sampled elements of the noise on each rank's shard of each parameter."""
    max_grad_norm: float
    step_time_ms: float
    peak_memory_gib: float
    tokens_per_second: float


@dataclass
class Recorder:
    """Collects the steps of one regime."""

    layer_names: list[str]
    parameter_sizes: dict[str, int]
    """Elements of each trainable parameter, in the model's order."""
    expected_batch_size: int
    initial_weights_hash: str
    noise_std: float
    layer_norm_steps: frozenset[int]
    """Steps whose layer norms are recorded."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    noise_draws: NoiseDraws | None = None
    """Sums over the noise of noise-only steps, once they are over."""

    def add(self, seen: StepObservation) -> dict[str, float]:
        """Record a step; returns its metrics."""
        divisor = self.expected_batch_size
        factors = seen.samples.clip_factor
        is_clipping = len(factors) > 0 and not np.isnan(factors).any()
        sketches = seen.samples.sketch.astype(np.float32)
        sketch, shard_sketch = np.split(sketches, 2, axis=2)
        row: dict[str, Any] = {
            "step": seen.step,
            "loss": seen.samples.mean_loss(),
            "grad_norm": seen.gradient.total_norm() / divisor,
            "grad_norm_noised": seen.noised.total_norm(),
            "clip_fraction": float((factors < 1).mean()) if is_clipping else float("nan"),
            "max_grad_norm": seen.max_grad_norm,
            "step_time_ms": seen.step_time_ms,
            "peak_memory_gib": seen.peak_memory_gib,
            "tokens_per_second": seen.tokens_per_second,
            "layer_weight_norm": self._layer_norms(seen.step, seen.weights_before, 1),
            "layer_grad_norm": self._layer_norms(seen.step, seen.gradient, divisor),
            "sample_index": seen.samples.index,
            "sample_rank": seen.samples.rank,
            "sample_micro_batch": seen.samples.micro_batch,
            "sample_loss": seen.samples.loss,
            "sample_norm": seen.samples.norm,
            "clip_factor": factors,
            "sample_norm_by_parameter": seen.samples.norm_by_parameter,
            "sample_sketch": sketch,
            "sample_shard_sketch": shard_sketch,
            "sample_other_norm": seen.samples.other_norm.astype(np.float32),
            "sample_other_loss": seen.samples.other_loss.astype(np.float32),
            "sample_part_square": seen.samples.part_square.astype(np.float32),
            "sample_target_loss": seen.samples.target_loss.astype(np.float32),
            "sample_size": seen.samples.size.astype(np.float32),
            "part_sketch": seen.part_sketch.astype(np.float32),
            "moved_sketch": seen.moved_sketch.astype(np.float32),
            "gradient_sketch": seen.gradient.sketch,
            "noised_sketch": seen.noised.sketch * divisor,
            "weight_sketch": seen.weights_after.sketch,
            "noise_samples": seen.noise,
            "data_hash": seen.samples.data_hash(),
        }
        self.rows.append(row)
        return self._metrics(row)

    def trajectory(self) -> Trajectory:
        """The trajectory of all steps so far."""
        num_samples = max(len(row["sample_index"]) for row in self.rows)
        rows = [_widened(row, num_samples) for row in self.rows]
        columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        return Trajectory(
            **columns,
            layer_names=np.array(self.layer_names, dtype=np.str_),
            parameter_names=np.array(list(self.parameter_sizes), dtype=np.str_),
            parameter_sizes=np.array(list(self.parameter_sizes.values()), dtype=np.int64),
            initial_weights_hash=self.initial_weights_hash,
            noise_std=self.noise_std,
            expected_batch_size=self.expected_batch_size,
            noise_draws=self.noise_draws,
        )

    def _layer_norms(self, step: int, measured: Measured, divisor: int) -> np.ndarray[Any, Any]:
        if step not in self.layer_norm_steps:
            return np.full(len(self.layer_names), np.nan)
        norm_sq = [measured.norm_sq.get(f"{name}.weight", np.nan) for name in self.layer_names]
        return np.sqrt(np.array(norm_sq, dtype=np.float64)) / divisor

    def _metrics(self, row: dict[str, Any]) -> dict[str, float]:
        metrics = {name: row[name] for name in SCALAR_METRICS}
        for prefix, column in (
            (LAYER_WEIGHT_NORM, row["layer_weight_norm"]),
            (LAYER_GRAD_NORM, row["layer_grad_norm"]),
        ):
            if row["step"] in self.layer_norm_steps:
                pairs = zip(self.layer_names, column, strict=True)
                metrics |= {f"{prefix}{name}": float(value) for name, value in pairs}
        if np.isnan(metrics["clip_fraction"]):
            del metrics["clip_fraction"]
        return metrics


def data_digest(trajectory: Trajectory) -> str:
    """Digest of all batches of a run, equal for modes that saw the same data."""
    batches = "".join(trajectory.data_hash.tolist()).encode()
    return hashlib.blake2b(batches, digest_size=8).hexdigest()


def _widened(row: dict[str, Any], num_samples: int) -> dict[str, Any]:
    """`row` with its samples' columns padded to `num_samples`."""
    missing = num_samples - len(row["sample_index"])
    widened = dict(row)
    for name in SAMPLE_COLUMNS:
        value = row[name]
        width = [(0, missing)] + [(0, 0)] * (value.ndim - 1)
        filler = UNUSED if value.dtype == np.int64 else np.nan
        widened[name] = np.pad(value, width, constant_values=filler)
    return widened


def rank_metrics(
    local: GatheredSamples, step_time_ms: float, memory_gib: float
) -> dict[str, float]:
    """A rank's own values of one step."""
    metrics = {"step_time_ms": step_time_ms, "peak_memory_gib": memory_gib}
    if len(local.index):
        metrics["loss"] = local.mean_loss()
    # Ordered by the global index, so that a permuted replay has the same positions.
    for prefix, column in ((SAMPLE_NORM, local.norm), (CLIP_FACTOR, local.clip_factor)):
        for position, row in enumerate(np.argsort(local.index)):
            if not np.isnan(column[row]):
                metrics[f"{prefix}{position:03d}"] = float(column[row])
    return metrics
