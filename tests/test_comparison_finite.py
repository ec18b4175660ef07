"""NaN and infinity are found wherever they are in a long record."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dpsgd_track.comparison.measure.finite import not_finite
from dpsgd_track.record.trajectory import Trajectory
from tests.support.synthetic_group import put, trajectory, without_norms

LONG = trajectory(steps=600)

Place = Callable[[Trajectory], Trajectory]
"""Puts a record where the test wants it: in memory, or in a file."""


@pytest.fixture(params=["memory", "file"])
def held(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    def place(t: Trajectory) -> Trajectory:
        if request.param == "memory":
            return t
        t.save(tmp_path / "trajectory.npz")
        return Trajectory.load(tmp_path / "trajectory.npz")

    return place


@pytest.mark.parametrize("step", [0, 255, 256, 599])
@pytest.mark.parametrize(
    ("field", "item", "where"),
    [
        ("weight_sketch", (2, 1), "parameter model.layers.2.weight"),
        ("sample_norm_by_parameter", (3, 1), "sample {}, parameter model.layers.1.weight"),
        ("sample_norm", (5,), "sample {}"),
    ],
)
def test_one_nan_is_named_by_its_step_and_place(
    held: Place, step: int, field: str, item: tuple[int, ...], where: str
) -> None:
    record = held(put(LONG, field, np.nan, (step, *item)))
    (found,) = not_finite(record)
    assert (found.field, found.step) == (field, step)
    assert found.where == where.format(LONG.sample_index[step, item[0]])
    assert not {*record.__dict__} & {*record.__dict__.get("_columns", ())}, "nothing is kept"


def test_what_is_never_computed_is_no_finding_and_what_is_sometimes_is(held: Place) -> None:
    assert not not_finite(held(without_norms(LONG)))
    assert not not_finite(held(put(LONG, "sample_norm_by_parameter", np.nan, np.s_[:, :, 1])))
    first_block = put(LONG, "sample_norm_by_parameter", np.nan, np.s_[:256, :, 1])
    (found,) = not_finite(held(first_block))
    assert found.step == 0
