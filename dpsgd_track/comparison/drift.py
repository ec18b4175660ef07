"""How far two aligned trajectories are apart, one number per observable, step and item.

Legend: S steps, N samples of one step, L linear layers, P trainable parameters, K projections,
M items an observable is made of (layers, samples, parameters, or one for a scalar).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpsgd_track.comparison.alignment import Aligned, Gap, align
from dpsgd_track.tracking.trajectory import Floats, Integers, Trajectory, sketch_distance

LOSS, GRAD_NORM = "loss", "grad_norm"
"""Thresholds an observable may be held against: fields of `config.Thresholds`."""

# A relative difference is taken of max(|baseline|, SMALL x total), the total being that of all
# layers or parameters of the step. Some gradients are zero by mathematics (the key bias of an
# attention layer), so both sides hold only rounding noise, and their plain relative difference is
# about 1. The noise is 1e-8 of the total in float32, and 1e-6 where a norm is computed from a Gram
# matrix, whose terms cancel. An item that is entirely wrong shows as 2 % at a thousandth of the
# total, and above float32's rounding down to a millionth of it.
SMALL = 0.05
# Samples are computed each by itself, so the rounding of one is not measured by the others.
SMALL_SAMPLE = 1e-3


def relative(
    baseline: Floats, difference: Floats, total: Floats | float, small: float = SMALL
) -> Floats:
    """`difference` in units of the baseline; 0/0 is 0, and anything else over 0 is infinite."""
    scale = np.maximum(np.abs(baseline), small * np.asarray(total))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(difference == 0, 0.0, difference / scale)


def _difference(baseline: Floats, other: Floats) -> Floats:
    # Infinities are findings of their own (finite.py); here they only must not warn.
    with np.errstate(invalid="ignore", over="ignore"):
        return np.abs(other - baseline)


def _l2(values: Floats, axis: int) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sqrt(np.nansum(np.square(values), axis=axis, keepdims=True))


def _absolute(field: str) -> Callable[[Aligned], Floats]:
    return lambda pair: _difference(getattr(pair.baseline, field), getattr(pair.other, field))


def _relative(
    field: str, total: Callable[[Trajectory], Floats], small: float = SMALL
) -> Callable[[Aligned], Floats]:
    def measure(pair: Aligned) -> Floats:
        ours = getattr(pair.baseline, field)
        apart = _difference(ours, getattr(pair.other, field))
        return relative(ours, apart, total(pair.baseline), small)

    return measure


def _largest(values: Floats, axis: int | None) -> Floats:
    return np.max(np.nan_to_num(np.abs(values)), axis=axis, keepdims=True, initial=0.0)


def _direction(
    of: Callable[[Trajectory], Floats], scale: Callable[[Trajectory], Floats] | None = None
) -> Callable[[Aligned], Floats]:
    """Sketch distance in units of the baseline's norm, both estimated: [S, P]."""

    def measure(pair: Aligned) -> Floats:
        ours, theirs = of(pair.baseline), of(pair.other)
        with np.errstate(invalid="ignore", over="ignore"):
            distance = sketch_distance(ours, theirs)
            unit = (scale or of)(pair.baseline)
            norm = sketch_distance(unit, np.zeros_like(unit))
        return relative(norm, distance, _l2(norm, axis=1))

    return measure


def _update(pair: Aligned) -> Floats:
    # A learning rate that is wrong moves weights by far less than they are long, so the path of
    # one step is compared as well. The path's own rounding is that of the weights.
    ours, theirs = (np.diff(t.weight_sketch, axis=0) for t in (pair.baseline, pair.other))
    after = pair.baseline.weight_sketch[1:]
    with np.errstate(invalid="ignore", over="ignore"):
        distance, length = sketch_distance(ours, theirs), sketch_distance(ours, np.zeros_like(ours))
        weight = sketch_distance(after, np.zeros_like(after))
    path = relative(length, distance, np.maximum(_l2(length, axis=1), weight))
    return np.concatenate([np.full((1, path.shape[1]), np.nan), path])


def _final_loss(pair: Aligned) -> Floats:
    drift = np.full(pair.baseline.num_steps, np.nan)
    drift[-1:] = _difference(pair.baseline.loss[-1:], pair.other.loss[-1:])
    return drift


@dataclass(frozen=True, kw_only=True)
class Observable:
    """One thing that is compared."""

    name: str
    title: str
    """As it stands in a sentence."""
    measure: Callable[[Aligned], Floats]
    """[S] or [S, items] differences; NaN where not computed."""
    field: str
    """Trajectory field it is made from."""
    items: str = ""
    """layer, parameter, sample, sample_parameter; empty for a scalar."""
    threshold: str = GRAD_NORM
    """Which threshold it is held against."""
    is_relative: bool = True
    is_estimate: bool = False
    """Known from K projections: relative standard deviation about sqrt(1 / (2 K))."""


def _noise(t: Trajectory) -> Floats:
    with np.errstate(invalid="ignore"):
        return t.noised_sketch - t.gradient_sketch


OBSERVABLES: dict[str, Observable] = {
    o.name: o
    for o in (
        Observable(
            name="loss",
            title="loss",
            measure=_absolute("loss"),
            field="loss",
            threshold=LOSS,
            is_relative=False,
        ),
        Observable(
            name="final_loss",
            title="final loss",
            measure=_final_loss,
            field="loss",
            threshold=LOSS,
            is_relative=False,
        ),
        Observable(
            name="sample_loss",
            title="loss of one sample",
            measure=_absolute("sample_loss"),
            field="sample_loss",
            items="sample",
            threshold=LOSS,
            is_relative=False,
        ),
        Observable(
            name="sample_norm",
            title="per-sample gradient norm",
            measure=_relative("sample_norm", lambda t: _largest(t.sample_norm, 1), SMALL_SAMPLE),
            field="sample_norm",
            items="sample",
        ),
        Observable(
            name="sample_norm_by_parameter",
            title="per-sample gradient norm of one parameter",
            measure=_relative(
                "sample_norm_by_parameter", lambda t: _l2(t.sample_norm_by_parameter, 2)
            ),
            field="sample_norm_by_parameter",
            items="sample_parameter",
        ),
        Observable(
            name="clip_factor",
            title="clip factor",
            measure=_absolute("clip_factor"),
            field="clip_factor",
            items="sample",
            is_relative=False,
        ),
        Observable(
            name="gradient",
            title="clipped sum (distance)",
            measure=_direction(lambda t: t.gradient_sketch),
            field="gradient_sketch",
            items="parameter",
            is_estimate=True,
        ),
        Observable(
            name="grad_norm",
            title="gradient norm",
            measure=_relative("grad_norm", lambda t: _largest(t.grad_norm, None), SMALL_SAMPLE),
            field="grad_norm",
        ),
        Observable(
            name="layer_grad_norm",
            title="gradient norm of one layer",
            measure=_relative("layer_grad_norm", lambda t: t.grad_norm[:, None]),
            field="layer_grad_norm",
            items="layer",
        ),
        # The noise can be a thousand times longer than the clipped sum and would hide an error
        # in it, so the sum above and the noise alone are both compared, besides their total.
        Observable(
            name="noise",
            title="noise (distance)",
            measure=_direction(_noise, lambda t: t.noised_sketch),
            field="noised_sketch",
            items="parameter",
            is_estimate=True,
        ),
        Observable(
            name="noised_gradient",
            title="noised gradient (distance)",
            measure=_direction(lambda t: t.noised_sketch),
            field="noised_sketch",
            items="parameter",
            is_estimate=True,
        ),
        Observable(
            name="grad_norm_noised",
            title="noised gradient norm",
            measure=_relative(
                "grad_norm_noised", lambda t: _largest(t.grad_norm_noised, None), SMALL_SAMPLE
            ),
            field="grad_norm_noised",
        ),
        Observable(
            name="update",
            title="weight update (distance)",
            measure=_update,
            field="weight_sketch",
            items="parameter",
            is_estimate=True,
        ),
        Observable(
            name="weights",
            title="weights after the step (distance)",
            measure=_direction(lambda t: t.weight_sketch),
            field="weight_sketch",
            items="parameter",
            is_estimate=True,
        ),
        Observable(
            name="layer_weight_norm",
            title="weight norm of one layer",
            measure=_relative("layer_weight_norm", lambda t: _l2(t.layer_weight_norm, 1)),
            field="layer_weight_norm",
            items="layer",
        ),
    )
}
"""Everything that is compared, in the order in which a step computes it."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One observable of one pair."""

    observable: Observable
    steps: Integers
    """[S] the steps both sides have."""
    per_step: Floats
    """[S] largest difference of each step; NaN where not computed."""
    where_per_step: tuple[str, ...]
    """[S] the layer, parameter or sample it is found at; empty for a scalar."""
    max: float
    mean: float
    """Over `per_step`."""
    std: float
    """Over `per_step`."""
    step: int
    """Step of the largest."""
    where: str
    """Layer, parameter or sample of the largest."""
    baseline_value: float
    """What the baseline has there; NaN for a distance."""
    other_value: float
    relative_max: float
    """The largest as a fraction of the baseline's value."""
    by_item: Mapping[str, float]
    """Largest over the steps, of each layer or parameter; empty for other items."""
    items: tuple[str, ...]
    """Layers or parameters, in the order of `per_step_by_item`; empty for other items."""
    per_step_by_item: Floats
    """[S, items] largest difference of each; NaN where not computed."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One mode against one baseline, in one regime."""

    regime: str
    baseline: str
    mode: str
    drifts: Mapping[str, Drift]
    """By observable."""
    not_computed: Mapping[str, str]
    """Observables left out, and which side does not compute them."""
    gaps: tuple[Gap, ...]


def compare_pair(
    regime: str, baseline: tuple[str, Trajectory], mode: tuple[str, Trajectory]
) -> Pair:
    """Every observable of a labelled `mode` against a labelled `baseline`."""
    pair = align(baseline[1], mode[1])
    drifts: dict[str, Drift] = {}
    absent: dict[str, str] = {}
    for name, observable in OBSERVABLES.items():
        drift = _reduce(pair, observable) if pair.baseline.num_steps else None
        if drift is None:
            absent[name] = _why_absent(pair, observable, baseline[0], mode[0])
        else:
            drifts[name] = drift
    return Pair(
        regime=regime,
        baseline=baseline[0],
        mode=mode[0],
        drifts=drifts,
        not_computed=absent,
        gaps=pair.gaps,
    )


def _why_absent(pair: Aligned, observable: Observable, baseline: str, mode: str) -> str:
    if not pair.baseline.num_steps:
        return "no step in common"
    sides = [
        label
        for label, side in ((baseline, pair.baseline), (mode, pair.other))
        if np.isnan(getattr(side, observable.field)).all()
    ]
    return f"not computed by {' and '.join(sides)}" if sides else "nothing in common to compare"


def _reduce(pair: Aligned, observable: Observable) -> Drift | None:
    found = observable.measure(pair)
    S = pair.baseline.num_steps
    items = found.reshape(S, -1) if found.size else np.empty((S, 0))
    if np.isnan(items).all():
        return None
    known = np.where(np.isnan(items), -1.0, items)
    at = known.argmax(axis=1)
    per_step = items[np.arange(S), at]
    wheres = tuple(_label(pair, observable, row, int(column)) for row, column in enumerate(at))
    row = int(np.nanargmax(per_step))
    ours, theirs = _values(pair, observable, row, int(at[row]))
    largest = float(per_step[row])
    fraction = largest
    if not observable.is_relative and observable.threshold == LOSS:
        fraction = float(relative(np.array(ours), np.array(largest), 0.0))
    with np.errstate(invalid="ignore"):  # the standard deviation of an infinity is NaN
        mean, std = float(np.nanmean(per_step)), float(np.nanstd(per_step))
    return Drift(
        observable=observable,
        steps=pair.baseline.step,
        per_step=per_step,
        where_per_step=wheres,
        max=largest,
        mean=mean,
        std=std,
        step=int(pair.baseline.step[row]),
        where=wheres[row],
        baseline_value=ours,
        other_value=theirs,
        relative_max=fraction,
        by_item=_by_item(pair, observable, known),
        **_items(pair, observable, items),
    )


def _items(pair: Aligned, observable: Observable, found: Floats) -> dict[str, Any]:
    S = len(found)
    names: Any = pair.baseline.parameter_names
    if observable.items == "layer":
        names = pair.baseline.layer_names
    elif observable.items == "sample_parameter":
        largest = np.where(np.isnan(found), -1.0, found).reshape(S, -1, len(names)).max(axis=1)
        found = np.where(largest < 0, np.nan, largest)
    elif observable.items != "parameter":
        return {"items": (), "per_step_by_item": np.empty((S, 0))}
    return {"items": tuple(names.tolist()), "per_step_by_item": found}


def _label(pair: Aligned, observable: Observable, row: int, column: int) -> str:
    side = pair.baseline
    P = len(side.parameter_names)
    match observable.items:
        case "layer":
            return f"layer {side.layer_names[column]}"
        case "parameter":
            return f"parameter {side.parameter_names[column]}"
        case "sample":
            return f"sample {side.sample_index[row, column]}"
        case "sample_parameter":
            sample, parameter = divmod(column, P)
            return (
                f"sample {side.sample_index[row, sample]}, "
                f"parameter {side.parameter_names[parameter]}"
            )
    return ""


def _values(pair: Aligned, observable: Observable, row: int, column: int) -> tuple[float, float]:
    if observable.is_estimate:
        return float("nan"), float("nan")
    ours, theirs = (
        float(getattr(side, observable.field)[row].reshape(-1)[column])
        for side in (pair.baseline, pair.other)
    )
    return ours, theirs


def _by_item(pair: Aligned, observable: Observable, known: Floats) -> dict[str, float]:
    names: Any = {
        "layer": pair.baseline.layer_names,
        "parameter": pair.baseline.parameter_names,
    }.get(observable.items, ())
    largest = known.max(axis=0, initial=-1.0)
    return {
        str(name): float(value) for name, value in zip(names, largest, strict=False) if value >= 0
    }
