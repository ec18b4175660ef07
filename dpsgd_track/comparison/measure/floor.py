"""The numerical floor: the effect of rounding alone, measured by replaying the baselines.

The replays of `no_dp` repeat the run with its samples permuted, and its embedded inputs moved by
one unit in the last place. The replay of `reference` computes in the modes' type, so that it shows
the error of plain autograd in that type against float64.

A drift within its limit cannot be told from rounding, whatever the thresholds are; one above it is
not rounding, however small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import optimize, special

from dpsgd_track.comparison.measure.alignment import Aligned
from dpsgd_track.comparison.measure.drift import Drift, Pair
from dpsgd_track.comparison.measure.observables import LOSS
from dpsgd_track.config import CLIP, kind_of
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import Floats, Integers, Trajectory

# Twice the error of plain autograd, as in FlashAttention's tests, where the floor is the largest
# of 64 draws, such as the projections of a parameter in four steps.
MARGIN = 2.0
# A loss, or the norm of a layer, is one draw of a random difference in each step, and the ratio of
# two such draws exceeds 2 every third time. The same holds for a sample: there are many, but in
# bfloat16 the one whose gradient cancels most has the largest error of all in every run. In runs of
# correct modes it reached 2.6 times that of plain autograd. Five is the margin of six normal draws.
MARGIN_OF_ONE_DRAW = 5.0
FALSE_ALARM = 1e-3
"""Probability that the largest of n draws exceeds `margin_of(n)` times the largest of n others."""
_ONE_DRAW = ("", "layer", "sample", "sample_parameter")
# With few steps, some layer's floor is small by luck: none is taken to be less than this share of
# the largest. So the limit of one parameter is never below the largest floor of any.
_LEAST_SHARE = {"layer": 0.5, "parameter": 0.5, "sample_parameter": 0.5}
_RELATED = {
    ObservableName.LOSS: ObservableName.SAMPLE_LOSS,
    ObservableName.FINAL_LOSS: ObservableName.SAMPLE_LOSS,
    ObservableName.GRAD_NORM: ObservableName.LAYER_GRAD_NORM,
    ObservableName.GRAD_NORM_NOISED: ObservableName.LAYER_GRAD_NORM,
}
"""By observable, a related one whose floor also counts: a mean is about as inaccurate as its terms,
and has fewer draws to show it."""

RESOLUTION = 32 * 2.0**-23
"""Relative difference that never counts: float32, with the rounding of a few operations that a
correct implementation may order differently. Norms, factors and sums are float32 whatever the
parameters' type."""
# If the terms of a Gram matrix cancel, as for the key bias of an attention layer, the square
# root of the remainder is off by sqrt(2^-23), 3e-4, of the terms: up to 1.6e-6 of the whole
# sample's norm, or 3.1e-5 here, in a small BERT with 64 tokens. The norm that is clipped does not
# show it.
_RESOLUTION_OF = {ObservableName.SAMPLE_NORM_BY_PARAMETER: 1e-4}

_OF_SQUARES, _MOST_OF_SQUARES = 2.0**-32, 2e-5
"""Relative error of a float32 norm that adds up squares one after the other: for each element, and
at most. `torch.linalg.vector_norm` does so on the CPU, and small squares are lost: in torch 2.13 it
is too small by 1e-6 of 24,000 elements, 7e-6 of 120,000 and 9e-5 of a million."""

_INHERITED, _BY_SUMS = {ObservableName.SAMPLE_NORM: 1.0, ObservableName.CLIP_FACTOR: 1.0}, 2.0
"""Multiple of the norms' error that counts for what is computed from them. Samples whose gradients
cancel in a sum do not weigh alike."""

CHAOS = 0.5
"""Limit of the clipped sum's distance from which on nothing is compared: rounding alone has moved
the weights so far apart that the gradients of a step are unrelated."""

_AHEAD, _AHEAD_SHARE = 4, 1.25
"""A growing floor may grow a little sooner in one run than in another: values up to step
1.25 s + 4 count for step s."""


@dataclass(frozen=True, kw_only=True)
class _Series:
    """The floor of one observable, step by step."""

    steps: Integers
    """[S]"""
    largest: Floats
    """[S] largest over all items."""
    items: tuple[str, ...]
    by_item: Floats
    """[S, items]"""
    num_draws: Integers
    """[S, items], or [S, 1]: independent draws that the floor of an item is the largest of."""
    share: Floats
    """[S] share of the related observable's floor that counts."""
    num_replays: int
    """Replays that show rounding, if steps move the weights; 0 if they stand still."""

    def at(self, steps: Integers) -> Integers:
        """Rows that count for `steps`."""
        reach = steps * _AHEAD_SHARE + _AHEAD
        return np.maximum(np.searchsorted(self.steps, reach, side="right") - 1, 0)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Floor of one regime."""

    measured_on: tuple[str, ...]
    """Titles of the replays."""
    values: Mapping[ObservableName, float]
    """Largest drift of a replay, by observable; one that no replay computes is left out."""
    series: Mapping[ObservableName, _Series]
    """The same step by step, as a running maximum."""
    against_float64: bool = False
    """True if plain autograd was compared with the float64 reference, rather than a mode with
    itself only: values within such a floor are as accurate as plain autograd."""
    norm_error: float = 0.0
    """Relative error of the whole norm that never counts; sums inherit it."""
    chaos: int | None = None
    """First step from which on rounding alone explains any gradient; nothing is compared there."""

    def of(self, observable: ObservableName) -> float | None:
        """The floor of `observable`; None if it was not measured."""
        return self.values.get(observable)


def error_of_norms(num_elements: int) -> float:
    """Relative error of a float32 norm of that many elements that a correct mode may have."""
    return min(_OF_SQUARES * num_elements, _MOST_OF_SQUARES)


def floor_of(replays: Sequence[Pair], *, against_float64: bool = False) -> Floor | None:
    """The joint floor of all replays; None if there are none.

    The largest counts, since each is one draw of the rounding error.
    """
    if not replays:
        return None
    drifts: dict[ObservableName, list[tuple[Aligned, Drift]]] = {}
    for replay in replays:
        for name, drift in replay.drifts.items():
            drifts.setdefault(name, []).append((replay.aligned, drift))
    stands_still = kind_of(replays[0].regime) == CLIP
    series = {name: _series(found, stands_still) for name, found in drifts.items()}
    return Floor(
        measured_on=tuple(dict.fromkeys(replay.mode for replay in replays)),
        values={name: max(drift.max for _, drift in found) for name, found in drifts.items()},
        series=series,
        against_float64=against_float64,
        norm_error=error_of_norms(_num_elements(replays[0].aligned.baseline)),
        chaos=_chaos(series.get(ObservableName.GRADIENT)),
    )


def _num_elements(record: Trajectory) -> int:
    return int(record.parameter_sizes.sum())


def _chaos(gradient: _Series | None) -> int | None:
    if gradient is None:
        return None
    lost = np.flatnonzero(MARGIN * gradient.largest[gradient.at(gradient.steps)] > CHAOS)
    return int(gradient.steps[lost[0]]) if len(lost) else None


def _series(drifts: Sequence[tuple[Aligned, Drift]], stands_still: bool) -> _Series:
    steps = np.unique(np.concatenate([drift.steps for _, drift in drifts]))
    items = drifts[0][1].items
    largest, by_item = np.zeros(len(steps)), np.zeros((len(steps), max(1, len(items))))
    num_draws, share = np.zeros_like(by_item, dtype=np.int64), np.ones(len(steps))
    num_replays = 0
    for aligned, drift in drifts:
        rows = np.searchsorted(steps, drift.steps)
        largest[rows] = np.fmax(largest[rows], drift.per_step)
        share[rows] = _share_of_sum(aligned, drift)
        if drift.items != items:
            continue
        by_item[rows] = np.fmax(by_item[rows], drift.matrix)
        # A replay that repeats every bit shows no rounding.
        if drift.max > 0:
            num_draws[rows] += _num_draws(aligned, drift)
            num_replays += 1
    return _Series(
        steps=steps,
        largest=np.maximum.accumulate(largest),
        items=items,
        by_item=np.maximum.accumulate(by_item, axis=0),
        num_draws=np.cumsum(num_draws, axis=0),
        share=share,
        num_replays=0 if stands_still else num_replays,
    )


def _num_draws(aligned: Aligned, drift: Drift) -> Integers:
    """[S, items], or [S, 1]: independent draws of a step's rounding error."""
    S, record = len(drift.steps), aligned.baseline
    match drift.observable.items:
        case "":
            draws = np.ones((S, 1), dtype=np.int64)
        case "layer":
            draws = np.full((S, 1), len(drift.items))
        case "parameter":
            # The projections of a small tensor repeat each other.
            sizes, num_projections = record.parameter_sizes, record.shape_of("gradient_sketch")[2]
            draws = np.where(sizes > 0, np.minimum(sizes, num_projections), num_projections)[None]
        case _:
            draws = record.num_samples[:, None]
    return np.where(np.isfinite(drift.per_step)[:, None], draws, 0)


def _share_of_sum(aligned: Aligned, drift: Drift) -> Floats | float:
    """[S] share of the clipped sum in the noised one, by which noise dilutes a relative error."""
    if drift.observable.name is not ObservableName.GRAD_NORM_NOISED:
        return 1.0
    noised = aligned.baseline.grad_norm_noised
    with np.errstate(divide="ignore", invalid="ignore"):
        share = aligned.baseline.grad_norm / noised
    return np.where(noised > 0, np.minimum(share, 1.0), 1.0)


def margin_of(num_draws: Integers) -> Floats:
    """Least m at which the largest |x| of n normal draws exceeds m times that of n others.

    This happens with probability FALSE_ALARM: 637 for one draw, 7.8 for 4, 5 for 6, 2 for 64.
    """
    knots, margins = _margins()
    return np.exp(np.interp(np.log(np.maximum(num_draws, 1)), knots, margins))


@cache
def _margins() -> tuple[Floats, Floats]:
    """Logarithms of numbers of draws and of their margins.

    With F the distribution of |x|, the probability is the integral of 1 - F(m t)^n over the
    distribution F(t)^n of the largest of the others.
    """
    t = np.geomspace(1e-6, 12.0, 600)

    def too_large(log_margin: float, n: int) -> float:
        others = special.erf(t / np.sqrt(2)) ** n
        exceeds = 1 - special.erf(np.exp(log_margin) * t / np.sqrt(2)) ** n
        return float(np.trapezoid(exceeds, others)) - FALSE_ALARM

    numbers = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 256, 4096)
    margins = [float(optimize.brentq(too_large, 0.0, 12.0, args=(n,), xtol=1e-4)) for n in numbers]
    return np.log(numbers), np.array(margins)


def limits_of(drift: Drift, floor: Floor | None) -> Floats | None:
    """[S, items] limit of each layer or parameter of `drift`, or [S, 1] of all, due to rounding.

    Infinite where rounding explains anything; None if no floor was measured.
    """
    name, kind = drift.observable.name, drift.observable.items
    series = floor.series.get(name) if floor else None
    if floor is None or series is None:
        return None
    rows = series.at(drift.steps)
    measured = series.largest[rows][:, None]
    num_draws = series.num_draws[rows]
    if name in _RELATED and (related := floor.series.get(_RELATED[name])) is not None:
        reach = related.at(drift.steps)
        measured = np.maximum(
            measured, 0.5 * (series.share[rows] * related.largest[reach])[:, None]
        )
        num_draws = num_draws + related.num_draws[reach]
    if drift.items and drift.items == series.items:
        measured = np.maximum(series.by_item[rows], _LEAST_SHARE[kind] * measured)
    else:
        num_draws = num_draws.max(axis=1, keepdims=True)
    margin = np.maximum(MARGIN_OF_ONE_DRAW if kind in _ONE_DRAW else MARGIN, margin_of(num_draws))
    inherited = 0.0 if drift.observable.threshold == LOSS else _INHERITED.get(name, _BY_SUMS)
    least = max(_RESOLUTION_OF.get(name, RESOLUTION), inherited * floor.norm_error)
    resolution = least * _unit(drift)
    limits = np.maximum(margin * measured, resolution)
    if kind == "parameter" and drift.items == series.items:
        limits[1:] = np.maximum(limits[1:], _limits_of_moved(series, rows[1:]))
    if floor.chaos is not None:
        limits[drift.steps >= floor.chaos] = np.inf
    return limits


def _limits_of_moved(series: _Series, rows: Integers) -> Floats:
    """[S, items] least limits of sums once the weights have moved; 0 if they stand still.

    All projections of a parameter then share one displacement of the weights, so that a replay is
    one draw. The largest floor of any parameter bounds what that can explain.
    """
    if series.num_replays == 0:
        return np.zeros((len(rows), 1))
    by_replay = margin_of(np.array(series.num_replays)) * series.by_item[rows]
    return np.minimum(by_replay, MARGIN * series.largest[rows][:, None])


def _unit(drift: Drift) -> float:
    # A loss is compared absolutely, and rounding is relative to its value.
    value = abs(drift.baseline_value)
    is_loss = drift.observable.threshold == LOSS
    return max(1.0, value) if is_loss and math.isfinite(value) else 1.0
