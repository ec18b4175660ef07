"""`compare.py` as users run it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpsgd_track.cli import compare as command
from dpsgd_track.record import names
from dpsgd_track.store.reader import ModeRun
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
    return command.main([group, "--tracking-uri", store.uri, "--no-png", *options])


def off_by(factor: float) -> list[ModeRun]:
    wrong = scaled(trajectory(noise_std=0.0), "grad_norm", factor, 1)
    return with_run(healthy_runs(), mode_run("flash_fsdp", "clip", wrong))


FAILED = with_run(healthy_runs(), mode_run("flash_fsdp", "clip", status="FAILED", reason="oom"))


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
    run_id = store.add_group(off_by(1.1), params={"command": "python launch.py full"})
    assert compare(store, group="latest") == 1
    printed = capsys.readouterr().out
    assert "BUG" in printed
    assert f"results{os.sep}synthetic{os.sep}report.html" in printed
    files = {path.name for path in Path("results/synthetic").iterdir()}
    logged = store.client.list_artifacts(run_id, command.ARTIFACT_FOLDER)
    assert {Path(entry.path).name for entry in logged} == files
    tags = store.client.get_run(run_id).data.tags
    assert tags[names.VERDICT] == "BUG"
    assert tags[names.NOTE].startswith("## ❌ BUG")


def test_no_log_leaves_the_server_alone(store: Store) -> None:
    run_id = store.add_group(healthy_runs())
    assert compare(store, "--no-log", "--results-dir", "elsewhere") == 0
    assert names.VERDICT not in store.client.get_run(run_id).data.tags
    assert store.client.list_artifacts(run_id) == []
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
    assert command.main(["synthetic", "--no-png", "--no-log"]) == 0
    assert Path("here/synthetic/report.md").is_file()
    Path("mlflow.yaml").write_text("tracking_url: x\n", encoding="utf-8")
    assert command.main(["synthetic"]) == 2
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
    assert command.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("compare.py: error: ")
    assert said in err
    assert err.count("\n") == 1
    assert not Path("absent.db").exists()


def test_file_that_is_no_store_is_an_error_without_a_trace(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("torn.db").write_bytes(b"no database" * 100)
    assert command.main(["x", "--tracking-uri", "sqlite:///torn.db"]) == 2
    assert "expected a tracking server that answers" in capsys.readouterr().err


def test_password_of_a_server_is_never_shown(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = "http://me:secret@127.0.0.1:9"
    assert command.main(["x", "--tracking-uri", uri]) == 2
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


def test_help_is_instant_and_loads_nothing_heavy() -> None:
    watched = (
        "import sys, runpy\n"
        "sys.argv = ['compare.py', '--help']\n"
        "try:\n    runpy.run_path('compare.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print(sorted({'torch', 'numpy', 'mlflow', 'plotly', 'rich'} & set(sys.modules)))"
    )
    assert python("-c", watched).stdout.splitlines()[-1] == "[]"
    times: list[float] = []
    # Other work on the machine only ever adds: of several times the least is the command's own.
    while len(times) < 10 and min(times, default=9) >= 0.5:
        started = time.perf_counter()
        assert "exit codes" in python("compare.py", "--help").stdout
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5


def test_usage_error_exits_with_2() -> None:
    done = python("compare.py")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_comparing_never_imports_torch(store: Store) -> None:
    store.add_group(healthy_runs())
    watched = (
        "import sys\n"
        "from dpsgd_track.cli.compare import main\n"
        f"code = main(['synthetic', '--tracking-uri', {store.uri!r}, '--no-png'])\n"
        "print(code, sorted({'torch', 'transformers', 'opacus'} & set(sys.modules)))"
    )
    done = python("-c", watched, cwd=store.folder)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
