"""Runs that are meant to be equal are, to the last bit, or the first difference is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpsgd_track.comparison.bitwise import unequal_runs
from dpsgd_track.record.run import Group
from tests.support.synthetic_group import group_of, healthy_runs, mode_run, put, scaled, with_run

MODE = "flash_fsdp"


def other_group(record: Any) -> Group:
    """The healthy group, in which MODE recorded something else in clip."""
    return group_of(with_run(healthy_runs(), mode_run(MODE, "clip", record)))


def test_equal_groups_are_equal_whatever_they_took() -> None:
    record = mode_run(MODE, "clip").trajectory
    assert record is not None
    slower = scaled(scaled(record, "step_time_ms", 2.0), "peak_memory_gib", 3.0)
    count, unequal = unequal_runs(group_of(healthy_runs()), other_group(slower))
    assert (count, unequal) == (8, [])


@pytest.mark.parametrize("value", ["next", "minus zero", "NaN"])
def test_the_last_bit_of_one_number_is_told(value: str) -> None:
    record = mode_run(MODE, "clip").trajectory
    assert record is not None
    if value == "minus zero":
        record = put(record, "layer_grad_norm", 0.0, (2, 1))
    before = other_group(record)
    number = float(record.layer_grad_norm[2, 1])
    new = {"next": np.nextafter(number, 9), "minus zero": -0.0, "NaN": np.nan}[value]
    changed = put(record, "layer_grad_norm", new, (2, 1))
    _, (found,) = unequal_runs(before, other_group(changed))
    assert (found.label, found.names, found.step) == (MODE, ("layer_grad_norm",), 2)
    assert found.sentence.endswith("layer_grad_norm, from step 2 on.")
    # NaN in the same place is equal.
    assert unequal_runs(other_group(changed), other_group(changed))[1] == []


def test_a_run_without_a_counterpart_is_told() -> None:
    whole, part = group_of(healthy_runs()), group_of(healthy_runs()[:-1])
    for pair in ((whole, part), (part, whole)):
        count, (found,) = unequal_runs(*pair)
        assert count == 8
        assert found.is_missing
        assert "reference in clip has no record on both sides" in found.sentence


def test_a_variant_is_held_against_the_installed_code() -> None:
    record = mode_run(MODE, "clip").trajectory
    runs = [*healthy_runs(), mode_run(MODE, "clip", record, variant="main")]
    assert unequal_runs(group_of(runs)) == (1, [])
    assert record is not None
    wrong = mode_run(MODE, "clip", scaled(record, "grad_norm", 1 + 2**-52), variant="main")
    _, (found,) = unequal_runs(group_of([*healthy_runs(), wrong]))
    assert found.label == f"{MODE}@main"
    assert "differs from the installed code: grad_norm, from step 0 on" in found.sentence


def test_a_group_without_counterparts_is_refused() -> None:
    runs = [run for run in healthy_runs() if not run.replay]
    alone = replace(mode_run("opacus:flash"), variant="fork")
    with pytest.raises(ValueError, match="bitwise=True: expected two groups"):
        unequal_runs(group_of([*runs, alone]))
