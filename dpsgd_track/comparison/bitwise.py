"""Equality of runs bit by bit, which a change that is meant to change nothing has to keep.

Held against each other are a mode's run in one group and in another, or with the installed code and
with a variant's. Times and memory are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from dpsgd_track.record.run import Group, ModeRun
from dpsgd_track.record.trajectory import Trajectory

_OF_THE_MACHINE = frozenset({"step_time_ms", "peak_memory_gib", "tokens_per_second"})


@dataclass(frozen=True, kw_only=True)
class Unequal:
    """A run that is not its counterpart bit by bit, or cannot be held against it."""

    label: str
    regime: str
    against: str
    """The counterpart, in words."""
    names: tuple[str, ...] = ()
    """Recorded quantities that differ, in the record's order; none if a record is missing."""
    step: int | None = None
    """First step at which one of them differs; None if none has steps."""

    @property
    def is_missing(self) -> bool:
        """True if one side has no record."""
        return not self.names

    @property
    def sentence(self) -> str:
        """The difference, with a full stop."""
        who = f"{self.label} in {self.regime}"
        if self.is_missing:
            return f"{who} has no record on both sides to hold against {self.against}."
        first, more = self.names[0], len(self.names) - 1
        when = "" if self.step is None else f", from step {self.step} on"
        return (
            f"{who} differs from {self.against}: {first}"
            + f" and {more} more" * bool(more)
            + f"{when}."
        )


def unequal_runs(before: Group, after: Group | None = None) -> tuple[int, list[Unequal]]:
    """The number of pairs, and those that are not equal.

    Args:
        after: the later group; None to hold each variant's runs against the installed code's.

    Raises:
        ValueError: there is nothing to hold against each other.
    """
    pairs = list(_pairs_of_groups(before, after) if after else _pairs_of_variants(before))
    if not pairs:
        raise ValueError(
            "bitwise=True: expected two groups, or a group with a variant that runs modes of it. "
            "Modes of different names are never equal bit by bit."
        )
    return len(pairs), [u for ours, theirs, name in pairs if (u := _unequal(ours, theirs, name))]


def _pairs_of_groups(before: Group, after: Group) -> Iterator[tuple[ModeRun, ModeRun | None, str]]:
    known = {run.key: run for run in before.runs}
    for run in after.runs:
        yield run, known.get(run.key), f"group {before.name}"
    for key in known.keys() - {run.key for run in after.runs}:
        yield known[key], None, f"group {after.name}"


def _pairs_of_variants(group: Group) -> Iterator[tuple[ModeRun, ModeRun | None, str]]:
    known = {run.key: run for run in group.runs if not run.variant}
    for run in group.runs:
        installed = known.get(replace(run.key, variant=""))
        if run.variant and installed:
            yield run, installed, "the installed code"


def _unequal(ours: ModeRun, theirs: ModeRun | None, name: str) -> Unequal | None:
    where = Unequal(label=ours.title, regime=ours.regime, against=name)
    if theirs is None or ours.trajectory is None or theirs.trajectory is None:
        return where
    names, steps = [], []
    for field in fields(Trajectory):
        if field.name in _OF_THE_MACHINE:
            continue
        a, b = (getattr(run.trajectory, field.name) for run in (ours, theirs))
        if _is_equal(a, b):
            continue
        names.append(field.name)
        if (step := _first_step(a, b, ours.trajectory)) is not None:
            steps.append(step)
    return replace(where, names=tuple(names), step=min(steps, default=None)) if names else None


def _is_equal(a: object, b: object) -> bool:
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return a == b
    if not a.size and not b.size:
        # Recorded on neither side.
        return True
    if a.dtype.kind != "f":
        return a.shape == b.shape and bool(np.all(a == b))
    is_same_sign = a.shape == b.shape and np.array_equal(np.signbit(a), np.signbit(b))
    return is_same_sign and np.array_equal(a, b, equal_nan=True)


def _first_step(a: object, b: object, trajectory: Trajectory) -> int | None:
    """First step at which two arrays of the same shape with a row a step differ."""
    num_steps = len(trajectory.step)
    for each in (a, b):
        if not isinstance(each, np.ndarray) or each.ndim == 0 or len(each) != num_steps:
            return None
    assert isinstance(a, np.ndarray)
    assert isinstance(b, np.ndarray)
    if a.shape != b.shape:
        return None
    rows = [
        not _is_equal(x, y) for x, y in zip(np.atleast_2d(a.T).T, np.atleast_2d(b.T).T, strict=True)
    ]
    return int(trajectory.step[rows.index(True)]) if True in rows else None
