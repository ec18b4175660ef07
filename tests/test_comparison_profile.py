"""What a profile's numbers come to. Nothing is launched."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console

from dpsgd_track.cli.main import main
from dpsgd_track.comparison import compare_group
from dpsgd_track.comparison.profile import Cost, CostStatus, over_limits, profile_of
from dpsgd_track.config import Settings, Thresholds
from dpsgd_track.record import names
from dpsgd_track.record.run import ModeRun, Status
from dpsgd_track.record.timings import Timings
from dpsgd_track.report.profile_json import PROFILE, profile_document, profile_json
from dpsgd_track.report.profile_table import plans, profile_csv, times
from dpsgd_track.report.text import print_profile
from dpsgd_track.report.write import write_profile, write_report
from dpsgd_track.store.golden import read_golden, write_golden
from dpsgd_track.store.reader import read_group
from tests.support.synthetic_group import Store, compared, failed, group_of, healthy_runs, verdicts
from tests.support.synthetic_profile import (
    large,
    missing,
    out_of_memory,
    profiled,
    timed_run,
    timings,
)

SCHEMA = PROFILE.json_schema()

BETWEEN = [
    timed_run("no_dp", 1, timings([10, 10, 10, 10], gib=2.0)),
    timed_run("flash_fsdp", 2, timings([10, 20, 30, 40, 50, 60], [33] * 6, gib=3.0)),
    timed_run("no_dp", 3, timings([20, 20, 20, 20], gib=4.0)),
    timed_run("flash_fsdp_bk", 4, timings([45, 45], gib=2.0)),
    timed_run("no_dp", 5, timings([1000, 1000], gib=90.0)),
]
"""Times that no two of the five have in common."""


def costs(runs: list[ModeRun]) -> dict[str, Cost]:
    found = profile_of(profiled(runs))
    assert found is not None
    return {cost.label: cost for cost in found.costs}


def test_a_mode_is_held_against_the_baseline_right_before_and_after_it() -> None:
    flash, other = costs(BETWEEN)["flash_fsdp"], costs(BETWEEN)["flash_fsdp_bk"]
    assert flash.baseline is not None
    assert other.baseline is not None
    assert (flash.baseline.step_time_ms, flash.baseline.peak_memory_gib) == (15.0, 3.0)
    assert flash.baseline.moved == 1.0  # twice as slow after it
    # Four steps of 20 ms and two of 1000.
    assert (other.baseline.step_time_ms, other.baseline.peak_memory_gib) == (20.0, 47.0)


def test_a_ratio_is_the_mode_over_the_baseline() -> None:
    flash = costs(BETWEEN)["flash_fsdp"]
    assert flash.time_ratio is not None
    assert flash.time_ratio.median == pytest.approx(35 / 15)
    assert flash.memory_ratio == pytest.approx(3.0 / 3.0)
    assert costs(BETWEEN)["flash_fsdp_bk"].memory_ratio == pytest.approx(2 / 47)


def test_the_spread_goes_from_the_20th_to_the_80th_percentile_of_untracked_steps() -> None:
    flash = costs(BETWEEN)["flash_fsdp"]
    assert flash.step_time_ms is not None
    assert flash.time_ratio is not None
    assert flash.step_time_ms.num_steps == 6
    assert (flash.step_time_ms.p20, flash.step_time_ms.p80) == pytest.approx((20, 50))
    assert (flash.time_ratio.p20, flash.time_ratio.p80) == pytest.approx((20 / 15, 50 / 15))


def test_tracked_steps_show_what_tracking_costs_and_nothing_else() -> None:
    runs = list(BETWEEN)
    flash = costs(runs)["flash_fsdp"]
    assert flash.tracking_overhead == pytest.approx(33 / 35 - 1)
    runs[1] = replace(runs[1], timings=timings([10, 20, 30, 40, 50, 60], [999] * 6))
    assert costs(runs)["flash_fsdp"].time_ratio == flash.time_ratio
    assert costs(runs)["flash_fsdp"].tokens_per_second == flash.tokens_per_second
    runs[0] = replace(runs[0], timings=timings([10] * 4, [999] * 4))
    assert costs(runs)["flash_fsdp"].time_ratio == flash.time_ratio


def test_a_baseline_is_one_row_of_all_its_runs_and_says_how_far_they_moved() -> None:
    base = costs(BETWEEN)["no_dp"]
    assert base.is_baseline
    assert base.time_ratio is None
    assert base.step_time_ms is not None
    assert (base.step_time_ms.median, base.step_time_ms.num_steps) == (20.0, 10)
    assert base.moved == pytest.approx(99.0)
    assert base.notes == ("moved 9900 %",)


def test_each_round_is_held_against_the_baseline_beside_it() -> None:
    """Processes that are twice as slow in the second round cancel."""
    rounds = [
        *(
            timed_run("no_dp", 1, timings([10] * 4)),
            timed_run("flash_fsdp", 2, timings([12] * 4, gib=3.0)),
        ),
        *(
            timed_run("no_dp", 3, timings([10] * 4)),
            timed_run("flash_fsdp", 4, timings([22] * 4, gib=3.0)),
        ),
        timed_run("no_dp", 5, timings([30] * 4)),
    ]
    flash = costs(rounds)["flash_fsdp"]
    assert flash.time_ratio is not None
    assert flash.baseline is not None
    assert flash.ratio_of_rounds == pytest.approx((1.2, 1.1))
    assert (flash.time_ratio.median, flash.time_ratio.num_steps) == (pytest.approx(1.15), 8)
    assert (flash.memory_ratio, flash.baseline.num_runs) == (3.0, 4)
    assert flash.baseline.moved == 2.0
    assert flash.notes == ("baseline moved +200 %", "2 rounds, 1.10 to 1.20")
    rounds[1] = out_of_memory("flash_fsdp", 2)
    flash = costs(rounds)["flash_fsdp"]
    assert flash.ratio_of_rounds == pytest.approx((1.1,))
    assert flash.notes == ("baseline moved +200 %", "1 of 2 runs not measured")


def test_modes_on_one_device_are_held_against_their_own_baseline() -> None:
    alone = [
        timed_run("no_dp_single", 6, timings([100])),
        timed_run("flash_bk", 7, timings([150])),
        timed_run("no_dp_single", 8, timings([100])),
    ]
    found = costs([*BETWEEN, *alone])
    assert found["no_dp_single"].is_baseline
    assert found["flash_bk"].baseline is not None
    assert found["flash_bk"].baseline.label == "no_dp_single"
    assert found["flash_bk"].time_ratio is not None
    assert found["flash_bk"].time_ratio.median == 1.5


def test_a_variant_is_held_against_the_installed_baseline() -> None:
    runs = [*BETWEEN[:3], timed_run("no_dp", 4, timings([30]), variant="b"), replace(BETWEEN[4])]
    found = costs(runs)["no_dp@b"]
    assert found.baseline is not None
    assert (found.baseline.label, found.baseline.num_runs) == ("no_dp", 2)


def test_shapes_are_not_mixed() -> None:
    found = profile_of(profiled(large()))
    assert found is not None
    for cost in found.costs:
        if cost.label == "flash_fsdp_bk":
            assert cost.time_ratio is not None
            assert cost.time_ratio.median == pytest.approx(1.4, rel=0.03)
    assert found.shapes == ((1024, 2), (4096, 2), (16384, 2))


def test_out_of_memory_is_a_result_and_a_failure_is_none() -> None:
    lost = [BETWEEN[0], out_of_memory("flash_fsdp", 2), *BETWEEN[2:]]
    found = profile_of(profiled(lost))
    assert found is not None
    assert found.incomplete == ()
    cost = next(cost for cost in found.costs if cost.label == "flash_fsdp")
    assert (cost.status, cost.notes) == (CostStatus.OUT_OF_MEMORY, ("out of memory",))
    assert cost.step_time_ms is cost.time_ratio is cost.memory_ratio is None
    assert found.sentence == "3 modes at 1 shape, 2 measured, 1 out of memory."

    broken = timed_run("flash_fsdp", 2, status=Status.FAILED, failure=failed("no"))
    found = profile_of(profiled([BETWEEN[0], broken, *BETWEEN[2:]]))
    assert found is not None
    assert found.incomplete == (
        "flash_fsdp (T=64, B=2) is FAILED: the worker raised an exception: no",
    )


@pytest.mark.parametrize("index", [0, 1])
def test_a_run_that_is_missing_leaves_the_profile_incomplete(index: int) -> None:
    runs = list(BETWEEN)
    runs[index] = missing(runs[index])
    found = profile_of(profiled(runs))
    assert found is not None
    assert len(found.incomplete) == 1
    if index == 0:
        flash = costs(runs)["flash_fsdp"]
        assert flash.baseline is not None
        assert (flash.baseline.num_runs, flash.baseline.moved) == (1, None)
        assert flash.notes == ("held against one baseline run",)


def test_a_mode_without_a_baseline_has_times_and_no_ratio() -> None:
    runs = [out_of_memory("no_dp", 1), BETWEEN[1], out_of_memory("no_dp", 3)]
    flash = costs(runs)["flash_fsdp"]
    assert flash.step_time_ms is not None
    assert flash.time_ratio is flash.memory_ratio is None
    assert flash.notes == ("no baseline was measured beside it",)


def test_what_is_compared_takes_no_notice_of_a_profile() -> None:
    with_profile = compare_group(group_of(healthy_runs(), timed_runs=tuple(large())), Thresholds())
    assert verdicts(with_profile) == verdicts(compared(healthy_runs()))
    assert "profile" not in {regime.name for regime in with_profile.regimes}


def test_every_row_of_the_csv_stands_alone() -> None:
    group = profiled(large())
    found = profile_of(group)
    assert found is not None
    rows = list(csv.DictReader(io.StringIO(profile_csv(found, group))))
    # Of each of 16 measured costs five figures, and a row for each that ran out of memory.
    assert len(rows) == 16 * 5 + 2
    assert {row["torch"] for row in rows if row["status"] == "measured"} == {"2.13.0"}
    assert {row["date"] for row in rows} == {"2023-11-14T22:13:20Z"}
    (time,) = (
        row
        for row in rows
        if (row["mode"], row["quantity"], row["seq_length"]) == ("flash_fsdp", "step_time", "1024")
    )
    assert float(time["median"]) / float(time["baseline_median"]) == pytest.approx(
        float(time["ratio"]), rel=1e-4
    )
    assert float(time["p20"]) < float(time["median"]) < float(time["p80"])
    lost = [row for row in rows if row["status"] == "out of memory"]
    assert {(row["mode"], row["median"]) for row in lost} == {
        ("ghost_fsdp", ""),
        ("flash_fsdp", ""),
    }


def test_json_is_as_its_schema_says_and_is_read_back() -> None:
    runs = [*large(), missing(timed_run("flash_fsdp", 99, shape=(8, 1)))]
    group = profiled(runs)
    found = profile_of(group)
    assert found is not None
    text = profile_json(found, group)
    assert PROFILE.loads(text) == profile_document(found, group)
    cost = SCHEMA["$defs"]["CostEntry"]
    assert cost["properties"]["step_time_ms"]["description"] == "Untracked steps."
    assert set(cost["required"]) == set(cost["properties"])
    document = json.loads(text)
    assert (document["schema"], document["schema_version"]) == ("dpsgd-track/profile", 1)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    del document["costs"][0]["status"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(document)


def test_like_layers_and_shapes_are_one_row_of_the_plan() -> None:
    found = profile_of(profiled(large()))
    assert found is not None
    rows = [row for row in plans(found) if row[0] == "flash_fsdp_bk"]
    assert rows == [
        ("flash_fsdp_bk", "model.layers.*.self_attn.q_proj (3)", "gram", "every shape"),
        ("flash_fsdp_bk", "model.layers.*.mlp.down_proj (3)", "gradient", "every shape"),
    ]


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_the_terminal_table_keeps_names_and_numbers_whole(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    found = profile_of(profiled(large()))
    assert found is not None
    print_profile(found, "profile", console)
    table, _, notes = console.export_text().partition("└")
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= width
    for cost in found.costs:
        assert f" {cost.label} " in table
        if cost.time_ratio is not None:
            assert f" {times(cost.time_ratio)} " in table
    # Memory is half of what a profile is for.
    assert ("memory" in table) == (width >= 80)
    assert ("tokens/s" in table) == (width >= 120)
    assert "ghost_fsdp, T=16384, B=2: out of memory." in notes


def test_a_report_shows_the_profile_alone_or_beside_the_verdict(tmp_path: Path) -> None:
    group = profiled(large())
    found = profile_of(group)
    assert found is not None
    alone = {path.name for path in write_profile(found, group, tmp_path / "alone", png=False)}
    charts = {
        f"profile_{name}.html"
        for name in ("memory", "step_time", "overhead", "memory_against_time")
    }
    texts = {"report.html", "report.md", "summary.txt"}
    assert alone == {*charts, *texts, "profile.csv", "profile.json"}
    for name in texts:
        text = (tmp_path / "alone" / name).read_text(encoding="utf-8")
        assert "out of memory" in text
        assert "INCONCLUSIVE" not in text.partition("<body>")[2]
    both = compare_group(group_of(healthy_runs(), timed_runs=tuple(large())), Thresholds())
    files = {path.name for path in write_report(both, tmp_path / "both", png=False)}
    assert files >= {*alone, "drift.json", "junit.xml"}
    for name in texts:
        text = (tmp_path / "both" / name).read_text(encoding="utf-8")
        assert "PASS" in text
        assert "Speed and memory" in text
        assert "out of memory" in text


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    return Store(tmp_path)


def _add(store: Store, runs: list[ModeRun], expected: list[ModeRun]) -> None:
    group_id = store.add_group([], "profile", expected=expected)
    for run in runs:
        run_id = store.add_run(replace(run, timings=None), "profile", group_id)
        if run.timings:
            path = store.folder / names.TIMINGS_FILE
            run.timings.save(path)
            store.client.log_artifact(run_id, str(path))


@pytest.mark.parametrize(
    ("second", "code"),
    [
        pytest.param(BETWEEN[1], 0, id="measured"),
        pytest.param(out_of_memory("flash_fsdp", 2), 0, id="out of memory"),
        pytest.param(timed_run("flash_fsdp", 2, status=Status.FAILED), 3, id="failed"),
        pytest.param(timed_run("flash_fsdp", 2), 3, id="no timings"),
        pytest.param(None, 3, id="missing"),
    ],
)
def test_compare_ends_with_0_when_every_run_gave_a_result(
    store: Store, second: ModeRun | None, code: int
) -> None:
    runs = [BETWEEN[0], *([second] if second else []), BETWEEN[2]]
    _add(store, runs, BETWEEN[:3])
    options = ["profile", "--tracking-uri", store.uri, "--no-png"]
    assert main(["compare", *options, *(["--no-log"] if code else [])]) == code
    settings = Settings(tracking_uri=store.uri)
    group = read_group(store.client, settings, "profile")
    assert group.runs == ()
    assert [run.order for run in group.timed_runs] == [1, 2, 3]
    assert group.timed_runs[0].timings == BETWEEN[0].timings


def test_a_profile_is_compared_with_no_other_group_and_kept_in_no_golden_file(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    _add(store, BETWEEN[:3], BETWEEN[:3])
    options = ["--tracking-uri", store.uri, "--no-png", "--no-log"]
    assert main(["compare", "profile", "profile", *options]) == 2
    assert "whose times mean something beside each other alone" in capsys.readouterr().err
    assert main(["compare", "profile", "--export", "x.dpsgd", *options]) == 2
    mixed = group_of(healthy_runs(), timed_runs=tuple(BETWEEN))
    write_golden(mixed, Path("y.dpsgd"))
    kept = read_golden(Path("y.dpsgd"))
    assert (len(kept.runs), kept.timed_runs) == (len(mixed.runs), ())


def test_a_torn_record_is_told_from_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / names.TIMINGS_FILE
    timings([1, 2]).save(path)
    assert Timings.load(path) == timings([1, 2])
    whole = path.read_text()
    for broken in (whole[:-9], "[]", whole.replace("timings", "other"), whole.replace("1.1", "-1")):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"timings.json: .*dpsgd-track/timings"):
            Timings.load(path)


def exceeded(runs: list[ModeRun], *limits: float | None) -> list[str]:
    profile = profile_of(profiled(runs))
    assert profile is not None
    return over_limits(profile, *limits)


def test_a_mode_over_a_limit_is_told_with_its_ratio() -> None:
    found = costs(BETWEEN)["flash_fsdp"]
    assert found.time_ratio is not None
    assert found.memory_ratio == 1.0
    ratio = found.time_ratio.median
    # At the limit is within it.
    assert exceeded(BETWEEN[:3], ratio, 1.0) == []
    assert exceeded(BETWEEN[:3], None, None) == []
    (slow,) = exceeded(BETWEEN[:3], ratio - 0.01, 1.0)
    assert slow.startswith("flash_fsdp (T=")
    assert f"{ratio:.3g} times the step time of the baseline, over {ratio - 0.01:g}" in slow
    (large_,) = exceeded(BETWEEN[:3], None, 0.9)
    assert "1 times the peak memory of the baseline, over 0.9" in large_


def test_a_mode_without_a_ratio_never_passes_a_limit() -> None:
    lost = [BETWEEN[0], out_of_memory("flash_fsdp", 2), BETWEEN[2]]
    (slow, memory) = exceeded(lost, 1.1, 1.1)
    assert "no step time to hold against 1.1: out of memory" in slow
    assert "no peak memory to hold against 1.1" in memory
