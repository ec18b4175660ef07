"""A waiver accepts what it names, for as long as it says, and nothing else."""

from __future__ import annotations

import datetime
import io
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from dpsgd_track.cli.main import main
from dpsgd_track.comparison import GroupComparison, Verdict, compare_group
from dpsgd_track.comparison.waivers import Waiver, load_waivers, matches
from dpsgd_track.config import Thresholds
from dpsgd_track.report.drift_json import drift_json
from dpsgd_track.report.html import html
from dpsgd_track.report.markdown import markdown
from dpsgd_track.report.text import print_table, summary
from tests.support.synthetic_group import (
    Store,
    failed,
    group_of,
    healthy_runs,
    mode_run,
    put,
    scaled,
    with_run,
)

TODAY = datetime.date(2026, 6, 15)
LATER = datetime.date(2026, 12, 31)
HOSTILE = "<script>alert(1)</script> | `**[x](http://e.vil)@you \"'; rm -rf / \x1b[2J"


def waiver(mode: str = "flash_fsdp", observable: str = "grad_norm", **more: object) -> Waiver:
    settings = {"reason": "known since #1", "expires": LATER, **more}
    return Waiver(mode=mode, observable=observable, **settings)


def drifting(factor: float = 1.004, *columns: int) -> list:
    """Healthy runs, but for flash_fsdp's gradient norm, or layer norms, in clip."""
    record = mode_run("flash_fsdp", "clip").trajectory
    if columns:
        for column in columns:
            record = scaled(record, "layer_grad_norm", factor, (1, column))
    else:
        record = scaled(record, "grad_norm", factor, 1)
    return with_run(healthy_runs(), mode_run("flash_fsdp", "clip", record))


def judged(runs: list, *waivers: Waiver, today: datetime.date = TODAY) -> GroupComparison:
    return compare_group(group_of(runs), Thresholds(), waivers, today)


def verdict_of(comparison: GroupComparison, label: str = "flash_fsdp") -> Verdict:
    return next(mode.verdict for mode in comparison.modes if mode.label == label)


@pytest.mark.parametrize(
    "given",
    [
        waiver(),
        waiver(mode="flash*"),
        waiver(mode="*"),
        waiver(observable="*"),
        waiver(regime="clip"),
        waiver(regime="c*"),
        waiver(up_to=0.005),
        waiver(expires=TODAY),
    ],
    ids=lambda w: w.title,
)
def test_a_drift_that_a_waiver_accepts_passes_and_stays_visible(given: Waiver) -> None:
    comparison = judged(drifting(), given)
    assert comparison.verdict is verdict_of(comparison) is Verdict.PASS
    mode = next(mode for mode in comparison.modes if mode.label == "flash_fsdp")
    assert [(f.verdict, f.waiver) for f in mode.findings] == [(Verdict.DRIFT, given)]
    assert "gradient norm differs from reference in clip" in mode.sentence
    until = f"1 finding waived until {given.expires}"
    assert until in mode.sentence
    assert until in comparison.sentence
    assert comparison.waiver_notes == ()


@pytest.mark.parametrize(
    "given",
    [
        waiver(mode="flash"),
        waiver(mode="flash_fsdp_fuse"),
        waiver(mode="flash_fsdp@*"),
        waiver(observable="layer_grad_norm"),
        waiver(regime="accuracy"),
        waiver(up_to=0.003),
    ],
    ids=lambda w: w.title,
)
def test_a_waiver_for_something_else_accepts_nothing_and_is_called_unneeded(given: Waiver) -> None:
    comparison = judged(drifting(), given)
    assert verdict_of(comparison) is Verdict.DRIFT
    assert comparison.waiver_notes == (
        f"The waiver for {given.title} was not needed: no such drift was found "
        "(its reason: known since #1).",
    )


def test_an_expired_waiver_accepts_nothing_and_is_told() -> None:
    comparison = judged(drifting(), waiver(), today=LATER + datetime.timedelta(days=1))
    assert comparison.verdict is Verdict.DRIFT
    assert "expired on 2026-12-31 and was not applied" in comparison.waiver_notes[0]


def test_a_bug_can_be_waived_by_name() -> None:
    assert judged(drifting(1.5)).verdict is Verdict.BUG
    assert judged(drifting(1.5), waiver()).verdict is Verdict.PASS


def test_a_second_drift_behind_a_waived_one_still_fails() -> None:
    record = mode_run("flash_fsdp", "clip").trajectory
    both = put(scaled(record, "grad_norm", 1.004, 1), "loss", 9.0, 2)
    comparison = judged(with_run(healthy_runs(), mode_run("flash_fsdp", "clip", both)), waiver())
    assert verdict_of(comparison) is Verdict.BUG
    mode = next(mode for mode in comparison.modes if mode.label == "flash_fsdp")
    assert "loss" in mode.sentence.split(" differs")[0]
    assert "1 finding waived" in mode.sentence


def test_a_stage_that_is_waived_is_neither_the_culprit_nor_called_right() -> None:
    record = mode_run("flash_fsdp", "clip").trajectory
    both = scaled(scaled(record, "sample_loss", 1.5, 1), "gradient_sketch", 1.5, 2)
    runs = with_run(healthy_runs(), mode_run("flash_fsdp", "clip", both))
    (alone,) = (m for m in judged(runs).modes if m.label == "flash_fsdp")
    assert alone.culprit is not None
    assert (alone.culprit.stage, alone.culprit.step) == ("loss", 1)
    given = waiver(observable="sample_loss")
    (mode,) = (m for m in judged(runs, given).modes if m.label == "flash_fsdp")
    assert mode.culprit is not None
    assert (mode.culprit.stage, mode.culprit.step) == ("clipped sum", 2)
    assert "the loss" not in mode.sentence
    (mode,) = (m for m in judged(runs, waiver(observable="*")).modes if m.label == "flash_fsdp")
    assert (mode.verdict, mode.culprit) == (Verdict.PASS, None)


def test_waived_findings_come_last_however_bad() -> None:
    record = mode_run("flash_fsdp", "clip").trajectory
    both = scaled(scaled(record, "grad_norm", 1.5, 1), "layer_grad_norm", 1.004, (1, 0))
    runs = with_run(healthy_runs(), mode_run("flash_fsdp", "clip", both))
    comparison = judged(runs, waiver())
    mode = next(mode for mode in comparison.modes if mode.label == "flash_fsdp")
    assert mode.verdict is Verdict.DRIFT
    assert [(f.observable, bool(f.waiver)) for f in mode.findings] == [
        ("layer_grad_norm", False),
        ("grad_norm", True),
    ]


LAYER = "layer model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("where", [LAYER, "layer model.layers.0.*"])
def test_a_waiver_of_one_layer_does_not_hide_another(where: str) -> None:
    given = waiver(observable="layer_grad_norm", where=where)
    assert verdict_of(judged(drifting(1.2, 0), given)) is Verdict.PASS
    assert verdict_of(judged(drifting(1.2, 1), given)) is Verdict.BUG
    # The waived one is the larger, so that the finding names it alone.
    record = scaled(mode_run("flash_fsdp", "clip").trajectory, "layer_grad_norm", 1.5, (1, 0))
    for factor in (1.01, 1.2):
        both = scaled(record, "layer_grad_norm", factor, (1, 1))
        runs = with_run(healthy_runs(), mode_run("flash_fsdp", "clip", both))
        assert verdict_of(judged(runs, given)) is Verdict.BUG


EVERYTHING = (waiver(observable="*"), waiver(mode="*"), waiver(mode="*", observable="loss"))
RECORD = mode_run("flash_fsdp", "clip").trajectory


@pytest.mark.parametrize(
    "run",
    [
        mode_run("flash_fsdp", "clip", status="FAILED", failure=failed("oom")),
        mode_run("flash_fsdp", "clip", status="MISSING"),
        mode_run("flash_fsdp", "clip", put(RECORD, "loss", np.nan, 1)),
        mode_run("flash_fsdp", "clip", put(RECORD, "grad_norm", np.inf, 1)),
        mode_run("flash_fsdp", "clip", put(RECORD, "sample_norm", np.nan)),
        mode_run("flash_fsdp", "clip", replace(RECORD, initial_weights_hash="other")),
    ],
    ids=["failed", "missing", "NaN", "inf", "no-norms", "unlike"],
)
def test_what_is_no_drift_is_never_waived(run) -> None:
    comparison = judged(with_run(healthy_runs(), run), *EVERYTHING)
    assert verdict_of(comparison) is not Verdict.PASS
    waived = [f for mode in comparison.modes for f in mode.findings if f.waiver]
    assert all(f.value is not None and np.isfinite(f.value) for f in waived)


def test_clipping_that_was_not_tested_is_never_waived() -> None:
    fraction = put(mode_run("reference", "clip").trajectory, "clip_fraction", 0.01, slice(0, 2))
    runs = with_run(healthy_runs(), mode_run("reference", "clip", fraction))
    given = waiver(mode="*", observable="clip_factor")
    assert judged(runs, given, *EVERYTHING).verdict is Verdict.INCONCLUSIVE


def write(tmp_path: Path, text: str) -> Path:
    (tmp_path / "w.yaml").write_text(text, encoding="utf-8")
    return tmp_path / "w.yaml"


def test_a_file_of_waivers_is_read_as_written(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
- mode: ghost_fsdp@*
  observable: layer_*
  reason: |
    two
    lines
  expires: 2026-12-31
  regime: clip
  where: layer head.*
  up_to: 2e-3
- {mode: "opacus:ew", observable: loss, reason: x, expires: "2027-01-01"}
""",
    )
    assert load_waivers(path) == (
        Waiver(
            mode="ghost_fsdp@*",
            observable="layer_*",
            reason="two lines",
            expires=LATER,
            regime="clip",
            where="layer head.*",
            up_to=2e-3,
        ),
        Waiver(mode="opacus:ew", observable="loss", reason="x", expires=datetime.date(2027, 1, 1)),
    )
    text = path.read_text(encoding="utf-8")
    assert load_waivers(write(tmp_path, f"\ufeff{text}")) == load_waivers(write(tmp_path, text))
    assert load_waivers(write(tmp_path, "# none\n")) == ()


def test_a_file_of_waivers_in_utf16_is_called_so(tmp_path: Path) -> None:
    write(tmp_path, "").write_text("[]", encoding="utf-16")
    with pytest.raises(ValueError, match=r"^waivers='.*': expected UTF-8 text. It is UTF-16, "):
        load_waivers(tmp_path / "w.yaml")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("mode: flsh", "mode='flsh': expected one of no_dp, "),
        ("mode: zz*", "mode='zz*': expected one of no_dp, "),
        ("observable: los", "observable='los': expected one of loss, "),
        ("regime: clap", "regime='clap': expected one of accuracy, clip"),
        ("reason: ' '", "reason=' ': expected a text that is not empty"),
        ("reason: 3", "reason=3: expected a text that is not empty"),
        ("reason: null", "reason=None: expected a value"),
        ("expires: soon", "expires='soon': expected a date such as 2026-12-31"),
        ("expires: '2026-02-30'", "expires='2026-02-30': expected a date"),
        ("expires: 2026-02-30", "expected valid YAML"),
        ("expires: 2026-12-31 10:00:00", "expires=datetime"),
        ("expires: 20261231", "expires=20261231: expected a date"),
        ("up_to: 0", "up_to=0: expected a number > 0"),
        ("up_to: yes", "up_to=True: expected a number > 0"),
        ("up_to: .inf", "up_to=inf: expected a number > 0"),
        ("up_to: x", "up_to='x': expected a number > 0"),
        ("upto: 1", "key='upto': expected one of mode, observable"),
        ("where: sample 3", "where='sample 3': expected no where with this observable"),
        ("{mode: '*', observable: '**'}", "mode='*': expected a name, where the observable is any"),
        ("{observable: layer_grad_norm, where: head}", "where='head': expected `layer NAME`"),
    ],
    ids=lambda value: re.sub(r"\W+", "-", value)[:40],
)
def test_a_waiver_that_cannot_apply_is_refused(tmp_path: Path, line: str, said: str) -> None:
    import yaml

    whole = {
        "mode": "flash_fsdp", "observable": "loss", "reason": "x", "expires": "2026-12-31"
    }  # fmt: skip
    key = line.partition(":")[0]
    if line.startswith("{"):
        whole |= yaml.safe_load(line)
        text = yaml.safe_dump([whole])
    else:
        whole.pop(key, None)
        text = "\n  ".join([f"- {line}", *(f"{k}: '{v}'" for k, v in whole.items())])
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        load_waivers(write(tmp_path, text))
    assert str(raised.value).startswith(("w.yaml[0]", "waivers="))


@pytest.mark.parametrize("text", ["mode: x", "3", "[3]", "- [", "\x00"])
def test_a_file_that_lists_no_waivers_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"^(waivers=|w.yaml\[0\]=)"):
        load_waivers(write(tmp_path, text))


def test_a_star_is_the_only_wildcard() -> None:
    assert matches("layer a[0].*", "layer a[0].b")
    assert not matches("layer a[0]", "layer a0")
    assert not matches("a?c", "abc")


def test_waived_findings_are_shown_everywhere_and_inert() -> None:
    comparison = judged(drifting(), waiver(reason=HOSTILE), waiver(observable="loss"))
    out = io.StringIO()
    print_table(comparison, Console(file=out, width=200))
    assert "PASS (1 waived)" in out.getvalue()
    assert "was not needed" in out.getvalue()
    text = summary(comparison)
    assert "flash_fsdp: DRIFT, waived until 2026-12-31 (<script>" in text
    assert "\x1b" not in text + out.getvalue()
    comment = markdown(comparison)
    assert "PASS (1 waived)" in comment
    assert "**DRIFT** (waived) flash" in comment
    assert "<script>" not in comment
    assert "@you" not in comment
    found = json.loads(drift_json(comparison))
    findings = [f for mode in found["modes"] for f in mode["findings"]]
    assert [f["waiver"]["expires"] for f in findings] == ["2026-12-31"]
    assert findings[0]["waiver"]["reason"] == HOSTILE
    assert found["waiver_notes"] == list(comparison.waiver_notes)
    assert "<script>alert" not in html(comparison, [])


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    made = Store(tmp_path)
    made.add_group(drifting())
    return made


ENTRY = "- {mode: flash_fsdp, observable: grad_norm, reason: x, expires: 9999-12-31}\n"


def compare(store: Store, *options: str) -> int:
    return main(
        ["compare", "synthetic", "--tracking-uri", store.uri, "--no-png", "--no-log", *options]
    )


def test_the_file_beside_the_settings_is_read(store: Store) -> None:
    assert compare(store) == 1
    Path("waivers.yaml").write_text(ENTRY)
    assert compare(store) == 0
    Path("none.yaml").write_text("[]")
    assert compare(store, "--waivers", "none.yaml") == 1
    Path("conf").mkdir()
    Path("conf/mlflow.yaml").write_text("")
    assert compare(store, "--config", "conf/mlflow.yaml") == 1
    Path("conf/waivers.yaml").write_text(ENTRY)
    Path("waivers.yaml").unlink()
    assert compare(store, "--config", "conf/mlflow.yaml") == 0


def test_a_wrong_waiver_is_one_line_and_exit_code_2(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(store, "--waivers", "absent.yaml") == 2
    Path("waivers.yaml").write_text(ENTRY.replace("9999-12-31", "never"))
    assert compare(store) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "waivers='absent.yaml': expected a file that can be read" in lines[0]
    assert "waivers.yaml[0].expires='never': expected a date" in lines[1]


@pytest.mark.parametrize("anything", ["*", "**"])
@pytest.mark.parametrize("mode", ["*", "***"])
def test_a_waiver_for_everything_is_refused_however_it_is_spelled(
    tmp_path: Path, mode: str, anything: str
) -> None:
    file = tmp_path / "waivers.yaml"
    file.write_text(
        f"- {{mode: '{mode}', observable: '{anything}', reason: x, expires: 2026-12-31}}"
    )
    with pytest.raises(ValueError, match="expected a name, where the observable is any"):
        load_waivers(file)


def test_matching_takes_linear_time() -> None:
    text = "a" * 200_000
    start = time.process_time()
    assert not matches("*a" * 1000 + "*b", text)
    assert matches("a*" * 1000, text)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("pattern", "text", "is_match"),
    [
        ("a*a", "a", False),
        ("a*a", "aa", True),
        ("*ab*ab", "abab", True),
        ("*ab*ab", "ab", False),
        ("a*b*c", "a\nbbc", True),
        ("", "", True),
    ],
)
def test_a_star_stands_for_any_text(pattern: str, text: str, is_match: bool) -> None:
    assert matches(pattern, text) is is_match


def test_a_waiver_that_ends_in_more_than_a_year_is_warned_of() -> None:
    far = TODAY + datetime.timedelta(days=367)
    near = TODAY + datetime.timedelta(days=360)
    notes = judged(healthy_runs(), waiver(expires=far), waiver(expires=near)).waiver_notes
    assert len([note for note in notes if "more than a year from now" in note]) == 1
