"""Which stage of a step went wrong first, and which only passed it on.

An error travels down a step and, where weights are trained, into the next one. So a stage is at
fault if it fails in a step in which no earlier stage does, or if it breaks a relation between its
own inputs and outputs (`consistency.py`). The other stages that fail have inherited it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.audit.consistency import Inconsistency
from dpsgd_track.comparison.measure.alignment import Aligned
from dpsgd_track.comparison.measure.drift import Drift, Pair
from dpsgd_track.comparison.measure.floor import Floor, limits_of
from dpsgd_track.config import CLIP, Thresholds, kind_of
from dpsgd_track.record.trajectory import Floats, Trajectory, sketch_distance, sketch_length

DATA, INITIAL_WEIGHTS = "data", "initial weights"

STAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss", ("loss", "sample_loss")),
    ("per-sample norms", ("sample_norm", "sample_norm_by_parameter")),
    ("clip factors", ("clip_factor",)),
    ("clipped sum", ("gradient", "grad_norm", "layer_grad_norm")),
    ("noise", ("noise", "noised_gradient", "grad_norm_noised")),
    ("updated weights", ("update", "weights", "layer_weight_norm")),
)
"""Stages of one step with their observables, in the order in which they are computed."""

_OWN_EVIDENCE = ("noise",)
"""Observables that show their stage alone, whatever it was given."""


class StageStatus(enum.StrEnum):
    """What became of a stage."""

    OK = "ok"
    INTRODUCED = "introduced"
    """The stage itself went wrong."""
    INHERITED = "inherited"
    """What it was given was wrong already, and explains what it shows."""
    NOT_COMPARED = "not compared"


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One stage of one comparison: where it first failed, or where it came nearest to failing."""

    stage: str
    status: StageStatus
    observable: str = ""
    value: float | None = None
    limit: float | None = None
    """What the value was held against."""
    floor: float | None = None
    step: int | None = None
    where: str = ""
    """Layer, parameter or sample of the value."""
    items: tuple[str, ...] = ()
    """All layers or parameters that were over the limit in that step, worst first."""

    @property
    def times(self) -> float:
        """Value over limit."""
        if self.value is None or self.limit is None:
            return float("nan")
        return self.value / self.limit if self.limit else float("inf")


@dataclass(frozen=True, kw_only=True)
class FirstFailure:
    """The stage that went wrong first."""

    stage: str
    step: int
    """-1 before the first step."""
    where: str = ""
    """Layer, parameter or sample; empty for a scalar."""
    observable: str = ""
    value: float = float("nan")

    @property
    def sentence(self) -> str:
        """`per-sample norms at step 3, sample 17`."""
        when = f" at step {self.step}" if self.step >= 0 else ""
        return f"{self.stage}{when}{', ' + self.where if self.where else ''}"


@dataclass(frozen=True, kw_only=True)
class Excess:
    """A drift in units of its limits: of what rounding explains, or else of its threshold."""

    drift: Drift
    times: Floats
    """[S] largest over the items; NaN where not computed."""
    limits: Floats
    """[S, items], or [S, 1] where there are none."""
    by_item: Floats
    """[S, items] differences, in the shape of the limits."""

    @property
    def failing(self) -> NDArray[np.bool_]:
        """[S] steps over the limit."""
        return np.asarray(self.times > 1)

    def rung(self, stage: str, status: StageStatus, row: int, floor: Floor | None) -> Rung:
        """The stage as step `row` shows it."""
        drift = self.drift
        times = np.nan_to_num(self.by_item[row] / self.limits[row], posinf=np.inf)
        worst_first = np.argsort(-times, kind="stable")
        item, where, items = int(worst_first[0]), drift.where_per_step[row], ()
        if drift.items:
            items = tuple(drift.items[i] for i in worst_first if times[i] > 1)
            kind = "layer" if drift.observable.items == "layer" else "parameter"
            named = f"{kind} {drift.items[item]}"
            # The place of the largest also names the sample.
            where = where if where.endswith(named) else named
        return Rung(
            stage=stage,
            status=status,
            observable=drift.observable.name,
            value=float(self.by_item[row, item]),
            limit=float(self.limits[row, item]),
            floor=floor.of(drift.observable.name) if floor else None,
            step=int(drift.steps[row]),
            where=where,
            items=items,
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


def unlike_inputs(baseline: Trajectory, mode: Trajectory) -> FirstFailure | None:
    """The first input, data or initial weights, that the two runs did not share.

    An empty hash, as in a record read from metrics, is unknown and no mismatch.
    """
    theirs = dict(zip(mode.step.tolist(), mode.data_hash.tolist(), strict=True))
    for step, ours in zip(baseline.step.tolist(), baseline.data_hash.tolist(), strict=True):
        if ours and theirs.get(step) and theirs[step] != ours:
            return FirstFailure(stage=DATA, step=step)
    hashes = {baseline.initial_weights_hash, mode.initial_weights_hash}
    if "" not in hashes and len(hashes) == 2:
        return FirstFailure(stage=INITIAL_WEIGHTS, step=-1)
    return None


@dataclass(frozen=True, kw_only=True)
class _Stage:
    name: str
    excesses: tuple[Excess, ...]
    failing: NDArray[np.bool_]
    """[S]"""
    is_broken: NDArray[np.bool_]
    """[S] fails by itself, whatever it was given."""


def ladder(
    pair: Pair,
    thresholds: Thresholds,
    floor: Floor | None,
    *,
    inputs: FirstFailure | None = None,
    broken: Sequence[Inconsistency] = (),
    own_errors: Mapping[str, Floats] | None = None,
) -> tuple[Rung, ...]:
    """Every stage of `pair`, in the order of a step.

    Args:
        inputs: the data or weights that the two runs did not share.
        broken: relations that the mode's own numbers break.
        own_errors: by stage, [S] how many times its limit the error is that its inputs leave
            unexplained; the steps are those of the pair.
    """
    rungs = [
        Rung(stage=stage, status=StageStatus.INTRODUCED, step=inputs.step)
        if inputs and inputs.stage == stage
        else Rung(stage=stage, status=StageStatus.OK)
        for stage in (DATA, INITIAL_WEIGHTS)
    ]
    any_drift = next(iter(pair.drifts.values()), None)
    steps = any_drift.steps.tolist() if any_drift else []
    num_steps = len(steps)
    earlier = np.zeros(num_steps, dtype=bool)
    stages = []
    for name, observables in STAGES:
        stage = _stage(pair, name, observables, thresholds, floor, num_steps)
        for each in broken:
            if each.stage == name and each.step in steps:
                stage.is_broken[steps.index(each.step)] = True
        if own_errors and name in own_errors:
            stage.is_broken[:] |= stage.failing & (own_errors[name] > 1)
        stages.append(stage)
    # Trained weights carry an error into every later step; with a learning rate of 0 each step
    # starts afresh.
    if kind_of(pair.regime) != CLIP:
        failing = np.any([stage.failing for stage in stages], axis=0)
        earlier = np.concatenate([[False], np.logical_or.accumulate(failing)[:-1]])[:num_steps]
    for stage in stages:
        rungs.append(_rung(stage, earlier, floor, steps))
        earlier = earlier | stage.failing
    return tuple(rungs)


def own_errors(
    aligned: Aligned, pair: Pair, thresholds: Thresholds, floor: Floor | None
) -> dict[str, Floats]:
    """By stage, how many times what its inputs explain its error is, step by step.

    A sum of clipped gradients is off by at most what its clip factors and the norms they belong
    to are off by: sum over samples of |c' - c| n + c' |n' - n|.
    """
    drift = pair.drifts.get("gradient")
    ours, theirs = aligned.baseline, aligned.other
    if drift is None or np.isnan(theirs.clip_factor * ours.clip_factor).all():
        return {}
    excess = excess_of(drift, thresholds, floor)
    if not excess.failing.any():
        return {}
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        apart = np.abs(theirs.clip_factor - ours.clip_factor) * ours.sample_norm
        apart += theirs.clip_factor * np.abs(theirs.sample_norm - ours.sample_norm)
        length, distance = (
            np.sqrt(np.square(by_parameter).sum(axis=1))
            for by_parameter in (
                sketch_length(ours.gradient_sketch),
                sketch_distance(ours.gradient_sketch, theirs.gradient_sketch),
            )
        )
        # Both distances are estimates.
        explained = 2 * np.nansum(apart, axis=1) / length + excess.limits.max(axis=1)
    for side in (ours, theirs):
        side.release()
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"clipped sum": np.asarray(distance / length / explained)}


def _stage(
    pair: Pair,
    name: str,
    observables: Sequence[str],
    thresholds: Thresholds,
    floor: Floor | None,
    num_steps: int,
) -> _Stage:
    excesses = tuple(
        excess_of(pair.drifts[each], thresholds, floor)
        for each in observables
        if each in pair.drifts
    )
    none = np.zeros(num_steps, dtype=bool)
    failing = np.any([none, *(excess.failing for excess in excesses)], axis=0)
    own = [e.failing for e in excesses if e.drift.observable.name in _OWN_EVIDENCE]
    return _Stage(
        name=name, excesses=excesses, failing=failing, is_broken=np.any([none, *own], axis=0)
    )


def _rung(
    stage: _Stage, earlier: NDArray[np.bool_], floor: Floor | None, steps: Sequence[int]
) -> Rung:
    if not stage.excesses:
        if not stage.is_broken.any():
            return Rung(stage=stage.name, status=StageStatus.NOT_COMPARED)
        first = steps[int(stage.is_broken.argmax())]
        return Rung(stage=stage.name, status=StageStatus.INTRODUCED, step=first)
    introduced = np.flatnonzero((stage.failing & ~earlier) | stage.is_broken)
    failing = np.flatnonzero(stage.failing)
    if len(introduced):
        status, row = StageStatus.INTRODUCED, int(introduced[0])
    elif len(failing):
        status, row = StageStatus.INHERITED, int(failing[0])
    else:
        status = StageStatus.OK
        row = int(np.nanargmax(np.fmax.reduce([e.times for e in stage.excesses], axis=0)))
    times = [float(np.nan_to_num(excess.times[row], nan=-1.0)) for excess in stage.excesses]
    # Of those that fail, one that names a layer says more than a total.
    tells = [(t > 1 and bool(e.drift.items), t) for e, t in zip(stage.excesses, times, strict=True)]
    shown = stage.excesses[tells.index(max(tells))]
    return shown.rung(stage.name, status, row, floor)


def first_failure(rungs: Sequence[Rung]) -> FirstFailure | None:
    """The stage at fault: of the earliest step, and in it the earliest that introduced an error."""
    order = {rung.stage: place for place, rung in enumerate(rungs)}
    guilty = [rung for rung in rungs if rung.status is StageStatus.INTRODUCED]
    if not guilty:
        return None
    first = min(guilty, key=lambda r: (-1 if r.step is None else r.step, order[r.stage]))
    return FirstFailure(
        stage=first.stage,
        step=-1 if first.step is None else first.step,
        where=first.where,
        observable=first.observable,
        value=float("nan") if first.value is None else first.value,
    )
