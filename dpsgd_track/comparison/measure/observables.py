"""The observables: a table of all compared quantities, each with its measure of difference.

Legend: S steps, N samples of one step, L linear layers, P trainable parameters, K projections,
M items of an observable (layers, samples, parameters, or one for a scalar).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from dpsgd_track.record.stages import ObservableName, Stage
from dpsgd_track.record.trajectory import Floats, Trajectory, sketch_distance, sketch_length

LOSS, GRAD_NORM = "loss", "grad_norm"
"""Thresholds of observables: fields of `config.Thresholds`."""

# A relative difference is taken of max(|baseline|, SMALL x total), the total being that of all
# layers or parameters of the step. Some gradients are zero by mathematics (the key bias of an
# attention layer), so both sides hold only rounding noise, and their plain relative difference is
# about 1. The noise is 1e-8 of the total in float32, and 1e-6 where a norm is computed from a Gram
# matrix, whose terms cancel. An item that is entirely wrong shows as 2 % at a thousandth of the
# total, and above float32's rounding down to a millionth of it.
SMALL = 0.05
# Samples are computed independently, so the rounding of one says nothing about the others.
SMALL_SAMPLE = 1e-3

OfOne = Callable[[Trajectory], Floats]
OfTwo = Callable[[Trajectory, Trajectory], Floats]


def relative(
    baseline: Floats, difference: Floats, total: Floats | float, small: float = SMALL
) -> Floats:
    """`difference` in units of the baseline; 0/0 is 0, and any other number over 0 is infinite."""
    return _in_units(difference, _unit(baseline, total, small))


def _unit(baseline: Floats, total: Floats | float, small: float = SMALL) -> Floats:
    return np.maximum(np.abs(baseline), small * np.asarray(total))


def _in_units(difference: Floats, unit: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = np.asarray(difference / unit)
    quotient[difference == 0] = 0.0
    return quotient


def _once(compute: OfOne) -> OfOne:
    """`compute`, cached for each record as long as the record lives.

    A run is compared with every other one, and its own quantities are the same each time.
    """
    known: WeakKeyDictionary[Trajectory, Floats] = WeakKeyDictionary()

    def remembered(t: Trajectory) -> Floats:
        if t not in known:
            known[t] = compute(t)
        return known[t]

    return remembered


def _difference(baseline: Floats, other: Floats) -> Floats:
    # Infinities are findings of their own (finite.py); here they only must not warn.
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.subtract(other, baseline)
    return np.abs(difference, out=difference)


def _l2(values: Floats, axis: int) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sqrt(np.nansum(np.square(values), axis=axis, keepdims=True))


def _largest(values: Floats, axis: int | None) -> Floats:
    return np.max(np.nan_to_num(np.abs(values)), axis=axis, keepdims=True, initial=0.0)


def _length(sketch: Floats) -> Floats:
    """[S, P] estimated L2 norm of each parameter's tensor."""
    with np.errstate(invalid="ignore", over="ignore"):
        return sketch_length(sketch)


def _distance(ours: Floats, theirs: Floats) -> Floats:
    with np.errstate(invalid="ignore", over="ignore"):
        return sketch_distance(ours, theirs)


def _absolute(field: str) -> OfTwo:
    return lambda baseline, other: _difference(getattr(baseline, field), getattr(other, field))


def _relative(field: str, total: OfOne, small: float = SMALL) -> OfTwo:
    unit = _once(lambda t: _unit(getattr(t, field), total(t), small))
    absolute = _absolute(field)
    return lambda baseline, other: _in_units(absolute(baseline, other), unit(baseline))


def _unit_of_sketch(field: str) -> OfOne:
    def unit(t: Trajectory) -> Floats:
        length = _length(getattr(t, field))
        return _unit(length, _l2(length, axis=1))

    return _once(unit)


def _direction(field: str) -> OfTwo:
    """Sketch distance in units of the baseline's norm, both estimated: [S, P]."""
    unit = _unit_of_sketch(field)
    return lambda baseline, other: _in_units(
        _distance(getattr(baseline, field), getattr(other, field)), unit(baseline)
    )


@_once
def _noise_sketch(t: Trajectory) -> Floats:
    with np.errstate(invalid="ignore"):
        return t.noised_sketch - t.gradient_sketch


_noise_unit = _unit_of_sketch("noised_sketch")


def _noise(baseline: Trajectory, other: Trajectory) -> Floats:
    distance = _distance(_noise_sketch(baseline), _noise_sketch(other))
    return _in_units(distance, _noise_unit(baseline))


@_once
def _path(t: Trajectory) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.diff(t.weight_sketch, axis=0)


@_once
def _path_unit(t: Trajectory) -> Floats:
    # The rounding of the path is that of the weights.
    length, weight = _length(_path(t)), _length(t.weight_sketch[1:])
    return _unit(length, np.maximum(_l2(length, axis=1), weight))


def _update(baseline: Trajectory, other: Trajectory) -> Floats:
    # A wrong learning rate moves weights by far less than their length, so the path of one step is
    # compared as well.
    path = _in_units(_distance(_path(baseline), _path(other)), _path_unit(baseline))
    return np.concatenate([np.full((1, path.shape[1]), np.nan), path])


def _final_loss(baseline: Trajectory, other: Trajectory) -> Floats:
    drift = np.full(baseline.num_steps, np.nan)
    drift[-1:] = _difference(baseline.loss[-1:], other.loss[-1:])
    return drift


class Charted(enum.Enum):
    """Condition under which the drift of an observable has a chart."""

    ALWAYS = enum.auto()
    IF_DIFFERENT = enum.auto()
    """Only if some mode deviates; if all are equal, the table of stages suffices."""
    NEVER = enum.auto()


@dataclass(frozen=True, kw_only=True)
class Observable:
    """One compared quantity."""

    name: ObservableName
    stage: Stage | None
    """Stage that it is evidence of; None where another observable is that of the same value."""
    charted: Charted
    title: str
    """Name in a sentence."""
    measure: Callable[[Trajectory, Trajectory], Floats]
    """[S] or [S, items] differences of two aligned records; NaN if not computed. Those of a step
    need only this step and the one before, unless the observable has one number per step."""
    field: str
    """Trajectory field it is made from."""
    items: str = ""
    """layer, parameter, sample, sample_parameter; empty for a scalar."""
    threshold: str = GRAD_NORM
    """Name of its threshold."""
    is_relative: bool = True
    may_be_absent: bool = False
    """NaN means "not computed" where the whole of it is NaN; elsewhere it is a defect."""
    is_estimate: bool = False
    """Estimated from K projections: relative standard deviation about sqrt(1 / (2 K))."""


OBSERVABLES: dict[ObservableName, Observable] = {
    o.name: o
    for o in (
        Observable(
            name=ObservableName.LOSS,
            stage=Stage.LOSS,
            charted=Charted.ALWAYS,
            title="loss",
            measure=_absolute("loss"),
            field="loss",
            threshold=LOSS,
            is_relative=False,
        ),
        Observable(
            name=ObservableName.FINAL_LOSS,
            stage=None,
            charted=Charted.NEVER,
            title="final loss",
            measure=_final_loss,
            field="loss",
            threshold=LOSS,
            is_relative=False,
        ),
        Observable(
            name=ObservableName.SAMPLE_LOSS,
            stage=Stage.LOSS,
            charted=Charted.NEVER,
            title="loss of one sample",
            measure=_absolute("sample_loss"),
            field="sample_loss",
            items="sample",
            threshold=LOSS,
            is_relative=False,
        ),
        Observable(
            name=ObservableName.SAMPLE_NORM,
            stage=Stage.NORMS,
            charted=Charted.ALWAYS,
            may_be_absent=True,
            title="per-sample gradient norm",
            measure=_relative("sample_norm", lambda t: _largest(t.sample_norm, 1), SMALL_SAMPLE),
            field="sample_norm",
            items="sample",
        ),
        Observable(
            name=ObservableName.SAMPLE_NORM_BY_PARAMETER,
            stage=Stage.NORMS,
            charted=Charted.NEVER,
            may_be_absent=True,
            title="per-sample gradient norm of one parameter",
            measure=_relative(
                "sample_norm_by_parameter", lambda t: _l2(t.sample_norm_by_parameter, 2)
            ),
            field="sample_norm_by_parameter",
            items="sample_parameter",
        ),
        Observable(
            name=ObservableName.CLIP_FACTOR,
            stage=Stage.FACTORS,
            charted=Charted.IF_DIFFERENT,
            may_be_absent=True,
            title="clip factor",
            measure=_absolute("clip_factor"),
            field="clip_factor",
            items="sample",
            is_relative=False,
        ),
        Observable(
            name=ObservableName.GRADIENT,
            stage=Stage.SUM,
            charted=Charted.ALWAYS,
            title="clipped sum (distance)",
            measure=_direction("gradient_sketch"),
            field="gradient_sketch",
            items="parameter",
            is_estimate=True,
        ),
        Observable(
            name=ObservableName.GRAD_NORM,
            stage=Stage.SUM,
            charted=Charted.ALWAYS,
            title="gradient norm",
            measure=_relative("grad_norm", lambda t: _largest(t.grad_norm, None), SMALL_SAMPLE),
            field="grad_norm",
        ),
        Observable(
            name=ObservableName.LAYER_GRAD_NORM,
            stage=Stage.SUM,
            charted=Charted.NEVER,
            may_be_absent=True,
            title="gradient norm of one layer",
            measure=_relative("layer_grad_norm", lambda t: t.grad_norm[:, None]),
            field="layer_grad_norm",
            items="layer",
        ),
        # The noise can be a thousand times longer than the clipped sum and would hide an error
        # in it, so the sum above and the noise alone are both compared, besides their total.
        Observable(
            name=ObservableName.NOISE,
            stage=Stage.NOISE,
            charted=Charted.IF_DIFFERENT,
            title="noise (distance)",
            measure=_noise,
            field="noised_sketch",
            items="parameter",
            is_estimate=True,
        ),
        Observable(
            name=ObservableName.NOISED_GRADIENT,
            stage=Stage.NOISE,
            charted=Charted.NEVER,
            title="noised gradient (distance)",
            measure=_direction("noised_sketch"),
            field="noised_sketch",
            items="parameter",
            is_estimate=True,
        ),
        Observable(
            name=ObservableName.GRAD_NORM_NOISED,
            stage=Stage.NOISE,
            charted=Charted.NEVER,
            title="noised gradient norm",
            measure=_relative(
                "grad_norm_noised", lambda t: _largest(t.grad_norm_noised, None), SMALL_SAMPLE
            ),
            field="grad_norm_noised",
        ),
        Observable(
            name=ObservableName.UPDATE,
            stage=Stage.UPDATE,
            charted=Charted.IF_DIFFERENT,
            title="weight update (distance)",
            measure=_update,
            field="weight_sketch",
            items="parameter",
            is_estimate=True,
        ),
        Observable(
            name=ObservableName.WEIGHTS,
            stage=Stage.UPDATE,
            charted=Charted.NEVER,
            title="weights after the step (distance)",
            measure=_direction("weight_sketch"),
            field="weight_sketch",
            items="parameter",
            is_estimate=True,
        ),
        Observable(
            name=ObservableName.LAYER_WEIGHT_NORM,
            stage=Stage.UPDATE,
            charted=Charted.NEVER,
            may_be_absent=True,
            title="weight norm of one layer",
            measure=_relative("layer_weight_norm", lambda t: _l2(t.layer_weight_norm, 1)),
            field="layer_weight_norm",
            items="layer",
        ),
    )
}
"""Every observable, in the order in which a step computes it."""

STAGES: Mapping[Stage, tuple[ObservableName, ...]] = {
    stage: names
    for stage in Stage
    if (names := tuple(o.name for o in OBSERVABLES.values() if o.stage is stage))
}
"""Stages that compute something, with their observables, in the order of a step. The first of a
stage is its result, and the others are made of it."""
