"""Where an error arose, who inherited it, whose samples it is in, and what its size gives away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dpsgd_track.comparison.audit import consistency
from dpsgd_track.comparison.diagnose import ladder
from dpsgd_track.comparison.diagnose.culprit import (
    Culprit,
    _are_right_in_sum,
    _right_before,
    describe,
    first_of,
    where_it_arose,
)
from dpsgd_track.comparison.diagnose.ladder import Rung, StageStatus
from dpsgd_track.comparison.measure.alignment import Aligned
from dpsgd_track.comparison.measure.amount import share
from dpsgd_track.comparison.result import Judged, ModeVerdict, mode_verdict
from dpsgd_track.comparison.verdict import Finding, Verdict
from dpsgd_track.config import DataConfig
from dpsgd_track.record.stages import ObservableName, Stage
from dpsgd_track.record.trajectory import Trajectory
from tests.support.synthetic_group import (
    compared,
    healthy_runs,
    job,
    mode_run,
    put,
    scaled,
    setup,
    trajectory,
    with_run,
)

MODE = "flash_fsdp"
CLIP_KEY = ("clip", "reference")
SGD = setup("accuracy", optimizer="sgd", learning_rate=6e-4, micro_batches=7)
PLANNED: dict[str, Any] = {
    "job": job(MODE, SGD, data=DataConfig(batch_size=5, seq_length=121), num_ranks=3),
    "setup": SGD,
}
NAMES = tuple(
    f"model.layers.{i}.{part}"
    for i in range(4)
    for part in ("norm.weight", "proj.weight", "proj.bias")
)


def clip_record(**more: Any) -> Trajectory:
    return trajectory(noise_std=0.0, **more)


def judged(
    wrong: Trajectory, base: Trajectory | None = None, plain: Trajectory | None = None
) -> ModeVerdict:
    """The verdict of `wrong` in the clip regime, where the reference's replay is `plain`."""
    base = base or clip_record()
    runs = with_run(healthy_runs(), mode_run("reference", "clip", base))
    runs = with_run(runs, mode_run(MODE, "clip", wrong, **PLANNED))
    runs = with_run(runs, mode_run("flash_fsdp_fuse", "clip", base))
    runs.append(mode_run("reference", "clip", plain or base, replay="plain"))
    return next(mode for mode in compared(runs).modes if mode.label == MODE)


def blamed(wrong: Trajectory, base: Trajectory | None = None) -> Culprit:
    found = judged(wrong, base)
    assert found.verdict == "BUG"
    return found.culprits[CLIP_KEY]


def statuses(found: ModeVerdict) -> dict[str, str]:
    return {rung.stage: rung.status.value for rung in found.ladders[CLIP_KEY]}


def with_norms(t: Trajectory, by_parameter: np.ndarray) -> Trajectory:
    """`t` with other norms, and all that follows from them but the sum."""
    norm = np.sqrt(np.square(by_parameter).sum(axis=2))
    factor = np.minimum(1.0, t.max_grad_norm[:, None] / norm)
    return replace(t, sample_norm_by_parameter=by_parameter, sample_norm=norm, clip_factor=factor)


def with_own_sum(t: Trajectory) -> Trajectory:
    """`t` with the sum that its own clip factors make."""
    own = np.einsum("sn,snpk->spk", t.clip_factor, t.sample_sketch)
    return replace(t, gradient_sketch=own, noised_sketch=own)


def test_healthy_run_has_a_ladder_without_blame() -> None:
    found = judged(clip_record())
    told = statuses(found)
    # Weights at a learning rate of 0 are equal whatever an update does.
    assert told.pop("updated weights") == "not tested"
    assert set(told.values()) == {"ok"}
    assert found.culprits == {}


def test_weights_that_move_at_a_learning_rate_of_0_are_told() -> None:
    base = clip_record()
    moved = scaled(base, "weight_sketch", 1.5, 3)
    assert statuses(judged(moved))["updated weights"] in ("introduced", "inherited")


def test_wrong_norm_of_one_parameter_is_named_and_the_clip_factors_inherit() -> None:
    base = clip_record()
    by_parameter = base.sample_norm_by_parameter.copy()
    by_parameter[2:, :, 1] *= 1.5
    found = judged(with_norms(base, by_parameter))
    assert found.culprits[CLIP_KEY].places == ("model.layers.1.weight",)
    assert (found.culprits[CLIP_KEY].stage, found.culprits[CLIP_KEY].step) == (
        "per-sample norms",
        2,
    )
    assert "they are multiplied by 1.5 from step 2 on" in found.sentence
    known = statuses(found)
    assert (known["loss"], known["per-sample norms"]) == ("ok", "introduced")
    assert (known["clip factors"], known["clipped sum"]) == ("inherited", "ok")


def test_wrong_sum_of_right_factors_is_introduced_by_the_sum() -> None:
    found = judged(scaled(clip_record(), "gradient_sketch", 2.0, (slice(None), 2)))
    assert found.culprits[CLIP_KEY].places == ("model.layers.2.weight",)
    said = (
        "it is the right one multiplied by 2, as where it is added up twice, or K_t (the number of "
        "micro-batches of the step)"
    )
    assert found.culprits[CLIP_KEY].cause.sentence == said
    assert statuses(found)["clipped sum"] == "introduced"


def test_sentence_says_what_is_wrong_where_first_and_by_how_much() -> None:
    wrong = scaled(clip_record(), "gradient_sketch", 1.19)
    wrong = replace(wrong, noised_sketch=wrong.gradient_sketch)
    assert judged(wrong).sentence.startswith(
        f"{MODE} computes a wrong clipped sum: it is 1.19 times the right one in every step. First "
        "at step 0 of clip, in all 4 parameters, while norms and clip factors are right; off by up "
        "to 19 % from reference (rounding explains 3.8e-06)"
    )


def test_only_stages_that_were_compared_and_agree_are_called_right() -> None:
    wrong = scaled(trajectory(), "gradient_sketch", 1.5)
    runs = with_run(healthy_runs(), mode_run(MODE, record=wrong, **PLANNED))
    (found,) = [m for m in compared(runs).modes if m.label == MODE]
    said = {base: culprit.sentence for (_, base), culprit in found.culprits.items()}
    assert "while the loss is right" in said["no_dp"]
    assert "while norms and clip factors are right" in said["reference"]
    later = scaled(wrong, "clip_factor", 0.5, (3, 1))
    runs = with_run(healthy_runs(), mode_run(MODE, record=later, **PLANNED))
    (found,) = [m for m in compared(runs).modes if m.label == MODE]
    assert "while the loss and norms are right" in found.culprits["accuracy", "reference"].sentence


def test_stage_that_was_held_against_nothing_is_not_called_right() -> None:
    rung = Rung(stage=Stage.NORMS, status=StageStatus.OK, value=0.0, limit=1.0)
    at_fault = Rung(stage=Stage.SUM, status=StageStatus.INTRODUCED)
    assert _right_before([rung, at_fault], at_fault) == [Stage.NORMS]
    for unknown in (
        replace(rung, limit=np.inf),
        replace(rung, status=StageStatus.NOT_COMPARED, value=None, limit=None),
        replace(rung, status=StageStatus.INHERITED),
        replace(rung, stage=Stage.NOISE),
        Rung(stage=Stage.DATA, status=StageStatus.OK),
    ):
        assert _right_before([unknown, at_fault], at_fault) == []


@pytest.mark.parametrize(
    ("fraction", "said"),
    [(0.19, "19 %"), (1.5, "150 %"), (1e-3, "0.1 %"), (4e-6, "4e-06"), (43.2, "43 times")],
)
def test_fraction_stands_as_a_colleague_says_it(fraction: float, said: str) -> None:
    assert share(fraction) == said


def test_error_where_the_baseline_is_zero_has_no_bound() -> None:
    base = put(clip_record(), "grad_norm", 0.0)
    wrong = put(base, "grad_norm", 1e-3)
    found = judged(wrong, base)
    assert "Gradient norm off without bound from reference" in found.culprits[CLIP_KEY].sentence


def test_sum_that_is_off_by_more_than_its_factors_is_at_fault_too() -> None:
    base = clip_record()
    by_parameter = base.sample_norm_by_parameter * (1 + 1e-4)
    slightly = with_norms(base, by_parameter)
    assert statuses(judged(slightly))["clipped sum"] == "ok"
    wrong = scaled(slightly, "gradient_sketch", 1.2)
    assert statuses(judged(wrong))["clipped sum"] == "introduced"
    assert statuses(judged(with_own_sum(slightly)))["clipped sum"] == "inherited"


def test_sum_of_a_later_block_is_at_fault_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "STEPS_AT_ONCE", 2)
    base = clip_record()
    slightly = with_norms(base, base.sample_norm_by_parameter * (1 + 1e-4))
    wrong = judged(scaled(slightly, "gradient_sketch", 1.2, 3))
    rung = next(r for r in wrong.ladders[CLIP_KEY] if r.stage is Stage.SUM)
    assert (rung.status, rung.step) == (StageStatus.INTRODUCED, 3)
    assert statuses(judged(with_own_sum(slightly)))["clipped sum"] == "inherited"


def test_samples_of_one_rank_alone_name_the_rank() -> None:
    base = clip_record()
    by_parameter = base.sample_norm_by_parameter.copy()
    by_parameter[:, base.sample_rank[0] == 1] *= 1.25
    found = blamed(with_norms(base, by_parameter))
    assert found.ranks == (1,)
    assert found.samples == tuple(base.sample_index[0][base.sample_rank[0] == 1].tolist())
    assert "of rank 1 alone" in found.sentence


def test_some_samples_of_every_rank_name_no_rank() -> None:
    base = clip_record()
    by_parameter = base.sample_norm_by_parameter.copy()
    by_parameter[:, [0, -1]] *= 1.25
    found = blamed(with_norms(base, by_parameter))
    assert found.samples == (base.sample_index[0, 0], base.sample_index[0, -1])
    assert found.ranks == ()


def test_error_in_all_samples_names_none() -> None:
    base = clip_record()
    found = blamed(with_norms(base, base.sample_norm_by_parameter * 1.25))
    assert (found.samples, found.ranks) == ((), ())
    assert "all 4 parameters" in found.sentence


def test_error_of_ten_times_the_floor_with_right_inputs_is_a_bug_below_every_threshold() -> None:
    base = clip_record()
    plain = with_norms(base, base.sample_norm_by_parameter * (1 + 1e-6))
    slight = with_norms(base, base.sample_norm_by_parameter * (1 + 2e-5))
    found = judged(slight, base, plain)
    assert found.verdict == "DRIFT"
    worse = judged(with_norms(base, base.sample_norm_by_parameter * (1 + 4e-4)), base, plain)
    assert worse.verdict == "BUG"
    assert "they are 1.0004 times the right ones in every step" in worse.sentence
    assert "too large by up to 0.04 % against reference (rounding explains" in worse.sentence
    assert all("times what rounding explains" in f.sentence for f in worse.findings)


def test_mode_as_right_as_plain_autograd_passes_above_every_threshold() -> None:
    base = clip_record()
    rng = np.random.default_rng(1)
    errors = rng.uniform(-1, 1, (2, *base.sample_norm_by_parameter.shape))
    plain = with_norms(base, base.sample_norm_by_parameter * (1 + 3e-3 * errors[0]))
    rounded = with_norms(base, base.sample_norm_by_parameter * (1 + 5e-3 * errors[1]))
    assert judged(rounded, base, plain).verdict == "PASS"
    assert judged(rounded, base).verdict == "BUG"


def test_wrong_layer_that_hands_its_error_on_is_told_from_those_before_it() -> None:
    arose, inherited = where_it_arose(NAMES[:8], NAMES)
    assert arose == ("model.layers.2.proj.weight",) or arose == NAMES[7:8]
    assert set(inherited) == set(NAMES[:7]) - {"model.layers.2.proj.weight"}


def test_wrong_layers_with_right_ones_before_them_are_wrong_by_themselves() -> None:
    biases = tuple(name for name in NAMES if name.endswith("bias"))
    assert where_it_arose(biases, NAMES) == (biases, ())
    assert where_it_arose(NAMES, NAMES) == (NAMES, ())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (NAMES, "all 12 parameters"),
        (NAMES[:1], "model.layers.0.norm.weight"),
        (NAMES[2::3], "every *.bias (4)"),
        (NAMES[1::3], "every *.proj.weight (4)"),
        ((*NAMES[2::3], *NAMES[::3]), "every *.bias, *.norm.weight (8)"),
        (
            NAMES[3:6],
            "model.layers.1.norm.weight, model.layers.1.proj.weight, model.layers.1.proj.bias",
        ),
        (NAMES[:6], "every model.layers.0.*, model.layers.1.* (6)"),
        (NAMES[5:], "7 of 12 parameters (all from model.layers.1.proj.bias on)"),
        (NAMES[:-1], "11 of 12 parameters (all but model.layers.3.proj.bias)"),
        (NAMES[:8], "8 of 12 parameters (model.layers.0.norm.weight most)"),
        (
            NAMES[:5],
            "model.layers.0.norm.weight, model.layers.0.proj.weight, "
            "model.layers.0.proj.bias and 2 more",
        ),
    ],
)
def test_what_parameters_have_in_common_is_said(wrong: tuple[str, ...], said: str) -> None:
    assert describe(wrong, NAMES) == said


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        (lambda t: scaled(t, "sample_norm", 1.01, (1, 2)), "per-sample norms"),
        (lambda t: scaled(t, "clip_factor", 0.98, (3, 2)), "clip factors"),
        (lambda t: scaled(t, "grad_norm", 9.0, 2), "clipped sum"),
    ],
)
def test_run_that_contradicts_itself_is_a_bug_without_any_baseline(change: Any, stage: str) -> None:
    wrong = mode_run(MODE, "clip", change(clip_record()), **PLANNED)
    (found,) = [m for m in compared([wrong]).modes if m.label == MODE]
    assert found.verdict == "BUG"
    assert {
        "sample_norm": "per-sample norms",
        "clip_factor": "clip factors",
        "grad_norm": "clipped sum",
    }[found.findings[0].observable] == stage


@pytest.mark.parametrize(
    ("rate", "verdict"), [(1.0, "PASS"), (1.01, "PASS"), (1.5, "BUG"), (-1.0, "BUG")]
)
def test_sgd_step_follows_from_the_gradient(rate: float, verdict: str) -> None:
    base = trajectory()
    path = -1e-4 * rate * np.cumsum(base.noised_sketch, axis=0) / base.expected_batch_size
    moved = replace(base, weight_sketch=base.weight_sketch[:1] * 0 + 30.0 + path)
    slow = replace(SGD, learning_rate=1e-4)
    runs = [mode_run("no_dp", record=moved), mode_run(MODE, record=moved, setup=slow)]
    (found,) = [m for m in compared(runs).modes if m.label == MODE]
    assert found.verdict == verdict


def test_noise_that_is_wrong_beside_a_wrong_sum_is_wrong_by_itself() -> None:
    base = trajectory()
    noise = base.noised_sketch - base.gradient_sketch
    wrong = scaled(base, "gradient_sketch", 1.5, 1)
    statuses = []
    for factor in (1.0, 1.5):
        factors = np.array([1.0, factor, 1.0, 1.0])[:, None, None]
        noised = wrong.gradient_sketch + noise * factors
        runs = with_run(healthy_runs(), mode_run(MODE, record=replace(wrong, noised_sketch=noised)))
        (found,) = [m for m in compared(runs).modes if m.label == MODE]
        rungs = {rung.stage: rung.status.value for rung in found.ladders["accuracy", "no_dp"]}
        statuses.append(rungs["noise"])
    assert statuses == ["inherited", "introduced"]


def test_sgd_step_between_two_blocks_is_looked_at() -> None:
    base = trajectory(steps=4)
    assert consistency.inconsistencies(base, SGD, steps_at_once=2) == ()
    jumped = put(base, "weight_sketch", 1e4, slice(2, None))
    (found,) = consistency.inconsistencies(jumped, SGD, steps_at_once=2)
    assert (found.stage, found.step) == ("updated weights", 2)


def test_stage_that_fails_only_after_another_step_failed_has_inherited_where_weights_move() -> None:
    wrong = scaled(trajectory(), "gradient_sketch", 1.5, (1, 2))
    wrong = scaled(wrong, "loss", 1.01, slice(2, None))
    noise = trajectory().noised_sketch - trajectory().gradient_sketch
    wrong = replace(wrong, noised_sketch=wrong.gradient_sketch + noise)
    runs = with_run(healthy_runs(), mode_run(MODE, record=wrong, **PLANNED))
    (found,) = [m for m in compared(runs).modes if m.label == MODE]
    rungs = {rung.stage: rung for rung in found.ladders["accuracy", "no_dp"]}
    assert rungs["loss"].status is StageStatus.INHERITED
    assert (rungs["clipped sum"].status, rungs["clipped sum"].step) == (StageStatus.INTRODUCED, 1)
    assert rungs["noise"].status is not StageStatus.INTRODUCED


def test_rung_tells_how_many_times_its_limit_a_value_is() -> None:
    rung = Rung(stage=Stage.LOSS, status=StageStatus.OK, value=3.0, limit=2.0)
    assert rung.times == 1.5
    assert np.isnan(replace(rung, limit=None).times)


def test_floor_that_explodes_leaves_the_rest_inconclusive() -> None:
    base = trajectory(steps=30)
    wild = scaled(base, "gradient_sketch", 3.0, slice(20, None))
    runs = [
        mode_run("no_dp", record=base),
        mode_run("no_dp", record=wild, replay="ulp"),
        mode_run(MODE, record=scaled(base, "gradient_sketch", 50.0, slice(20, None))),
    ]
    (found,) = [m for m in compared(runs).modes if m.label == MODE]
    assert found.verdict == "INCONCLUSIVE"
    assert "from step 13 on: rounding alone moves equal runs apart" in found.sentence
    early = put(base, "gradient_sketch", 0.0, 3)
    runs[-1] = mode_run(MODE, record=early)
    (found,) = [m for m in compared(runs).modes if m.label == MODE]
    assert found.verdict == "BUG"


def finding(against: str, observable: ObservableName, **more: Any) -> Finding:
    return Finding(
        verdict=Verdict.BUG,
        regime="accuracy",
        sentence=f"{observable} differs from {against}",
        against=against,
        observable=observable,
        **more,
    )


def culprit(stage: Stage, step: int, **more: Any) -> Culprit:
    return Culprit(regime="accuracy", stage=stage, step=step, **more)


def test_the_earliest_stage_that_any_comparison_shows_is_the_culprit_and_the_sentence() -> None:
    late, early = ("accuracy", "no_dp"), ("accuracy", "reference")
    norm = ObservableName.SAMPLE_NORM
    shown = {
        late: culprit(Stage.SUM, 0, places=("a", "b"), against="no_dp"),
        early: culprit(
            Stage.NORMS, 0, against="reference", observable=norm, claim="has wrong norms of a"
        ),
    }
    told, other = finding("reference", norm), finding("no_dp", ObservableName.GRADIENT)
    found = mode_verdict(MODE, [Judged(findings=(other, told), culprits=shown)])
    assert found.culprit is shown[early]
    assert found.sentence == f"{MODE} has wrong norms of a."
    assert found.others == (other,)


def test_what_one_run_shows_by_itself_is_the_culprit_where_no_comparison_shows_one() -> None:
    noisy = culprit(Stage.NOISE, 2, places=("b",), claim="adds wrong noise")
    alone = finding("", ObservableName.NOISE, culprit=noisy)
    found = mode_verdict(MODE, [Judged(findings=(alone,))])
    assert (found.culprit, found.sentence, found.others) == (noisy, f"{MODE} adds wrong noise.", ())
    compared_too = {("accuracy", "no_dp"): culprit(Stage.UPDATE, 0, against="no_dp")}
    both = mode_verdict(MODE, [Judged(findings=(alone,), culprits=compared_too)])
    assert both.culprit == compared_too["accuracy", "no_dp"]
    assert mode_verdict(MODE, [Judged()]).culprit is None


def test_of_equal_stages_the_one_that_says_where_is_the_culprit() -> None:
    culprits = {
        ("accuracy", "no_dp"): culprit(Stage.FACTORS, 1, samples=(4,)),
        ("accuracy", "reference"): culprit(Stage.FACTORS, 1, samples=(3,), against="reference"),
        ("clip", "reference"): culprit(Stage.FACTORS, 0),
    }
    assert first_of(culprits) == ("clip", "reference")
    del culprits["clip", "reference"]
    assert first_of(culprits) == ("accuracy", "reference")
    assert first_of({}) is None


def test_an_error_is_handed_on_only_where_sums_that_are_not_clipped_are_wrong_too() -> None:
    base = replace(clip_record(), clip_factor=np.ones_like(clip_record().clip_factor))
    rung = Rung(stage=Stage.NORMS, status=StageStatus.INTRODUCED, limit=1e-4)
    names = tuple(base.parameter_names.tolist())
    wrong = scaled(base, "gradient_sketch", 1.5)

    def are_right(other: Trajectory, baseline: Trajectory = base) -> bool:
        pair = Aligned(baseline=baseline, other=other, gaps=())
        return _are_right_in_sum(names, rung, pair, 0)

    assert are_right(base)
    assert not are_right(wrong)
    # Where samples were clipped nothing is known.
    clipped = clip_record()
    assert not are_right(clipped, clipped)


def test_a_stage_that_only_contradicts_itself_is_blamed_on_the_step_where_it_does() -> None:
    run = next(r for r in healthy_runs() if (r.mode, r.regime) == (MODE, "accuracy"))
    assert run.trajectory is not None
    norms = run.trajectory.sample_norm.copy()
    norms[2] *= 1.5
    wrong = replace(run, trajectory=replace(run.trajectory, sample_norm=norms))
    runs = [r for r in healthy_runs() if r.regime == "accuracy"]
    (found,) = (m for m in compared(with_run(runs, wrong)).modes if m.label == MODE)
    assert found.culprits["accuracy", "no_dp"].stage == "per-sample norms"
    assert found.culprits["accuracy", "no_dp"].step == 2


def test_one_wrong_parameter_before_another_is_not_said_to_have_inherited_it() -> None:
    names = ("embedding.weight", "position.weight", "proj.weight")
    wrong = ("position.weight", "embedding.weight")
    assert where_it_arose(wrong, names) == (wrong, ())
