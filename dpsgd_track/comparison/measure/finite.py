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

from dpsgd_track.comparison.measure.observables import OBSERVABLES
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import LARGE, SAMPLE_COLUMNS, UNUSED, Trajectory

# Of several observables that are made of one field, the one that compares the field as it is.
_MADE_OF_OTHERS = (ObservableName.FINAL_LOSS, ObservableName.NOISE, ObservableName.UPDATE)
_CHECKED = {o.field: o for o in OBSERVABLES.values() if o.name not in _MADE_OF_OTHERS}
ALWAYS_FINITE = tuple(field for field, o in _CHECKED.items() if not o.may_be_absent)
SOMETIMES_ABSENT = tuple(field for field, o in _CHECKED.items() if o.may_be_absent)


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
        return _CHECKED[self.field].name


def not_finite_in(
    observable: ObservableName, mode: Trajectory, baseline: Trajectory
) -> NotFinite | None:
    """The first NaN or infinity of `mode` in the field of `observable`.

    None if there is none, or if the baseline has one as well.
    """
    field = OBSERVABLES[observable].field
    found = next((bad for bad in not_finite(mode) if bad.field == field), None)
    if found is None or any(bad.field == field for bad in not_finite(baseline)):
        return None
    return found


_known: WeakKeyDictionary[Trajectory, tuple[NotFinite, ...]] = WeakKeyDictionary()
_ROWS = 256
"""Steps per block of a large field."""


def not_finite(trajectory: Trajectory) -> tuple[NotFinite, ...]:
    """One entry for each field with a NaN or an infinity that it must not have.

    The result is cached, since a baseline is checked for every run that is compared with it.
    """
    if trajectory not in _known:
        found = (_first(trajectory, field) for field in (*ALWAYS_FINITE, *SOMETIMES_ABSENT))
        _known[trajectory] = tuple(bad for bad in found if bad)
    return _known[trajectory]


def _first(t: Trajectory, field: str) -> NotFinite | None:
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
                title=_CHECKED[field].title.removesuffix(" (distance)"),
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
