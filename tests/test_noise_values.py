"""Elements of the noise that are too large, zero, or copies of others; and rounding, which is none
of this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from dpsgd_track.comparison.audit.noise import check
from dpsgd_track.comparison.audit.noise.equality import (
    EQUAL_VALUES,
    ZEROS,
    check_equal_values,
    check_zeros,
    log_moments,
)
from dpsgd_track.comparison.audit.noise.gaussian import beyond, share_interval
from dpsgd_track.comparison.audit.noise.samples import COARSE, FINE, Samples, samples_of
from dpsgd_track.comparison.audit.noise.tails import TAILS, check_tails
from dpsgd_track.launcher.regimes import NOISE_SIGMA
from tests.support.noisy_records import C, Fault, Floats, audited, noisy, sentences

SMALL = (600, 300, 64, 3, 1)
BATCH = 1001
"""What the updates of the records are divided by."""
STD = NOISE_SIGMA * C[:, None, None, None]
Rounding = Callable[[Floats], Floats]


def in_float32(values: Floats) -> Floats:
    return values.astype(np.float32).astype(np.float64)


def in_bfloat16(values: Floats) -> Floats:
    return torch.from_numpy(values).bfloat16().double().numpy()


def on_a_grid(values: Floats) -> Floats:
    return np.round(values * 2**16) / 2**16


def added(
    rounding: Rounding, sum_over_noise: float, fault: Fault = lambda z, rng: z, *, one_sign: bool
) -> Fault:
    """The noise as it is known: a noisy update less the silent one, both rounded."""

    def known(z: Floats, rng: np.random.Generator) -> Floats:
        z = fault(z, rng)
        sums = sum_over_noise * rng.standard_normal(z.shape) * STD
        sums[2] = 0  # the empty step
        sums = np.abs(sums) if one_sign else sums
        difference = rounding((sums + z * STD) / BATCH) - rounding(sums / BATCH)
        return difference * BATCH / STD

    return known


def samples(fault: Fault, *, seed: int = 0, sizes: tuple[int, ...] = SMALL) -> Samples:
    record = noisy(fault, seed=seed, sizes=sizes)
    found = samples_of(replace(record, expected_batch_size=BATCH))
    assert found is not None
    return found


def failed(found: Samples) -> set[str]:
    checks = check_tails(found), check_zeros(found), check_equal_values(found)
    return {check.name for check in checks if not check.is_ok}


ROUNDED: dict[str, tuple[Rounding, float, float]] = {
    "float32": (in_float32, 0.1, FINE),
    "float32 beside a sum ten times as large": (in_float32, 10.0, FINE),
    "a coarse grid": (on_a_grid, 0.1, COARSE),
    "bfloat16": (in_bfloat16, 0.0, COARSE),
    "bfloat16 beside a small sum": (in_bfloat16, 0.01, COARSE),
    "bfloat16 beside a sum as large": (in_bfloat16, 1.0, COARSE),
}


@pytest.mark.parametrize("num_seeds", [40, pytest.param(400, marks=pytest.mark.soak)])
@pytest.mark.parametrize("one_sign", [False, True])
@pytest.mark.parametrize("name", ROUNDED)
def test_sound_noises_raise_no_alarm_however_rounded(
    name: str, one_sign: bool, num_seeds: int
) -> None:
    rounding, sum_over_noise, resolution = ROUNDED[name]
    fault = added(rounding, sum_over_noise, one_sign=one_sign)
    for seed in range(num_seeds):
        found = samples(fault, seed=seed)
        assert failed(found) == set()
        assert found.resolution == resolution


def test_sound_noise_in_bfloat16_has_many_equal_pairs_that_are_no_alarm() -> None:
    found = samples(added(in_bfloat16, 0.0, one_sign=False))
    values = found.noise[0][found.held]
    assert len(values) - len(np.unique(values)) > 100
    assert check_equal_values(found).is_ok


def test_a_sum_that_is_the_same_in_a_whole_shard_makes_no_copies_of_its_grid() -> None:
    # Equal pairs are on the grid of the updates there, and opposite ones are not.
    def fault(z: Floats, rng: np.random.Generator) -> Floats:
        sums = rng.standard_normal((*z.shape[:3], 1)) * STD
        difference = in_bfloat16((sums + z * STD) / BATCH) - in_bfloat16(sums / BATCH)
        return difference * BATCH / STD

    for seed in range(20):
        assert check_equal_values(samples(fault, seed=seed)).is_ok


def _clamped(z: Floats, rng: np.random.Generator) -> Floats:
    return z.clip(-3, 3)


def _drawn_again_beyond_three(z: Floats, rng: np.random.Generator) -> Floats:
    while (is_out := np.abs(z) > 3).any():
        z[is_out] = rng.standard_normal(is_out.sum())
    return z


def _laplace(z: Floats, rng: np.random.Generator) -> Floats:
    return rng.laplace(0, np.sqrt(0.5), z.shape)


def _student(z: Floats, rng: np.random.Generator) -> Floats:
    return rng.standard_t(5, z.shape) * np.sqrt(3 / 5)


def _one_outlier(z: Floats, rng: np.random.Generator) -> Floats:
    z[1, 1, 0, 17] = 9
    return z


def _zeros(z: Floats, rng: np.random.Generator) -> Floats:
    return np.where(rng.random(z.shape) < 0.02, 0, z)


def _blocks(z: Floats, rng: np.random.Generator) -> Floats:
    z[..., 128:] = z[..., :128]
    return z


def _reversed_on_the_other_rank(z: Floats, rng: np.random.Generator) -> Floats:
    z[:, 1] = z[:, 0, :, ::-1]
    return z


def _permuted_within_a_rank(z: Floats, rng: np.random.Generator) -> Floats:
    z[:, :, 1, :100] = rng.permuted(z[:, :, 0, :100], axis=-1)
    return z


def _from_the_step_before(z: Floats, rng: np.random.Generator) -> Floats:
    z[1:] = z[:-1, :, :, ::-1].copy()
    return z


def _opposite_elsewhere(z: Floats, rng: np.random.Generator) -> Floats:
    z[:, 1] = -z[:, 0, :, ::-1]
    return z


FAULTS: dict[str, tuple[Fault, str, str]] = {
    "clamped": (_clamped, TAILS, "are expected"),
    "drawn again": (_drawn_again_beyond_three, TAILS, "are expected"),
    "Laplace": (_laplace, TAILS, "are beyond 3.5 sigma C"),
    "Student": (_student, TAILS, "beyond"),
    "an outlier": (_one_outlier, TAILS, "is beyond 8.9"),
    "zeros": (_zeros, ZEROS, "are exactly 0 where rounding explains 0."),
    "blocks": (_blocks, EQUAL_VALUES, "pairs of elements of its noise in one shard are equal"),
    "reversed": (_reversed_on_the_other_rank, EQUAL_VALUES, "in one parameter at one step are"),
    "permuted": (_permuted_within_a_rank, EQUAL_VALUES, "on one rank at one step are equal"),
    "step before": (_from_the_step_before, EQUAL_VALUES, "pairs of elements of its noise are"),
    "opposite": (_opposite_elsewhere, EQUAL_VALUES, "opposite, where chance makes as many"),
}
LARGE = (16384,) * 8 + SMALL


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_fails_its_check_and_no_other(name: str) -> None:
    fault, wanted, sentence = FAULTS[name]
    known = added(in_float32, 1.0, fault, one_sign=False)
    for seed in range(5):
        assert failed(samples(known, seed=seed, sizes=LARGE)) == {wanted}
    record = noisy(known, sizes=LARGE)
    found = {check.name: check for check in audited(record).failed}
    assert sentence in found[wanted].sentence


@pytest.mark.parametrize("name", sorted(set(FAULTS) - {"Laplace", "Student", "an outlier"}))
def test_the_check_that_alone_sees_it_leads_the_sentence(name: str) -> None:
    fault, _, sentence = FAULTS[name]
    if name == "blocks":
        # Of the shards whose elements are all recorded the form is known.
        sentence = "repeats every 128 elements, as if one row were drawn for all, in model.layers"
    told = sentences(noisy(added(in_float32, 1.0, fault, one_sign=False), sizes=LARGE))
    assert sentence in told[0]
    assert len(told) == 1


@pytest.mark.parametrize("name", ["blocks", "reversed", "opposite", "clamped"])
def test_a_copy_shows_among_the_chance_coincidences_of_bfloat16(name: str) -> None:
    fault, wanted, _ = FAULTS[name]
    found = samples(added(in_bfloat16, 1.0, fault, one_sign=False), sizes=LARGE)
    assert failed(found) == {wanted}


def test_copies_are_named_by_place_and_value() -> None:
    def fault(z: Floats, rng: np.random.Generator) -> Floats:
        z[1, 1, 4, 30:80] = z[1, 0, 2, 100:150][::-1]
        return z

    found = check_equal_values(samples(fault, sizes=LARGE))
    assert "model.layers.2.weight on rank 0 at step 1" in found.sentence
    assert "model.layers.4.weight on rank 1 at step 1" in found.sentence
    assert found.place.text.endswith("at step 1")
    assert found.explains_others


def test_skewed_noise_is_not_called_copied() -> None:
    def fault(z: Floats, rng: np.random.Generator) -> Floats:
        return rng.exponential(1.0, z.shape) - 1

    found = audited(noisy(fault, sizes=LARGE))
    equal = next(check for check in found.checks if check.name == EQUAL_VALUES)
    assert not equal.explains_others
    assert not any("equal" in sentence for sentence in sentences(noisy(fault, sizes=LARGE)))


def test_zeros_in_a_low_precision_are_not_put_to_the_test() -> None:
    found = check_zeros(samples(added(in_bfloat16, 8.0, one_sign=False)))
    assert found.is_ok
    assert not found.was_tested
    assert "low precision" in found.sentence


def test_a_part_without_noise_is_said_by_its_std_alone() -> None:
    def fault(z: Floats, rng: np.random.Generator) -> Floats:
        z[:, :, 3] = 0
        z[2] = 0
        return z

    found = samples(fault, sizes=LARGE)
    assert check_zeros(found).is_ok
    assert check_equal_values(found).is_ok
    said = sentences(noisy(fault, sizes=LARGE))
    assert all("the std of its noise" in s or "its std should be sigma C" in s for s in said)


def test_an_audit_makes_no_more_checks_than_share_the_false_alarms() -> None:
    assert len(audited(noisy(ranks=3)).checks) <= check._NUM_CHECKS


# The mathematics.


def test_the_moments_of_a_surplus_are_those_of_all_signs() -> None:
    for m in (2, 3, 7):
        signs = np.array(list(product((-1, 1), repeat=m)))
        surplus = (signs.sum(axis=1) ** 2 - m) / 2
        pairs = [(s[:, None] * s)[np.triu_indices(m, k=1)].sum() for s in signs]
        np.testing.assert_array_equal(surplus, pairs)
        t = np.geomspace(1e-5, 8, 56)
        for side, sign in enumerate((1, -1)):
            expected = np.log(np.exp(sign * t[:, None] * surplus).mean(axis=1))
            np.testing.assert_allclose(log_moments()[side, :, m], expected, atol=1e-12)


@pytest.mark.parametrize(("size", "num_bins"), [(2, 200), (5, 40), (60, 30), (256, 4)])
def test_a_surplus_is_beyond_its_bound_no_more_often_than_it_says(size: int, num_bins: int) -> None:
    rng = np.random.default_rng(0)
    alpha, t = 0.02, np.geomspace(1e-5, 8, 56)
    total = 2 * rng.binomial(size, 0.5, (20_000, num_bins)) - size
    surplus = ((total.astype(float) ** 2 - size) / 2).sum(axis=1)
    for side, sign in enumerate((1, -1)):
        reach = ((num_bins * log_moments()[side, :, size] - np.log(alpha)) / t).min()
        share = (sign * surplus > reach).mean()
        # Chernoff's bound is wider than need be, by no more than this.
        assert alpha / 40 < share < alpha


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution() -> None:
    rng = np.random.default_rng(0)
    n, p, alpha = 800, 0.0124, 0.02
    count = rng.binomial(n, p, 40_000)
    low, high = share_interval(count, count, n, alpha)
    # Exact means at most so often: counts are whole.
    assert alpha / 8 < (low > p).mean() < alpha / 2 * 1.1
    assert alpha / 8 < (high < p).mean() < alpha / 2 * 1.1
    none, most = share_interval(0, 0, 100, alpha)
    assert none == 0
    assert most == pytest.approx(1 - (alpha / 2) ** 0.01)
    assert share_interval(100, 100, 100, alpha)[1] == 1


def test_the_largest_of_many_is_as_large_as_its_exact_distribution_says() -> None:
    rng = np.random.default_rng(0)
    n, alpha = 1000, 0.1
    largest = np.abs(rng.standard_normal((5000, n))).max(axis=1)
    low, _ = share_interval(1, 1, n, alpha)
    _, high = share_interval(0, 0, n, alpha)
    too_large, too_small = (beyond(largest) < low).mean(), (beyond(largest) > high).mean()
    assert 0.04 < too_large < 0.06
    assert 0.04 < too_small < 0.06
