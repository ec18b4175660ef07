"""What charts are made of: no point that matters is lost, and no number changes on its way."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import numpy as np
import pytest

from dpsgd_track.comparison.profile import profile_of
from dpsgd_track.report.charts import Style, figures, profile_charts
from dpsgd_track.report.charts.curves import points_of_each, whole
from dpsgd_track.report.charts.heatmap import LOWEST, NOTHING, PER_DECADE, as_bytes
from dpsgd_track.report.charts.style import Chart, name_axis, wrapped
from dpsgd_track.report.html import chart_data
from tests.support.synthetic_group import (
    compared,
    healthy_runs,
    mode_run,
    scaled,
    trajectory,
    with_run,
)
from tests.support.synthetic_profile import large, profiled
from tests.support.synthetic_report import GUILTY, GUILTY_LAYER, audit, broken, healthy


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


@pytest.mark.parametrize("value", [1e-17, 3.3e-9, 1e-3, 0.08, 1.0])
def test_a_byte_of_the_heatmap_is_within_a_tenth_of_its_value(value: float) -> None:
    code = base64.b64decode(as_bytes(np.array([value])))[0]
    assert 10 ** (LOWEST + code / PER_DECADE) == pytest.approx(value, rel=0.1)


def test_bytes_of_the_heatmap_tell_nothing_from_zero_and_infinity() -> None:
    codes = base64.b64decode(as_bytes(np.array([np.nan, 0.0, np.inf])))
    assert list(codes) == [NOTHING, 0, NOTHING - 1]


def test_heatmap_of_the_faulty_mode_shows_its_layer_from_its_step_on_its_rank() -> None:
    cube = chart(figures(broken()), "heatmap_clip").cube
    order = list(dict.fromkeys(run.label for run in broken().group.runs))
    mode = next(each for each in cube["modes"] if each["mode"] == order.index(GUILTY))
    shape = (len(mode["first"]), len(mode["ranks"]), len(cube["parameters"]))
    codes = np.frombuffer(base64.b64decode(mode["bytes"]), np.uint8).reshape(shape)
    hot = codes > (np.log10(cube["threshold"]) - LOWEST) * PER_DECADE
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
    drawn = (*figures(broken()), *profile_charts(profile, Style.of_group(group)))
    shown = [each for each in drawn if each.figure.layout.showlegend is not False]
    assert len({each.section for each in shown}) > 4
    for each in shown:
        names = [t.name for t in each.figure.data if t.legendgroup and t.showlegend is not False]
        assert sorted(names) == sorted({t.name for t in each.figure.data if t.legendgroup})


def test_a_place_of_a_drift_is_found_by_its_number() -> None:
    data = chart(figures(broken()), "drift_clip_gradient").figure.data
    wrong = next(trace for trace in data if trace.name == GUILTY)
    pair = next(
        p for r in broken().regimes if r.name == "clip" for p in r.pairs if p.mode == GUILTY
    )
    places = [wrong.meta["names"][i] for i in wrong.customdata]
    assert places == list(pair.drifts["gradient"].where_per_step)
    assert len(set(places)) > 1


def test_long_names_keep_their_end_on_an_axis() -> None:
    names = ["model." + "x" * 80 + ".weight", "short"]
    assert name_axis(names, 20)["ticktext"][0].endswith(".weight")
    assert name_axis(names, 20)["ticktext"][1] == "short"


def test_every_trace_of_a_mode_can_be_filtered() -> None:
    for each in figures(broken()):
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
