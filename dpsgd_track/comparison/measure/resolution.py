"""Resolution: the smallest relative errors that a comparison would have found.

A norm or a sum that is off by a factor 1 + e is found where its largest difference exceeds the
limit, and where its mean is a bias (`bias.py`). Of the two, and of several comparisons of one
model, the most sensitive counts; of several modes the least.

Legend: S steps, N samples of one step, P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np

from dpsgd_track.comparison.measure.amount import share
from dpsgd_track.comparison.measure.bias import Biases
from dpsgd_track.comparison.measure.excess import Evidence
from dpsgd_track.comparison.measure.observables import SMALL
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import Floats, Trajectory, sketch_length

_ROWS = 256
"""Steps per block of a large field."""
_APART = 10.0
"""Multiple of the median from which on a parameter is named as an exception."""
_SHOWN = 2


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Smallest errors of one quantity, norms or sums, found with a probability of 95 %."""

    parameters: tuple[str, ...]
    """[P]"""
    one: Floats
    """[P] of each parameter alone; infinite where none is found, NaN without a gradient."""
    all: float
    """Of all parameters at once."""

    @property
    def exceptions(self) -> tuple[str, ...]:
        """Parameters far less visible than the others, such as a bias of one element."""
        known = self.one[np.isfinite(self.one)]
        limit = _APART * float(np.median(known)) if known.size else 0.0
        far = np.flatnonzero(self.one > limit)
        return tuple(self.parameters[i] for i in far)

    @property
    def any_one(self) -> float:
        """Of any one parameter that is no exception; infinite if there is none."""
        seen = [
            value
            for name, value in zip(self.parameters, self.one.tolist(), strict=True)
            if name not in set(self.exceptions) and not np.isnan(value)
        ]
        return max(seen, default=float("inf"))


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """Smallest errors that would have been found in one model."""

    norms: Sight | None = None
    """Of per-sample norms; None where none were compared."""
    sums: Sight | None = None
    """Of clipped sums."""

    @property
    def sights(self) -> tuple[tuple[Literal["norms", "sums"], Sight], ...]:
        """Those that were compared, with their names."""
        named: tuple[tuple[Literal["norms", "sums"], Sight | None], ...] = (
            ("norms", self.norms),
            ("sums", self.sums),
        )
        return tuple((name, sight) for name, sight in named if sight)


def resolution_of(evidence: Evidence, biases: Biases | None) -> Resolution:
    """The resolution of one comparison."""
    record = evidence.pair.aligned.baseline
    norms = _sight(
        evidence,
        biases,
        (ObservableName.SAMPLE_NORM_BY_PARAMETER, ObservableName.SAMPLE_NORM),
        lambda: _strengths(record, "norms"),
    )
    sums = _sight(
        evidence,
        biases,
        (ObservableName.GRADIENT, ObservableName.GRAD_NORM),
        lambda: _strengths(record, "sums"),
    )
    return Resolution(norms=norms, sums=sums)


def _sight(
    evidence: Evidence,
    biases: Biases | None,
    names: tuple[ObservableName, ObservableName],
    strengths: Callable[[], Floats],
) -> Sight | None:
    """Resolution of the observable by parameter, and of the total, that `names` gives."""
    found = [evidence.excesses.get(name) for name in names]
    means = [biases.by_observable.get(name) if biases else None for name in names]
    if found[0] is None:
        return None
    parameters = found[0].drift.items
    strength = strengths()
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = np.where(np.isnan(found[0].by_item), np.inf, found[0].limits) / strength
    one = np.fmin.reduce(largest, axis=0, initial=np.inf)
    total = np.inf if found[1] is None else float(np.min(found[1].limits, initial=np.inf))
    if means[0] is not None:
        one = np.minimum(one, means[0].resolution)
    if means[1] is not None:
        total = min(total, float(means[1].resolution[0]))
    one = np.where(strength.any(axis=0), one, np.nan)
    # An error of all parameters is one of each.
    return Sight(
        parameters=parameters,
        one=one,
        all=min(total, float(np.fmin.reduce(one, initial=np.inf))),
    )


_known: WeakKeyDictionary[Trajectory, dict[str, Floats]] = WeakKeyDictionary()


def _strengths(record: Trajectory, what: str) -> Floats:
    """[S, P] relative difference that shows for an error of 1, by parameter.

    It is 1 but for parameters with a small part of a sample's norm, or of the sum's length, whose
    differences are relative to that instead (`observables.SMALL`). The result is cached, since a
    baseline is compared with many modes.
    """
    cached = _known.setdefault(record, {})
    if what not in cached:
        cached[what] = np.concatenate(
            [_strength(record, what, start) for start in range(0, record.num_steps, _ROWS)]
        )
    return cached[what]


def _strength(record: Trajectory, what: str, start: int) -> Floats:
    if what == "norms":
        values = record.read("sample_norm_by_parameter", start, start + _ROWS)
    else:
        values = sketch_length(record.read("gradient_sketch", start, start + _ROWS))[:, None]
    values = np.nan_to_num(values)
    total = np.sqrt(np.square(values).sum(axis=2, keepdims=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        strength = values / np.maximum(values, SMALL * total)
    return np.asarray(np.nan_to_num(strength).max(axis=1, initial=0.0))


def most_sensitive(found: Iterable[Resolution]) -> Resolution:
    """Joint resolution of several comparisons of one model."""
    return _joint(list(found), np.fmin)


def least_sensitive(found: Iterable[Resolution]) -> Resolution:
    """Smallest errors that would have been found in any of several modes of one model."""
    return _joint(list(found), np.fmax)


def _joint(found: Sequence[Resolution], pick: np.ufunc) -> Resolution:
    def joined(sights: Iterable[Sight | None]) -> Sight | None:
        every = [sight for sight in sights if sight]
        if not every:
            return None
        first = every[0]
        # Modes that report other parameters are not comparable; the first ones' count.
        alike = [sight for sight in every if sight.parameters == first.parameters]
        return replace(
            first,
            one=pick.reduce([sight.one for sight in alike]),
            all=float(pick.reduce([sight.all for sight in every])),
        )

    return Resolution(norms=joined(r.norms for r in found), sums=joined(r.sums for r in found))


def told(resolution: Resolution) -> str:
    """`norms off by 0.2 % in any one parameter or by 0.03 % in all, and sums off by 0.3 % ...`."""
    parts = [
        f"{noun} off by {_sizes(sight)}"
        for noun, sight in resolution.sights
        if np.isfinite(sight.all)
    ]
    coarse = dict.fromkeys(name for _, sight in resolution.sights for name in sight.exceptions)
    return ", and ".join(parts) + _coarser(list(coarse)) * bool(parts)


def _sizes(sight: Sight) -> str:
    one, all_together = share(sight.any_one), share(sight.all)
    both = " or in all" if one == all_together else f" or by {all_together} in all"
    return f"{one} in any one parameter{both}"


def _coarser(exceptions: Sequence[str]) -> str:
    if not exceptions:
        return ""
    more = f" and {len(exceptions) - _SHOWN} more" if len(exceptions) > _SHOWN else ""
    return f" (coarser in {', '.join(exceptions[:_SHOWN])}{more})"
