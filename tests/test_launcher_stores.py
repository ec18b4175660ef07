"""A store that cannot be used is said before anything starts, in a line, and leaves nothing."""

import contextlib
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException

from dpsgd_track.config import Settings
from dpsgd_track.launcher import suites
from dpsgd_track.tracking import names
from dpsgd_track.tracking.source import read_group_anywhere
from dpsgd_track.tracking.store import open_store
from tests import fake_launch
from tests.tracking_servers import MlflowServer, certificate, closed_port, gate, shared_server

SECRET = "a-secret-never-to-be-seen"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suites, "count_gpus", lambda: 0)
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """A fresh SQLite store, to be copied."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    open_store(Settings(tracking_uri=f"sqlite:///{path}"))
    return path


def launch(uri: str, *options: str) -> int:
    arguments = ("--mode", "no_dp", "--regime", "accuracy", "--tracking-uri", uri)
    return fake_launch.run(["quick", *arguments, *options])


def refuse(capsys: pytest.CaptureFixture[str], uri: str, *options: str) -> str:
    """Launch on a store that cannot be used; what is said."""
    start = time.monotonic()
    assert launch(uri, *options) == 2
    assert time.monotonic() - start < 15
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("launch.py: ")
    assert said.err.count("\n") == 1
    assert SECRET not in said.err
    for place in ("spool", "results"):
        assert not Path(place).exists() or not list(Path(place).iterdir())
    return said.err


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own; skips where none can be mounted."""
    place = folder / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


def test_no_server(folder, capsys):
    said = refuse(capsys, f"http://me:{SECRET}@127.0.0.1:{closed_port()}")
    assert "Connection refused" in said
    assert "Start the server" in said


def test_a_server_that_never_answers(folder, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        said = refuse(capsys, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert "timed out" in said or "timeout" in said


def test_another_schema(folder, capsys, database):
    shutil.copy(database, "other.db")
    with contextlib.closing(sqlite3.connect("other.db")) as other:
        other.execute("UPDATE alembic_version SET version_num = 'abcdef012345'")
        other.commit()
    said = refuse(capsys, f"sqlite:///{folder}/other.db")
    assert "schema" in said
    assert "mlflow db upgrade" in said


def test_a_full_disk_under_the_store(folder, capsys, database):
    with small_disk(folder, "4m") as disk:
        shutil.copy(database, disk)
        fill(disk)
        said = refuse(capsys, f"sqlite:///{disk}/mlflow.db")
    assert "full" in said
    assert "Make room" in said


def test_a_store_that_refuses_the_group(folder, capsys, database, monkeypatch):
    def create(*_: object, **__: object) -> None:
        raise MlflowException("value too long", error_code=INVALID_PARAMETER_VALUE)

    monkeypatch.setattr(MlflowClient, "create_run", create)
    assert "value too long" in refuse(capsys, f"sqlite:///{database}")


def test_a_store_that_can_only_be_read(folder, capsys, database):
    with small_disk(folder, "4m") as disk:
        shutil.copy(database, disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        said = refuse(capsys, f"sqlite:///{disk}/mlflow.db")
    assert "cannot be written to" in said or "readonly" in said


@pytest.mark.parametrize("option", ["--spool", "results_dir"])
def test_no_room_for_what_is_kept_here(folder, capsys, database, option):
    with small_disk(folder, "64k") as disk:
        fill(disk)
        options = ["--spool", str(disk)]
        if option == "results_dir":
            Path("own.yaml").write_text(f"results_dir: {disk}/results")
            options = ["--config", "own.yaml"]
        said = refuse(capsys, f"sqlite:///{database}", *options)
    assert "No space left on device" in said


def told(group: str) -> int:
    found = Path("results", group, "logs").glob("*/progress.jsonl")
    return sum(file.read_text().count('"step", ') for file in found)


def test_a_disk_that_fills_up_stops_no_step_and_what_was_written_is_readable(
    folder, capfd, monkeypatch
):
    monkeypatch.setenv("FAKE_WORKER", '{"no_dp": {"do": "wide"}}')
    with small_disk(folder, "256k") as disk:

        def fill_later() -> None:
            while told("g") < 3:
                time.sleep(0.02)
            fill(disk)

        threading.Thread(target=fill_later).start()
        options = ("--group", "g", "--num-iter", "12", "--spool", str(disk))
        assert launch(f"sqlite:///{folder}/mlflow.db", *options) == 1
        # All steps of all four regimes were done before it was said that they could not be kept.
        assert told("g") == 48
        said = capfd.readouterr()
        assert "No space left on device" in said.out
        assert "Traceback" not in said.out + said.err
        settings = Settings(tracking_uri=f"sqlite:///{folder}/mlflow.db", spool_dir=str(disk))
        run = read_group_anywhere(settings, "g", print).group.runs[0]
        assert run.trajectory is not None
        assert 2 <= run.trajectory.num_steps < 12
        assert run.trajectory.loss.tolist() == [
            1 / (1 + i) for i in range(run.trajectory.num_steps)
        ]
        (disk / "filler").unlink()
        sync = ("sync", "--spool", str(disk), "--tracking-uri", settings.tracking_uri)
        assert fake_launch.run(list(sync)) == 0
    assert "RUNNING" not in statuses(settings.tracking_uri, "g")


@pytest.fixture(scope="module")
def server() -> MlflowServer:
    return shared_server()


def statuses(uri: str, group: str) -> dict[str, int]:
    client, experiment_id = open_store(Settings(tracking_uri=uri))
    runs = client.search_runs([experiment_id], f"tags.`{names.GROUP}` = '{group}'")
    found = [run.info.status for run in runs]
    return {status: found.count(status) for status in found}


BASIC = "Basic bWU6YS1zZWNyZXQtbmV2ZXItdG8tYmUtc2Vlbg=="


def test_credentials_are_taken_from_the_environment(folder, server, monkeypatch, capsys):
    for wanted, environment in (
        (BASIC, {"USERNAME": "me", "PASSWORD": SECRET}),
        (f"Bearer {SECRET}", {"TOKEN": SECRET}),
    ):
        with gate(server, wanted=wanted) as asked:
            said = refuse(capsys, asked.uri)
            assert "401" in said
            assert "MLFLOW_TRACKING_TOKEN" in said
            for name, value in environment.items():
                monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
            open_store(Settings(tracking_uri=asked.uri))
            for name in environment:
                monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")


def test_someone_who_may_not(folder, server, capsys):
    with gate(server, wanted="Bearer other", status=403) as asked:
        assert "403" in refuse(capsys, asked.uri)


def test_a_server_that_goes_by_another_name(folder, server, capsys):
    with gate(server, host="tracking.example") as asked:
        said = refuse(capsys, asked.uri)
    assert "403" in said
    assert "--allowed-hosts" in said


def test_certificates_are_verified(folder, server, capsys, monkeypatch):
    shown = certificate(folder)
    with gate(server, wanted=f"Bearer {SECRET}", shows=shown) as asked:
        uri = asked.uri
        said = refuse(capsys, uri)
        assert "CERTIFICATE_VERIFY_FAILED" in said
        assert "MLFLOW_TRACKING_SERVER_CERT_PATH" in said
        monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
        assert "MLFLOW_TRACKING_INSECURE_TLS='true': expected false" in refuse(capsys, uri)
        monkeypatch.delenv("MLFLOW_TRACKING_INSECURE_TLS")
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(shown.authority))
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
        open_store(Settings(tracking_uri=uri))
