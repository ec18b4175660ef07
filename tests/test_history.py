"""The history of an experiment: in the terminal, as a page, and in the next comment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dpsgd_track.cli.main import main
from dpsgd_track.config import Settings
from dpsgd_track.record import names
from dpsgd_track.record.judged import JudgedGroup
from dpsgd_track.report.history import since
from dpsgd_track.report.html import history_html
from dpsgd_track.store.judged import judged_before
from tests.support.synthetic_group import (
    Store,
    healthy_runs,
    mode_run,
    scaled,
    trajectory,
    with_run,
)


def point(verdict: str = "PASS", **more: float) -> JudgedGroup:
    """A group at commit abc1234 with drifts by stage, or with costs by mode."""
    stages = {name.replace("_", " "): value for name, value in more.items() if name != "flash"}
    return JudgedGroup(
        name="june",
        start_time_ms=0,
        revision="abc1234def",
        verdict=verdict,
        drifts=stages,
        costs={"flash": more["flash"]} if "flash" in more else {},
    )


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        (point(loss=0.2), point(loss=0.3), "drifts unchanged"),
        (point(loss=1e-9), point(loss=0.09), "drifts unchanged"),
        (point(loss=0.2), point(noise=5.0), "drifts unchanged"),
        (point(loss=0.2), point("BUG", loss=800.0), "was PASS, loss from 0.2 to 800 × limit"),
        (point("BUG", loss=800.0), point(loss=0.2), "was BUG, loss from 800 to 0.2 × limit"),
        (point(flash=1.2), point(flash=1.236), "drifts unchanged, flash 3 % slower"),
        (point(flash=1.2), point(flash=1.08), "drifts unchanged, flash 10 % faster"),
        (point(flash=1.2), point(flash=1.21), "drifts unchanged, as fast"),
        (
            point(loss=0.2, noise=0.2, clipped_sum=0.2),
            point(loss=0.5, noise=0.9, clipped_sum=0.7),
            "noise from 0.2 to 0.9 × limit, clipped sum from 0.2 to 0.7 × limit",
        ),
    ],
)
def test_what_changed_is_said_in_a_sentence(
    before: JudgedGroup, now: JudgedGroup, said: str
) -> None:
    assert since(before, now) == f"Since abc1234: {said}."


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    # A narrower table has its cells on several lines.
    monkeypatch.setenv("COLUMNS", "140")
    return Store(tmp_path)


def add_judged(store: Store, name: str, suite: str) -> None:
    """A group that passed, with a clipped sum at a tenth of its limit."""
    group = store.add_group([], name, expected=healthy_runs())
    for tag, value in ((names.GIT_COMMIT, f"{name}0123456789"), (names.VERDICT, "PASS")):
        store.client.set_tag(group, tag, value)
    store.client.log_metric(group, f"{names.DRIFT_OF_LIMIT}/clipped sum", 0.1)
    store.client.log_param(group, "suite", suite)


def test_groups_are_told_in_order_and_the_comment_says_what_changed(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    add_judged(store, "june", "quick")
    add_judged(store, "other", "full")
    wrong = scaled(trajectory(noise_std=0.0), "grad_norm", 1.1, 1)
    july = store.add_group(with_run(healthy_runs(), mode_run("flash_fsdp", "clip", wrong)), "july")
    store.client.log_param(july, "suite", "quick")
    store.client.set_tag(july, names.GIT_COMMIT, "july0123456789")
    assert main(["compare", "july", "--tracking-uri", store.uri, "--no-png"]) == 1
    comment = Path("results", "july", "report.md").read_text(encoding="utf-8")
    said = "Since june012: was PASS, clipped sum from 0.1 to 100 × limit."
    assert re.search(rf"^- \*\*Cost:\*\* .*{re.escape(said)}$", comment, re.MULTILINE)
    assert said in store.client.get_run(july).data.tags[names.NOTE]
    settings = Settings(tracking_uri=store.uri)
    # Compared again, it is held beside the same group and not beside itself.
    before = judged_before(store.client, settings, july)
    assert before is not None
    assert before.name == "june"
    store.add_group(healthy_runs(), "never-compared")
    capsys.readouterr()
    assert main(["history", "--tracking-uri", store.uri]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"│ (june|other|july|never\S*) +│.*?│ (\w+) +│ (\w+) +│", out)
    assert rows == [
        ("june", "june012", "PASS"),
        ("other", "other01", "PASS"),
        ("july", "july012", "BUG"),
    ]
    assert "clipped sum from 0.1 to 100 × limit" in out
    page = Path("results", "history.html").read_text(encoding="utf-8")
    assert page.index("july012") > 0
    assert main(["history", "--last", "1", "--tracking-uri", store.uri]) == 0
    out = capsys.readouterr().out
    assert "july" in out
    assert "june" not in out


def test_an_experiment_without_comparisons_has_no_history(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store.add_group(healthy_runs())
    assert main(["history", "--tracking-uri", store.uri]) == 2
    assert "expected a group that was compared" in capsys.readouterr().err
    assert main(["history", "--last", "0", "--tracking-uri", store.uri]) == 2
    assert "last=0: expected an integer >= 1" in capsys.readouterr().err


def test_names_are_inert_in_the_page() -> None:
    hostile = "<img src=x onerror=alert(1)>"
    group = JudgedGroup(
        name=hostile, start_time_ms=0, verdict=hostile, drifts={"loss": 0.1}, costs={hostile: 1.0}
    )
    own = re.sub(r"<script>/\*\*.*?</script>", "", history_html(hostile, [group]), flags=re.DOTALL)
    assert "<img" not in own
    assert "\\u003cimg" not in own
    assert "&lt;img" in own
