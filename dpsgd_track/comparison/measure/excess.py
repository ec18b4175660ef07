"""Ratio of each drift of a pair to the limit that rounding explains, or else to its threshold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.measure.drift import Drift, Pair
from dpsgd_track.comparison.measure.floor import Floor, limits_of
from dpsgd_track.config import Thresholds
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import Floats, Integers


@dataclass(frozen=True, kw_only=True)
class Excess:
    """A drift in units of its limits: those that rounding explains, or else its threshold."""

    drift: Drift
    times: Floats
    """[S] largest over the items; NaN if not computed."""
    limits: Floats
    """[S, items], or [S, 1] if there are none."""
    by_item: Floats
    """[S, items] differences, in the shape of the limits."""

    @property
    def nearest(self) -> Integers:
        """[S] the item that is nearest to its limit."""
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = self.by_item / self.limits
        return np.asarray(np.where(np.isnan(shares), -1.0, shares).argmax(axis=1))

    def place(self, row: int, item: int) -> str:
        """The layer, parameter or sample of `item` in a step."""
        where = self.drift.where_per_step[row]
        if not self.drift.items:
            return where
        kind = "layer" if self.drift.observable.items == "layer" else "parameter"
        named = f"{kind} {self.drift.items[item]}"
        # The place of the largest also names the sample.
        return where if where.endswith(named) else named

    @property
    def failing(self) -> NDArray[np.bool_]:
        """[S] steps over the limit."""
        return np.asarray(self.times > 1)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A pair with the limits of its drifts: all that a diagnosis and a verdict need.

    It holds arrays over all steps and items, so it is released as soon as its pair is judged.
    """

    pair: Pair
    thresholds: Thresholds
    floor: Floor | None
    """Floor of the baseline; None if it was not measured."""
    excesses: Mapping[ObservableName, Excess]
    """Excess of every drift of the pair."""

    def measured(self, observable: ObservableName) -> float | None:
        """The floor of an observable; None if it was not measured."""
        return self.floor.of(observable) if self.floor else None


def evidence_of(pair: Pair, thresholds: Thresholds, floor: Floor | None) -> Evidence:
    """`pair` with each of its drifts in units of its limits."""
    return Evidence(
        pair=pair,
        thresholds=thresholds,
        floor=floor,
        excesses={name: excess_of(d, thresholds, floor) for name, d in pair.drifts.items()},
    )


def excess_of(drift: Drift, thresholds: Thresholds, floor: Floor | None) -> Excess:
    """`drift` in units of its limits."""
    limits = limits_of(drift, floor)
    if limits is None:
        threshold = float(getattr(thresholds, drift.observable.threshold))
        limits = np.full((len(drift.steps), 1), threshold)
    by_item = drift.matrix
    limits = np.broadcast_to(limits, by_item.shape)
    times = np.fmax.reduce(by_item / limits, axis=1)
    return Excess(drift=drift, times=times, limits=limits, by_item=by_item)
