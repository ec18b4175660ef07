"""NaN and infinity, where a run must not have them.

NaN in a per-sample field or in a layer norm may mean "not computed", but only for the whole of
what is not computed: one NaN among numbers is a defect. A place that a step has no sample for is
none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.tracking.trajectory import SAMPLE_COLUMNS, UNUSED, Trajectory

ALWAYS_FINITE = {
    "loss": "loss",
    "grad_norm": "gradient norm",
    "grad_norm_noised": "noised gradient norm",
    "sample_loss": "loss of one sample",
    "gradient_sketch": "clipped sum",
    "noised_sketch": "noised gradient",
    "weight_sketch": "weights after the step",
}
SOMETIMES_ABSENT = {
    "sample_norm": "per-sample gradient norm",
    "sample_norm_by_parameter": "per-sample gradient norm of one parameter",
    "clip_factor": "clip factor",
    "layer_weight_norm": "weight norm of one layer",
    "layer_grad_norm": "gradient norm of one layer",
}


@dataclass(frozen=True, kw_only=True)
class NotFinite:
    """The first value of one field that is not a number a run may have."""

    field: str
    title: str
    value: float
    step: int
    where: str


def not_finite(trajectory: Trajectory) -> tuple[NotFinite, ...]:
    """One entry for each field with a NaN or an infinity that it must not have."""
    found = []
    for field, title in (ALWAYS_FINITE | SOMETIMES_ABSENT).items():
        values = getattr(trajectory, field)
        bad = ~np.isfinite(values)
        if field in SAMPLE_COLUMNS:
            bad[trajectory.sample_index == UNUSED] = False
        if field in SOMETIMES_ABSENT:
            bad &= ~_absent(field, np.isnan(values))
        if bad.any():
            at = np.unravel_index(int(bad.argmax()), bad.shape)
            found.append(
                NotFinite(
                    field=field,
                    title=title,
                    value=float(values[at]),
                    step=int(trajectory.step[at[0]]),
                    where=_where(trajectory, field, tuple(int(i) for i in at)),
                )
            )
    return tuple(found)


def _absent(field: str, nan: NDArray[np.bool_]) -> NDArray[np.bool_]:
    if field == "sample_norm_by_parameter":
        return np.asarray(nan.all(axis=(0, 1), keepdims=True))
    if field.startswith("layer_"):
        # A step without layer norms, or a layer that has none in any step.
        return np.asarray(nan.all(axis=1, keepdims=True) | nan.all(axis=0, keepdims=True))
    return np.asarray(nan.all(keepdims=True))


def _where(t: Trajectory, field: str, at: tuple[int, ...]) -> str:
    if field.endswith("_sketch"):
        return f"parameter {t.parameter_names[at[1]]}"
    if field.startswith("layer_"):
        return f"layer {t.layer_names[at[1]]}"
    if len(at) == 1:
        return ""
    sample = f"sample {t.sample_index[at[:2]]}"
    return sample if len(at) == 2 else f"{sample}, parameter {t.parameter_names[at[2]]}"
