"""The results of a single run as a JSON file, under keys that scripts rely on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpsgd_track.record.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class LayerNorms:
    """Norms of all linear layers at one step."""

    iter: int
    norms: Mapping[str, float]
    """Norms by `<layer>_weight_norm` and `<layer>_grad_norm`."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """One run; its fields are the keys of the file."""

    loss_values: tuple[float, ...]
    """Loss of each step."""
    final_loss: float
    grad_norms: tuple[float, ...]
    """Gradient norm of each step, before noise."""
    avg_grad_norm: float
    layer_norms_history: tuple[LayerNorms, ...]
    """One entry for each step whose layer norms were recorded."""
    avg_time_ms: float
    """Mean time of a step."""
    peak_memory_mb: float
    """Peak memory in MiB."""
    peak_memory_gb: float
    """Peak memory in GiB."""


def write_output(trajectory: Trajectory, path: Path) -> None:
    """Write `results` of the trajectory to `path`, whole or not at all.

    The file is strict JSON: null stands for NaN and infinities.
    """
    from pydantic_core import to_json

    text = to_json(results(trajectory), indent=2, inf_nan_mode="null")
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(text + b"\n")
    partial.replace(path)


def results(trajectory: Trajectory) -> Results:
    """Losses, norms, time and peak memory of one run."""
    peak_gib = float(trajectory.peak_memory_gib.max())
    return Results(
        loss_values=tuple(trajectory.loss.tolist()),
        final_loss=float(trajectory.loss[-1]),
        grad_norms=tuple(trajectory.grad_norm.tolist()),
        avg_grad_norm=float(trajectory.grad_norm.mean()),
        layer_norms_history=tuple(_layer_norms_history(trajectory)),
        avg_time_ms=float(trajectory.step_time_ms.mean()),
        peak_memory_mb=peak_gib * 1024,
        peak_memory_gb=peak_gib,
    )


def _layer_norms_history(trajectory: Trajectory) -> list[LayerNorms]:
    recorded = ~np.isnan(trajectory.layer_weight_norm).all(axis=1)
    history = []
    for i in np.flatnonzero(recorded):
        norms: dict[str, float] = {}
        for j, name in enumerate(trajectory.layer_names):
            norms[f"{name}_weight_norm"] = float(trajectory.layer_weight_norm[i, j])
            norms[f"{name}_grad_norm"] = float(trajectory.layer_grad_norm[i, j])
        history.append(LayerNorms(iter=int(trajectory.step[i]), norms=norms))
    return history
