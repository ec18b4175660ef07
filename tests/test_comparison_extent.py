"""Runs are compared only as far as they do the same by design, and what is left out is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpsgd_track.comparison import GroupComparison, compare_groups
from dpsgd_track.comparison.audit.noise.own import own_noise
from dpsgd_track.config import RegimeConfig, Thresholds
from dpsgd_track.demands import Demand
from dpsgd_track.record.facts import DeviceFacts, RunFacts
from dpsgd_track.record.run import ModeRun
from dpsgd_track.record.stages import ObservableName, Stage
from dpsgd_track.record.trajectory import Trajectory
from tests.support.noisy_records import noisy
from tests.support.noisy_records import run_of as noise_run
from tests.support.synthetic_group import (
    ENVIRONMENT,
    compared,
    group_of,
    job,
    mode_run,
    put,
    scaled,
    setup,
    trajectory,
    verdicts,
    without_norms,
)

USERS, SHIPPED = "my_mode:MyMode", "flash_fsdp"
SIZE, STD = 4096, 100.0
Floats = np.ndarray[Any, np.dtype[np.float64]]


def record() -> Trajectory:
    """A record with the common noise, of parameters whose sizes are known."""
    t = trajectory(noise_std=STD)
    noise = np.random.default_rng(1).normal(0, STD * SIZE**0.5, t.gradient_sketch.shape)
    return with_noise(replace(t, parameter_sizes=np.full(len(t.parameter_names), SIZE)), noise)


def noise_of(t: Trajectory) -> Floats:
    return np.asarray(t.noised_sketch - t.gradient_sketch)


def with_noise(t: Trajectory, noise: Floats) -> Trajectory:
    noised = t.gradient_sketch + noise
    start = trajectory(noise_std=STD).weight_sketch[:1]
    weights = start - 1e-5 * np.cumsum(noised, axis=0)
    return replace(t, noised_sketch=noised, weight_sketch=weights)


def own(t: Trajectory, factor: float = 1.0, seed: int = 7) -> Trajectory:
    """`t` with noise of its own in place of the common, from which the weights follow."""
    noise = np.random.default_rng(seed).normal(0, STD * SIZE**0.5, t.noised_sketch.shape)
    drawn = with_noise(t, factor * noise)
    # From the second step on, the weights are others, and so is everything else.
    for name in ("loss", "grad_norm", "sample_norm", "gradient_sketch", "sample_norm_by_parameter"):
        drawn = scaled(drawn, name, 1.1, slice(1, None))
    return replace(drawn, noised_sketch=drawn.gradient_sketch + factor * noise)


MOVING = setup("accuracy", learning_rate=0.1)


def group(mode: Trajectory, label: str = USERS, setup: RegimeConfig = MOVING) -> GroupComparison:
    return compared(
        [
            mode_run("no_dp", record=without_norms(record())),
            mode_run("reference", record=record()),
            mode_run(label, record=mode, setup=setup),
        ]
    )


def sentence(comparison: GroupComparison, label: str = USERS) -> str:
    return next(mode.sentence for mode in comparison.modes if mode.label == label)


def test_right_noise_of_its_own_passes_and_is_told() -> None:
    comparison = group(own(record()))
    assert verdicts(comparison)[USERS] == "PASS"
    said = sentence(comparison)
    assert "compared only in what comes before the noise up to step 0" in said
    assert "it draws noise of its own, with std" in said
    assert "run the noise regime as well" in said
    pair = comparison.regimes[0].pair(USERS, "no_dp")
    assert pair is not None
    assert ObservableName.NOISE not in pair.drifts
    assert "noise of its own" in pair.not_computed[ObservableName.NOISE]
    assert pair.drifts[ObservableName.GRADIENT].steps.tolist() == [0]


def test_a_mode_that_declines_the_common_noise_is_left_to_its_audit() -> None:
    declined = RunFacts(
        environment=ENVIRONMENT,
        device=DeviceFacts(torch_num_threads=1, allow_tf32=False, cudnn_allow_tf32=True),
        declined=(Demand.GIVEN_NOISE,),
    )
    for factor, verdict, said in (
        # So small that by itself it would not pass for noise of its own.
        (0.3, "BUG", "where 1 is meant"),
        (0.0, "BUG", "its noise is zero where its std should be sigma C"),
        (1.0, "PASS", "compared only in what comes before the noise up to step 0"),
    ):
        run = mode_run(USERS, record=own(record(), factor), setup=MOVING, facts=declined)
        comparison = compared([mode_run("reference", record=record()), run])
        assert (verdicts(comparison)[USERS], said in sentence(comparison)) == (verdict, True)
        pair = comparison.regimes[0].pair(USERS)
        assert pair is not None
        assert ObservableName.NOISE not in pair.drifts


def test_noise_of_its_own_is_left_to_its_audit_where_there_is_one() -> None:
    runs = [
        mode_run("no_dp", record=without_norms(record())),
        mode_run(USERS, record=own(record()), setup=MOVING),
        replace(noise_run(noisy()), mode=USERS),
    ]
    assert "which its audit judges" in sentence(compared(runs))


STEPS, PARAMETERS = np.arange(4)[:, None, None], np.arange(4)[None, :, None]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda ours, own: 0.5 * own,
        lambda ours, own: 2.0 * own,
        lambda ours, own: 0.9 * ours,
        lambda ours, own: -ours,
        lambda ours, own: 0 * ours,
        lambda ours, own: 0.8 * ours + 0.6 * own,
        lambda ours, own: np.where(STEPS == 2, ours, own),
        lambda ours, own: np.where(PARAMETERS == 2, ours, own),
        lambda ours, own: np.where(PARAMETERS == 2, 0, own),
    ],
    ids=[
        "half the size",
        "twice the size",
        "common, but smaller",
        "negative",
        "none",
        "mixed",
        "common in one step",
        "common in one parameter",
        "none in one parameter",
    ],
)
def test_wrong_noise_is_not_taken_for_noise_of_its_own(
    wrong: Callable[[Floats, Floats], Floats],
) -> None:
    mode = with_noise(record(), wrong(noise_of(record()), noise_of(own(record()))))
    assert own_noise(record(), mode) is None
    assert verdicts(group(mode))[USERS] == "BUG"


def test_a_hundred_draws_of_right_noise_are_all_recognised() -> None:
    found = [own_noise(record(), own(record(), seed=seed)) for seed in range(10, 110)]
    assert all(found)
    assert all(each.std[1] < 1 < each.std[2] and abs(each.correlation) < 0.5 for each in found)


def test_a_record_that_cannot_tell_is_compared_as_ever() -> None:
    unsized = replace(own(record()), parameter_sizes=np.zeros(4, dtype=np.int64))
    assert own_noise(record(), unsized) is None
    tiny = replace(record(), noise_std=1e-9)
    assert own_noise(tiny, with_noise(tiny, 1e-11 * noise_of(own(record())))) is None


def test_a_built_in_mode_has_to_draw_the_common_noise() -> None:
    assert verdicts(group(own(record()), SHIPPED))[SHIPPED] == "BUG"


@pytest.mark.parametrize(
    ("field", "stage"),
    [("sample_loss", Stage.LOSS), ("sample_norm", Stage.NORMS), ("grad_norm", Stage.SUM)],
)
def test_what_comes_before_noise_of_its_own_is_judged(field: str, stage: Stage) -> None:
    comparison = group(scaled(own(record()), field, 1.05, 0))
    (found,) = [mode for mode in comparison.modes if mode.label == USERS]
    assert found.verdict == "BUG"
    assert found.culprit is not None
    assert found.culprit.stage is stage


def test_weights_that_stand_still_are_compared_in_every_step() -> None:
    still = with_noise(record(), noise_of(own(record())))
    resting = setup("accuracy", learning_rate=0.0)
    assert verdicts(group(still, setup=resting))[USERS] == "PASS"
    late = scaled(still, "grad_norm", 1.05, 3)
    assert verdicts(group(late, setup=resting))[USERS] == "BUG"
    assert verdicts(group(late))[USERS] == "PASS"


# A bound that clips in the accuracy regime.


def large(step: int) -> Trajectory:
    """A record whose gradients are longer than C from `step` on."""
    t = record()
    for name in (
        "sample_norm",
        "sample_norm_by_parameter",
        "grad_norm",
        "layer_grad_norm",
        "gradient_sketch",
    ):
        t = scaled(t, name, 1e5, slice(step, None))
    return t


def clipping(step: int) -> Trajectory:
    """What a mode that clips records of such gradients."""
    t = large(step)
    factor = np.minimum(1, t.max_grad_norm[:, None] / t.sample_norm)
    shrunk = (factor * t.sample_norm).sum(axis=1) / t.sample_norm.sum(axis=1)
    clipped = replace(
        t,
        clip_factor=factor,
        clip_fraction=(factor < 1).mean(axis=1),
        grad_norm=t.grad_norm * shrunk,
        layer_grad_norm=t.layer_grad_norm * shrunk[:, None],
        gradient_sketch=t.gradient_sketch * shrunk[:, None, None],
    )
    return with_noise(clipped, noise_of(record()))


def ordinary(step: int) -> Trajectory:
    """What no_dp records of them."""
    return without_norms(with_noise(large(step), noise_of(record())))


def beside(no_dp: Trajectory, *modes: ModeRun) -> GroupComparison:
    return compared([mode_run("no_dp", record=no_dp), *modes])


@pytest.mark.parametrize("step", [0, 2])
def test_a_bound_that_clips_makes_the_reference_the_baseline_and_nobody_a_bug(step: int) -> None:
    modes = [mode_run(label, record=clipping(step)) for label in ("reference", SHIPPED, USERS)]
    comparison = beside(ordinary(step), *modes)
    assert comparison.regimes[0].baseline == "reference"
    assert set(verdicts(comparison).values()) == {"PASS"}
    assert f"C = 10000 clips samples from step {step} on and no_dp clips none" in sentence(
        comparison, "no_dp"
    )
    wrong = mode_run(SHIPPED, record=scaled(clipping(step), "grad_norm", 0.9))
    assert verdicts(beside(ordinary(step), modes[0], wrong))[SHIPPED] == "BUG"


def test_noise_lost_beside_a_gradient_that_is_not_clipped_raises_no_alarm() -> None:
    rounded = replace(ordinary(0), noised_sketch=ordinary(0).noised_sketch * (1 + 1e-6))
    comparison = beside(rounded, mode_run("reference", record=clipping(0)))
    assert verdicts(comparison)["no_dp"] == "PASS"


def test_no_dp_is_judged_up_to_the_first_step_that_clips() -> None:
    reference = mode_run("reference", record=clipping(2))
    before = scaled(ordinary(2), "grad_norm", 1.05, 1)
    assert verdicts(beside(before, reference))["no_dp"] == "BUG"
    after = scaled(ordinary(2), "grad_norm", 1.05, 2)
    assert verdicts(beside(after, reference))["no_dp"] == "PASS"
    at_once = put(ordinary(0), "sample_loss", 1.0, 0)
    assert verdicts(beside(at_once, mode_run("reference", record=clipping(0))))["no_dp"] == "BUG"


def test_without_the_reference_a_bound_that_clips_is_inconclusive_with_advice() -> None:
    modes = [mode_run(label, record=clipping(0)) for label in (SHIPPED, USERS)]
    comparison = beside(ordinary(0), *modes)
    assert verdicts(comparison) == {"no_dp": "PASS", SHIPPED: "INCONCLUSIVE", USERS: "INCONCLUSIVE"}
    assert "Run reference beside it" in sentence(comparison, SHIPPED)


def test_without_norms_the_gradient_of_no_dp_proves_that_the_bound_clips() -> None:
    told_nothing = mode_run(USERS, record=without_norms(clipping(0)))
    assert verdicts(beside(ordinary(0), told_nothing))[USERS] == "INCONCLUSIVE"


def test_a_mode_that_clips_where_nothing_is_to_be_clipped_is_a_bug() -> None:
    comparison = group(clipping(0), SHIPPED)
    assert comparison.regimes[0].baseline == "no_dp"
    assert verdicts(comparison)[SHIPPED] == "BUG"


# Two groups.


def held(before: ModeRun, after: ModeRun) -> GroupComparison:
    return compare_groups(group_of([before], "june"), group_of([after], "july"), Thresholds(), ())


def test_noise_of_two_groups_is_judged_by_each_ones_audit() -> None:
    fine, other, wrong = (
        noise_run(noisy(seed=0)),
        noise_run(noisy(seed=1)),
        noise_run(noisy(lambda z, rng: 0.8 * z)),
    )
    comparison = held(fine, other)
    assert comparison.verdict == "PASS"
    said = sentence(comparison, SHIPPED)
    assert "compared only in their audits" in said
    assert "that of group june passes as well" in said
    assert held(fine, wrong).verdict == "BUG"
    assert held(wrong, fine).verdict == "INCONCLUSIVE"
    assert (
        "in group june" in held(wrong, fine).sentence or "group june" in held(wrong, fine).sentence
    )


def trained(mode: Trajectory, label: str, source: str) -> ModeRun:
    regime = setup("train", noise_matched=False, learning_rate=0.1)
    return mode_run(label, "train", mode, setup=regime, job=job(label, regime, noise_from=source))


def test_training_with_equal_seeds_is_compared_throughout() -> None:
    june = trained(record(), SHIPPED, "seed")
    assert held(june, june).verdict == "PASS"
    late = scaled(record(), "grad_norm", 1.05, 3)
    assert held(june, trained(late, SHIPPED, "seed")).verdict == "BUG"


def test_training_with_noise_of_the_operating_system_is_compared_up_to_the_noise() -> None:
    june, july = trained(record(), SHIPPED, "os"), trained(own(record()), SHIPPED, "os")
    assert held(june, july).verdict == "PASS"
    assert "noise of its own" in held(june, july).modes[0].sentence
    wrong = trained(scaled(own(record()), "grad_norm", 1.05, 0), SHIPPED, "os")
    assert held(june, wrong).verdict == "BUG"
