"""The heat of a mode shows the parameter, the step and the rank that are off, and no other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dpsgd_track.comparison.measure.drift import compare_pair
from dpsgd_track.comparison.measure.norm_heatmap import Heat, heat
from dpsgd_track.record.trajectory import Trajectory
from tests.support.synthetic_group import permuted, put, scaled, trajectory, without_norms

STEP, SAMPLE, PARAMETER = 2, 5, 1


def heat_of(record: Trajectory, mode: Trajectory, num_bins: int = 60) -> Heat | None:
    return heat("clip", ("reference", record), ("flash", mode), num_bins)


def wrong(record: Trajectory) -> Trajectory:
    return scaled(record, "sample_norm_by_parameter", 1.5, (STEP, SAMPLE, PARAMETER))


@pytest.mark.parametrize("is_permuted", [False, True])
def test_one_wrong_sample_shows_at_its_step_rank_and_parameter(is_permuted: bool) -> None:
    record = trajectory(noise_std=0.0)
    mode = permuted(wrong(record)) if is_permuted else wrong(record)
    found = heat_of(record, mode)
    assert found is not None
    rank = int(record.sample_rank[STEP, SAMPLE])
    assert rank == 1
    expected = np.zeros((4, 2, 4))
    expected[STEP, rank, PARAMETER] = 0.5
    np.testing.assert_allclose(found.values, expected, atol=1e-12)
    assert found.first_steps.tolist() == found.last_steps.tolist() == [0, 1, 2, 3]


def test_ranks_are_those_of_the_mode_and_not_of_the_baseline() -> None:
    record = trajectory(noise_std=0.0)
    on_one_rank = replace(record, sample_rank=np.zeros_like(record.sample_rank))
    found = heat_of(on_one_rank, wrong(record))
    assert found is not None
    assert found.ranks.tolist() == [0, 1]
    assert np.argwhere(found.values > 0.1).tolist() == [[STEP, 1, PARAMETER]]


def test_heat_has_the_largest_drift_of_the_observable() -> None:
    record = trajectory(noise_std=0.0)
    rng = np.random.default_rng(1)
    noisy = scaled(record, "sample_norm_by_parameter", 1 + 1e-3 * rng.normal(size=(4, 6, 4)))
    found = heat_of(record, noisy)
    pair = compare_pair("clip", ("reference", record), ("flash", noisy))
    assert found is not None
    assert found.values.max() == pair.drifts["sample_norm_by_parameter"].max


@pytest.mark.parametrize("num_bins", [1, 2, 3])
def test_a_bin_keeps_its_largest_and_no_step_is_lost(num_bins: int) -> None:
    record = trajectory(steps=7, noise_std=0.0)
    found = heat_of(record, wrong(record), num_bins)
    assert found is not None
    covered = zip(found.first_steps.tolist(), found.last_steps.tolist(), strict=True)
    assert [step for first, last in covered for step in range(first, last + 1)] == list(range(7))
    assert len(found.first_steps) == num_bins
    at = next(i for i, last in enumerate(found.last_steps) if last >= STEP)
    assert found.values[at, 1, PARAMETER] == pytest.approx(0.5)
    assert found.values.sum() == pytest.approx(0.5)


def test_what_was_not_computed_is_nan_and_not_zero() -> None:
    record = trajectory(noise_std=0.0)
    blind = put(record, "sample_norm_by_parameter", np.nan, (slice(None), slice(None), PARAMETER))
    found = heat_of(record, blind)
    assert found is not None
    assert np.isnan(found.values[..., PARAMETER]).all()
    assert not np.isnan(np.delete(found.values, PARAMETER, axis=2)).any()


def test_there_is_no_heat_of_a_mode_without_norms() -> None:
    record = trajectory(noise_std=0.0)
    assert heat_of(record, without_norms(record)) is None
