"""The audit of a mode's noise: passes what is sound, and says of each fault what it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import special

from dpsgd_track.comparison.audit.noise import audit, judge_noise, sensitivity
from dpsgd_track.comparison.audit.noise.gaussian import (
    correlation_bound,
    std_interval,
)
from dpsgd_track.comparison.audit.noise.sketches import independent_squares
from dpsgd_track.comparison.group import compare_group, compare_groups
from dpsgd_track.comparison.verdict import Verdict
from dpsgd_track.config import NOISE, PLAIN, SILENT, Thresholds
from dpsgd_track.launcher.regimes import NOISE_SIGMA
from dpsgd_track.record.failure import FailureKind
from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.trajectory import UNUSED, Trajectory
from tests.support.noisy_records import (
    SIZES,
    C,
    Fault,
    Floats,
    audited,
    noisy,
    run_of,
    sentences,
)
from tests.support.synthetic_group import (
    compared,
    failed,
    group_of,
    healthy_runs,
    mode_run,
    trajectory,
    verdicts,
)

STEP, RANK, PARAMETER = range(3)
EMPTY = 2


def test_sound_noise_passes_every_check() -> None:
    for ranks in (1, 2, 3):
        found = audited(noisy(ranks=ranks))
        assert not found.failed
        assert found.source == "samples"
        names = {check.name for check in found.checks}
        assert ("correlation_of_ranks" in names) == (ranks > 1)
        assert names >= {"std", "std_of_empty_step", "distribution", "reuse", "sensitivity"}
        assert all(check.low <= check.expected <= check.high for check in found.checks[:-1])
        assert len(found.by_parameter) == len(SIZES)


@pytest.mark.parametrize("num_audits", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_audits_of_sound_noise_raise_no_alarm(num_audits: int) -> None:
    # At a probability of 1e-6 each; 10,000 of them raised none either.
    for seed in range(num_audits):
        assert not sentences(noisy(ranks=1 + seed % 3, seed=seed))


def _scaled(factors: Any, axis: int | None = None) -> Fault:
    shape = [1, 1, 1, 1]
    if axis is not None:
        shape[axis] = -1
    return lambda z, rng: z * np.reshape(factors, shape)


def _only(value: float, *at: Any) -> Fault:
    def fault(z: Floats, rng: np.random.Generator) -> Floats:
        z[at] *= value
        return z

    return fault


def _same_for_one_shape(z: Floats, rng: np.random.Generator) -> Floats:
    z[:, :, 2] = z[:, :, 1]
    return z


def _shifted_reuse(z: Floats, rng: np.random.Generator) -> Floats:
    z[1, 0, 2] = z[0, 1, 5]
    return z


def _same_in_all_parameters(z: Floats, rng: np.random.Generator) -> Floats:
    # So few independent elements that a step's std is off by more than chance explains.
    alike = np.repeat(z[:, :, :1], z.shape[2], 2)
    return alike * np.array([1.0, 1.12, 1.0, 1.0])[:, None, None, None]


def _begin_alike(z: Floats, rng: np.random.Generator) -> Floats:
    z[:, 1, :, :128] = z[:, 0, :, :128]
    return z


def _lagged(z: Floats, rng: np.random.Generator) -> Floats:
    return np.sqrt(0.8) * z + np.sqrt(0.2) * np.roll(z, 7, axis=-1)


def _a_tenth_zero(z: Floats, rng: np.random.Generator) -> Floats:
    return np.where(rng.random(z.shape) < 0.1, 0, z) / np.sqrt(0.9)


def _from_a_table(z: Floats, rng: np.random.Generator) -> Floats:
    return special.ndtri((rng.integers(0, 64, z.shape) + 0.5) / 64)


def _repeating(parameter: int, length: int) -> Fault:
    def fault(z: Floats, rng: np.random.Generator) -> Floats:
        row = z[:, :, parameter, :length]
        z[:, :, parameter] = np.tile(row, z.shape[-1] // length)
        return z

    return fault


def _in_runs(z: Floats, rng: np.random.Generator) -> Floats:
    z[:, :, 0] = np.repeat(z[:, :, 0, ::32], 32, axis=-1)
    return z


def _in_halves(z: Floats, rng: np.random.Generator) -> Floats:
    for p, size in enumerate(SIZES):
        half = size // 4  # of a rank's shard
        if 4 * half == size and half <= 128:
            z[:, :, p, half : 2 * half] = z[:, :, p, :half]
    return z


every = slice(None)
FAULTS: dict[str, tuple[Fault, str]] = {
    "two thirds": (_scaled(2 / 3), "the std of its noise is 0.6"),
    "three halves": (_scaled(3 / 2), "the std of its noise is 1.5"),
    "none": (_scaled(0), "it adds no noise"),
    "sigma C^2": (_scaled(C, STEP), "as if it were sigma C^2"),
    "C ignored": (_scaled(1 / C, STEP), "as if C were ignored and it were sigma"),
    "1": (_scaled(1 / (NOISE_SIGMA * C), STEP), "as if it were 1, whatever sigma and C"),
    "first C": (_scaled(C[0] / C, STEP), "as if C were that of the first step"),
    "mean": (_scaled(12), "calibrated to the sum of the batch but added to its mean"),
    "every rank": (_scaled(np.sqrt(2)), "as if each of the ranks added the whole noise"),
    "micro-batches": (
        _scaled(np.sqrt([3, 3, 1, 1]), STEP),
        "as if every micro-batch got the whole noise",
    ),
    "same in micro-batches": (
        _scaled([3, 3, 1, 1], STEP),
        "as if every micro-batch got the same whole noise",
    ),
    "empty": (_only(0, EMPTY), "noise of the empty step 2 is zero"),
    "one step": (_only(1.2, 1), "of step 1 is 1.19"),
    "one rank": (_only(1.2, every, 1, every), "of rank 1 is 1.2"),
    "one parameter": (_only(1.3, every, every, 4, every), "of model.layers.4.weight is 1.2"),
    "one parameter twice": (
        _only(np.sqrt(2), every, every, 5, every),
        "out of bounds: as if noise were added there twice",
    ),
    "one shard": (_only(0, 1, 1, 4), "model.layers.4.weight on rank 1 at step 1 is 0.000"),
    "shift": (lambda z, rng: z + 0.1, "the mean of its noise is 0.1"),
    "uniform": (
        lambda z, rng: rng.uniform(-np.sqrt(3), np.sqrt(3), z.shape),
        "its noise is not normal but uniform",
    ),
    "Laplace": (
        lambda z, rng: rng.laplace(0, np.sqrt(0.5), z.shape),
        "its noise is not normal but a Laplace distribution",
    ),
    "small Laplace": (
        lambda z, rng: rng.laplace(0, 0.5 * np.sqrt(0.5), z.shape),
        "its noise is not normal but a Laplace distribution, with std 0.",
    ),
    "half normal": (lambda z, rng: np.abs(z), "the absolute value of normal noise"),
    "a tenth zero": (_a_tenth_zero, "the value 0 stands"),
    "first block": (
        _only(0, every, every, every, slice(64, None)),
        "the first 64 elements of a shard alone have noise in 6 of 11 parameters",
    ),
    "remainder": (
        _only(0, every, every, 10, slice(128, None)),
        "the last elements, past the last multiple of 128, have no noise in model.layers.10.weight",
    ),
    "end": (
        _only(0, every, 1, 10, slice(100, None)),
        "the last elements have no noise in model.layers.10.weight",
    ),
    "Box-Muller": (
        _scaled(np.sqrt([0.5] * 4), STEP),
        "averaged over them or as of a Box-Muller transform without its factor 2",
    ),
    "variance": (
        _scaled(1 / np.sqrt(NOISE_SIGMA * C), STEP),
        "as if sigma C were its variance",
    ),
    "signs": (lambda z, rng: np.sign(z), "its noise takes 2 different values only"),
    "a table": (_from_a_table, "its noise takes 64 different values only"),
    "one row": (
        _repeating(5, 64),
        "its noise repeats every 64 elements, as if one row were drawn for all, in model.layers.5",
    ),
    "one number a row": (
        _in_runs,
        "one number of its noise stands for 32 elements in a row, as if drawn once for a row, in m",
    ),
    "halves": (_in_halves, "the second half of its noise repeats the first in 4 of 11"),
    "taken back": (
        lambda z, rng: z - 0.5 * np.concatenate([0 * z[:1], z[:-1]]),
        "the noise of each step holds -0.50 to -0.40 times that of the step before",
    ),
    "added up": (
        lambda z, rng: np.cumsum(z, axis=0),
        "that of the step before, so that it adds up from step to step",
    ),
    "shards": (lambda z, rng: np.repeat(z[:, :1], 2, 1), "between rank 0 and rank 1 is 1.000"),
    "parameters": (_same_in_all_parameters, "they are the same ("),
    "beginnings": (_begin_alike, "are out of bounds): their shards begin with the same numbers"),
    "steps": (lambda z, rng: np.repeat(z[:1], 4, 0), "step 0 and step 1 is 1.000"),
    "shape": (_same_for_one_shape, "model.layers.1.weight and model.layers.2.weight is 1.000"),
    "shifted": (
        _shifted_reuse,
        "model.layers.5.weight on rank 1 at step 0 and model.layers.2.weight on rank 0 at step 1",
    ),
    "neighbours": (_lagged, "between elements 7 apart"),
}


def test_ranks_that_hold_the_same_parameters_are_counted_by_the_job() -> None:
    # Copies of the noise are kept once, as if there were one rank.
    whole = run_of(noisy(_scaled(np.sqrt(2)), ranks=1))
    on_two = replace(whole, job=replace(whole.job, num_ranks=2)) if whole.job else whole
    (found,) = judge_noise(on_two, audit(on_two))
    assert "as if each of the ranks added the whole noise" in found.sentence


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name: str) -> None:
    fault, wanted = FAULTS[name]
    found = sentences(noisy(fault))
    assert any(wanted in sentence for sentence in found), found
    assert all(check.num_failed > 0 for check in audited(noisy(fault)).failed)
    assert len(found) <= 2, "one fault, not a list of its consequences"


def test_noise_in_few_elements_is_not_taken_for_few_values() -> None:
    found = sentences(noisy(lambda z, rng: z * (np.arange(z.shape[2]) == 8)[:, None]))
    assert any("is zero where its std should be sigma C" in sentence for sentence in found)
    assert not any("different values" in sentence for sentence in found)


def test_what_follows_from_a_fault_is_not_told_beside_it() -> None:
    alone = [name for name, (fault, _) in FAULTS.items() if len(sentences(noisy(fault))) == 1]
    # These two or three show in more than one way.
    assert set(FAULTS) - set(alone) <= {"uniform", "Laplace", "a tenth zero"}


NAMES = ("step 7", "and", "rank", "my head", "head", "my", "step", "0", "1", "on", "at step 3")
"""Parameters that are called what stands in the text of a place."""


def _again_on(rank: int) -> Fault:
    def fault(z: Floats, rng: np.random.Generator) -> Floats:
        z[2, rank, 1] = z[1, 0, 1]
        return z

    return fault


def _lagged_in_one(z: Floats, rng: np.random.Generator) -> Floats:
    z[:, :, 1] = _lagged(z[:, :, 1], rng)
    return z


def _shifted_at(*at: Any) -> Fault:
    def fault(z: Floats, rng: np.random.Generator) -> Floats:
        z[at] += 0.2
        return z

    return fault


@pytest.mark.parametrize(
    ("fault", "where", "step", "places"),
    [
        (_only(1.3, every, every, 0), "step 7", None, ("step 7",)),
        (_only(1.3, every, every, 3), "my head", None, ("my head",)),
        (_only(1.2, every, 1), "rank 1", None, ()),
        (_only(1.2, 1), "step 1", 1, ()),
        (_only(0, EMPTY), "the empty step 2", 2, ()),
        (_only(0, 1, 1, 0), "step 7 on rank 1 at step 1", 1, ("step 7",)),
        (FAULTS["shards"][0], "rank 0 and rank 1", None, ()),
        (FAULTS["steps"][0], "step 0 and step 1", 0, ()),
        (_same_for_one_shape, "and and rank", None, ("and", "rank")),
        (
            _shifted_reuse,
            "my on rank 1 at step 0 and rank on rank 0 at step 1",
            0,
            ("my", "rank"),
        ),
        (_again_on(0), "step 1 and step 2 in and", 1, ("and",)),
        (_again_on(1), "and on rank 0 at step 1 and and on rank 1 at step 2", 1, ("and",)),
        (_lagged, "elements 7 apart", None, ()),
        (_lagged_in_one, "elements 7 apart in and", None, ("and",)),
        (lambda z, rng: z + 0.1, "", None, ()),
        (_shifted_at(every, every, 0), "in step 7", None, ("step 7",)),
        (_shifted_at(3), "at step 3", 3, ()),
    ],
)
def test_a_place_is_read_from_no_words(
    fault: Fault, where: str, step: int | None, places: tuple[str, ...]
) -> None:
    run = run_of(replace(noisy(fault), parameter_names=np.array(NAMES)))
    (found,) = judge_noise(run, audit(run))
    assert found.culprit is not None
    assert (found.where, found.step) == (where, step)
    assert (found.culprit.step, found.culprit.places) == (step, places)


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_one_shard_of_256_elements_shows_two_thirds_and_three_halves(factor: float) -> None:
    # Their std is known to 3 and 7 percent, so that a few in a hundred may escape.
    is_seen = []
    for seed in range(40):
        record = noisy(_scaled(factor), ranks=1, seed=seed, sizes=(256,))
        first = replace(record, **_first_step(record))
        failed = {check.name for check in audited(first).failed}
        is_seen.append({"std", "std_by_parameter"} <= failed)
    assert np.mean(is_seen) > 0.9


def _first_step(t: Trajectory) -> dict[str, Any]:
    whole = ("layer_names", "parameter_names", "parameter_sizes")
    return {
        name: getattr(t, name)[:1]
        for name in t.__dataclass_fields__
        if name not in whole and isinstance(getattr(t, name), np.ndarray)
    }


def test_a_mode_without_empty_batches_is_told_so() -> None:
    record = noisy()
    full = replace(record, sample_index=np.abs(record.sample_index))
    check = next(c for c in audited(full).checks if c.name == "std_of_empty_step")
    assert (check.is_ok, check.was_tested) == (True, False)
    assert "not put to the test" in check.sentence
    comparison = compared([*healthy_runs(), run_of(full)])
    (said,) = [mode.sentence for mode in comparison.modes if mode.label == "flash_fsdp"]
    assert "its noise in noise has std 1.0" in said
    assert "noise on an empty batch was not put to the test" in said


def test_nan_noise_never_passes() -> None:
    record = noisy()
    record.noise_samples[1, 0, 0, 5] = np.nan
    assert "the std of its noise" in sentences(record)[0]
    assert "is zero" not in sentences(record)[0]


def test_a_cause_is_only_named_where_it_fits_every_step() -> None:
    (found,) = sentences(noisy(_scaled([np.sqrt(3), 1, 1, np.sqrt(3)], STEP)))
    assert "as if" not in found


# Sketches.


def sketched(
    factor: Any = 1.0, *, sizes: tuple[int, ...] = SIZES, same: bool = False, seed: int = 0
) -> Trajectory:
    """A record of the accuracy regime whose sketches are those of real vectors of noise."""
    rng = np.random.default_rng(seed)
    S, K, std = 10, 16, 100.0
    t = trajectory(steps=S, layers=len(sizes) - 1, noise_std=std)
    columns = []
    for size in sizes:
        # Signs are the parameter's own, equal in every step.
        signs = rng.choice([-1.0, 1.0], (K, size))
        noise = rng.standard_normal((S, size)) * std
        columns.append((np.repeat(noise[:1], S, 0) if same else noise) @ signs.T)
    noise = np.stack(columns, axis=1) * np.reshape(factor, (-1, 1, 1))
    gradient = rng.normal(0, 5.0, noise.shape)
    return replace(
        t,
        parameter_sizes=np.array(sizes),
        gradient_sketch=gradient,
        noised_sketch=gradient + noise,
        weight_sketch=np.zeros_like(noise),
    )


SMALL_SIZES = (4096, 512, 64, 16, 3, 1)


def test_sketches_of_sound_noise_raise_no_alarm() -> None:
    for seed in range(60):
        found = audited(sketched(seed=seed, sizes=SMALL_SIZES))
        assert found.source == "sketches"
        assert not found.failed


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (sketched(2 / 3), "the std of its noise is 0.6"),
        (sketched(3 / 2), "the std of its noise is 1."),
        (sketched([1, 1, 1, 1, 1, 1, 1, 1, 1, 3]), "of step 9 is"),
        (sketched(same=True), "they are the same"),
    ],
)
def test_a_fault_shows_in_the_sketches(record: Trajectory, wanted: str) -> None:
    run = run_of(record, "accuracy")
    found = [finding.sentence for finding in judge_noise(run, audit(run))]
    assert any(wanted in sentence for sentence in found), found


def test_projections_of_few_elements_count_as_one() -> None:
    worth = independent_squares(np.array([1.0, 4.0, 256.0, 1e9]), 16)
    assert worth[:2].tolist() == [1.0, pytest.approx(16 / 9)]
    assert worth[2] == pytest.approx(16 / 1.25**2)
    assert worth[3] == pytest.approx(16, rel=1e-3)


def test_noise_that_drowns_in_rounding_is_not_audited_from_sketches() -> None:
    record = replace(sketched(), noise_std=1e-6)
    names = {check.name for check in audited(record).checks}
    assert names == {"sensitivity"}


def test_a_record_without_sizes_says_nothing_of_its_noise() -> None:
    assert {check.name for check in audited(trajectory()).checks} == {"sensitivity"}


# What a sample contributes.


def test_a_contribution_above_c_is_named() -> None:
    record = noisy()
    factors = record.clip_factor.copy()
    factors[1, 4] *= 1.002
    clipped = replace(record, clip_factor=factors)
    check = sensitivity(run_of(clipped))
    assert check is not None
    assert not check.is_ok
    assert check.value == pytest.approx(1.002)
    assert check.place.text == f"sample {record.sample_index[1, 4]} at step 1"
    assert "own norms" in check.sentence
    run = run_of(replace(clipped, parameter_names=np.array(NAMES)))
    (found,) = judge_noise(run, audit(run))
    assert found.sentence.startswith("clipped sum (regime noise): the largest contribution")
    assert found.culprit is not None
    assert (found.culprit.step, found.culprit.places) == (1, ())


def test_the_reference_sees_norms_that_are_too_small() -> None:
    record = noisy()
    # The mode's own norms are half of what they should be, and its factors twice.
    mine = replace(
        record,
        sample_norm=record.sample_norm / 2,
        clip_factor=np.minimum(1, 2 * C[:, None] / record.sample_norm),
    )
    reference = mode_run("reference", "clip", record)
    assert sensitivity(run_of(mine)).is_ok  # type: ignore[union-attr]
    check = sensitivity(run_of(mine), reference)
    assert check is not None
    assert check.value == pytest.approx(2)
    assert "reference's norms" in check.sentence


def test_the_norms_of_a_reference_with_other_weights_say_nothing() -> None:
    record = noisy()
    larger = replace(
        record,
        sample_norm=record.sample_norm * 1.1,
        weight_sketch=record.weight_sketch * 1.01,
    )
    # Both start from the same weights, and have others from the second step on.
    larger.sample_norm[0] = record.sample_norm[0]
    check = sensitivity(run_of(record), mode_run("reference", "accuracy", larger))
    assert check is not None
    assert check.is_ok
    same = replace(larger, weight_sketch=record.weight_sketch)
    check = sensitivity(run_of(record), mode_run("reference", "accuracy", same))
    assert check is not None
    assert check.value == pytest.approx(1.1)


def test_rounding_that_the_plain_reference_shows_is_allowed_for() -> None:
    record = noisy()
    reference = mode_run("reference", "clip", record)
    rounded = replace(record, sample_norm=record.sample_norm * 1.004)
    plain = mode_run("reference", "clip", rounded, replay=PLAIN)
    mine = replace(record, clip_factor=record.clip_factor * 1.005)
    assert not sensitivity(run_of(mine), reference).is_ok  # type: ignore[union-attr]
    assert sensitivity(run_of(mine), reference, plain).is_ok  # type: ignore[union-attr]


def test_samples_that_the_reference_lacks_are_held_to_their_own_norms() -> None:
    record = noisy()
    other = replace(record, sample_index=record.sample_index + 1000)
    check = sensitivity(run_of(record), mode_run("reference", "clip", other))
    assert check is not None
    assert "own norms" in check.sentence


def test_places_without_a_sample_contribute_nothing() -> None:
    record = noisy()
    factors = record.clip_factor.copy()
    factors[record.sample_index == UNUSED] = 1e9
    check = sensitivity(run_of(replace(record, clip_factor=factors)))
    assert check is not None
    assert check.is_ok


# In a group.


def _noisy_group(*runs: ModeRun) -> list[ModeRun]:
    return [*healthy_runs(), *runs]


def test_the_noise_regime_needs_no_baseline_and_its_twin_is_no_mode() -> None:
    twin = run_of(replace(noisy(), noise_std=0.0), replay=SILENT)
    comparison = compared(_noisy_group(twin, run_of(noisy())))
    assert comparison.verdict is Verdict.PASS
    assert "flash_fsdp (silent)" not in verdicts(comparison)
    regime = next(r for r in comparison.regimes if r.name == NOISE)
    assert (regime.pairs, dict(regime.floors), dict(regime.replays)) == ((), {}, {})
    assert list(regime.audits) == ["flash_fsdp"]


def test_a_twin_that_did_not_finish_is_inconclusive() -> None:
    twin = run_of(None, replay=SILENT, status="FAILED", failure=failed("out of memory"))
    comparison = compared(_noisy_group(twin, run_of(noisy())))
    assert verdicts(comparison)["flash_fsdp (silent)"] == "INCONCLUSIVE"


def test_wrong_noise_is_a_bug_of_its_mode_alone() -> None:
    comparison = compared(_noisy_group(run_of(noisy(_scaled(2 / 3)))))
    assert verdicts(comparison)["flash_fsdp"] == "BUG"
    assert verdicts(comparison)["flash_fsdp_fuse"] == "PASS"
    guilty = next(mode for mode in comparison.modes if mode.label == "flash_fsdp")
    assert "adds wrong noise: the std of its noise" in guilty.sentence


@pytest.mark.parametrize("has_norms", [True, False])
def test_a_run_of_the_noise_regime_without_its_noise_is_inconclusive(has_norms: bool) -> None:
    record = replace(noisy(), noise_samples=np.empty((4, 0, len(SIZES), 0), dtype=np.float32))
    if not has_norms:
        record = replace(record, clip_factor=np.full(record.clip_factor.shape, np.nan))
    comparison = compared(_noisy_group(run_of(record)))
    guilty = next(mode for mode in comparison.modes if mode.label == "flash_fsdp")
    assert guilty.verdict is Verdict.INCONCLUSIVE
    assert any("left no elements of its noise" in f.sentence for f in guilty.findings)


def test_replicas_with_unequal_noise_are_a_bug() -> None:
    failure = failed("ranks 0 and 1 hold the same elements", FailureKind.UNEQUAL_NOISE)
    unequal = run_of(None, status="FAILED", failure=failure)
    assert verdicts(compared(_noisy_group(unequal)))["flash_fsdp"] == "BUG"
    # The kind alone is read, and never the words.
    worded = run_of(None, status="FAILED", failure=failed("copies of the noise differ"))
    assert verdicts(compared(_noisy_group(worded)))["flash_fsdp"] == "INCONCLUSIVE"


def test_the_accuracy_regime_is_audited_from_its_sketches() -> None:
    run = run_of(sketched(), "accuracy")
    comparison = compare_group(group_of([run]), Thresholds())
    assert comparison.regimes[0].audits["flash_fsdp"].source == "sketches"


# The mathematics.


def test_intervals_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    alpha, trials = 0.01, 20_000
    a, b = rng.standard_normal((2, trials, 20))
    _, low, high = std_interval(np.square(a).sum(axis=1), 20, alpha)
    # 200 are expected, with a standard deviation of 14.
    assert 140 < ((low > 1) | (high < 1)).sum() < 260
    r = (a * b).sum(axis=1) / np.sqrt(np.square(a).sum(axis=1) * np.square(b).sum(axis=1))
    assert 140 < (np.abs(r) > correlation_bound(20, alpha)).sum() < 260


def test_the_noise_of_two_groups_is_audited_too() -> None:
    twin = run_of(replace(noisy(), noise_std=0.0), replay=SILENT)
    june, july = (group_of([twin, run_of(noisy())], name) for name in ("june", "july"))
    comparison = compare_groups(june, july, Thresholds())
    assert [(mode.label, mode.verdict) for mode in comparison.modes] == [("flash_fsdp", "PASS")]
    assert comparison.regimes[0].audits["flash_fsdp"].source == "samples"


# What rounding does is no fault.


def _bf16(values: Floats) -> Floats:
    mantissas, exponents = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissas, 8)), exponents - 8)


def _of_weights(learning_rate: float) -> Fault:
    """Noise as a mode tells it that has nothing but its weights, in bfloat16, before and after."""

    def fault(z: Floats, rng: np.random.Generator) -> Floats:
        scale = learning_rate * NOISE_SIGMA * C[:, None, None, None]
        weights = _bf16(rng.normal(0, 0.05, z.shape))
        return (weights - _bf16(weights - scale * z)) / scale

    return fault


@pytest.mark.parametrize("learning_rate", [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0])
def test_differences_of_bfloat16_weights_are_no_bug_and_those_too_coarse_not_tested(
    learning_rate: float,
) -> None:
    for seed in range(8):
        run = run_of(noisy(_of_weights(learning_rate), seed=seed))
        found = list(judge_noise(run, audit(run)))
        assert not [finding for finding in found if finding.verdict is Verdict.BUG]
        if learning_rate <= 1e-3:
            (untested,) = found
            assert untested.verdict is Verdict.INCONCLUSIVE
            assert "rounded to" in untested.sentence
            assert "not tested" in untested.sentence


def test_no_noise_is_not_mistaken_for_noise_that_is_rounded_away() -> None:
    assert "it adds no noise" in sentences(noisy(_scaled(0)))[0]
    assert any("is 0.5" in said for said in sentences(noisy(_scaled(0.5))))


@pytest.mark.parametrize("spacing", [1.0, 0.25, 2.0])
def test_noise_that_is_itself_of_few_values_is_a_bug(spacing: float) -> None:
    faults: tuple[Fault, ...] = (
        lambda z, rng: np.sign(z) * spacing,
        lambda z, rng: np.rint(z / spacing) * spacing,
    )
    for fault in faults:
        run = run_of(noisy(fault))
        assert {f.verdict for f in judge_noise(run, audit(run))} == {Verdict.BUG}


def test_a_shard_of_one_element_may_be_rounded_to_zero() -> None:
    record = noisy(_only(0, 1, 0, 9))
    assert SIZES[9] == 1
    assert record.noise_samples[1, 0, 9, 0] == 0
    assert sentences(record) == []


def test_noise_in_bfloat16_beside_a_sum_is_sound() -> None:
    def fault(z: Floats, rng: np.random.Generator) -> Floats:
        unit = NOISE_SIGMA * C[:, None, None, None]
        total = _bf16(rng.normal(0, 2, z.shape))
        return (_bf16(total + unit * z) - total) / unit

    for seed in range(8):
        assert sentences(noisy(fault, seed=seed)) == []


def test_float32_has_no_slack_of_bfloat16() -> None:
    """Noise cut a little above 3, by more than float32 moves an element and less than bfloat16."""

    def cut(z: Floats, rng: np.random.Generator) -> Floats:
        return np.where(np.abs(z) > 2.995, 2.995 * np.sign(z), z)

    failed = {check.name for check in audited(noisy(cut, sizes=(256 * 64,) * 60)).failed}
    assert "tails" in failed
