"""What charts are made of: no point that matters is lost, and no number changes on its way."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from dpsgd_track.comparison.measure.excess import excess_of
from dpsgd_track.comparison.measure.floor import limits_of
from dpsgd_track.comparison.profile import profile_of
from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.record.stages import Stage
from dpsgd_track.report.charts import Style, figures, profile_charts
from dpsgd_track.report.charts.curves import points_of_each, whole
from dpsgd_track.report.charts.heatmap import LOWEST, NOTHING, PER_DECADE, as_bytes
from dpsgd_track.report.charts.style import Chart, name_axis, wrapped
from dpsgd_track.report.html import chart_data
from dpsgd_track.report.table import HEADINGS, rows
from tests.support.synthetic_group import (
    compared,
    healthy_runs,
    mode_run,
    scaled,
    trajectory,
    with_run,
)
from tests.support.synthetic_profile import large, profiled
from tests.support.synthetic_report import (
    GUILTY,
    GUILTY_LAYER,
    NAN_STEP,
    QUICK,
    audit,
    broken,
    healthy,
    undefined,
)


@cache
def drawn(made: Callable[[], GroupComparison]) -> tuple[Chart, ...]:
    return figures(made())


def figure_of(name: str, made: Callable[[], GroupComparison]) -> Any:
    return chart(drawn(made), name).figure


def trace_of(name: str, made: Callable[[], GroupComparison]) -> Any:
    """What is drawn of the guilty mode."""
    return next(t for t in figure_of(name, made).data if t.name == GUILTY)


def chart(charts: tuple[Chart, ...], name: str) -> Chart:
    return next(each for each in charts if each.name == name)


@pytest.mark.parametrize(("curves", "points"), [(0, 1000), (10, 1000), (200, 575), (10_000, 200)])
def test_many_curves_share_the_page(curves: int, points: int) -> None:
    assert points_of_each(curves) == points


@pytest.mark.parametrize(
    ("largest", "dtype"), [(0, "int8"), (127, "int8"), (128, "int16"), (40_000, "int32")]
)
def test_whole_numbers_take_the_smallest_type_that_holds_them(largest: int, dtype: str) -> None:
    found = whole(np.array([-largest, largest]))
    assert found.dtype == dtype
    assert found.tolist() == [-largest, largest]


@pytest.mark.parametrize("value", [1e-8, 3.3e-5, 0.08, 1.0, 80.0, 1e8])
def test_a_byte_of_the_heatmap_is_within_a_tenth_of_its_value(value: float) -> None:
    code = base64.b64decode(as_bytes(np.array([value])))[0]
    assert 10 ** (LOWEST + code / PER_DECADE) == pytest.approx(value, rel=0.1)


def test_bytes_of_the_heatmap_tell_nothing_from_zero_and_infinity() -> None:
    codes = base64.b64decode(as_bytes(np.array([np.nan, 0.0, np.inf])))
    assert list(codes) == [NOTHING, 0, NOTHING - 1]
    huge = base64.b64decode(as_bytes(np.array([1e300])))
    assert list(huge) == [NOTHING - 2], "no number looks like an infinity"


def test_heatmap_of_the_faulty_mode_shows_its_layer_from_its_step_on_its_rank() -> None:
    cube = chart(drawn(broken), "heatmap_clip").cube
    order = list(dict.fromkeys(run.label for run in broken().group.runs))
    mode = cube["modes"][0]
    assert mode["mode"] == order.index(GUILTY), "the one that is over its limit is shown first"
    shape = (len(mode["first"]), len(mode["ranks"]), len(cube["parameters"]))
    codes = np.frombuffer(base64.b64decode(mode["bytes"]), np.uint8).reshape(shape)
    hot = codes > -LOWEST * PER_DECADE  # above 1, the limit
    places = {tuple(place) for place in np.argwhere(hot).tolist()}
    layer = cube["parameters"].index(GUILTY_LAYER)
    assert places == {(step, 1, layer) for step in range(3, 12)}


def test_equal_arrays_stand_once_in_the_data_of_a_chart() -> None:
    data = json.loads(chart_data(chart(figures(compared(healthy_runs())), "drift_clip_loss")))
    curves = [trace for trace in data["data"] if "mode" in trace.get("meta", {})]
    assert len(curves) > 1
    assert all(trace["y"] == curves[0]["y"] == {"$": curves[0]["y"]["$"]} for trace in curves)
    texts = [json.dumps(array) for array in data["arrays"]]
    assert len(set(texts)) == len(texts)


def test_difference_from_the_baseline_is_signed_and_exact() -> None:
    lower = scaled(trajectory(noise_std=0.0), "loss", 1 - 1e-6)
    comparison = compared(with_run(healthy_runs(), mode_run("flash_fsdp", "clip", lower)))
    figure = chart(figures(comparison), "trajectory_clip_loss").figure
    (curve,) = [t for t in figure.data if t.name == "flash_fsdp" and t.yaxis == "y2"]
    expected = -1e-6 * trajectory(noise_std=0.0).loss
    np.testing.assert_allclose(curve.y, expected, rtol=1e-6)


def test_clipped_samples_are_marked_and_others_open() -> None:
    figure = chart(figures(healthy()), "samples_clip").figure
    record = next(r for r in healthy().regimes[1].runs if r.label == "flash_fsdp").trajectory
    assert record is not None
    drawn = {
        trace.meta["clipped"]: (len(trace.x), trace.marker.symbol)
        for trace in figure.data
        if trace.name == "flash_fsdp"
    }
    clipped = int((record.clip_factor < 1).sum())
    assert {flag: count for flag, (count, _) in drawn.items()} == {
        True: clipped,
        False: record.clip_factor.size - clipped,
    }
    assert [drawn[flag][1].endswith("-open") for flag in (True, False)] == [False, True]


def test_noise_chart_shows_the_parameters_that_are_farthest_off() -> None:
    names = [f"layer{i}" for i in range(100)]
    found = audit("flash_fsdp", "accuracy", names)
    odd = tuple((n, 2.0, 1.9, 2.1) if n == "layer77" else (n, 1.0, 0.9, 1.1) for n in names)
    regime = replace(healthy().regimes[0], audits={"flash_fsdp": replace(found, by_parameter=odd)})
    charts = figures(replace(healthy(), regimes=(regime,)))
    shown = chart(charts, "noise_accuracy")
    curve = shown.figure.data[0]
    at = list(curve.x).index(2.0)
    assert shown.figure.layout.yaxis.ticktext[round(float(curve.y[at]))] == "layer77"
    assert "40 farthest from 1 of 100" in shown.caption


def test_a_mode_stands_once_in_the_legend_of_each_chart() -> None:
    group = profiled(large())
    profile = profile_of(group)
    assert profile is not None
    every = (*drawn(broken), *profile_charts(profile, Style.of_group(group)))
    shown = [each for each in every if each.figure.layout.showlegend is not False]
    assert len({each.section for each in shown}) > 4
    for each in shown:
        names = [t.name for t in each.figure.data if t.legendgroup and t.showlegend is not False]
        assert sorted(names) == sorted({t.name for t in each.figure.data if t.legendgroup})


def test_a_place_of_a_drift_is_found_by_its_number() -> None:
    data = chart(drawn(broken), "drift_clip_gradient").figure.data
    wrong = next(trace for trace in data if trace.name == GUILTY)
    pair = next(
        p for r in broken().regimes if r.name == "clip" for p in r.pairs if p.mode == GUILTY
    )
    places = [wrong.meta["names"][i] for i in wrong.customdata]
    assert places == list(pair.drifts["gradient"].where_per_step)
    assert len(set(places)) > 1


def test_a_drift_is_drawn_with_the_limit_of_the_verdict_for_the_item_drawn() -> None:
    curve = trace_of("drift_clip_gradient", broken)
    rungs = next(mode for mode in broken().modes if mode.label == GUILTY).ladders
    rung = next(r for r in rungs["clip", "reference"] if r.stage is Stage.SUM)
    assert rung.observable == "gradient"
    assert rung.step is not None
    row = list(curve.x).index(rung.step)
    limit = np.broadcast_to(curve.meta["limits"], curve.x.shape)[row]
    assert limit == pytest.approx(rung.limit, rel=1e-6)
    assert curve.y[row] * limit == pytest.approx(rung.value, rel=1e-6)
    assert curve.meta["names"][curve.customdata[row]] == rung.where


def test_a_drift_is_over_the_line_in_the_steps_that_the_verdict_calls_wrong() -> None:
    regime = next(each for each in broken().regimes if each.name == "clip")
    pair, floor = regime.pair(GUILTY), regime.floor_for(GUILTY)
    assert pair is not None
    names = ("sample_norm", "gradient", "grad_norm")
    assert all(limits_of(pair.drifts[name], floor) is not None for name in names)
    for name in names:
        curve = trace_of(f"drift_clip_{name}", broken)
        failing = excess_of(pair.drifts[name], broken().thresholds, floor).failing
        assert (curve.y > 1).tolist() == failing.tolist()
        assert failing.any()
        assert not failing.all()


def test_a_cell_of_a_layer_is_over_1_where_the_layer_is_over_its_limit() -> None:
    shares = trace_of("layers_clip", broken).z[:, 0]
    regime = next(each for each in broken().regimes if each.name == "clip")
    pair = regime.pair(GUILTY)
    assert pair is not None
    drift = pair.drifts["layer_grad_norm"]
    limits = limits_of(drift, regime.floor_for(GUILTY))
    assert limits is not None
    expected = np.log10((drift.matrix / limits).max(axis=0))
    np.testing.assert_allclose(shares, np.maximum(expected, -17), rtol=1e-4)


def test_nan_is_marked_from_the_step_in_which_it_begins() -> None:
    for name in ("sample_norm", "gradient", "grad_norm", "loss"):
        traces = figure_of(f"drift_clip_{name}", undefined).data
        (mark,) = [t for t in traces if t.marker.symbol == "x"]
        first = NAN_STEP + (name == "loss")
        assert list(mark.x) == list(range(first, 12)), name
        assert mark.name == f"{GUILTY}: NaN from step {first} on"
        assert mark.y.min() > 1, "no NaN lies below the limit"


def test_nan_is_hot_in_the_cells_of_its_layer() -> None:
    cells = trace_of("layers_clip", undefined)
    layers = [str(line[0]).split("<br>")[0] for line in cells.customdata]
    (at,) = (i for i, layer in enumerate(layers) if ".2." in layer)
    assert [text[0] == "NaN" for text in cells.text] == [i == at for i in range(4)]
    assert cells.z[at, 0] == 30
    cube = chart(drawn(undefined), "heatmap_clip").cube
    mode = next(m for m in cube["modes"] if m["mode"] == QUICK.index(GUILTY))
    codes = np.frombuffer(base64.b64decode(mode["bytes"]), np.uint8).reshape(12, 2, -1)
    at = cube["parameters"].index(GUILTY_LAYER)
    assert set(codes[NAN_STEP:, :, at].flat) == {NOTHING - 1}
    assert NOTHING - 1 not in codes[:NAN_STEP]


def test_nan_from_the_first_step_on_leaves_no_mode_out() -> None:
    comparison = undefined(0)
    marks = chart(figures(comparison), "drift_clip_grad_norm").figure.data
    assert [t.name for t in marks if t.marker.symbol == "x"] == [f"{GUILTY}: NaN from step 0 on"]
    row = next(row for row in rows(comparison) if row.label == GUILTY)
    shown = dict(zip(HEADINGS, row.cells, strict=True))
    assert {shown[name] for name in ("Δ grad norm", "Δ clipped sum")} == {"NaN"}


def test_long_names_keep_their_end_on_an_axis() -> None:
    names = ["model." + "x" * 80 + ".weight", "short"]
    assert name_axis(names, 20)["ticktext"][0].endswith(".weight")
    assert name_axis(names, 20)["ticktext"][1] == "short"


def test_every_trace_of_a_mode_can_be_filtered() -> None:
    for each in drawn(broken):
        for trace in each.figure.data:
            belongs_to_no_mode = each.cube or (trace.name or "").startswith(
                ("floor", "threshold", "limit", "as it should be")
            )
            assert belongs_to_no_mode or "mode" in trace.meta


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("flash_fsdp", "flash_fsdp"),
        (
            "defective_modes:NoiseByLocalShard",
            "defective_modes:<br>NoiseByLocalShard",
        ),
        ("a" * 40, f"{'a' * 18}<br>{'a' * 18}<br>aaaa"),
        ("<b>\n", "&lt;b&gt;\n"),
    ],
)
def test_names_above_columns_are_broken_and_not_lost(name: str, lines: str) -> None:
    assert wrapped(name) == lines


@pytest.mark.parametrize("name", ["trajectory_clip_loss", "trajectory_clip_grad_norm"])
def test_nan_of_a_trajectory_is_no_gap(name: str) -> None:
    (mark,) = [t for t in figure_of(name, undefined).data if t.marker.symbol == "x"]
    first = NAN_STEP + name.endswith("loss")
    assert list(mark.x) == list(range(first, 12))


def test_samples_with_nan_are_marked() -> None:
    (mark,) = [t for t in figure_of("samples_clip", undefined).data if t.marker.symbol == "x"]
    assert mark.name == f"{GUILTY}: {8 * (12 - NAN_STEP)} norms that are NaN or infinite"
