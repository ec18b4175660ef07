"""NaN and infinity, where a run must not have them.

NaN in a per-sample field or in a layer norm may mean "not computed", but only if the whole item is
NaN: one NaN among numbers is a defect. Padding beyond a step's samples does not count.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import LARGE, SAMPLE_COLUMNS, UNUSED, Trajectory

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
_COMPARED_AS = {
    "gradient_sketch": ObservableName.GRADIENT,
    "noised_sketch": ObservableName.NOISED_GRADIENT,
    "weight_sketch": ObservableName.WEIGHTS,
}
"""Fields that are compared under a name other than their own."""


@dataclass(frozen=True, kw_only=True)
class NotFinite:
    """The first value of one field that is NaN or infinite and must not be."""

    field: str
    title: str
    value: float
    step: int
    where: str

    @property
    def observable(self) -> ObservableName:
        """The observable that is made from the field."""
        return _COMPARED_AS.get(self.field) or ObservableName(self.field)


_known: WeakKeyDictionary[Trajectory, tuple[NotFinite, ...]] = WeakKeyDictionary()
_ROWS = 256
"""Steps per block of a large field."""


def not_finite(trajectory: Trajectory) -> tuple[NotFinite, ...]:
    """One entry for each field with a NaN or an infinity that it must not have.

    The result is cached, since a baseline is checked for every run that is compared with it.
    """
    if trajectory not in _known:
        fields = ALWAYS_FINITE | SOMETIMES_ABSENT
        found = (_first(trajectory, field, title) for field, title in fields.items())
        _known[trajectory] = tuple(bad for bad in found if bad)
    return _known[trajectory]


def _first(t: Trajectory, field: str, title: str) -> NotFinite | None:
    absent: NDArray[np.bool_] | None = None
    for start, stop in _blocks(t, field):
        values = t.read(field, start, stop)
        bad = ~np.isfinite(values)
        if field in SAMPLE_COLUMNS:
            bad[t.sample_index[start:stop] == UNUSED] = False
        if bad.any() and field in SOMETIMES_ABSENT:
            absent = _absent(t, field) if absent is None else absent
            bad &= ~absent
        if bad.any():
            row, *item = (int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
            return NotFinite(
                field=field,
                title=title,
                value=float(values[(row, *item)]),
                step=int(t.step[start + row]),
                where=_where(t, field, (start + row, *item)),
            )
    return None


def _blocks(t: Trajectory, field: str) -> Iterator[tuple[int, int]]:
    # A small field is one block, and so is its mask of values that are not computed.
    rows = _ROWS if field in LARGE else max(1, t.num_steps)
    return ((start, start + rows) for start in range(0, t.num_steps, rows))


def _absent(t: Trajectory, field: str) -> NDArray[np.bool_]:
    """Mask of the NaN that mean "not computed"; broadcasts with the shape of a block."""
    nan = (np.isnan(t.read(field, start, stop)) for start, stop in _blocks(t, field))
    if field == "sample_norm_by_parameter":
        columns = (block.all(axis=(0, 1), keepdims=True) for block in nan)
        return functools.reduce(np.logical_and, columns)
    whole = next(nan)
    if field.startswith("layer_"):
        # A step without layer norms, or a layer that has none in any step.
        return np.asarray(whole.all(axis=1, keepdims=True) | whole.all(axis=0, keepdims=True))
    return np.asarray(whole.all(keepdims=True))


def _where(t: Trajectory, field: str, at: tuple[int, ...]) -> str:
    if field.endswith("_sketch"):
        return f"parameter {t.parameter_names[at[1]]}"
    if field.startswith("layer_"):
        return f"layer {t.layer_names[at[1]]}"
    if len(at) == 1:
        return ""
    sample = f"sample {t.sample_index[at[:2]]}"
    return sample if len(at) == 2 else f"{sample}, parameter {t.parameter_names[at[2]]}"
