"""A mode that is wrong on average is found below its largest differences, and no other is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.verdict_power import (
    FAULTS,
    ROUNDINGS,
    STUDIES,
    Case,
    Fault,
    Size,
    case,
    measured,
    page,
    scaled,
)
from dpsgd_track.comparison import compare_group
from dpsgd_track.comparison.measure import bias as bias_module
from dpsgd_track.comparison.measure.bias import FEWEST, TOLERANCES, Biases, biases_of
from dpsgd_track.comparison.measure.floor import margin_of
from dpsgd_track.comparison.measure.resolution import told
from dpsgd_track.comparison.result import GroupComparison, ModeVerdict
from dpsgd_track.config import PLAIN, Thresholds
from dpsgd_track.record.stages import ObservableName, Stage
from dpsgd_track.record.trajectory import Trajectory
from tests.support.synthetic_group import group_of, mode_run

BF16 = ROUNDINGS["bfloat16"]
MODE = "flash_fsdp"
BY_PARAMETER = ObservableName.SAMPLE_NORM_BY_PARAMETER


def drawn(seed: int, size: Size | None = None) -> Case:
    return case(np.random.default_rng(seed), BF16, size or Size(steps=8, samples=16))


def biases(of: Case, *, stands_still: bool = True) -> Biases:
    tolerance = TOLERANCES["bfloat16"]
    found = biases_of(of.mode, of.plain, of.exact, tolerance, stands_still=stands_still)
    assert found is not None
    return found


def compared(of: Case, regime: str = "clip") -> GroupComparison:
    runs = [
        mode_run("reference", regime, of.exact),
        mode_run("reference", regime, of.plain, replay=PLAIN),
        mode_run(MODE, regime, of.mode),
    ]
    return compare_group(group_of(runs), Thresholds())


def judged(of: Case) -> ModeVerdict:
    return next(mode for mode in compared(of).modes if mode.label == MODE)


def with_error(of: Case, field: str, factor: float, at: Any = slice(None)) -> Case:
    return replace(of, mode=scaled(of.mode, field, factor, at))


def readable_norms(of: Case, parameter: int) -> tuple[float, float]:
    """Mean and standard error of the log ratios, one number at a time."""
    ratios = [
        np.log(of.mode.sample_norm_by_parameter[s, n, parameter])
        - np.log(of.plain.sample_norm_by_parameter[s, n, parameter])
        for s in range(of.mode.num_steps)
        for n in range(of.mode.sample_index.shape[1])
    ]
    return float(np.mean(ratios)), float(np.std(ratios, ddof=1) / np.sqrt(len(ratios)))


def readable_sums(of: Case, parameter: int) -> tuple[float, float]:
    """Mean and standard error of the errors along plain autograd's sum, a projection at a time."""
    y, u = [], []
    for step in range(of.mode.num_steps):
        plain = of.plain.gradient_sketch[step, parameter]
        unit = np.mean(plain**2)
        y += list((of.mode.gradient_sketch[step, parameter] - plain) * plain / unit)
        u += list(plain**2 / unit)
    mean = np.mean(y)
    residuals = np.array(y) - mean * np.array(u)
    return float(mean), float(np.sqrt(np.mean(residuals**2) / (len(y) - 1)))


@pytest.mark.parametrize("block", [1, 1 << 20], ids=["blocks", "one-block"])
def test_fast_form_is_the_readable_one(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(bias_module, "VALUES_AT_ONCE", block)
    of = drawn(1)
    found = biases(of).by_observable
    for parameter in (1, 5, 9):
        for name, wanted in (
            (BY_PARAMETER, readable_norms(of, parameter)),
            (ObservableName.GRADIENT, readable_sums(of, parameter)),
        ):
            bias = found[name]
            got = bias.mean[parameter], bias.standard_error[parameter]
            np.testing.assert_allclose(got, wanted, rtol=1e-9)


@pytest.mark.parametrize(
    ("field", "stage"), [("sample_norm_by_parameter", Stage.NORMS), ("gradient_sketch", Stage.SUM)]
)
def test_bias_of_one_layer_is_the_culprit_with_its_size(field: str, stage: Stage) -> None:
    of = drawn(2)
    assert judged(of).verdict == "PASS"
    found = judged(with_error(of, field, 1 - 3e-3, 4))
    assert found.verdict == "DRIFT"
    assert found.culprit is not None
    assert found.culprit.stage is stage
    assert found.culprit.places == ("layer4.weight",)
    assert "biased by -0.3" in found.sentence or "biased by -0.2" in found.sentence
    assert " in layer4.weight over " in found.sentence
    assert "(resolution 0." in found.sentence


@pytest.mark.parametrize("field", ["sample_norm_by_parameter", "gradient_sketch"])
def test_tenth_of_a_percent_in_all_is_found(field: str) -> None:
    assert judged(with_error(drawn(3), field, 1 + 1e-3)).verdict == "DRIFT"


def test_a_mode_that_computes_in_more_bits_than_plain_autograd_is_not_biased() -> None:
    of = drawn(6)
    # Rounding that is not nothing on average, as that of a few weights may be.
    plain = of.plain
    for field in FIELDS:
        plain = scaled(plain, field, 1 + 5e-3, slice(None))
    exact = replace(of, plain=plain, mode=of.exact)
    assert (np.abs(biases(exact).by_observable[BY_PARAMETER].mean) > 3e-3).any()
    assert judged(exact).verdict == "PASS"
    # One that is wrong is as wrong as before.
    for field, observable in FIELDS.items():
        wrong = with_error(exact, field, 1 + 5e-3, 4)
        failing = biases(wrong).by_observable[observable].failing
        assert not failing[:4].any()
        plain_again = replace(wrong, plain=of.plain)
        assert biases(plain_again).by_observable[observable].failing[4]


FIELDS = {
    "sample_norm_by_parameter": BY_PARAMETER,
    "gradient_sketch": ObservableName.GRADIENT,
}


def test_wrong_norms_are_blamed_and_not_the_sum_that_inherits_them() -> None:
    of = with_error(drawn(4), "sample_norm_by_parameter", 1 + 5e-3, 4)
    of = with_error(of, "gradient_sketch", 1 - 5e-3, 4)
    found = judged(of)
    assert found.culprit is not None
    assert found.culprit.stage is Stage.NORMS
    statuses = {rung.stage: rung.status for rung in found.ladders["clip", "reference"]}
    assert statuses[Stage.NORMS] == "introduced"
    assert statuses[Stage.SUM] != "introduced"


def test_norms_that_scatter_without_a_bias_are_found() -> None:
    of = drawn(5)
    values = of.mode.sample_norm_by_parameter.copy()
    signs = np.random.default_rng(0).choice((-1, 1), values.shape[:2])
    values[:, :, 4] *= 1 + 0.025 * signs
    wrong = replace(of, mode=replace(of.mode, sample_norm_by_parameter=values))
    bias, scatter = biases(wrong).by_observable[BY_PARAMETER], biases(wrong).scatter
    assert scatter is not None
    assert not bias.failing.any()
    assert np.flatnonzero(scatter.failing).tolist() == [4]
    before = biases(of).scatter
    assert before is not None
    assert not before.failing.any()


def test_one_wrong_loss_is_named_with_its_sample() -> None:
    of = drawn(6)
    losses = of.mode.sample_loss.copy()
    losses[2, 3] *= 1 + 8e-3
    found = judged(replace(of, mode=replace(of.mode, sample_loss=losses)))
    assert found.culprit is not None
    assert found.culprit.stage is Stage.LOSS
    assert found.culprit.samples == (of.mode.sample_index[2, 3],)


def test_parameter_that_plain_autograd_scatters_is_left_out() -> None:
    of = drawn(7)
    rng = np.random.default_rng(0)

    def scattered(record: Trajectory) -> Trajectory:
        values = record.sample_norm_by_parameter.copy()
        values[:, :, 4] *= np.exp(0.2 * rng.standard_normal(values.shape[:2]))
        return replace(record, sample_norm_by_parameter=values)

    found = biases(replace(of, mode=scattered(of.mode), plain=scattered(of.plain)))
    assert np.isnan(found.by_observable[BY_PARAMETER].mean[4])
    assert np.isinf(found.by_observable[BY_PARAMETER].resolution[4])


def test_values_of_a_step_and_rank_that_depend_on_each_other_count_once() -> None:
    of = drawn(8, Size(steps=6, samples=24))
    values = of.mode.sample_norm_by_parameter.copy()
    rng = np.random.default_rng(0)
    shift = rng.normal(0, 4e-3, (6, 2))[:, of.mode.sample_rank[0]]
    values[:, :, 4] *= 1 + shift
    coupled = replace(of, mode=replace(of.mode, sample_norm_by_parameter=values))
    alone, together = (biases(each).by_observable[BY_PARAMETER] for each in (of, coupled))
    assert together.quantile[4] > alone.quantile[4]
    assert together.standard_error[4] > 3 * alone.standard_error[4]
    assert not together.failing.any()


def test_few_samples_and_few_elements_are_not_tested() -> None:
    few = biases(drawn(9, Size(steps=1, samples=FEWEST - 1)))
    assert BY_PARAMETER not in few.by_observable
    # Sixteen projections of one element are one value in each of four steps.
    sums = biases(drawn(9, Size(steps=4))).by_observable[ObservableName.GRADIENT]
    assert sums.num[0] == 0
    assert sums.num[1] == 64


def test_only_the_first_step_is_paired_where_weights_move() -> None:
    found = biases(drawn(10), stands_still=False)
    assert found.steps.tolist() == [0]
    assert found.num_samples == 16
    # A step's sum is one draw of its rounding, however many projections are kept of it.
    assert not found.by_observable.keys() & {ObservableName.GRADIENT, ObservableName.GRAD_NORM}


# What torch.linalg.vector_norm was measured to lose of so many elements; of few it is an error.
@pytest.mark.parametrize(
    ("size", "lost", "is_tolerated"),
    [(24_000, 1.3e-6, True), (120_000, 8e-6, True), (120, 8e-6, False)],
)
def test_norms_may_be_as_wrong_as_torch_makes_them(
    size: int, lost: float, is_tolerated: bool
) -> None:
    of = case(np.random.default_rng(15), ROUNDINGS["float32"], Size())
    sizes = np.full(len(of.plain.parameter_names), size)
    mode, plain, exact = (replace(t, parameter_sizes=sizes) for t in (of.mode, of.plain, of.exact))
    for field in ("sample_norm", "sample_norm_by_parameter"):
        mode = replace(mode, **{field: getattr(mode, field) * (1 - lost)})
    of = replace(of, mode=mode, plain=plain, exact=exact)
    found = measured(of, TOLERANCES["float32"].of_model(sizes))
    assert bool(found.alarms) is not is_tolerated


def test_steps_and_parameters_that_one_side_lacks_are_not_paired() -> None:
    of = drawn(11)
    found = biases(replace(of, mode=of.mode.rows(2, 8)))
    assert found.steps.tolist() == list(range(2, 8))
    names = np.array([f"other{i}" for i in range(10)])
    other = replace(of.mode, parameter_names=names)
    tolerance = TOLERANCES["bfloat16"]
    assert biases_of(other, of.plain, of.exact, tolerance, stands_still=True) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_stated_resolution_is_true(dtype: str, fault: Fault) -> None:
    rng = np.random.default_rng(12)
    tolerance = TOLERANCES[dtype]
    for _ in range(12):
        of = case(rng, ROUNDINGS[dtype], Size())
        healthy = measured(of, tolerance)
        error = 1.5 * fault.stated(healthy.resolution)
        wrong = replace(of, mode=scaled(of.mode, fault.field, 1 + error, fault.at))
        assert not healthy.alarms
        assert measured(wrong, tolerance).alarms


def test_resolution_is_said_in_one_line_with_what_no_regime_showed() -> None:
    comparison = compared(drawn(13))
    sentence = comparison.seen.sentence
    assert sentence.startswith("Would have seen in the model: norms off by 0.")
    assert "in any one parameter" in sentence
    assert "Cannot have seen faults that begin after step 7" in sentence
    for kind in ("of a mode's own noise", "of an empty batch"):
        assert kind in sentence
    assert told(comparison.seen.resolutions["the model"]) in sentence


def test_margin_falls_with_the_number_of_draws() -> None:
    margins = margin_of(np.array([1, 2, 4, 6, 16, 64, 10_000]))
    assert (np.diff(margins) < 0).all()
    np.testing.assert_allclose(margins[[0, 3, 5]], [637, 4.97, 2.0], rtol=5e-3)
    # The definition, by draws: 4 against 4 others.
    rng = np.random.default_rng(0)
    ours, theirs = np.abs(rng.standard_normal((2, 200_000, 4))).max(axis=2)
    assert np.mean(ours > margins[2] * theirs) == pytest.approx(1e-3, rel=0.25)


def test_norm_after_noise_has_the_limit_of_the_sum_where_sigma_is_zero() -> None:
    excesses = measured(drawn(14), TOLERANCES["bfloat16"]).evidence.excesses
    before, after = (
        excesses[name].limits
        for name in (ObservableName.GRAD_NORM, ObservableName.GRAD_NORM_NOISED)
    )
    np.testing.assert_allclose(after, before)
    assert (before > 0).all()


def test_sum_of_one_element_has_the_margin_of_its_draws() -> None:
    # Four steps of one value against four of sixteen, at floors that are made equal.
    of = drawn(15, Size(steps=4))
    gone = replace(of.plain, gradient_sketch=of.exact.gradient_sketch * (1 + 1e-2))
    excesses = measured(replace(of, plain=gone), TOLERANCES["bfloat16"]).evidence.excesses
    limits = excesses[ObservableName.GRADIENT].limits
    np.testing.assert_allclose(limits[:, 1:], 2e-2, rtol=1e-5)
    np.testing.assert_allclose(limits[:, 0], 7.82e-2, rtol=1e-3)


def test_page_of_the_simulation_has_every_table() -> None:
    text = page(2, "python benchmarks/verdict_power.py page.md")
    for study in STUDIES:
        table = text.split(f"## {study.title}\n")[1].split("\n## ")[0].strip().splitlines()[2:]
        assert table[0] == f"| {' | '.join(study.headings)} |"
        assert len({line.count("|") for line in table}) == 1
        assert len(table) > 3
