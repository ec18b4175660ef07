"""Aligns two trajectories by step, sample index, and layer and parameter name.

Order never matters, so a permuted replay lines up with its baseline. Items that only one side has
are left out of the pair and reported as gaps, and a pair with a gap never passes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.record.trajectory import (
    LARGE,
    SAMPLE_COLUMNS,
    UNUSED,
    Column,
    Integers,
    Trajectory,
)

_SHOWN = 3

_BY_LAYER = ("layer_names", "layer_weight_norm", "layer_grad_norm")
_BY_SAMPLE = tuple(name for name in SAMPLE_COLUMNS if name != "sample_index")
_SKETCHES = ("gradient_sketch", "noised_sketch", "weight_sketch")


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Items that one side has and the other lacks."""

    kind: str
    """step, sample, layer, parameter or projection."""
    missing_from: str
    """baseline or mode."""
    names: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """`2 steps missing from the mode: 3, 4`."""
        shown = ", ".join(self.names[:_SHOWN])
        more = f" and {len(self.names) - _SHOWN} more" if len(self.names) > _SHOWN else ""
        plural = "s" * (len(self.names) != 1)
        return (
            f"{len(self.names)} {self.kind}{plural} missing from the {self.missing_from}: "
            f"{shown}{more}"
        )


@dataclass(frozen=True, kw_only=True)
class Aligned:
    """The common part of two trajectories, in the baseline's order."""

    baseline: Trajectory
    other: Trajectory
    """A sample that it lacks is NaN, and a gap reports it."""
    gaps: tuple[Gap, ...]


def align(baseline: Trajectory, other: Trajectory) -> Aligned:
    """`baseline` and `other` with equal steps, samples, layers and parameters.

    A side that needs no selection and no reordering is passed on unchanged. The large fields of any
    other are reordered when they are read.
    """
    gaps: list[Gap] = []

    def common(kind: str, ours: NDArray[Any], theirs: NDArray[Any]) -> tuple[_Places, _Places]:
        if np.array_equal(ours, theirs):
            return None, None
        here = {str(name): i for i, name in enumerate(ours.tolist())}
        there = {str(name): i for i, name in enumerate(theirs.tolist())}
        gaps.extend(_gaps(kind, here, there))
        both = [name for name in here if name in there]
        return _places(here, both), _places(there, both)

    steps = common("step", baseline.step, other.step)
    layers = common("layer", baseline.layer_names, other.layer_names)
    parameters = common("parameter", baseline.parameter_names, other.parameter_names)
    ours, theirs = (
        _in_order(side, _Order(steps=step, layers=layer, parameters=parameter))
        for side, step, layer, parameter in zip(
            (baseline, other), steps, layers, parameters, strict=True
        )
    )
    samples = _sample_places(ours, theirs, gaps)
    theirs = _in_order(theirs, _Order(samples=samples), {"sample_index": ours.sample_index})
    sketches = ours.shape_of("gradient_sketch")
    if sketches != theirs.shape_of("gradient_sketch"):
        counts = [str(t.shape_of("gradient_sketch")[-1]) for t in (ours, theirs)]
        gaps.append(Gap(kind="projection", missing_from="mode", names=(" against ".join(counts),)))
        theirs = _in_order(theirs, _Order(blank=sketches))
    return Aligned(baseline=ours, other=theirs, gaps=tuple(gaps))


def _gaps(kind: str, here: Mapping[str, int], there: Mapping[str, int]) -> list[Gap]:
    lacking = (
        ("mode", tuple(name for name in here if name not in there)),
        ("baseline", tuple(name for name in there if name not in here)),
    )
    return [Gap(kind=kind, missing_from=side, names=names) for side, names in lacking if names]


_Places = Integers | None
"""Indices of the selected items; None for all of them in their own order."""


def _places(at: Mapping[str, int], wanted: Sequence[str]) -> _Places:
    chosen = [at[name] for name in wanted]
    return None if chosen == list(range(len(at))) else np.array(chosen, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class _Order:
    """Selection and order of a trajectory's items."""

    steps: _Places = None
    layers: _Places = None
    parameters: _Places = None
    samples: _Places = None
    """[S, N] place of each sample in its step; -1 for a missing one."""
    blank: tuple[int, ...] | None = None
    """Shape of the NaN that replace sketches that cannot be compared."""

    @property
    def is_unchanged(self) -> bool:
        """True if everything is selected in its own order."""
        return all(getattr(self, item.name) is None for item in fields(self))

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a large field after reordering."""
        if self.blank is not None and name in _SKETCHES:
            return self.blank
        axis = _parameter_axis(name)
        S = shape[0] if self.steps is None else len(self.steps)
        P = shape[axis] if self.parameters is None else len(self.parameters)
        N = (
            shape[1:2]
            if self.samples is None or name not in _BY_SAMPLE
            else (self.samples.shape[1],)
        )
        ordered = [S, *N, *shape[2:]]
        ordered[axis] = P
        return tuple(ordered)

    def read(self, of: Trajectory, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` in the new order, of a field with one row per step."""
        if self.blank is not None and name in _SKETCHES:
            return np.full((stop - start, *self.blank[1:]), np.nan)
        if self.steps is None:
            values = of.read(name, start, stop)
        else:
            rows = self.steps[start:stop]
            first, end = (rows.min(), rows.max() + 1) if rows.size else (0, 0)
            values = of.read(name, first, end)[rows - first]
        if self.layers is not None and name in _BY_LAYER:
            values = values[:, self.layers]
        if self.parameters is not None and name in LARGE:
            values = np.take(values, self.parameters, axis=_parameter_axis(name))
        if self.samples is not None and name in _BY_SAMPLE:
            values = _gather(values, self.samples[start:stop])
        return values


def _parameter_axis(name: str) -> int:
    return 1 if name in _SKETCHES else 2


@dataclass(frozen=True)
class _Ordered:
    """A large field of a trajectory, reordered when it is read."""

    of: Trajectory
    name: str
    order: _Order

    @property
    def shape(self) -> tuple[int, ...]:
        return self.order.shape(self.name, self.of.shape_of(self.name))

    def read(self, start: int, stop: int) -> NDArray[Any]:
        return self.order.read(self.of, self.name, start, stop)


def _in_order(
    trajectory: Trajectory, order: _Order, instead: Mapping[str, Any] | None = None
) -> Trajectory:
    """`trajectory` in `order`, with the fields of `instead` replacing its own."""
    if order.is_unchanged:
        return trajectory
    S = trajectory.num_steps if order.steps is None else len(order.steps)
    values: dict[str, Any] = {}
    for name in (item.name for item in fields(Trajectory) if item.name not in LARGE):
        value = getattr(trajectory, name)
        names_of = {
            "layer_names": order.layers,
            "parameter_names": order.parameters,
            "parameter_sizes": order.parameters,
        }
        if name in names_of:
            values[name] = value if names_of[name] is None else value[names_of[name]]
        elif isinstance(value, np.ndarray):
            values[name] = order.read(trajectory, name, 0, S)
        else:
            values[name] = value
    values.update(instead or {})
    columns: dict[str, Column] = {name: _Ordered(trajectory, name, order) for name in LARGE}
    return Trajectory.deferred(values, columns)


def _sample_places(baseline: Trajectory, other: Trajectory, gaps: list[Gap]) -> _Places:
    """[S, N] place in `other` of each sample of `baseline`; None if both have the same order."""
    if np.array_equal(baseline.sample_index, other.sample_index):
        return None
    permuted = _permutation(baseline.sample_index, other.sample_index)
    if permuted is not None:
        return permuted
    places = np.full(baseline.sample_index.shape, -1, dtype=np.int64)
    absent: dict[str, list[str]] = {"mode": [], "baseline": []}
    for row, (step, ours, theirs) in enumerate(
        zip(baseline.step, baseline.sample_index, other.sample_index, strict=True)
    ):
        place = {int(sample): i for i, sample in enumerate(theirs) if sample != UNUSED}
        places[row] = [place.get(int(sample), -1) for sample in ours]
        known = set(ours.tolist()) - {UNUSED}
        absent["mode"] += [f"{s} (step {step})" for s in sorted(known - place.keys())]
        absent["baseline"] += [f"{s} (step {step})" for s in place if s not in known]
    gaps.extend(
        Gap(kind="sample", missing_from=side, names=tuple(names))
        for side, names in absent.items()
        if names
    )
    return places


def _permutation(ours: Integers, theirs: Integers) -> _Places:
    """[S, N] places if every step has the same samples in another order; otherwise None."""
    if ours.shape != theirs.shape:
        return None
    here, there = np.argsort(ours, axis=1), np.argsort(theirs, axis=1)
    same = np.take_along_axis(ours, here, axis=1) == np.take_along_axis(theirs, there, axis=1)
    if not same.all():
        return None
    places = np.empty_like(ours)
    np.put_along_axis(places, here, there, axis=1)
    return places


def _gather(values: NDArray[Any], places: Integers) -> NDArray[Any]:
    # The values picked by place -1 are replaced by NaN, or by a rank that does not exist.
    rows = np.arange(len(values))[:, None]
    if values.shape[1] == 0:
        shape = (*places.shape, *values.shape[2:])
        return np.full(shape, _filler(values), dtype=values.dtype)
    picked: NDArray[Any] = values[rows, places]
    picked[places == -1] = _filler(values)
    return picked


def _filler(values: NDArray[Any]) -> float:
    return UNUSED if values.dtype == np.int64 else np.nan
