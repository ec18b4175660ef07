"""The ladder of stages: which stage of a step introduced an error, and which inherited it.

An error propagates down a step and, if weights are trained, into the next one. So a stage is at
fault if it fails in a step in which no earlier stage does, or if it violates a relation between
its own inputs and outputs (`consistency.py`). Other failing stages have inherited the error.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.comparison.audit.consistency import Inconsistency
from dpsgd_track.comparison.measure.excess import Evidence, Excess
from dpsgd_track.comparison.measure.finite import NotFinite, not_finite
from dpsgd_track.comparison.measure.observables import OBSERVABLES, SMALL, STAGES
from dpsgd_track.config import CLIP, kind_of
from dpsgd_track.record.stages import ObservableName, Stage
from dpsgd_track.record.trajectory import Floats, Trajectory, sketch_distance, sketch_length

_OWN_EVIDENCE = (ObservableName.NOISE,)
"""Observables that depend on their own stage only, whatever its inputs."""
_OWN_LIMITS, _OWN_CLOSEST = 3.0, 2e-5
"""Error of a sum as its own terms predict it, in units of its limit, and at least."""
STEPS_AT_ONCE = 512
"""Steps per block: records of long runs are larger than memory."""


class StageStatus(enum.StrEnum):
    """Outcome of a stage."""

    OK = "ok"
    INTRODUCED = "introduced"
    """The stage itself went wrong."""
    INHERITED = "inherited"
    """The stage's inputs were wrong already, which explains its error."""
    NOT_COMPARED = "not compared"
    NOT_TESTED = "not tested"
    """Equal, as the regime lets nothing happen there: weights at a learning rate of 0."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One stage of one comparison, at its first failure or else where it was closest to failing."""

    stage: Stage
    status: StageStatus
    observable: ObservableName | None = None
    value: float | None = None
    limit: float | None = None
    """Limit of `value`."""
    floor: float | None = None
    step: int | None = None
    """None before the first step, or if nothing was compared."""
    where: str = ""
    """Layer, parameter or sample of the value."""
    items: tuple[str, ...] = ()
    """All layers or parameters over the limit in that step, worst first."""
    is_by_itself: bool = False
    """True if the stage is wrong whatever its inputs are."""

    @property
    def times(self) -> float:
        """Value over limit."""
        if self.value is None or self.limit is None:
            return float("nan")
        return self.value / self.limit if self.limit else float("inf")


def unlike_inputs(baseline: Trajectory, mode: Trajectory) -> Rung | None:
    """The first input, data or initial weights, that differs between the two runs.

    An empty hash, as in a record read from metrics, means unknown and is no mismatch.
    """
    theirs = dict(zip(mode.step.tolist(), mode.data_hash.tolist(), strict=True))
    for step, ours in zip(baseline.step.tolist(), baseline.data_hash.tolist(), strict=True):
        if ours and theirs.get(step) and theirs[step] != ours:
            return Rung(stage=Stage.DATA, status=StageStatus.INTRODUCED, step=step)
    hashes = {baseline.initial_weights_hash, mode.initial_weights_hash}
    if "" not in hashes and len(hashes) == 2:
        return Rung(stage=Stage.INITIAL_WEIGHTS, status=StageStatus.INTRODUCED)
    return None


@dataclass(frozen=True, kw_only=True)
class _Stage:
    name: Stage
    excesses: tuple[Excess, ...]
    failing: NDArray[np.bool_]
    """[S]"""
    is_broken: NDArray[np.bool_]
    """[S] fails by itself, whatever its inputs."""


def ladder(
    evidence: Evidence,
    broken: Sequence[Inconsistency] = (),
    not_finite_in_mode: Sequence[NotFinite] = (),
) -> tuple[Rung, ...]:
    """Every stage of a pair, in the order of a step.

    Args:
        broken: relations that the mode's own numbers violate.
        not_finite_in_mode: the first NaN or infinity of each of the mode's fields.
    """
    aligned = evidence.pair.aligned
    inputs = unlike_inputs(aligned.baseline, aligned.other)
    rungs = [
        inputs if inputs and inputs.stage is stage else Rung(stage=stage, status=StageStatus.OK)
        for stage in (Stage.DATA, Stage.INITIAL_WEIGHTS)
    ]
    steps = aligned.baseline.step.tolist() if evidence.excesses else []
    earlier = np.zeros(len(steps), dtype=bool)
    stages = [_stage(evidence, name, len(steps)) for name in STAGES]
    for stage in stages:
        for each in broken:
            # Wrong norms or factors explain a sum beyond its bound.
            if each.stage is stage.name and each.step in steps and not each.breaks_bound:
                stage.is_broken[steps.index(each.step)] = True
        if stage.name is Stage.SUM:
            stage.is_broken[:] |= stage.failing & _sum_is_unexplained(evidence)
    # Trained weights propagate an error to every later step; with a learning rate of 0 each step
    # starts afresh.
    if kind_of(evidence.pair.regime) != CLIP:
        failing = np.any([stage.failing for stage in stages], axis=0)
        earlier = np.concatenate([[False], np.logical_or.accumulate(failing)[:-1]])[: len(steps)]
    elif inputs is None and (changed := _changed_weights(stages, evidence)):
        rungs[1] = changed
        earlier[:] = True
    nan = _first_not_finite(aligned.baseline, not_finite_in_mode)
    for stage in stages:
        rungs.append(
            nan.get(stage.name) or _tested(_rung(stage, earlier, evidence, steps), evidence)
        )
        earlier = earlier | stage.failing
    return tuple(rungs)


def _tested(rung: Rung, evidence: Evidence) -> Rung:
    """`rung`, unless equal weights are those that no step has changed."""
    is_still = rung.stage is Stage.UPDATE and kind_of(evidence.pair.regime) == CLIP
    if is_still and rung.status is StageStatus.OK and not rung.value:
        return Rung(stage=rung.stage, status=StageStatus.NOT_TESTED)
    return rung


def _changed_weights(stages: Sequence[_Stage], evidence: Evidence) -> Rung | None:
    """The initial weights, where the mode has changed them before its first step.

    The learning rate is 0, so that the weights after the first step are those before it. If they
    differ and the losses of that step do too, it was not the step that changed them.
    """
    excess = evidence.excesses.get(ObservableName.WEIGHTS)
    loss = next(stage for stage in stages if stage.name is Stage.LOSS)
    if excess is None or not (len(loss.failing) and loss.failing[0] and excess.failing[0]):
        return None
    return rung_at(evidence, excess, 0, Stage.INITIAL_WEIGHTS, StageStatus.INTRODUCED)


def _first_not_finite(baseline: Trajectory, found: Sequence[NotFinite]) -> dict[Stage, Rung]:
    """The stages with a NaN or an infinity that the baseline lacks; the first introduced it."""
    if not found:
        # The baseline, cut to the common steps, need not be read once more.
        return {}
    there = {bad.field for bad in not_finite(baseline)}
    steps = set(baseline.step.tolist())
    found = [bad for bad in found if bad.field not in there and bad.step in steps]
    order = list(Stage)
    stages: dict[Stage, NotFinite] = {}
    # Of the values of one step, one that names a parameter says more than a total.
    for bad in sorted(found, key=lambda bad: (bad.step, not _parameter_in(bad.where))):
        if (stage := OBSERVABLES[bad.observable].stage) is not None:
            stages.setdefault(stage, bad)
    first = min(stages, key=lambda s: (stages[s].step, order.index(s)), default=None)
    return {
        stage: Rung(
            stage=stage,
            status=StageStatus.INTRODUCED if stage is first else StageStatus.INHERITED,
            observable=bad.observable,
            value=bad.value,
            step=bad.step,
            where=bad.where,
            items=_parameter_in(bad.where),
        )
        for stage, bad in stages.items()
    }


def _parameter_in(where: str) -> tuple[str, ...]:
    """The parameter that a place names, if it does."""
    _, named, parameter = where.rpartition("parameter ")
    return (parameter,) if named else ()


def _sum_is_unexplained(evidence: Evidence) -> NDArray[np.bool_] | bool:
    """[S] True if the clipped sum is off by more than its factors and norms explain.

    The error of a sum of clipped gradients is bounded by the errors of its clip factors and norms:
    sum over samples of |c' - c| n + c' |n' - n|.
    """
    excess = evidence.excesses.get(ObservableName.GRADIENT)
    ours, theirs = evidence.pair.aligned.baseline, evidence.pair.aligned.other
    if excess is None or not excess.failing.any():
        return False
    if ours.shape_of("sample_sketch")[-1] and not np.isnan(theirs.clip_factor).all():
        return _differs_from_own_terms(evidence, excess)
    if np.isnan(theirs.clip_factor * ours.clip_factor).all():
        return False
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        apart = np.abs(theirs.clip_factor - ours.clip_factor) * ours.sample_norm
        apart += theirs.clip_factor * np.abs(theirs.sample_norm - ours.sample_norm)
        length, distance = _length_and_distance(ours, theirs)
        # Both distances are estimates.
        explained = 2 * np.nansum(apart, axis=1) / length + excess.limits.max(axis=1)
        return np.asarray(distance / length / explained > 1)


def _differs_from_own_terms(evidence: Evidence, excess: Excess) -> NDArray[np.bool_]:
    """[S] True if the sum is not that of right gradients with the mode's own clip factors.

    Parameters whose norms are wrong are left out: there the gradients themselves may be.
    """
    ours, theirs = evidence.pair.aligned.baseline, evidence.pair.aligned.other
    norms = evidence.excesses.get(ObservableName.SAMPLE_NORM_BY_PARAMETER)
    is_right = np.ones(excess.by_item.shape, dtype=bool)
    if norms is not None:
        is_right = norms.by_item <= norms.limits
    elif (totals := evidence.excesses.get(ObservableName.SAMPLE_NORM)) is not None:
        is_right[totals.failing] = False
    weights = np.nan_to_num(theirs.clip_factor)
    own = np.einsum("sn,snpk->spk", weights, ours.sample_sketch.astype(np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):
        length = sketch_length(ours.gradient_sketch)
        total = np.sqrt(np.square(length).sum(axis=1, keepdims=True))
        error = sketch_distance(theirs.gradient_sketch, own) / np.maximum(length, SMALL * total)
    allowed = np.maximum(_OWN_LIMITS * excess.limits, _OWN_CLOSEST)
    return np.asarray(((error > allowed) & is_right).any(axis=1))


def _length_and_distance(ours: Trajectory, theirs: Trajectory) -> tuple[Floats, Floats]:
    """[S] length of the baseline's clipped sum, and [S] distance of the mode's from it."""
    length, distance = np.empty(ours.num_steps), np.empty(ours.num_steps)
    for start in range(0, ours.num_steps, STEPS_AT_ONCE):
        rows = slice(start, start + STEPS_AT_ONCE)
        a, b = (
            side.read("gradient_sketch", start, start + STEPS_AT_ONCE) for side in (ours, theirs)
        )
        length[rows] = np.sqrt(np.square(sketch_length(a)).sum(axis=1))
        distance[rows] = np.sqrt(np.square(sketch_distance(a, b)).sum(axis=1))
    return length, distance


def _stage(evidence: Evidence, name: Stage, num_steps: int) -> _Stage:
    excesses = tuple(evidence.excesses[each] for each in STAGES[name] if each in evidence.excesses)
    none = np.zeros(num_steps, dtype=bool)
    failing = np.any([none, *(excess.failing for excess in excesses)], axis=0)
    own = [e.failing for e in excesses if e.drift.observable.name in _OWN_EVIDENCE]
    return _Stage(
        name=name, excesses=excesses, failing=failing, is_broken=np.any([none, *own], axis=0)
    )


def _rung(
    stage: _Stage, earlier: NDArray[np.bool_], evidence: Evidence, steps: Sequence[int]
) -> Rung:
    if not stage.excesses:
        if not stage.is_broken.any():
            return Rung(stage=stage.name, status=StageStatus.NOT_COMPARED)
        first = steps[int(stage.is_broken.argmax())]
        return Rung(stage=stage.name, status=StageStatus.INTRODUCED, step=first, is_by_itself=True)
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
    # Of the failing observables, one that names a layer says more than a total.
    tells = [(t > 1 and bool(e.drift.items), t) for e, t in zip(stage.excesses, times, strict=True)]
    shown = stage.excesses[tells.index(max(tells))]
    rung = rung_at(evidence, shown, row, stage.name, status)
    is_by_itself = bool(stage.is_broken[row]) and status is StageStatus.INTRODUCED
    return replace(rung, is_by_itself=is_by_itself)


def rung_at(
    evidence: Evidence, excess: Excess, row: int, stage: Stage, status: StageStatus
) -> Rung:
    """`stage` as shown by one observable in step `row`."""
    drift = excess.drift
    times = np.nan_to_num(excess.by_item[row] / excess.limits[row], posinf=np.inf)
    worst_first = np.argsort(-times, kind="stable")
    item = int(worst_first[0])
    items = tuple(drift.items[i] for i in worst_first if times[i] > 1) if drift.items else ()
    return Rung(
        stage=stage,
        status=status,
        observable=drift.observable.name,
        value=float(excess.by_item[row, item]),
        limit=float(excess.limits[row, item]),
        floor=evidence.measured(drift.observable.name),
        step=int(drift.steps[row]),
        where=excess.place(row, item),
        items=items,
    )


def first_introduced(rungs: Sequence[Rung]) -> Rung | None:
    """The stage at fault: the first that introduced an error, in the earliest step with one."""
    order = list(Stage)
    return min(
        (rung for rung in rungs if rung.status is StageStatus.INTRODUCED),
        key=lambda rung: (-1 if rung.step is None else rung.step, order.index(rung.stage)),
        default=None,
    )
