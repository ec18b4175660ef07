"""Relations between the inputs and outputs of one run's stages, checked without a baseline.

A clip factor follows from the norm it was computed from, a clipped sum is no longer than the sum of
its terms' lengths, and an SGD step is the learning rate times the gradient. If such a relation is
violated, the stage itself went wrong, whatever its inputs.

Legend: S steps, N samples, P parameters, K projections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dpsgd_track.comparison.measure.clip_factors import FORMULAS, factors_by
from dpsgd_track.config import FLAT, RegimeConfig
from dpsgd_track.record.stages import ObservableName, Stage
from dpsgd_track.record.trajectory import Floats, Trajectory, sketch_distance, sketch_length

TOLERANCE = 1e-4
"""Largest relative error of a relation between float32 numbers; sums of many terms and a small
constant in a denominator stay well below."""
# The step is compared as a difference of two sketches, which the weights' rounding affects.
_ROUNDING = 2.0**-23
_BLOCK = 512
"""Steps per block: records of long runs are larger than memory."""
# The triangle inequality is exact; this leaves room for rounding in bfloat16.
_TIMES_LONGER = 1.05


@dataclass(frozen=True, kw_only=True)
class Inconsistency:
    """A relation between a run's own numbers that does not hold."""

    stage: Stage
    observable: ObservableName
    title: str
    """The violated relation, as a clause of a sentence."""
    value: float
    """Relative error."""
    step: int
    sample: int | None = None
    """Global index of the affected sample; None if the relation is not per sample."""
    parameters: tuple[str, ...] = ()
    """The affected parameters, worst first; empty if the relation is not per parameter."""
    breaks_bound: bool = False
    """True if a sum is longer than privacy allows: n C for n samples."""
    has_amount: bool = True
    """False if the error has no size worth telling."""

    @property
    def where(self) -> str:
        """`sample 3` or `parameter head.weight`; empty if the whole step is affected."""
        if self.sample is not None:
            return f"sample {self.sample}"
        return f"parameter {self.parameters[0]}" if self.parameters else ""


def inconsistencies(
    t: Trajectory,
    setup: RegimeConfig | None,
    *,
    clips: bool = False,
    steps_at_once: int = _BLOCK,
) -> tuple[Inconsistency, ...]:
    """The first violation of each relation.

    Args:
        setup: the regime as planned; None if unknown.
        clips: True if the mode claims to clip every sample's gradient at C.
    """
    found: dict[str, Inconsistency] = {}
    if (unmoved := _unmoved(t, setup)) is not None:
        found[unmoved.title] = unmoved
    for start in range(0, t.num_steps, steps_at_once):
        # An optimizer step needs the weights of the step before.
        block = t.rows(max(0, start - 1), start + steps_at_once)
        # NaN and infinity are findings of their own (finite.py).
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for each in (
                _total_norm(block),
                _clip_factor(block, setup.clipping if setup else FLAT),
                _bound_of_sum(block) if clips else None,
                _length_of_sum(block),
                _sgd_step(block, setup),
            ):
                if each is not None:
                    found.setdefault(each.title, each)
    return tuple(found.values())


def _total_norm(t: Trajectory) -> Inconsistency | None:
    total = np.sqrt(np.square(t.sample_norm_by_parameter).sum(axis=2))
    error = np.abs(t.sample_norm - total) / total
    title = "a sample's norm differs from that of its parameters' norms"
    return _of_samples(t, Stage.NORMS, ObservableName.SAMPLE_NORM, title, error)


def _clip_factor(t: Trajectory, rule: str) -> Inconsistency | None:
    wanted = factors_by(rule, t)
    error = np.abs(t.clip_factor - wanted) / wanted
    title = f"a clip factor differs from {FORMULAS[rule]} that the mode itself reports"
    return _of_samples(t, Stage.FACTORS, ObservableName.CLIP_FACTOR, title, error)


def _of_samples(
    t: Trajectory, stage: Stage, observable: ObservableName, title: str, error: Floats
) -> Inconsistency | None:
    over = np.argwhere(error > TOLERANCE)
    if not len(over):
        return None
    row = int(over[0, 0])
    column = int(np.nanargmax(error[row]))
    return Inconsistency(
        stage=stage,
        observable=observable,
        title=title,
        value=float(error[row, column]),
        step=int(t.step[row]),
        sample=int(t.sample_index[row, column]),
    )


def _length_of_sum(t: Trajectory) -> Inconsistency | None:
    if not t.expected_batch_size or np.isnan(t.clip_factor * t.sample_norm).all():
        return None
    bound = np.nansum(t.clip_factor * t.sample_norm, axis=1)
    length = t.grad_norm * t.expected_batch_size
    over = np.flatnonzero(length > bound * _TIMES_LONGER)
    if not len(over):
        return None
    row = int(over[0])
    return Inconsistency(
        stage=Stage.SUM,
        observable=ObservableName.GRAD_NORM,
        title="the clipped sum is longer than the sum of the lengths of what it is made of",
        value=float(length[row] / bound[row] - 1) if bound[row] else math.inf,
        step=int(t.step[row]),
    )


def _bound_of_sum(t: Trajectory) -> Inconsistency | None:
    """Check the length of the clipped sum against n C, which needs no record of any sample."""
    bound = t.max_grad_norm * t.num_samples
    length = t.grad_norm * t.expected_batch_size
    over = np.flatnonzero((length > bound * _TIMES_LONGER) & (t.num_samples > 0))
    if not len(over):
        return None
    row = int(over[0])
    count = int(t.num_samples[row])
    return Inconsistency(
        stage=Stage.SUM,
        observable=ObservableName.GRAD_NORM,
        title=f"the clipped sum of {count} sample{'s' * (count != 1)} is "
        f"{length[row] / t.max_grad_norm[row]:.3g} C long, where each may add C at most",
        value=float(length[row] / bound[row] - 1),
        step=int(t.step[row]),
        breaks_bound=True,
        has_amount=False,
    )


def _unmoved(t: Trajectory, setup: RegimeConfig | None) -> Inconsistency | None:
    """Parameters whose weights never move, though their gradient is not zero and others' do."""
    if setup is None or not setup.learning_rate > 0 or t.num_steps < 2:
        return None
    is_still = np.ones(len(t.parameter_names), dtype=bool)
    is_pushed = np.zeros(len(t.parameter_names), dtype=bool)
    for start in range(1, t.num_steps, _BLOCK):
        weights = t.read("weight_sketch", start - 1, start + _BLOCK)
        is_still &= (np.diff(weights, axis=0) == 0).all(axis=(0, 2))
        gradients = t.read("noised_sketch", start, start + _BLOCK)
        # So long that a step of it cannot vanish in the rounding of the weights.
        step = setup.learning_rate * sketch_length(gradients) / max(t.expected_batch_size, 1)
        is_pushed |= (step > 1e-4 * sketch_length(weights[1:])).any(axis=0)
    stuck = np.flatnonzero(is_still & is_pushed)
    if not len(stuck) or is_still.all():
        return None
    return Inconsistency(
        stage=Stage.UPDATE,
        observable=ObservableName.UPDATE,
        title="these weights never move, although their gradient is not zero: the optimizer lacks "
        "them",
        value=1.0,
        step=int(t.step[1]),
        parameters=tuple(t.parameter_names[stuck].tolist()),
        has_amount=False,
    )


def _sgd_step(t: Trajectory, setup: RegimeConfig | None) -> Inconsistency | None:
    """Check that each step after the first moved the weights by learning rate x gradient."""
    if setup is None or setup.optimizer != "sgd" or not t.expected_batch_size:
        return None
    wanted = -setup.learning_rate * t.noised_sketch[1:] / t.expected_batch_size
    error = sketch_distance(np.diff(t.weight_sketch, axis=0), wanted)
    length = _l2(sketch_length(wanted))
    rounding = _l2(sketch_length(t.weight_sketch[1:])) * _ROUNDING
    # Half a unit in the last place of each weight, in which much smaller steps disappear.
    over = np.argwhere(error > 0.01 * length + 4 * rounding)
    if not len(over):
        return None
    row = int(over[0, 0])
    columns = over[over[:, 0] == row, 1]
    columns = columns[np.argsort(-error[row, columns], kind="stable")]
    column = int(columns[0])
    return Inconsistency(
        stage=Stage.UPDATE,
        observable=ObservableName.UPDATE,
        title="the weights did not move by the learning rate times the gradient",
        value=float(error[row, column] / length[row, 0]) if length[row, 0] else math.inf,
        step=int(t.step[row + 1]),
        parameters=tuple(t.parameter_names[columns].tolist()),
    )


def _l2(by_parameter: Floats) -> Floats:
    """[S, 1] L2 norm over all parameters."""
    return np.sqrt(np.square(by_parameter).sum(axis=1, keepdims=True))
