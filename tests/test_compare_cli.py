"""`compare.py` as users run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dpsgd_track.cli.compare import ARTIFACT_FOLDER
from dpsgd_track.cli.main import main
from dpsgd_track.record import names
from dpsgd_track.record.failure import FAILURE, Failure, FailureKind
from dpsgd_track.record.run import ModeRun
from tests.support.synthetic_group import (
    Store,
    healthy_runs,
    mode_run,
    scaled,
    trajectory,
    with_run,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    return Store(tmp_path)


def compare(store: Store, *options: str, group: str = "synthetic") -> int:
    return main(["compare", group, "--tracking-uri", store.uri, "--no-png", *options])


def off_by(factor: float) -> list[ModeRun]:
    wrong = scaled(trajectory(noise_std=0.0), "grad_norm", factor, 1)
    return with_run(healthy_runs(), mode_run("flash_fsdp", "clip", wrong))


def runs_by_title(store: Store) -> dict[str, Any]:
    """Stored runs, but those of ranks, by the titles that `Store` gives them."""
    stored = store.client.search_runs([store.experiment_id], max_results=100)
    kept = [run for run in stored if run.data.tags[names.KIND] != names.KIND_RANK]
    return {f"{run.info.run_name} {run.data.tags.get(names.REGIME, '')}": run for run in kept}


def test_the_list_of_runs_tells_a_bug_until_it_is_none(store: Store) -> None:
    store.add_group(off_by(1.004))
    assert compare(store, "--bug-threshold", "0.002") == 1
    runs = runs_by_title(store)
    group, guilty, innocent = (
        runs[title] for title in ("synthetic ", "flash_fsdp clip", "flash_fsdp_fuse clip")
    )
    assert group.info.status == "FAILED"
    assert group.info.end_time
    assert guilty.info.status == innocent.info.status == "FINISHED"
    assert guilty.data.tags[names.VERDICT] == "BUG"
    assert innocent.data.tags[names.VERDICT] == "PASS"
    assert runs["flash_fsdp accuracy"].data.tags[names.VERDICT] == "PASS"
    assert (
        guilty.data.metrics[names.DRIFT_OF_LIMIT]
        > 1
        > innocent.data.metrics.get(names.DRIFT_OF_LIMIT, 0)
    )
    for metric in (names.DRIFT_OF_LIMIT, f"{names.DRIFT_OF_LIMIT}/clipped sum"):
        assert group.data.metrics[metric] == guilty.data.metrics[names.DRIFT_OF_LIMIT]
    assert compare(store, "--grad-norm-threshold", "0.005") == 0
    runs = runs_by_title(store)
    assert runs["synthetic "].info.status == "FINISHED"
    assert runs["flash_fsdp clip"].data.tags[names.VERDICT] == "PASS"


@pytest.mark.parametrize(
    ("variables", "link"),
    [
        (
            {
                "GITHUB_SERVER_URL": "https://github.com",
                "GITHUB_REPOSITORY": "o/r",
                "GITHUB_RUN_ID": "7",
            },
            "(https://github.com/o/r/actions/runs/7#artifacts)",
        ),
        ({"CI_JOB_URL": "https://gitlab.com/j/7"}, "(https://gitlab.com/j/7/artifacts/browse)"),
        ({}, "**Report:** report.html of group synthetic"),
    ],
    ids=["GitHub", "GitLab", "elsewhere"],
)
def test_the_comment_links_to_the_files_of_its_ci_run(
    store: Store, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], link: str
) -> None:
    for name in ("GITHUB_RUN_ID", "CI_JOB_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    store.add_group([mode_run("no_dp"), mode_run("flash_fsdp")])
    compare(store, "--no-log")
    assert link in Path("results/synthetic/report.md").read_text(encoding="utf-8")


def test_a_group_that_failed_by_itself_stays_failed(store: Store) -> None:
    group_id = store.add_group(healthy_runs())
    store.client.set_tag(group_id, names.FAILURE, FAILURE.dumps(OOM))
    store.client.set_terminated(group_id, "FAILED")
    assert compare(store) == 0
    assert runs_by_title(store)["synthetic "].info.status == "FAILED"


OOM = Failure(kind=FailureKind.OUT_OF_MEMORY)
FAILED = with_run(healthy_runs(), mode_run("flash_fsdp", "clip", status="FAILED", failure=OOM))


@pytest.mark.parametrize(
    ("runs", "options", "code"),
    [
        pytest.param(healthy_runs(), (), 0, id="PASS"),
        pytest.param(off_by(1.004), (), 1, id="DRIFT"),
        pytest.param(off_by(1.004), ("--fail-on", "bug"), 0, id="DRIFT-fail-on-bug"),
        pytest.param(off_by(1.004), ("--grad-norm-threshold", "0.005"), 0, id="DRIFT-allowed"),
        pytest.param(off_by(1.004), ("--bug-threshold", "0.002", "--fail-on", "bug"), 1, id="BUG2"),
        pytest.param(off_by(1.1), ("--fail-on", "bug"), 1, id="BUG"),
        pytest.param(FAILED, (), 3, id="INCONCLUSIVE"),
        pytest.param(FAILED, ("--fail-on", "bug"), 3, id="INCONCLUSIVE-fail-on-bug"),
    ],
)
def test_exit_code_tells_the_verdict(
    store: Store, runs: list[ModeRun], options: tuple[str, ...], code: int
) -> None:
    store.add_group(runs)
    assert compare(store, "--no-log", *options) == code


@pytest.mark.parametrize("is_action", [True, False])
def test_annotations_are_printed_where_github_reads_them(
    store: Store,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    is_action: bool,
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", str(is_action).lower())
    store.add_group(off_by(1.1))
    assert compare(store, "--no-log") == 1
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if line.startswith("::")]
    assert len(commands) == is_action
    assert all(c.startswith("::error title=BUG%3A flash_fsdp in clip::") for c in commands)


def test_result_is_printed_written_and_logged(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = store.add_group(off_by(1.1), command="dpsgd-track full")
    assert compare(store, group="latest") == 1
    printed = capsys.readouterr().out
    assert "BUG" in printed
    assert f"results{os.sep}synthetic{os.sep}report.html" in printed
    files = {path.name for path in Path("results/synthetic").iterdir()}
    logged = store.client.list_artifacts(run_id, ARTIFACT_FOLDER)
    assert {Path(entry.path).name for entry in logged} == files
    tags = store.client.get_run(run_id).data.tags
    assert tags[names.VERDICT] == "BUG"
    assert tags[names.NOTE].startswith("## ❌ BUG")


@pytest.mark.parametrize("verdict", ["PASS", "BUG"])
def test_a_pass_is_a_line_and_where_the_report_is_and_quiet_is_the_verdict(
    verdict: str,
    store: Store,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Wide enough for a table whose headings are on one line.
    monkeypatch.setenv("COLUMNS", "120")
    store.add_group(healthy_runs() if verdict == "PASS" else off_by(1.1))
    code = 0 if verdict == "PASS" else 1
    shown = {}
    for option in ("--no-log", "-v", "-q"):
        assert compare(store, "--no-log", option) == code
        out, err = capsys.readouterr()
        assert err == ""
        assert not set("\x1b\r") & set(out)
        shown[option] = out.splitlines()
    report = f"Report: results{os.sep}synthetic{os.sep}report.html (and 8 more files in "
    assert len(shown["-q"]) == 1
    assert shown["-q"][0].startswith(f"{verdict}: ")
    assert shown["-v"][-2] == shown["-q"][0]
    assert shown["-v"][-1].startswith(report)
    assert any("Δ grad norm" in line for line in shown["-v"])
    # What is wrong is told in full anyway.
    assert shown["--no-log"] == (shown["-v"][-2:] if verdict == "PASS" else shown["-v"])
    assert compare(store, "-q", "-v") == 2


def test_no_log_leaves_the_server_alone(store: Store) -> None:
    run_id = store.add_group(healthy_runs())
    before = [file.path for file in store.client.list_artifacts(run_id)]
    assert compare(store, "--no-log", "--results-dir", "elsewhere") == 0
    assert names.VERDICT not in store.client.get_run(run_id).data.tags
    assert [file.path for file in store.client.list_artifacts(run_id)] == before
    assert Path("elsewhere/synthetic/report.html").is_file()


def test_comparing_again_replaces_the_verdict(store: Store) -> None:
    run_id = store.add_group(off_by(1.004))
    assert compare(store) == 1
    assert compare(store, "--grad-norm-threshold", "0.005") == 0
    assert store.client.get_run(run_id).data.tags[names.VERDICT] == "PASS"


def test_settings_file_in_the_working_directory_is_read(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store.add_group(healthy_runs())
    # With a byte order mark, as editors on Windows write it.
    Path("mlflow.yaml").write_text(
        f"tracking_uri: {store.uri}\nresults_dir: here\n", encoding="utf-8-sig"
    )
    assert main(["compare", "synthetic", "--no-png", "--no-log"]) == 0
    assert Path("here/synthetic/report.md").is_file()
    Path("mlflow.yaml").write_text("tracking_url: x\n", encoding="utf-8")
    assert main(["compare", "synthetic"]) == 2
    assert "key='tracking_url': expected one of tracking_uri" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent"], "group='absent': expected"),
        (["x", "--tracking-uri", "sqlite:///absent.db"], "expected an existing SQLite file"),
        (["x", "--tracking-uri", "sqlite:mlflow.db"], "expected sqlite:///FILE"),
        (["x", "--tracking-uri", "file:///tmp"], "tracking_uri='file:///tmp': expected"),
        (["x", "--config", "absent.yaml"], "config='absent.yaml': expected"),
        (["x", "--config", "wide.yaml"], "expected UTF-8 text. It is UTF-16"),
        (["x", "--config", "."], "expected a file that can be read. Is a directory."),
        (["x", "--loss-threshold", "-1"], "thresholds.loss=-1.0: expected"),
    ],
)
def test_error_of_a_user_is_one_line_and_exit_code_2(
    store: Store, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    Path("wide.yaml").write_text("results_dir: here", encoding="utf-16")
    if "--tracking-uri" not in arguments:
        arguments = [*arguments, "--tracking-uri", store.uri]
    assert main(["compare", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("dpsgd-track compare: ")
    assert said in err
    assert err.count("\n") == 1
    assert not Path("absent.db").exists()


WRONG_TYPES = {
    "settings": ("results_dir: [1]\n", ["--config", "settings.yaml"], "results_dir=[1]: expected"),
    "thresholds": ("thresholds: 3\n", ["--config", "settings.yaml"], "thresholds=3: expected"),
    "a threshold": ("thresholds: {bug: [1]}\n", ["--config", "settings.yaml"], "bug=[1]: expected"),
    "waivers": ("5\n", ["--waivers", "settings.yaml"], "expected"),
    "a waiver": ("- 5\n", ["--waivers", "settings.yaml"], "expected"),
}


@pytest.mark.parametrize(("text", "options", "said"), WRONG_TYPES.values(), ids=WRONG_TYPES.keys())
def test_a_value_of_the_wrong_type_in_a_file_is_one_line_and_exit_code_2(
    store: Store, capsys: pytest.CaptureFixture[str], text: str, options: list[str], said: str
) -> None:
    store.add_group(healthy_runs())
    Path("settings.yaml").write_text(text)
    assert compare(store, *options) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("what", ["torn", "of another type", "of the wrong types"])
def test_a_golden_file_that_cannot_be_read_is_one_line_and_exit_code_2(
    store: Store, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    store.add_group(healthy_runs())
    assert compare(store, "--no-log", "--export", "golden.dpsgd") == 0
    golden = Path("golden.dpsgd")
    if what == "torn":
        golden.write_bytes(golden.read_bytes()[:200])
    elif what == "of another type":
        golden.write_text("loss: 3")
    else:
        with zipfile.ZipFile(golden) as archive:
            held = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(golden, "w") as archive:
            for name, content in held.items():
                is_text = name.endswith(".json")
                archive.writestr(
                    name, re.sub(rb": [0-9]+", b': "x"', content) if is_text else content
                )
    capsys.readouterr()
    assert main(["compare", "golden.dpsgd", "--no-png"]) == 2
    err = capsys.readouterr().err
    assert "group='golden.dpsgd': expected" in err
    assert err.count("\n") == 1


def test_an_error_while_comparing_is_no_verdict(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("unsupported operand")

    monkeypatch.setattr("dpsgd_track.comparison.compare_group", broken)
    store.add_group(healthy_runs())
    assert compare(store) == 70
    err = capsys.readouterr().err
    assert "TypeError: unsupported operand. The traceback is in " in err
    Path(err.split()[-1]).unlink()


def test_file_that_is_no_store_is_an_error_without_a_trace(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("torn.db").write_bytes(b"no database" * 100)
    assert main(["compare", "x", "--tracking-uri", "sqlite:///torn.db"]) == 2
    assert "expected a tracking server that answers" in capsys.readouterr().err


def test_password_of_a_server_is_never_shown(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = "http://me:secret@127.0.0.1:9"
    assert main(["compare", "x", "--tracking-uri", uri]) == 2
    shown = capsys.readouterr()
    assert "secret" not in shown.err + shown.out
    assert "***@127.0.0.1:9" in shown.err


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_usage_error_exits_with_2() -> None:
    done = python("compare.py")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_comparing_never_imports_torch(store: Store) -> None:
    store.add_group(healthy_runs())
    watched = (
        "import sys\n"
        "from dpsgd_track.cli.main import main\n"
        f"code = main(['compare', 'synthetic', '--tracking-uri', {store.uri!r}, '--no-png'])\n"
        "print(code, sorted({'torch', 'transformers', 'opacus'} & set(sys.modules)))"
    )
    done = python("-c", watched, cwd=store.folder)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
