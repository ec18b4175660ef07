"""Puts two trajectories side by side: by step, by sample index, by layer and parameter name.

Order never matters, so a permuted replay lines up with its baseline. What only one side has is
left out of the pair and reported as a gap, and a pair with a gap never passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.tracking.trajectory import SAMPLE_COLUMNS, UNUSED, Integers, Trajectory

_SHOWN = 3

_BY_LAYER = ("layer_names", "layer_weight_norm", "layer_grad_norm")
_BY_SAMPLE = tuple(name for name in SAMPLE_COLUMNS if name != "sample_index")
_SKETCHES = ("gradient_sketch", "noised_sketch", "weight_sketch")


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Something one side has and the other lacks."""

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
    """Two trajectories over what they have in common, in the baseline's order."""

    baseline: Trajectory
    other: Trajectory
    """A sample that it lacks has NaN, and a gap says so."""
    gaps: tuple[Gap, ...]


def align(baseline: Trajectory, other: Trajectory) -> Aligned:
    """`baseline` and `other` with equal steps, samples, layers and parameters."""
    gaps: list[Gap] = []

    def common(kind: str, ours: Sequence[Any], theirs: Sequence[Any]) -> tuple[Integers, Integers]:
        here = {str(name): i for i, name in enumerate(ours)}
        there = {str(name): i for i, name in enumerate(theirs)}
        gaps.extend(_gaps(kind, here, there))
        both = [name for name in here if name in there]
        return (
            np.array([here[name] for name in both], dtype=np.int64),
            np.array([there[name] for name in both], dtype=np.int64),
        )

    steps = common("step", list(baseline.step), list(other.step))
    layers = common("layer", list(baseline.layer_names), list(other.layer_names))
    parameters = common("parameter", list(baseline.parameter_names), list(other.parameter_names))
    ours, theirs = (
        _select(side, step, layer, parameter)
        for side, step, layer, parameter in zip(
            (baseline, other), steps, layers, parameters, strict=True
        )
    )
    theirs = _in_sample_order(ours, theirs, gaps)
    if ours.gradient_sketch.shape != theirs.gradient_sketch.shape:
        counts = [str(t.gradient_sketch.shape[-1]) for t in (ours, theirs)]
        gaps.append(Gap(kind="projection", missing_from="mode", names=(" against ".join(counts),)))
        blank: dict[str, Any] = {
            name: np.full(ours.gradient_sketch.shape, np.nan) for name in _SKETCHES
        }
        theirs = replace(theirs, **blank)
    return Aligned(baseline=ours, other=theirs, gaps=tuple(gaps))


def _gaps(kind: str, here: Any, there: Any) -> list[Gap]:
    lacking = (
        ("mode", tuple(name for name in here if name not in there)),
        ("baseline", tuple(name for name in there if name not in here)),
    )
    return [Gap(kind=kind, missing_from=side, names=names) for side, names in lacking if names]


def _select(
    trajectory: Trajectory, steps: Integers, layers: Integers, parameters: Integers
) -> Trajectory:
    chosen: dict[str, Any] = {}
    for item in fields(Trajectory):
        value = getattr(trajectory, item.name)
        if not isinstance(value, np.ndarray):
            continue
        if item.name not in ("layer_names", "parameter_names", "parameter_sizes"):
            value = value[steps]
        if item.name in _BY_LAYER:
            value = value[..., layers]
        elif item.name in ("parameter_names", "parameter_sizes", "sample_norm_by_parameter"):
            value = value[..., parameters]
        elif item.name in _SKETCHES:
            value = value[:, parameters]
        elif item.name == "noise_samples":
            value = value[:, :, parameters]
        chosen[item.name] = value
    return replace(trajectory, **chosen)


def _in_sample_order(baseline: Trajectory, other: Trajectory, gaps: list[Gap]) -> Trajectory:
    if np.array_equal(baseline.sample_index, other.sample_index):
        return other
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
    moved: dict[str, Any] = {name: _gather(getattr(other, name), places) for name in _BY_SAMPLE}
    return replace(other, sample_index=baseline.sample_index, **moved)


def _gather(values: NDArray[Any], places: Integers) -> NDArray[Any]:
    # A row of NaN, or of ranks that nobody has, appended at the end is what place -1 picks.
    shape = (values.shape[0], 1, *values.shape[2:])
    filler = UNUSED if values.dtype == np.int64 else np.nan
    padded = np.concatenate([values, np.full(shape, filler, dtype=values.dtype)], axis=1)
    rows = np.arange(len(values))[:, None]
    picked: NDArray[Any] = padded[rows, places]
    return picked
