"""Sums over a million elements of a mode's noise: what they are, and what they show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dpsgd_track.comparison.audit.noise import audit, judge_noise, passed_noise
from dpsgd_track.comparison.audit.noise.check import ALPHA, NoiseCheck
from dpsgd_track.comparison.audit.noise.draws import check_draws
from dpsgd_track.comparison.audit.noise.gaussian import hermite_bound
from dpsgd_track.record.noise_draws import FORMATS, LEVELS, NUM_LAGS, NoiseDraws
from dpsgd_track.record.trajectory import SCHEMA_VERSION, Trajectory
from tests.support.noisy_records import (
    DRAWN_SIZES,
    SIZES,
    Fault,
    Floats,
    draws_of,
    noisy,
    run_of,
    sentences,
)

PARAMETERS = tuple(f"p{number}" for number in range(len(DRAWN_SIZES)))


def _same(ours: NoiseDraws, theirs: NoiseDraws) -> bool:
    return all(
        np.allclose(getattr(ours, each.name), getattr(theirs, each.name), rtol=1e-12, atol=1e-9)
        for each in fields(NoiseDraws)
        if each.name != "key"
    )


# The sums.


def test_sums_are_those_of_a_loop_over_elements() -> None:
    rng = np.random.default_rng(1)
    z, before = rng.standard_normal((2, 2, 3, 300)) * 2
    for p, sizes in enumerate(((300, 280), (5, 0), (1, 1))):
        for w, size in enumerate(sizes):
            z[w, p, size:] = before[w, p, size:] = np.nan
    found = NoiseDraws.of_step(z, before, units=(1.0, 3.0))
    shards = [[row[~np.isnan(row)] for row in rank] for rank in z]
    for w, rank in enumerate(shards):
        for p, shard in enumerate(rank):
            assert found.moments[w, p] == pytest.approx([(shard**k).sum() for k in range(5)])
            assert found.beyond[w, p].tolist() == [(abs(shard) > lv).sum() for lv in LEVELS]
    for i in range(2):
        for j in range(2):
            both = [
                x * y for a, b in zip(z[i], z[j], strict=True) for x, y in zip(a, b, strict=True)
            ]
            both = [x for x in both if not np.isnan(x)]
            assert found.ranks[:, i, j] == pytest.approx([sum(both), len(both)])
    for i in range(3):
        for j in range(3):
            both = [x * y for rank in z for x, y in zip(rank[i], rank[j], strict=True)]
            both = [x for x in both if not np.isnan(x)]
            assert found.parameters[:, i, j] == pytest.approx([sum(both), len(both)])
    rows = [np.concatenate(rank) for rank in shards]
    for lag in (1, 7, NUM_LAGS):
        products = [row[k] * row[k + lag] for row in rows for k in range(len(row) - lag)]
        assert found.neighbours[:, lag - 1] == pytest.approx([sum(products), len(products)])
    assert found.steps == pytest.approx([np.nansum(z * before), (~np.isnan(z)).sum()])
    assert found.num_looked_at == (~np.isnan(z)).sum()


def test_sums_of_steps_add_up() -> None:
    one, two = (replace(draws_of(num_steps=3, seed=seed), key=str(seed)) for seed in (0, 1))
    both = one + two
    assert (both.num_steps, both.key) == (6, "0 1")
    assert both.moments[..., 0].sum() == 6 * 2 * sum(DRAWN_SIZES)
    assert np.allclose(both.ranks, one.ranks + two.ranks)


def test_a_record_keeps_its_draws(tmp_path: Path) -> None:
    draws = replace(draws_of(num_steps=2), key="abc")
    replace(noisy(), noise_draws=draws).save(tmp_path / "t.npz")
    read = Trajectory.load(tmp_path / "t.npz").noise_draws
    assert read is not None
    assert _same(read, draws)
    assert read.key == "abc"
    noisy().save(tmp_path / "none.npz")
    assert Trajectory.load(tmp_path / "none.npz").noise_draws is None


def test_a_record_of_before_the_draws_is_read_and_one_of_later_is_not(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    noisy().save(path)
    with np.load(path) as archive:
        columns = dict(archive)
    np.savez(path, **{**columns, "schema": np.int64(2)})
    assert Trajectory.load(path).noise_draws is None
    np.savez(path, **{**columns, "schema": np.int64(SCHEMA_VERSION + 1)})
    with pytest.raises(ValueError, match="expected trajectory schema"):
        Trajectory.load(path)
    np.savez(path, **columns, **{"noise_draws.key": np.array("x")})
    with pytest.raises(ValueError, match="noise_draws: expected other fields"):
        Trajectory.load(path)


# What they show.


def _failed(draws: NoiseDraws, alpha: float = ALPHA) -> list[NoiseCheck]:
    return [check for check in check_draws(draws, PARAMETERS, alpha) if not check.is_ok]


def _bf16(values: Floats) -> Floats:
    return np.ldexp(np.rint(np.ldexp(np.frexp(values)[0], 8)), np.frexp(values)[1] - 8)


def _skewed(z: Floats, rng: np.random.Generator) -> Floats:
    # A gamma variable of shape k has a skewness of 2 / sqrt(k): here 0.04.
    return (rng.gamma(2500, size=z.shape) - 2500) / 50


FAULTS: dict[str, tuple[Callable[[], Fault], str]] = {
    "std half a percent low": (lambda: lambda z, rng: 0.995 * z, "the std of its noise is 0.99"),
    "std of one rank": (
        lambda: lambda z, rng: z * np.array([1, 0.98])[:, None, None],
        "the std of its noise of rank 1 is 0.98",
    ),
    "mean of 0.01": (lambda: lambda z, rng: z + 0.01, "the mean of its noise is 0.0"),
    "cut at 4": (lambda: lambda z, rng: z.clip(-4, 4), "are beyond 4 sigma C"),
    "skewed": (lambda: _skewed, "the skewness of its noise is 0.03"),
    "rounded": (lambda: lambda z, rng: _bf16(z), "as if they were rounded to bfloat16"),
    "ranks": (lambda: _common(0, 0.01), "between rank 0 and rank 1 is 0.01"),
    "parameters": (lambda: _common(1, 0.01), "between any two parameters is 0.00"),
    "neighbours": (lambda: _moved(0.0101), "between elements 3 apart is 0.01"),
    "steps": (lambda: _after(0.0101), "between each step and the one after it is 0.00"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_small_fault_is_named(name: str) -> None:
    fault, wanted = FAULTS[name]
    found = sentences(_record(draws_of(fault())))
    assert len(found) == 1, found
    assert wanted in found[0]
    assert "1,169,604 elements of 53 noise-only steps" in found[0] or name == "rounded"


def _record(draws: NoiseDraws) -> Trajectory:
    return replace(noisy(sizes=SIZES[: len(PARAMETERS)]), noise_draws=draws)


def test_sound_noise_passes_and_says_what_would_have_failed() -> None:
    run = run_of(_record(draws_of()))
    found = audit(run)
    assert found is not None
    assert not found.failed
    said = passed_noise(found)
    assert "by 1,169,604 draws" in said
    for would_fail in ("std off by 0.5%", "mean of 0.007", "a cut at 4 sigma", "correlation of"):
        assert would_fail in said
    assert not [check for check in found.checks if check.is_of_draws and not check.was_tested]


def test_what_is_said_to_fail_does() -> None:
    """Faults of one and a half times the stated resolution."""
    sound = {check.name: check.resolution for check in check_draws(draws_of(), PARAMETERS)}

    def larger(name: str) -> float:
        return 1.5 * sound[f"draws_{name}"]

    rho = larger("correlation_of_steps")
    # A part of H_3 or H_4 moves the skewness or the kurtosis by 6 or 24 times as much.
    skew, more = larger("skewness") / 6, larger("kurtosis") / 24
    faults: dict[str, Fault] = {
        "std": lambda z, rng: z * (1 - larger("std")),
        "mean": lambda z, rng: z + larger("mean"),
        "skewness": lambda z, rng: z + skew * (z**2 - 1),
        "kurtosis": lambda z, rng: z + more * (z**3 - 3 * z),
        "tails": lambda z, rng: z.clip(-sound["draws_tails"], sound["draws_tails"]),
        "correlation_of_ranks": _common(0, larger("correlation_of_ranks")),
        "correlation_of_parameters": _common(1, larger("correlation_of_parameters")),
        "correlation_of_neighbours": _moved(larger("correlation_of_neighbours")),
        "correlation_of_steps": _after(rho),
    }
    for name, fault in faults.items():
        failed = {check.name for check in _failed(draws_of(fault, seed=3))}
        assert f"draws_{name}" in failed, name


def _common(axis: int, rho: float) -> Fault:
    def fault(z: Floats, rng: np.random.Generator) -> Floats:
        common = rng.standard_normal(z.shape).take([0], axis=axis)
        return np.sqrt(1 - rho) * z + np.sqrt(rho) * common

    return fault


def _moved(rho: float) -> Fault:
    return lambda z, rng: (z + rho * np.roll(z, 3, axis=-1)) / np.sqrt(1 + rho**2)


def _after(rho: float) -> Fault:
    """Noise with a part of the step before."""
    last: list[Floats] = []

    def fault(z: Floats, rng: np.random.Generator) -> Floats:
        last.append(z)
        return z if len(last) < 2 else (z + rho * last[-2]) / np.sqrt(1 + rho**2)

    return fault


def test_evidence_of_runs_adds_up() -> None:
    runs = [draws_of(lambda z, rng: 0.995 * z, num_steps=7, seed=seed) for seed in range(9)]
    assert not any(_failed(run) for run in runs)
    assert "draws_std" in {check.name for check in _failed(sum(runs[1:], runs[0]))}


def test_noise_of_a_narrow_type_is_not_held_to_have_full_bits() -> None:
    draws = draws_of(lambda z, rng: _bf16(z), significant_bits=8)
    assert not _failed(draws)
    (bits,) = (check for check in check_draws(draws, PARAMETERS) if check.name == "draws_bits")
    assert not bits.was_tested
    assert "8 significant bits" in bits.sentence


def test_noise_beside_a_sum_is_not_held_to_have_full_bits() -> None:
    sampled = replace(draws_of(num_steps=2), is_bare=False, num_looked_at=0)
    (bits,) = (check for check in check_draws(sampled, PARAMETERS) if check.name == "draws_bits")
    assert (bits.was_tested, bits.is_ok) == (False, True)


def _simulated(num: int, seed: int) -> Iterator[NoiseDraws]:
    """Draws of correct noise, small enough that thousands take seconds."""
    rng = np.random.default_rng(seed)
    for _ in range(num):
        z = rng.standard_normal((3, 2, 3, 2600))
        z[:, :, 1, 1500:] = z[:, :, 2, 200:] = np.nan
        first = NoiseDraws.of_step(z[0], units=(1.0,))
        steps = (NoiseDraws.of_step(now, before) for before, now in pairwise(z))
        yield sum(steps, first)


def _alarms(num: int, seed: int, alpha: float) -> Counter[str]:
    return Counter(
        check.name
        for draws in _simulated(num, seed)
        for check in check_draws(draws, PARAMETERS[:3], alpha)
        if not check.is_ok
    )


def test_a_check_raises_no_more_false_alarms_than_it_is_designed_to() -> None:
    alarms = _alarms(200, 1, alpha=0.05)
    # 10 are expected of a check, and 22 or more of one in a thousand.
    assert max(alarms.values()) < 22, alarms
    assert alarms["draws_std"] > 1, "the level is not zero either"
    assert not _alarms(100, 2, alpha=ALPHA)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_thousands_of_audits_raise_as_many_false_alarms_as_designed() -> None:
    num, alpha = 10_000, 1e-3
    alarms = _alarms(num, 3, alpha)
    assert max(alarms.values()) <= 25, alarms  # 10 are expected; more in one of 30,000
    assert not _alarms(num, 4, ALPHA)


def test_bounds_of_hermite_polynomials_hold() -> None:
    rng = np.random.default_rng(0)
    for num in (30, 3000):
        z = rng.standard_normal((600_000 // num, num))
        for order, values in ((3, z**3 - 3 * z), (4, z**4 - 6 * z**2 + 3)):
            low, high = hermite_bound(order, num, 0.05)
            outside = (values.mean(axis=1) < low) | (values.mean(axis=1) > high)
            assert outside.mean() <= 0.05
    # Far out it is no more than a tenth wider than the normal approximation.
    for order in (3, 4):
        low, high = hermite_bound(order, 1_000_000, 5e-8)
        normal = 5.45 * np.sqrt((6 if order == 3 else 24) / 1_000_000)
        assert normal < -low <= high * 1.0001 < 1.15 * normal


# What no number may break.


@pytest.mark.parametrize("size", [60.0, 1e10, 1e36, 1e-30])
@pytest.mark.parametrize("where", ["one", "all"])
def test_no_number_however_large_breaks_an_audit(size: float, where: str) -> None:
    def fault(z: Floats, rng: np.random.Generator) -> Floats:
        if where == "one":
            z[1, 0, 0, 5] = size
            return z
        return z * size

    found = sentences(noisy(fault))
    assert found or (where == "one" and size < 1)

    def drawn(z: Floats, rng: np.random.Generator) -> Floats:
        if where == "one":
            z[0, 0, 5] = size
            return z
        return z * size

    assert sentences(_record(draws_of(drawn, num_steps=4))) or (where == "one" and size < 1)


def test_infinite_draws_are_wrong() -> None:

    def fault(z: Floats, rng: np.random.Generator) -> Floats:
        z[0, 1, 5] = np.inf
        return z

    run = run_of(_record(draws_of(fault, num_steps=3)))
    (found,) = judge_noise(run, audit(run))
    assert found.verdict == "BUG"
    assert "model.layers.1.weight is infinite or NaN" in found.sentence


def test_formats_have_the_bits_they_are_said_to_have() -> None:
    assert {"bfloat16": 8, "float16": np.finfo(np.float16).nmant + 1} == FORMATS
