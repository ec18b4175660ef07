"""Which stage of a step went wrong first.

An error travels down a step and into the next one, so of everything that is out of bounds the
earliest step is looked at, and in it the earliest stage.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from dpsgd_track.comparison.drift import OBSERVABLES, Observable, Pair
from dpsgd_track.comparison.floor import Floor
from dpsgd_track.config import Thresholds
from dpsgd_track.tracking.trajectory import Trajectory

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
    """All that were over the limit in that step, worst first."""


@dataclass(frozen=True, kw_only=True)
class FirstFailure:
    """Where a comparison first goes out of bounds."""

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


def explained_by_rounding(observable: Observable, floor: Floor | None) -> float:
    """The largest drift that rounding may explain; 0 where no floor was measured.

    Twice the floor, as in FlashAttention's tests, where the floor is the largest of many samples
    or parameters and therefore steady. A loss or a norm is one draw of a random difference, and
    the norms of all layers move together; the ratio of two such draws exceeds 2 every third
    time, so five times the floor is allowed.
    """
    measured = floor.of(observable.name) if floor else None
    return (5.0 if observable.items in ("", "layer") else 2.0) * (measured or 0.0)


def limit(observable: Observable, thresholds: Thresholds, floor: Floor | None) -> float:
    """The threshold, or what rounding may explain where that is more."""
    threshold = float(getattr(thresholds, observable.threshold))
    return max(threshold, explained_by_rounding(observable, floor))


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


def first_failure(
    pair: Pair, thresholds: Thresholds, floor: Floor | None = None
) -> FirstFailure | None:
    """The earliest step, and in it the earliest stage, with a drift over its limit."""
    best: tuple[int, int] | None = None
    found: FirstFailure | None = None
    for rank, (stage, observables) in enumerate(STAGES):
        for name in observables:
            if name not in pair.drifts:
                continue
            drift = pair.drifts[name]
            bound = limit(OBSERVABLES[name], thresholds, floor)
            over = (drift.per_step > bound).nonzero()[0]
            if len(over) and (best is None or (int(over[0]), rank) < best):
                row = int(over[0])
                best = (row, rank)
                found = FirstFailure(
                    stage=stage,
                    step=int(drift.steps[row]),
                    where=drift.where_per_step[row],
                    observable=name,
                    value=float(drift.per_step[row]),
                )
    return found
