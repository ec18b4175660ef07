"""What other programs read: JUnit XML, GitHub annotations, drift.json, and the comment."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import numpy as np
import pytest
from rich.console import Console

from dpsgd_track.comparison import GroupComparison, compare_group, compare_groups
from dpsgd_track.comparison.diagnose.ladder import StageStatus
from dpsgd_track.comparison.verdict import Verdict
from dpsgd_track.config import Thresholds
from dpsgd_track.record.run import ModeRun
from dpsgd_track.report.annotations import MOST, workflow_commands
from dpsgd_track.report.brief import brief
from dpsgd_track.report.charts import figures
from dpsgd_track.report.drift_document import DRIFT
from dpsgd_track.report.drift_json import drift_document, drift_json
from dpsgd_track.report.html import html
from dpsgd_track.report.junit import junit
from dpsgd_track.report.markdown import markdown, note, prose
from dpsgd_track.report.stages import advice, multiple, stage_tables
from dpsgd_track.report.text import print_table, summary
from tests.support.synthetic_group import (
    compared,
    failed,
    group_of,
    healthy_runs,
    mode_run,
    put,
    scaled,
    trajectory,
    with_run,
)
from tests.support.synthetic_profile import timed_run, timings
from tests.support.synthetic_report import GUILTY, broken, healthy, hostile

SCHEMA = DRIFT.json_schema()
ROOT = Path(__file__).resolve().parent.parent


def many_wrong(count: int) -> GroupComparison:
    wrong = scaled(trajectory(noise_std=0.0), "grad_norm", 1.1)
    modes = [mode_run(f"mode{i}", "clip", wrong) for i in range(count)]
    return compared([mode_run("reference", "clip"), *modes])


def inconclusive() -> GroupComparison:
    return compared([*healthy_runs(), mode_run("ghost_fsdp", "clip", status="KILLED")])


def not_finite() -> GroupComparison:
    record = put(trajectory(noise_std=0.0), "loss", np.nan, 1)
    record = put(record, "grad_norm", np.inf, 1)
    return compared(with_run(healthy_runs(), mode_run("flash_fsdp", "clip", record)))


def annotated(comparison: GroupComparison) -> str:
    return workflow_commands(comparison).replace("%25", "%")


def nothing() -> GroupComparison:
    return compared([])


def nothing_tested() -> GroupComparison:
    """An audit without a number, of noise that overflowed."""
    made = healthy()
    regimes = []
    for regime in made.regimes:
        audits = {
            label: replace(
                audit,
                checks=tuple(replace(check, value=np.nan, low=-np.inf) for check in audit.checks),
                by_parameter=(("head.weight", np.inf, np.nan, np.nan),),
            )
            for label, audit in regime.audits.items()
        }
        regimes.append(replace(regime, audits=audits))
    return replace(made, regimes=tuple(regimes))


EVERY = [healthy, broken, inconclusive, not_finite, nothing, hostile]


@pytest.mark.parametrize("made", EVERY, ids=lambda made: made.__name__)
def test_junit_fails_exactly_where_the_group_does(made: Any) -> None:
    comparison = made()
    root = ET.fromstring(junit(comparison))
    outcomes = {kind: len(root.findall(f".//{kind}")) for kind in ("failure", "error")}
    assert (outcomes["failure"] > 0) == (comparison.verdict in (Verdict.BUG, Verdict.DRIFT))
    assert any(outcomes.values()) == (comparison.verdict is not Verdict.PASS)
    for suite in root:
        assert int(suite.get("tests", -1)) == len(suite.findall("testcase"))
        assert int(suite.get("failures", -1)) == len(suite.findall("testcase/failure"))
        assert int(suite.get("errors", -1)) == len(suite.findall("testcase/error"))
        names = [(case.get("classname"), case.get("name")) for case in suite]
        assert len(set(names)) == len(names)


def test_junit_fails_at_the_stage_that_introduced_the_error_and_skips_the_heirs() -> None:
    root = ET.fromstring(junit(broken()))
    outcome = {
        (case.get("classname"), case.get("name")): case[0].tag if len(case) else "passed"
        for case in root.iterfind("testsuite[@name='clip']/testcase")
    }
    stages = {
        "loss": "passed",
        "per-sample norms": "failure",
        "clip factors": "skipped",
        "clipped sum": "skipped",
    }
    for stage, expected in stages.items():
        assert outcome[GUILTY, f"{stage}, against reference"] == expected
    assert outcome["flash_fsdp", "per-sample norms, against reference"] == "passed"
    failure = root.find(f".//testcase[@classname='{GUILTY}']/failure[@message]")
    assert failure is not None


def test_junit_survives_characters_that_xml_lacks() -> None:
    run = mode_run(
        "m:\x00\x1b]]>\ud800\ufffe<&\"'", "clip", status="FAILED", failure=failed("a\x0bb")
    )
    root = ET.fromstring(junit(compared([*healthy_runs(), run])))
    names = {case.get("classname") for case in root.iter("testcase")}
    assert "m:\ufffd\ufffd]]>\ufffd\ufffd<&\"'" in names


def test_an_accepted_drift_fails_no_test() -> None:
    modes = tuple(
        replace(
            mode,
            findings=tuple(
                replace(f, waiver=broken().modes[1].findings[0].waiver) for f in mode.findings
            ),
        )
        for mode in broken().modes
    )
    waived = replace(broken(), modes=modes, verdict=Verdict.PASS)
    root = ET.fromstring(junit(waived))
    assert not root.findall(".//failure")
    assert not root.findall(".//error")
    assert workflow_commands(waived) == ""
    assert "accepted drifts are listed under Waivers" in advice(waived)


def test_annotations_are_one_line_each_and_escaped() -> None:
    comparison = compared(
        [
            *healthy_runs(),
            mode_run(
                "m:a,b%\n::error::x", "clip", status="FAILED", failure=failed("50% gone\r\n::stop")
            ),
        ]
    )
    (line,) = workflow_commands(comparison).splitlines()
    command, title, message = re.fullmatch(r"::(\w+) title=([^:,]*)::(.*)", line).groups()
    assert command == "warning"
    assert title == "INCONCLUSIVE%3A m%3Aa%2Cb%25%0A%3A%3Aerror%3A%3Ax in clip"
    assert "50%25 gone%0D%0A::stop" in message


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (MOST, MOST), (MOST + 5, MOST)])
def test_no_more_annotations_than_are_shown(count: int, shown: int) -> None:
    lines = workflow_commands(many_wrong(count)).splitlines()
    assert len(lines) == shown
    assert all(line.startswith("::error ") for line in lines)
    assert ("6 more" in lines[-1]) == (count > MOST)


def test_a_healthy_group_has_no_annotations() -> None:
    assert workflow_commands(healthy()) == ""


@pytest.mark.parametrize("made", EVERY, ids=lambda made: made.__name__)
def test_drift_json_meets_its_schema_and_is_read_back(made: Any) -> None:
    text = drift_json(made())
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(text))
    assert DRIFT.loads(text) == drift_document(made())


@pytest.mark.parametrize("made", [*EVERY, nothing_tested], ids=lambda made: made.__name__)
def test_drift_json_has_no_number_that_json_lacks(made: Any) -> None:
    def refuse(literal: str) -> None:
        raise AssertionError(literal)

    json.loads(drift_json(made()), parse_constant=refuse)


def test_schema_is_valid_and_says_what_fields_mean() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for entry in ("DriftEntry", "LargestEntry"):
        largest = SCHEMA["$defs"][entry]["properties"]["max"]
        assert largest["description"].startswith("Largest difference")
        assert {"type": "null"} in largest["anyOf"]


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("verdict",), "MAYBE"),
        (("schema_version",), 1),
        (("surprise",), 1),
        (("modes", 0, "ladders", 0, "stages", 0, "status"), "fine"),
        (("modes", 0, "findings"), None),
        (("table", 0, "final_loss"), "NaN"),
        (("regimes", 0, "noise_audits", 0, "source"), "guesses"),
        (("regimes", 0, "noise_audits", 0, "checks", 0, "is_ok"), "yes"),
    ],
)
def test_schema_refuses_what_is_not_meant(where: tuple[Any, ...], value: Any) -> None:
    document = json.loads(drift_json(broken()))
    at = document
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(document)


def test_drift_json_has_ladders_culprits_audits_waivers_and_differences() -> None:
    document = json.loads(drift_json(broken()))
    guilty = next(mode for mode in document["modes"] if mode["label"] == GUILTY)
    ladder = next(each for each in guilty["ladders"] if each["regime"] == "clip")
    assert [stage["status"] for stage in ladder["stages"]][2:5] == ["ok", "introduced", "inherited"]
    assert guilty["culprits"] == [guilty["culprit"]]
    assert (guilty["culprit"]["ranks"], guilty["culprit"]["places"]) == (
        [1],
        ["model.layers.2.weight"],
    )
    assert document["regimes"][0]["noise_audits"][0]["checks"][0]["is_ok"] is True
    waivers = [f["waiver"] for mode in document["modes"] for f in mode["findings"] if f["waiver"]]
    assert [waiver["expires"] for waiver in waivers] == ["2026-12-31"]
    assert document["environment_differences"][0] == {
        "setting": "torch",
        "before": "2.12.1",
        "after": "2.13.0",
    }


@pytest.mark.parametrize(
    ("value", "limit", "said"),
    [
        (0.08, 1e-3, "80 × limit"),
        (5e-6, 1e-4, "0.05 × limit"),
        (1e-7, 1e-3, "< 0.01 × limit"),
        (0.0, 1e-3, "0 × limit"),
        (0.0, 0.0, "0 × limit"),
        (1e-9, 0.0, "over a limit of 0"),
        (float("nan"), 1e-3, ""),
        (None, 1e-3, ""),
    ],
)
def test_multiple_of_a_limit(value: float | None, limit: float, said: str) -> None:
    assert multiple(value, limit) == said


def test_stages_that_went_wrong_come_first() -> None:
    tables = stage_tables(broken())
    assert (tables[0].regime, tables[0].against) == ("clip", "reference")
    assert tables[0].lines[0].label == GUILTY
    assert [table.is_wrong for table in tables] == [True, False, False]
    statuses = {cell.stage: cell.status for cell in tables[0].lines[0].cells}
    assert statuses["per-sample norms"] is StageStatus.INTRODUCED


def test_the_sentence_names_where_to_start_and_the_advice_what_to_do() -> None:
    assert advice(healthy()).startswith("Safe to merge")
    what = "computes wrong per-sample norms: they are 1.08 times the right ones"
    where = "First at step 3 of clip, in model.layers.2.weight"
    assert f"BUG: {GUILTY} {what}" in broken().sentence
    assert f". {where}" in broken().sentence
    assert advice(broken()).startswith("Do not merge")
    assert "irst at step 0 of clip" in many_wrong(1).sentence
    assert advice(inconclusive()).startswith("Do not merge on this evidence")


@pytest.mark.parametrize("told", [markdown, lambda c: html(c, figures(c)), summary, annotated])
def test_every_form_says_once_what_went_wrong_and_counts_the_rest(told: Any) -> None:
    text = told(broken())
    assert text.count("First at step 3 of clip, in model.layers.2.weight") == 1
    assert text.lower().count("too large by up to 8 % against reference") == 1
    assert ("more findings" in text) is (told is not annotated)


def two_groups() -> GroupComparison:
    """The broken group after the healthy one."""
    return compare_groups(healthy().group, broken().group, Thresholds())


@pytest.mark.parametrize(
    "made",
    [healthy, broken, inconclusive, not_finite, hostile, two_groups],
    ids=lambda made: made.__name__,
)
def test_a_comment_is_six_lines_and_the_rest_folded(made: Any) -> None:
    comparison = made()
    text = markdown(comparison, "https://ci.example/7", "Since abc1234: drifts unchanged.")
    assert re.search(r"^- \*\*Cost:\*\* .* Since abc1234: drifts unchanged\.$", text, re.M)
    shown, folded = text.split("<details>", 1)
    unfenced = re.sub(r"^(`{3,})sh$.*?^\1$", "", shown, flags=re.DOTALL | re.MULTILINE)
    heading, *lines = filter(None, unfenced.splitlines())
    assert heading.startswith("## ")
    assert f" {comparison.verdict}: " in heading
    titles = [re.match(r"- \*\*([\w ]+):\*\* [^ .]", line)[1] for line in lines]
    assert titles == ["What", "Where", "How sure", "Cost", "Report"]
    assert lines[-1].count("](https://ci.example/7)") == 1
    assert re.sub(r"</details>\s*(<details>|$)", "", folded).count("details>") == 0


def test_the_six_lines_name_the_culprit_and_the_first_table_its_stage() -> None:
    text = markdown(broken())
    what, where, sure = re.findall(r"^- \*\*(?:What|Where|How sure):\*\* (.*)$", text, re.M)
    assert prose(f"{GUILTY} computes wrong per-sample norms: they are 1.08 times") in what
    assert where.startswith("First at step 3 of clip, in model.layers.2.weight, of all samples of")
    assert sure.startswith("Too large by up to 8 % against reference (rounding explains 0.01 %).")
    assert "✗ introduced" in text.split("</details>")[0]
    assert "✗ introduced" not in markdown(healthy())


def test_cost_is_that_of_a_variant_beside_the_same_mode() -> None:
    runs = [
        timed_run(mode, order, timings([time_ms]), variant=variant)
        for order, (mode, variant, time_ms) in enumerate(
            [
                ("no_dp", "", 100.0),
                ("flash_fsdp", "", 120.0),
                ("no_dp", "", 100.0),
                ("flash_fsdp", "branch", 126.0),
                ("no_dp", "", 100.0),
            ],
            1,
        )
    ]

    def cost(timed: Sequence[ModeRun]) -> str:
        group = group_of(healthy_runs(), timed_runs=tuple(timed))
        return brief(compare_group(group, Thresholds())).cost

    assert cost(runs) == "flash_fsdp@branch is 5 % slower than flash_fsdp."
    assert cost(runs[:3]) == "flash_fsdp takes 1.20 × the time of no_dp."
    assert cost([]).startswith("Not measured")
    restless = replace(runs[2], timings=timings([112.0]))
    assert "its baseline moved by 12 %" in cost([*runs[:2], restless])


def test_sections_without_data_say_so_in_one_line() -> None:
    bare = compared([mode_run("no_dp"), mode_run("x", status="MISSING")])
    text = html(bare, figures(bare))
    assert "Left out: no two runs could be compared stage by stage." in text
    assert "Left out: no mode&#39;s own noise was audited." in text
    assert "Waivers" not in text
    assert "What differs between the two groups" not in text


def test_note_of_a_large_group_shows_the_worst_modes() -> None:
    wrong = scaled(trajectory(noise_std=0.0), "grad_norm", 1.1)
    runs = [mode_run("reference", "clip")]
    runs += [mode_run(f"mode{i}", "clip") for i in range(80)]
    text = note(compared([*runs, mode_run("bad", "clip", wrong)]))
    assert "| bad | ❌ BUG |" in text
    assert "_And 22 more in report.html._" in text


def test_terminal_still_prints_a_group_of_every_kind() -> None:
    for made in EVERY:
        console = Console(width=120, file=io.StringIO())
        print_table(made(), console)
        assert made().verdict in console.file.getvalue()
