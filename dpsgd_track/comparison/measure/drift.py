"""Drift of two aligned trajectories: one distance per observable, step and item.

Records of long runs with many parameters are far larger than the result, so they are processed in
blocks of steps, all pairs at a time: each block is read once and released before the next.

Legend: S steps, N samples of one step, L linear layers, P trainable parameters, K projections,
M items of an observable (layers, samples, parameters, or one for a scalar).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import overload

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.measure.alignment import Aligned, Gap, align
from dpsgd_track.comparison.measure.observables import LOSS, OBSERVABLES, Observable, relative
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import LARGE, Floats, Integers, Trajectory

Labelled = tuple[str, Trajectory]
"""A run's label and its record."""

# Numbers of one field and run in a block: 2 MB, so that intermediate results stay in cache.
_BLOCK_SIZE = 1 << 18


@dataclass(frozen=True)
class Places(Sequence[str]):
    """[S] the layer, parameter or sample of each step's largest difference, named on demand."""

    record: Trajectory
    """The baseline, aligned."""
    items: str
    """Kind of the observable's items."""
    columns: Integers
    """[S] index of the item."""

    def __len__(self) -> int:
        return len(self.columns)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[str, ...]: ...
    def __getitem__(self, row: int | slice) -> str | tuple[str, ...]:
        if isinstance(row, slice):
            return tuple(self[i] for i in range(*row.indices(len(self))))
        column = int(self.columns[row])
        match self.items:
            case "layer":
                return f"layer {self.record.layer_names[column]}"
            case "parameter":
                return f"parameter {self.record.parameter_names[column]}"
            case "sample":
                return f"sample {self.record.sample_index[row, column]}"
            case "sample_parameter":
                sample, parameter = divmod(column, len(self.record.parameter_names))
                return (
                    f"sample {self.record.sample_index[row, sample]}, "
                    f"parameter {self.record.parameter_names[parameter]}"
                )
        return ""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Drift of one observable of one pair."""

    observable: Observable
    steps: Integers
    """[S] the steps that both sides have."""
    per_step: Floats
    """[S] largest difference of each step; NaN if not computed."""
    where_per_step: Sequence[str]
    """[S] its layer, parameter or sample; empty for a scalar."""
    max: float
    mean: float
    """Mean of `per_step`."""
    std: float
    """Standard deviation of `per_step`."""
    step: int
    """Step of the largest difference."""
    where: str
    """Layer, parameter or sample of the largest difference."""
    baseline_value: float
    """The baseline's value there; NaN for a distance."""
    other_value: float
    relative_max: float
    """The largest difference as a fraction of the baseline's value."""
    by_item: Mapping[str, float]
    """Largest difference over the steps, of each layer or parameter; empty for other items."""
    items: tuple[str, ...] = ()
    """[M] layers or parameters of `per_step_by_item`; empty for other items."""
    per_step_by_item: NDArray[np.float32] | None = None
    """[S, M] largest difference of each layer or parameter at each step (over the samples, if
    each has its own); NaN if not computed. None if there are no such items, and in a pair that only
    contributes to the largest drift of all."""

    @property
    def matrix(self) -> Floats:
        """[S, M] `per_step_by_item`, or [S, 1] `per_step` if there are no such items."""
        if not self.items:
            return self.per_step[:, None]
        assert self.per_step_by_item is not None, "a pair that is judged keeps its items"
        return self.per_step_by_item.astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One mode and one baseline, in one regime."""

    regime: str
    baseline: str
    mode: str
    aligned: Aligned
    """The common part of the two records."""
    drifts: Mapping[ObservableName, Drift]
    """By observable."""
    not_computed: Mapping[ObservableName, str]
    """Observables left out, and the side that does not compute them."""

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """Items that one of the two has and the other lacks."""
        return self.aligned.gaps


def compare_pair(
    regime: str, baseline: Labelled, mode: Labelled, *, block_size: int = _BLOCK_SIZE
) -> Pair:
    """Compare every observable of a labelled `mode` with a labelled `baseline`."""
    return compare_pairs(regime, [(baseline, mode)], block_size=block_size)[0]


def compare_pairs(
    regime: str,
    pairs: Sequence[tuple[Labelled, Labelled]],
    num_detailed: int | None = None,
    *,
    block_size: int = _BLOCK_SIZE,
) -> list[Pair]:
    """Compare every observable of many pairs (baseline, mode), reading each record once.

    Args:
        num_detailed: number of leading pairs that keep `Drift.per_step_by_item`; by default all.
        block_size: numbers of a record that are read at once.
    """
    detailed = len(pairs) if num_detailed is None else num_detailed
    walks = [
        _Walk(align(baseline[1], mode[1]), keep_items=number < detailed)
        for number, (baseline, mode) in enumerate(pairs)
    ]
    for walk in walks:
        walk.take_small()
    for start, stop in _blocks([side for walk in walks for side in walk.sides], block_size):
        # An update starts from the weights of the step before, so a block begins one step early.
        first = max(0, start - 1)
        running = [walk for walk in walks if start < walk.num_steps]
        sides = {id(side): side for walk in running for side in walk.sides}
        blocks = {key: side.rows(first, stop) for key, side in sides.items()}
        for walk in running:
            ours, theirs = (blocks[id(side)] for side in walk.sides)
            walk.take_block(ours, theirs, start, start - first)
    return [
        _summed_up(regime, baseline[0], mode[0], walk)
        for (baseline, mode), walk in zip(pairs, walks, strict=True)
    ]


def _blocks(sides: Sequence[Trajectory], block_size: int) -> Iterator[tuple[int, int]]:
    num_steps = max((side.num_steps for side in sides), default=0)
    width = max((prod(side.shape_of(name)[1:]) for side in sides for name in _COMPARED), default=1)
    rows = max(16, block_size // max(1, width))
    for start in range(0, num_steps, rows):
        yield start, min(start + rows, num_steps)


_COMPARED = [name for name in LARGE if name in {o.field for o in OBSERVABLES.values()}]


class _Walk:
    """Progress of one pair through the steps, with the largest differences so far."""

    def __init__(self, pair: Aligned, *, keep_items: bool) -> None:
        self.pair = pair
        self.sides = pair.baseline, pair.other
        self.num_steps = pair.baseline.num_steps
        self.keep_items = keep_items
        self.seen: dict[ObservableName, _Seen] = {}
        """By observable."""

    def take_small(self) -> None:
        """Measure the observables that are small enough to be processed in one piece."""
        for observable in OBSERVABLES.values():
            if observable.field not in LARGE and self.num_steps:
                found = observable.measure(*self.sides)
                self._take(observable, found, 0)

    def take_block(self, baseline: Trajectory, other: Trajectory, start: int, early: int) -> None:
        """Measure a block of steps from row `start` on, which begins `early` steps before it."""
        for observable in OBSERVABLES.values():
            if observable.field in LARGE:
                self._take(observable, observable.measure(baseline, other)[early:], start)

    def _take(self, observable: Observable, found: Floats, start: int) -> None:
        if found.size:
            if observable.name not in self.seen:
                self.seen[observable.name] = _Seen(self, observable, found)
            self.seen[observable.name].take(found, start)


class _Seen:
    """Differences of one observable, reduced to the largest of each step and item."""

    def __init__(self, walk: _Walk, observable: Observable, found: Floats) -> None:
        S, record = walk.num_steps, walk.pair.baseline
        self.per_step = np.full(S, np.nan)
        self.columns = np.zeros(S, dtype=np.int64)
        names: dict[str, Sequence[str]] = {
            "layer": record.layer_names.tolist(),
            "parameter": record.parameter_names.tolist(),
            "sample_parameter": record.parameter_names.tolist(),
        }
        self.items = tuple(names.get(observable.items, ()))
        self.by_item = np.full(len(self.items), np.nan)
        self.per_step_by_item: NDArray[np.float32] | None = None
        if walk.keep_items and self.items:
            self.per_step_by_item = np.full((S, len(self.items)), np.nan, dtype=np.float32)

    def take(self, found: Floats, start: int) -> None:
        """Fold in `found` ([rows] or [rows, ...]), whose first row is step row `start`."""
        rows = slice(start, start + len(found))
        flat = found.reshape(len(found), -1)
        # argmax would pick NaN as the largest.
        columns = np.where(np.isnan(flat), -1.0, flat).argmax(axis=1)
        self.columns[rows] = columns
        self.per_step[rows] = flat[np.arange(len(flat)), columns]
        if not self.items:
            return
        largest = np.fmax.reduce(found, axis=1) if found.ndim == 3 else found
        self.by_item = np.fmax(self.by_item, np.fmax.reduce(largest, axis=0))
        if self.per_step_by_item is not None:
            with np.errstate(over="ignore"):
                self.per_step_by_item[rows] = largest


def _summed_up(regime: str, baseline: str, mode: str, walk: _Walk) -> Pair:
    drifts: dict[ObservableName, Drift] = {}
    absent: dict[ObservableName, str] = {}
    for name, observable in OBSERVABLES.items():
        seen = walk.seen.get(name)
        if seen is None or np.isnan(seen.per_step).all():
            absent[name] = _why_absent(walk.pair, observable, baseline, mode)
        else:
            drifts[name] = _drift(walk.pair, observable, seen)
    return Pair(
        regime=regime,
        baseline=baseline,
        mode=mode,
        aligned=walk.pair,
        drifts=drifts,
        not_computed=absent,
    )


def _why_absent(pair: Aligned, observable: Observable, baseline: str, mode: str) -> str:
    if not pair.baseline.num_steps:
        return "no step in common"
    sides = [
        label
        for label, side in ((baseline, pair.baseline), (mode, pair.other))
        if _is_blank(side, observable.field)
    ]
    return f"not computed by {' and '.join(sides)}" if sides else "nothing in common to compare"


def _is_blank(side: Trajectory, field: str) -> bool:
    starts = range(0, side.num_steps, 16)
    return all(np.isnan(side.read(field, start, start + 16)).all() for start in starts)


def _drift(pair: Aligned, observable: Observable, seen: _Seen) -> Drift:
    per_step = seen.per_step
    row = int(np.nanargmax(per_step))
    ours, theirs = _values(pair, observable, row, int(seen.columns[row]))
    largest = float(per_step[row])
    fraction = largest
    if not observable.is_relative and observable.threshold == LOSS:
        fraction = float(relative(np.array(ours), np.array(largest), 0.0))
    with np.errstate(invalid="ignore"):  # the standard deviation of an infinity is NaN
        mean, std = float(np.nanmean(per_step)), float(np.nanstd(per_step))
    places = Places(pair.baseline, observable.items, seen.columns)
    # `sample_parameter` has too many items for a table.
    by_item = zip(seen.items, seen.by_item.tolist(), strict=True)
    return Drift(
        observable=observable,
        steps=pair.baseline.step,
        per_step=per_step,
        where_per_step=places,
        max=largest,
        mean=mean,
        std=std,
        step=int(pair.baseline.step[row]),
        where=places[row],
        baseline_value=ours,
        other_value=theirs,
        relative_max=fraction,
        by_item={name: value for name, value in by_item if value >= 0}
        if observable.items in ("layer", "parameter")
        else {},
        items=seen.items,
        per_step_by_item=seen.per_step_by_item,
    )


def _values(pair: Aligned, observable: Observable, row: int, column: int) -> tuple[float, float]:
    if observable.is_estimate:
        return float("nan"), float("nan")
    ours, theirs = (
        float(side.read(observable.field, row, row + 1).reshape(-1)[column])
        for side in (pair.baseline, pair.other)
    )
    return ours, theirs
