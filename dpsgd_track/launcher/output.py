"""The results of a single run as one JSON file, under the keys that scripts rely on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from dpsgd_track.record.trajectory import Trajectory


def write_output(trajectory: Trajectory, path: Path) -> None:
    """Write `results` of the trajectory to `path` as strict JSON, whole or not at all."""
    text = json.dumps(_strict(results(trajectory)), indent=2, allow_nan=False)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def results(trajectory: Trajectory) -> dict[str, Any]:
    """Losses, norms, time (ms) and peak memory (MiB and GiB) of one run."""
    peak_gib = float(trajectory.peak_memory_gib.max())
    return {
        "loss_values": trajectory.loss.tolist(),
        "final_loss": float(trajectory.loss[-1]),
        "grad_norms": trajectory.grad_norm.tolist(),
        "avg_grad_norm": float(trajectory.grad_norm.mean()),
        "layer_norms_history": _layer_norms_history(trajectory),
        "avg_time_ms": float(trajectory.step_time_ms.mean()),
        "peak_memory_mb": peak_gib * 1024,
        "peak_memory_gb": peak_gib,
    }


def _layer_norms_history(trajectory: Trajectory) -> list[dict[str, Any]]:
    """One entry for each step whose layer norms were recorded."""
    recorded = ~np.isnan(trajectory.layer_weight_norm).all(axis=1)
    history = []
    for i in np.flatnonzero(recorded):
        norms: dict[str, float] = {}
        for j, name in enumerate(trajectory.layer_names):
            norms[f"{name}_weight_norm"] = float(trajectory.layer_weight_norm[i, j])
            norms[f"{name}_grad_norm"] = float(trajectory.layer_grad_norm[i, j])
        history.append({"iter": int(trajectory.step[i]), "norms": norms})
    return history


def _strict(value: Any) -> Any:
    """`value` with null for what JSON has no number for."""
    match value:
        case dict():
            return {key: _strict(inner) for key, inner in value.items()}
        case list():
            return [_strict(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
    return value
