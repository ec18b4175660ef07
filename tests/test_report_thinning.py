"""Thinned series keep what a reader must not miss."""

from __future__ import annotations

import numpy as np
import pytest

from dpsgd_track.report.thinning import MOST, kept


def series(length: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.random.default_rng(length).standard_normal(length)


@pytest.mark.parametrize("length", [0, 1, 4, MOST])
def test_short_series_is_kept_whole(length: int) -> None:
    assert kept(series(length)).tolist() == list(range(length))


@pytest.mark.parametrize("length", [MOST + 1, 1999, 10_000, 12_345])
def test_long_series_keeps_few_points_and_its_ends_in_order(length: int) -> None:
    points = kept(series(length))
    assert 0.9 * MOST < len(points) <= MOST
    assert (points[0], points[-1]) == (0, length - 1)
    assert (np.diff(points) > 0).all()


@pytest.mark.parametrize("at", [0, 1, 4999, 6253, 9998, 9999])
@pytest.mark.parametrize("value", [50.0, -50.0, np.inf, -np.inf])
def test_spike_of_one_step_is_kept_wherever_it_is(at: int, value: float) -> None:
    values = series(10_000)
    values[at] = value
    assert at in kept(values)


def test_near_every_point_one_as_large_and_one_as_small_is_kept() -> None:
    values = series(10_000)
    points = kept(values)
    for i, value in enumerate(values.tolist()):
        near = values[points[abs(points - i) <= 2 * len(values) // MOST]]
        assert near.min() <= value <= near.max()


def test_nan_hides_no_extreme_and_a_gap_stays_a_gap() -> None:
    values = series(10_000)
    values[::2] = np.nan
    values[4000:6000] = np.nan
    values[7001] = 50.0
    points = kept(values)
    assert 7001 in points
    assert np.isnan(values[points[(points >= 4100) & (points < 5900)]]).all()
    assert ((points >= 4100) & (points < 5900)).any()
    around = points[((points > 10) & (points < 3990)) | ((points > 6010) & (points < 9990))]
    assert np.isfinite(values[around]).all()


def test_flat_series_is_thinned_too() -> None:
    assert len(kept(np.zeros(10_000))) <= MOST
