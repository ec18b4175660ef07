"""What must pass, and what never may."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpsgd_track.comparison import compare_group
from dpsgd_track.comparison.diagnose.ladder import StageStatus
from dpsgd_track.comparison.measure.drift import compare_pair
from dpsgd_track.comparison.measure.floor import floor_of, limits_of
from dpsgd_track.comparison.measure.observables import OBSERVABLES
from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.comparison.verdict import judge_coverage
from dpsgd_track.config import Thresholds, layer_norm_steps
from dpsgd_track.record.failure import FailureKind
from dpsgd_track.record.stages import ObservableName
from dpsgd_track.record.trajectory import SAMPLE_COLUMNS, UNUSED, Trajectory
from dpsgd_track.report.table import rows
from tests.support.synthetic_group import (
    FACTS,
    compared,
    failed,
    first_steps,
    group_of,
    healthy_runs,
    mode_run,
    permuted,
    put,
    scaled,
    trajectory,
    verdicts,
    with_run,
    without_norms,
)

MODE = "flash_fsdp"


def record(regime: str) -> Trajectory:
    return trajectory(noise_std=0.0 if regime == "clip" else 100.0)


def with_record(regime: str, changed: Trajectory, **more: Any) -> GroupComparison:
    """The healthy group, in which MODE recorded `changed`."""
    return compared(with_run(healthy_runs(), mode_run(MODE, regime, changed, **more)))


def sentence(comparison: GroupComparison, mode: str = MODE) -> str:
    return next(m.sentence for m in comparison.modes if m.label == mode)


def test_equal_runs_pass() -> None:
    comparison = compared(healthy_runs())
    assert comparison.verdict == "PASS"
    assert set(verdicts(comparison).values()) == {"PASS"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("field", "at"),
    [
        ("loss", 2),
        ("grad_norm", 0),
        ("grad_norm_noised", 3),
        ("sample_loss", (1, 4)),
        ("sample_norm", (1, 4)),
        ("clip_factor", (1, 4)),
        ("sample_norm_by_parameter", (1, 4, 2)),
        ("layer_grad_norm", (3, 1)),
        ("layer_weight_norm", (0, 0)),
        ("gradient_sketch", (2, 1, 0)),
        ("noised_sketch", (2, 1, 7)),
        ("weight_sketch", (3, 0, 0)),
    ],
)
def test_one_value_that_is_not_finite_is_a_bug(field: str, at: Any, value: float) -> None:
    comparison = with_record("clip", put(record("clip"), field, value, at))
    assert verdicts(comparison)[MODE] == "BUG"
    step = at if isinstance(at, int) else at[0]
    assert f"at step {step}" in sentence(comparison)


def test_nan_in_the_baseline_convicts_the_baseline_alone() -> None:
    nan = put(record("clip"), "loss", np.nan, 1)
    comparison = compared(with_run(healthy_runs(), mode_run("reference", "clip", nan)))
    assert verdicts(comparison)["reference"] == "BUG"
    assert verdicts(comparison)[MODE] == "INCONCLUSIVE"


# Each observable alone, so that none is computed and then not judged.
DRIFTING = [
    ("loss", 2),
    ("sample_loss", (1, 4)),
    ("grad_norm", 1),
    ("grad_norm_noised", 1),
    ("sample_norm", (1, 4)),
    ("clip_factor", (0, slice(None))),
    ("sample_norm_by_parameter", (1, 4, 2)),
    ("layer_grad_norm", (3, 1)),
    ("layer_weight_norm", (2, 0)),
    ("gradient_sketch", (2, 1)),
    ("noised_sketch", (2, 1)),
    ("weight_sketch", (3, 0)),
]
ALWAYS_A_BUG = {
    "weight_sketch",  # 0.4 % of the weights is far more than the step they moved by
    # These contradict the run's own other numbers.
    "sample_norm",
    "sample_norm_by_parameter",
    "clip_factor",
}


def test_every_compared_field_is_made_to_drift_below() -> None:
    assert {field for field, _ in DRIFTING} == {each.field for each in OBSERVABLES.values()}


@pytest.mark.parametrize(("field", "at"), DRIFTING)
@pytest.mark.parametrize(
    ("factor", "verdict"), [(1 + 1e-8, "PASS"), (1.004, "DRIFT"), (1.1, "BUG")]
)
def test_every_observable_is_judged(field: str, at: Any, factor: float, verdict: str) -> None:
    comparison = with_record("clip", scaled(record("clip"), field, factor, at))
    if factor == 1.004 and field in ALWAYS_A_BUG:
        verdict = "BUG"
    assert verdicts(comparison)[MODE] == verdict
    if verdict != "PASS":
        assert f"step {at if isinstance(at, int) else at[0]}" in sentence(comparison)


def test_a_right_norm_in_the_wrong_place_is_a_bug() -> None:
    turned = record("clip")
    turned = replace(turned, gradient_sketch=turned.gradient_sketch[:, :, ::-1].copy())
    assert verdicts(with_record("clip", turned))[MODE] == "BUG"


def test_an_error_in_the_clipped_sum_is_not_hidden_by_noise() -> None:
    wrong = scaled(record("accuracy"), "gradient_sketch", 1.05, (1, 2))
    assert verdicts(with_record("accuracy", wrong))[MODE] == "BUG"


def test_noise_of_another_size_is_a_bug_and_named_noise() -> None:
    noisy = record("accuracy")
    noise = noisy.noised_sketch - noisy.gradient_sketch
    noisy = replace(noisy, noised_sketch=noisy.gradient_sketch + 1.5 * noise)
    comparison = with_record("accuracy", noisy)
    assert verdicts(comparison)[MODE] == "BUG"
    said = (
        "adds wrong noise: it is 1.5 times the right one in every step. First at step 0 of accuracy"
    )
    assert f"{MODE} {said}" in sentence(comparison)


def test_wrong_sum_with_the_right_noise_is_not_blamed_on_the_noise() -> None:
    right = record("accuracy")
    wrong = scaled(right, "gradient_sketch", 1.05, (1, 2))
    wrong = replace(
        wrong, noised_sketch=wrong.gradient_sketch + right.noised_sketch - right.gradient_sketch
    )
    comparison = with_record("accuracy", wrong)
    pair = comparison.regimes[0].pair(MODE)
    assert pair is not None
    assert pair.drifts["noise"].max < 1e-12
    said = "computes a wrong clipped sum: it is 1.05 times the right one. First at step 1 of"
    assert f"{MODE} {said}" in sentence(comparison)


def test_rounding_noise_in_a_gradient_that_is_zero_by_mathematics_passes() -> None:
    ours = put(record("clip"), "gradient_sketch", 1e-7, (..., 1, slice(None)))
    theirs = put(record("clip"), "gradient_sketch", -2e-7, (..., 1, slice(None)))
    runs = with_run(healthy_runs(), mode_run("reference", "clip", ours))
    runs = with_run(runs, mode_run("flash_fsdp_fuse", "clip", ours))
    assert compared(with_run(runs, mode_run(MODE, "clip", theirs))).verdict == "PASS"


def test_a_layer_a_thousand_times_smaller_than_the_total_is_still_judged() -> None:
    small = scaled(record("clip"), "layer_grad_norm", 1e-3, (..., 1))
    runs = with_run(healthy_runs(), mode_run("reference", "clip", small))
    wrong = scaled(small, "layer_grad_norm", 2, (2, 1))
    assert verdicts(compared(with_run(runs, mode_run(MODE, "clip", wrong))))[MODE] == "BUG"


def test_a_gradient_where_the_baseline_has_none_at_all_is_a_bug() -> None:
    zero = put(record("clip"), "gradient_sketch", 0.0)
    comparison = compared(with_run(healthy_runs(), mode_run("reference", "clip", zero)))
    assert verdicts(comparison)[MODE] == "BUG"


def test_missing_step_never_passes() -> None:
    comparison = with_record("accuracy", first_steps(record("accuracy"), 3))
    assert verdicts(comparison)[MODE] == "INCONCLUSIVE"
    assert "1 step missing from the mode: 3" in sentence(comparison)


def test_step_that_only_the_mode_has_never_passes() -> None:
    short = [
        mode_run(r.mode, r.regime, first_steps(r.trajectory, 3), replay=r.replay)
        for r in healthy_runs()
        if r.trajectory
    ]
    comparison = compared(with_run(short, mode_run(MODE, "clip")))
    assert verdicts(comparison)[MODE] == "INCONCLUSIVE"


def test_missing_sample_never_passes() -> None:
    moved = put(record("clip"), "sample_index", 999, (1, 2))
    comparison = with_record("clip", moved)
    assert verdicts(comparison)[MODE] == "INCONCLUSIVE"
    assert "(step 1)" in sentence(comparison)


@pytest.mark.parametrize("field", ["layer_names", "parameter_names"])
def test_missing_name_never_passes(field: str) -> None:
    named = record("clip")
    changed: dict[str, Any] = {field: np.array(["other", *getattr(named, field)[1:]])}
    assert verdicts(with_record("clip", replace(named, **changed)))[MODE] == "INCONCLUSIVE"


@pytest.mark.parametrize("status", ["FAILED", "KILLED", "RUNNING", "SCHEDULED", "MISSING"])
def test_run_that_did_not_finish_never_passes(status: str) -> None:
    whole = with_record("clip", record("clip"), status=status, failure=failed("out of memory"))
    assert verdicts(whole)[MODE] == "INCONCLUSIVE"
    assert whole.verdict == "INCONCLUSIVE"
    assert f"{status}: the worker raised an exception: out of memory" in sentence(whole)
    gone = mode_run(MODE, "clip", status=status, trajectory_missing="gone")
    assert verdicts(compared(with_run(healthy_runs(), gone)))[MODE] == "INCONCLUSIVE"


def test_run_that_failed_because_of_what_it_computed_is_a_bug() -> None:
    nan = failed("loss is nan at step 3", FailureKind.NOT_FINITE)
    dead = mode_run(MODE, "clip", status="FAILED", failure=nan)
    assert verdicts(compared(with_run(healthy_runs(), dead)))[MODE] == "BUG"


def test_failed_replay_never_passes() -> None:
    dead = mode_run("no_dp", replay="permuted", status="FAILED", failure=failed("killed"))
    comparison = compared(with_run(healthy_runs(), dead))
    assert comparison.verdict == "INCONCLUSIVE"
    assert comparison.regimes[0].floor() is None


@pytest.mark.parametrize(
    "change", [{"status": "KILLED"}, {"setup": None}], ids=["killed", "noise of its own"]
)
def test_unsound_replay_measures_no_floor(change: dict[str, Any]) -> None:
    far = scaled(without_norms(record("accuracy")), "grad_norm", 1.5)
    replay = mode_run("no_dp", replay="permuted", record=far, **change)
    wrong = mode_run(MODE, record=scaled(record("accuracy"), "grad_norm", 1.5))
    comparison = compared(with_run(with_run(healthy_runs(), replay), wrong))
    assert comparison.regimes[0].floor() is None
    assert verdicts(comparison)[MODE] == "BUG"
    assert verdicts(comparison)["no_dp (permuted)"] == "INCONCLUSIVE"


def test_replay_that_is_too_short_never_passes() -> None:
    short = first_steps(permuted(without_norms(record("accuracy"))), 3)
    replay = mode_run("no_dp", replay="permuted", record=short)
    found = verdicts(compared(with_run(healthy_runs(), replay)))
    assert found["no_dp (permuted)"] == "INCONCLUSIVE"


def test_runs_without_a_common_step_never_pass() -> None:
    late = record("clip")
    late = replace(late, step=late.step + 100)
    assert verdicts(with_record("clip", late))[MODE] == "INCONCLUSIVE"


def test_missing_baseline_never_passes() -> None:
    runs = [run for run in healthy_runs() if run.mode not in ("no_dp", "reference")]
    comparison = compared(runs)
    assert set(verdicts(comparison).values()) == {"INCONCLUSIVE"}
    assert "no baseline" in comparison.sentence
    assert comparison.regimes[0].largest["loss"].drift.max == 0


def test_one_mode_alone_never_passes() -> None:
    comparison = compared([mode_run("no_dp")])
    assert comparison.verdict == "INCONCLUSIVE"
    assert "nothing to compare with" in comparison.sentence


def test_empty_group_never_passes() -> None:
    assert compared([]).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"initial_weights_hash": "other"}, "initial weights"),
        ({"data_hash": np.array(["data-0", "other", "data-2", "data-3"])}, "data at step 1"),
        ({"noise_std": 1.0}, "noise of 1"),
        ({"max_grad_norm": np.full(4, 2e4)}, "clipping bounds"),
        ({"expected_batch_size": 7}, "expected batch size of 7"),
    ],
)
def test_unlike_runs_are_inconclusive_even_if_their_numbers_differ(
    change: dict[str, Any], named: str
) -> None:
    wrong = scaled(record("accuracy"), "loss", 2.0)
    comparison = with_record("accuracy", replace(wrong, **change))
    assert verdicts(comparison)[MODE] == "INCONCLUSIVE"
    assert named in sentence(comparison)


def test_runs_with_noise_of_their_own_are_inconclusive() -> None:
    comparison = with_record("accuracy", scaled(record("accuracy"), "loss", 2.0), setup=None)
    assert verdicts(comparison)[MODE] == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("clipped", "verdict"),
    [
        (0.0, "INCONCLUSIVE"),
        (0.1, "INCONCLUSIVE"),
        (0.2, "PASS"),
        (0.8, "PASS"),
        (0.9, "INCONCLUSIVE"),
        (1.0, "INCONCLUSIVE"),
    ],
)
def test_clip_regime_must_clip_some_samples_and_spare_some(clipped: float, verdict: str) -> None:
    covered = put(record("clip"), "clip_fraction", clipped, slice(0, 2))
    covered = put(covered, "clip_fraction", 1.0, slice(2, 4))
    comparison = compared(with_run(healthy_runs(), mode_run("reference", "clip", covered)))
    assert comparison.verdict == verdict


def test_permuted_samples_are_aligned() -> None:
    comparison = with_record("clip", permuted(record("clip")))
    assert comparison.verdict == "PASS"
    pair = comparison.regimes[1].pair(MODE)
    assert pair is not None
    assert pair.drifts["sample_norm"].max == 0


def test_sample_norms_in_another_order_under_the_same_indices_are_a_bug() -> None:
    swapped = record("clip")
    swapped = replace(swapped, sample_norm=swapped.sample_norm[:, ::-1].copy())
    assert verdicts(with_record("clip", swapped))[MODE] == "BUG"


def floored(floor: float, drift: float) -> str:
    """Verdict of a gradient norm off by `drift` where the replay is off by `floor`."""
    base = mode_run("no_dp").trajectory
    assert base
    replay = mode_run("no_dp", replay="permuted", record=scaled(base, "grad_norm", 1 + floor))
    wrong = mode_run(MODE, record=scaled(record("accuracy"), "grad_norm", 1 + drift))
    # Held against no_dp alone: the reference would be a second opinion.
    runs = [run for run in healthy_runs() if run.regime == "accuracy" and run.mode != "reference"]
    return verdicts(compared(with_run(with_run(runs, replay), wrong)))[MODE]


@pytest.mark.parametrize(
    ("floor", "drift", "verdict"),
    [
        (1e-7, 3.5e-6, "PASS"),  # less than float32 resolves
        (1e-7, 5e-6, "DRIFT"),
        (1e-7, 3e-5, "DRIFT"),
        (1e-7, 5e-5, "BUG"),  # ten times what rounding explains, and nothing before it is wrong
        # One replay of four steps is four draws, whose margin is 7.8.
        (1e-5, 7.5e-5, "PASS"),
        (1e-5, 8.1e-5, "DRIFT"),
        (1e-4, 7.5e-4, "PASS"),
        (1e-4, 1.5e-3, "DRIFT"),
        (1e-4, 9e-3, "BUG"),
        (5e-4, 1.5e-3, "INCONCLUSIVE"),
        (1e-3, 7.5e-3, "INCONCLUSIVE"),
        (1e-3, 8.1e-3, "DRIFT"),
        (2e-3, 5e-4, "PASS"),
        (1e-3, 2e-2, "BUG"),
        (3e-2, 4e-2, "INCONCLUSIVE"),
    ],
)
def test_floor_excuses_only_what_it_explains(floor: float, drift: float, verdict: str) -> None:
    assert floored(floor, drift) == verdict


@pytest.mark.parametrize(
    ("field", "drift", "verdict"),
    [
        # The largest of 32 projections is steady: 2.3 times what the replay shows.
        ("gradient_sketch", 4.5e-3, "INCONCLUSIVE"),
        ("gradient_sketch", 4.7e-3, "DRIFT"),
        # The sample that cancels most is one draw, however many others there are.
        ("sample_loss", 8e-3, "INCONCLUSIVE"),
        ("sample_loss", 1.05e-2, "BUG"),
    ],
)
def test_floor_of_many_draws_is_steady_and_excuses_less(
    field: str, drift: float, verdict: str
) -> None:
    plain = record("accuracy")
    replay = mode_run("no_dp", replay="permuted", record=scaled(plain, field, 1 + 2e-3))
    base = mode_run("no_dp", record=plain)
    wrong = mode_run(MODE, record=scaled(plain, field, 1 + drift))
    runs = [run for run in healthy_runs() if run.regime == "accuracy" and run.mode != "reference"]
    found = compared(with_run(with_run(with_run(runs, base), replay), wrong))
    assert verdicts(found)[MODE] == verdict


def test_once_weights_have_moved_a_replay_is_one_draw_of_a_parameters_floor() -> None:
    plain = record("accuracy")
    rounded = scaled(plain, "gradient_sketch", 1 + 2e-3)
    rounded = scaled(rounded, "gradient_sketch", 1.006, (slice(None), 0))
    for regime, later in (("accuracy", 2 * 8.012e-3), ("clip", 2.3 * 4.006e-3)):
        replay = compare_pair(regime, ("no_dp", plain), ("no_dp (permuted)", rounded))
        limits = limits_of(replay.drifts[ObservableName.GRADIENT], floor_of([replay]))
        assert limits is not None
        # Before, the 32 projections of four steps are draws of their own.
        assert limits[0, 1] == pytest.approx(2.3 * 4.006e-3, rel=0.02)
        assert limits[2, 1] == pytest.approx(later, rel=0.02)


def test_mode_that_agrees_with_no_dp_is_still_held_against_the_reference() -> None:
    # A bug in code that all modes share shows only against the oracle.
    shared = scaled(record("accuracy"), "gradient_sketch", 1.02, (slice(None), 1))
    plain = without_norms(shared)
    runs = with_run(healthy_runs(), mode_run("no_dp", record=permuted(plain), replay="permuted"))
    for mode in ("no_dp", MODE, "flash_fsdp_fuse"):
        runs = with_run(runs, mode_run(mode, record=plain if mode == "no_dp" else shared))
    found = verdicts(compared(runs))
    assert (found["no_dp"], found[MODE], found["reference"]) == ("BUG", "BUG", "PASS")


def test_what_no_dp_does_not_compute_is_listed_and_not_judged() -> None:
    pair = compared(healthy_runs()).regimes[0].pair(MODE)
    assert pair is not None
    assert pair.not_computed["sample_norm"] == "not computed by no_dp"
    assert "sample_norm" not in pair.drifts


def test_built_in_mode_without_sample_norms_never_passes() -> None:
    assert verdicts(with_record("clip", without_norms(record("clip"))))[MODE] == "INCONCLUSIVE"


def test_mode_of_ones_own_may_lack_sample_norms() -> None:
    own = mode_run("mine:make", "clip", without_norms(record("clip")))
    assert verdicts(compared([*healthy_runs(), own]))["mine:make"] == "PASS"


def test_layer_norms_of_the_ends_only_are_no_nan() -> None:
    ends = put(record("clip"), "layer_grad_norm", np.nan, slice(1, 3))
    assert compared(with_run(healthy_runs(), mode_run(MODE, "clip", ends))).verdict == "PASS"


def _thinned(layer_norms: str) -> Trajectory:
    steps = layer_norm_steps(layer_norms, 4)
    left_out = [step for step in range(4) if step not in steps]
    thinned = put(record("clip"), "layer_grad_norm", np.nan, left_out)
    return put(thinned, "layer_weight_norm", np.nan, left_out)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("2", "3"), ("3", "2"), ("all", "2"), ("2", "ends"), ("ends", "all")]
)
def test_layer_norms_thinned_in_two_ways_are_compared_where_both_have_them(
    ours: str, theirs: str
) -> None:
    thinned = mode_run("reference", "clip", _thinned(ours))
    runs = with_run(healthy_runs(), thinned)
    same = with_run(runs, mode_run(MODE, "clip", _thinned(theirs)))
    assert set(verdicts(compared(same)).values()) == {"PASS"}
    wrong = scaled(_thinned(theirs), "layer_grad_norm", 1.1, (3, 1))
    comparison = compared(with_run(runs, mode_run(MODE, "clip", wrong)))
    assert verdicts(comparison)[MODE] == "BUG"
    assert "at step 3" in sentence(comparison)


def test_small_absolute_loss_difference_is_no_bug_however_small_the_loss() -> None:
    runs = [
        mode_run(r.mode, r.regime, scaled(r.trajectory, "loss", 1e-6), replay=r.replay)
        for r in healthy_runs()
        if r.trajectory
    ]
    wrong = scaled(scaled(record("clip"), "loss", 1e-6), "loss", 2.0, 1)
    assert verdicts(compared(with_run(runs, mode_run(MODE, "clip", wrong))))[MODE] == "PASS"


def test_record_rebuilt_from_metrics_never_passes() -> None:
    rebuilt = mode_run(MODE, "clip", record("clip"), trajectory_missing="not uploaded")
    assert verdicts(compared(with_run(healthy_runs(), rebuilt)))[MODE] == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("worse", "verdict"),
    [
        ([("DRIFT", 1.004), ("BUG", 1.1)], "BUG"),
        ([("DRIFT", 1.004), ("INCONCLUSIVE", None)], "DRIFT"),
        ([("INCONCLUSIVE", None)], "INCONCLUSIVE"),
    ],
)
def test_group_has_its_worst_verdict(worse: list[tuple[str, float | None]], verdict: str) -> None:
    runs = healthy_runs()
    for mode, (_, factor) in zip((MODE, "flash_fsdp_fuse"), worse, strict=False):
        run = (
            mode_run(mode, "clip", scaled(record("clip"), "grad_norm", factor))
            if factor
            else mode_run(mode, "clip", status="FAILED", failure=failed("x"))
        )
        runs = with_run(runs, run)
    assert compared(runs).verdict == verdict


def test_first_failing_stage_is_of_the_earliest_step_then_of_the_earliest_stage() -> None:
    wrong = scaled(record("clip"), "loss", 1.1, 3)
    wrong = scaled(wrong, "grad_norm", 1.1, slice(2, 4))
    wrong = scaled(wrong, "clip_factor", 0.8, (slice(2, 4), 1))
    wrong = scaled(wrong, "sample_norm_by_parameter", 1.1, (2, 3, 1))
    (mode,) = (m for m in with_record("clip", wrong).modes if m.label == MODE)
    first = mode.culprits["clip", "reference"]
    assert (first.stage, first.step) == ("per-sample norms", 2)
    assert (first.samples, first.places) == ((15,), ("model.layers.1.weight",))


def test_variant_is_compared_with_the_installed_baseline() -> None:
    branch = scaled(record("clip"), "grad_norm", 1.5)
    runs = [*healthy_runs(), mode_run(MODE, "clip", branch, variant="branch")]
    found = verdicts(compared(runs))
    assert (found[MODE], found[f"{MODE}@branch"]) == ("PASS", "BUG")


def test_largest_drift_is_over_all_pairs() -> None:
    up, down = (scaled(record("clip"), "grad_norm", 1 + d) for d in (8e-4, -8e-4))
    runs = with_run(healthy_runs(), mode_run(MODE, "clip", up))
    runs = with_run(runs, mode_run("flash_fsdp_fuse", "clip", down))
    comparison = compared(runs)
    largest = comparison.regimes[1].largest["grad_norm"]
    assert {largest.first, largest.second} == {MODE, "flash_fsdp_fuse"}
    assert largest.drift.max == pytest.approx(1.6e-3, rel=1e-2)
    assert comparison.verdict == "PASS"


def test_thresholds_are_the_ones_given() -> None:
    group = group_of(
        with_run(healthy_runs(), mode_run(MODE, "clip", scaled(record("clip"), "grad_norm", 1.004)))
    )
    assert compare_group(group, Thresholds(grad_norm=5e-3)).verdict == "PASS"
    assert compare_group(group, Thresholds(bug=2e-3)).verdict == "BUG"


def uneven(t: Trajectory, *, wider: int = 0) -> Trajectory:
    """`t` without the last two samples of step 1 and without all of step 3."""
    changed: dict[str, Any] = {}
    for name in SAMPLE_COLUMNS:
        values = getattr(t, name)
        filler = UNUSED if values.dtype == np.int64 else np.nan
        width = [(0, 0), (0, wider)] + [(0, 0)] * (values.ndim - 2)
        values = np.pad(values, width, constant_values=filler)
        values[1, 4:] = values[3] = filler
        changed[name] = values
    # Fewer samples make a shorter sum.
    length = t.grad_norm * np.array([1, 0.3, 1, 0])[: t.num_steps]
    return replace(t, grad_norm=length, **changed)


def with_uneven(changed: Trajectory) -> GroupComparison:
    ours = uneven(record("clip"))
    runs = with_run(healthy_runs(), mode_run("reference", "clip", ours))
    runs = with_run(runs, mode_run("flash_fsdp_fuse", "clip", ours))
    return compared(with_run(runs, mode_run(MODE, "clip", changed)))


@pytest.mark.parametrize("wider", [0, 2])
def test_steps_of_unequal_size_pass_in_any_order(wider: int) -> None:
    assert with_uneven(uneven(record("clip"), wider=wider)).verdict == "PASS"
    assert with_uneven(permuted(uneven(record("clip"), wider=wider))).verdict == "PASS"


@pytest.mark.parametrize("field", ["sample_norm", "sample_loss", "clip_factor"])
def test_nan_at_a_sample_of_an_uneven_step_is_a_bug(field: str) -> None:
    wrong = put(uneven(record("clip")), field, np.nan, (1, 3))
    comparison = with_uneven(wrong)
    assert verdicts(comparison)[MODE] == "BUG"
    assert "(NaN): first at step 1 of clip, sample 9" in sentence(comparison)
    ladder = next(m for m in comparison.modes if m.label == MODE).ladders["clip", "reference"]
    introduced = [rung for rung in ladder if rung.status is StageStatus.INTRODUCED]
    assert [(rung.step, rung.where) for rung in introduced] == [(1, "sample 9")]
    assert introduced[0].stage is OBSERVABLES[ObservableName(field)].stage


def test_a_drift_in_an_uneven_step_is_judged() -> None:
    wrong = scaled(uneven(record("clip")), "sample_norm", 1.1, (1, 3))
    assert verdicts(with_uneven(wrong))[MODE] == "BUG"


def test_a_sample_that_only_one_side_of_an_uneven_step_has_never_passes() -> None:
    missing = uneven(record("clip"))
    for name in SAMPLE_COLUMNS:
        is_integer = getattr(missing, name).dtype == np.int64
        missing = put(missing, name, UNUSED if is_integer else np.nan, (1, 3))
    comparison = with_uneven(missing)
    assert verdicts(comparison)[MODE] == "INCONCLUSIVE"
    assert "1 sample missing from the mode: 9 (step 1)" in sentence(comparison)


def test_coverage_counts_samples_and_not_steps() -> None:
    # 27 of 31 samples are clipped, though on average over the two mixed steps less than half.
    t = trajectory(noise_std=0.0, samples=30)
    t = replace(t, clip_fraction=np.array([0.0, 0.9, 1.0, 1.0]))
    assert not list(judge_coverage(mode_run("reference", "clip", t)))
    t = put(t, "sample_index", UNUSED, (0, slice(1, 30)))
    (finding,) = judge_coverage(mode_run("reference", "clip", t))
    assert finding.value == pytest.approx(27 / 31)


def with_facts(**changed: Any) -> GroupComparison:
    """The healthy group, in which MODE reported other facts in the clip regime."""
    run = replace(mode_run(MODE, "clip"), facts=replace(FACTS, **changed))
    return compared(with_run(healthy_runs(), run))


def test_an_optimizer_that_lacks_parameters_is_a_bug_by_name() -> None:
    comparison = with_facts(not_optimized=("model.layers.1.weight", "model.layers.2.weight"))
    assert verdicts(comparison)[MODE] == "BUG"
    wanted = "its optimizer lacks 2 of 4 trainable parameters (model.layers.1.weight, model.layers."
    assert wanted in sentence(comparison)


def test_a_mode_whose_code_warned_is_no_plain_pass() -> None:
    comparison = with_facts(warnings=("Falling back to hooks " + "x" * 1000, "Another"))
    assert comparison.verdict == "PASS"
    assert comparison.sentence.endswith(f", but the code of {MODE} warned.")
    assert " Its code warned: Falling back to hooks.... (1 more)" in sentence(comparison)
    assert next(r for r in rows(comparison) if r.label == MODE).cells[1] == "PASS (warned)"
