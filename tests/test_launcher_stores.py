"""A store that cannot be used is said before anything starts, in a line, and leaves nothing."""

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path

from dpsgd_track.cli.main import main
from dpsgd_track.config import Settings
from dpsgd_track.launcher import choices
from dpsgd_track.record import names
from dpsgd_track.store.find_group import read_group_anywhere
from dpsgd_track.store.history import metric_history
from dpsgd_track.store.opening import open_store
from dpsgd_track.store.reader import _local_folder, open_client
from tests.support import fake_launch
from tests.support.small_disk import fill, small_disk
from tests.support.store_launches import SECRET, launch, refuse, statuses
from tests.support.synthetic_group import empty_tables
from tests.support.tracking_servers import (
    MlflowServer,
    certificate,
    closed_port,
    gate,
    shared_server,
)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choices, "count_gpus", lambda: 0)
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> Path:
    """A fresh SQLite store, to be copied."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    open_store(Settings(tracking_uri=f"sqlite:///{path}"))
    return path


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


ODD_NAMES = ("feature%20x", "a?b", "a?b=c", "a#b", "ü b", 'it\'s "x"', "a;b&c=d", "100%", "[b]:@")
"""Names of folders that a URI writes in another way, or cuts short."""


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("place", ["working directory", "option"])
def test_the_store_is_the_file_that_sqlite3_opens_under_the_same_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str
) -> None:
    here = folder / name
    here.mkdir()
    # What is opened where %20 is decoded.
    (folder / "feature x").mkdir()
    shutil.copy(empty_tables(), here / "mlflow.db")
    shutil.copy(empty_tables(), folder / "feature x" / "mlflow.db")
    before = set(folder.rglob("*"))
    settings = Settings()
    if place == "option":
        settings = Settings(tracking_uri=f"sqlite:///{here}/mlflow.db")
        location = str(here / "artifacts")
        settings = replace(settings, artifact_location=location)
    else:
        monkeypatch.chdir(here)
    client, experiment_id = open_store(settings)
    run_id = client.create_run(experiment_id).info.run_id
    client.log_metric(run_id, "loss", 0.5)
    (here / "note.txt").write_text("kept")
    client.log_artifact(run_id, str(here / "note.txt"))
    with contextlib.closing(sqlite3.connect(here / "mlflow.db")) as database:
        assert database.execute("SELECT run_uuid FROM runs").fetchall() == [(run_id,)]
    # Readers find the same file, by SQL as well, and its artifacts.
    reader = open_client(settings.tracking_uri)
    assert metric_history(reader, run_id, ["loss"]) == {"loss": {0: 0.5}}
    kept = _local_folder(reader.get_run(run_id).info.artifact_uri)
    assert kept is not None
    assert kept.is_relative_to(here)
    assert (kept / "note.txt").read_text() == "kept"
    assert {path.relative_to(folder).parts[0] for path in set(folder.rglob("*")) - before} == {name}


@pytest.mark.parametrize("name", ["feature%20x", 'it\'s "x"'])
def test_a_new_store_keeps_artifacts_beside_it_where_no_place_is_set(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    here = folder / name
    here.mkdir()
    monkeypatch.chdir(here)
    settings = Settings(artifact_location=None)
    client, experiment_id = open_store(settings)
    run_id = client.create_run(experiment_id).info.run_id
    (here / "note.txt").write_text("kept")
    client.log_artifact(run_id, str(here / "note.txt"))
    assert len(list(here.glob(f"mlruns/*/{run_id}/artifacts/note.txt"))) == 1
    assert list(folder.iterdir()) == [here]
    assert "_MLFLOW_SERVER_ARTIFACT_ROOT" not in os.environ


def test_a_path_through_a_link_and_back_is_followed_as_the_system_does(folder: Path) -> None:
    (folder / "far" / "away").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "far" / "away")
    shutil.copy(empty_tables(), folder / "far" / "mlflow.db")
    client, experiment_id = open_store(Settings(tracking_uri="sqlite:///link/../mlflow.db"))
    client.create_run(experiment_id)
    with contextlib.closing(sqlite3.connect("link/../mlflow.db")) as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (1,)
    assert not Path("mlflow.db").exists()


def test_every_command_finds_the_store_in_a_folder_with_an_odd_name(folder, monkeypatch, capsys):
    here, other = folder / "a%20b?c=d#e \"ü'", folder / "a b"
    here.mkdir()
    other.mkdir()
    shutil.copy(empty_tables(), here / "mlflow.db")
    monkeypatch.chdir(here)
    options = ("--mode", "no_dp", "--regime", "accuracy", "--group", "g")
    monkeypatch.setenv("FAKE_WORKER", '{"no_dp": {"do": "crash", "regime": 1}}')
    assert fake_launch.run(["quick", *options]) == 1
    monkeypatch.setenv("FAKE_WORKER", "{}")
    assert fake_launch.run(["resume", "g", "--offline"]) == 0
    assert fake_launch.run(["sync", "g"]) == 0
    assert list(Path("spool").iterdir()) == []
    capsys.readouterr()
    assert fake_launch.run(["resume", "g"]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    # Of the synthetic records no verdict is asked, but that all of them are read, from anywhere.
    monkeypatch.chdir(other)
    uri = f"sqlite:///{here}/mlflow.db"
    main(["compare", "g", "--no-png", "--tracking-uri", uri, "--results-dir", str(here / "out")])
    found = read_group_anywhere(Settings(tracking_uri=uri), "g", print)
    assert {run.status for run in found.group.runs} == {"FINISHED"}
    assert all(run.trajectory and not run.trajectory_missing for run in found.group.runs)
    assert found.group.tags[names.VERDICT]
    assert sorted(folder.iterdir()) == sorted((here, other))
    assert list(other.iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("sqlite:///mlflow.db?timeout=60", "expected sqlite:///FILE without options"),
        ("sqlite:///stores/", "expected sqlite:///FILE."),
        ("sqlite:///raw\udcff.db", "expected a path in UTF-8"),
    ],
)
def test_a_store_that_mlflow_would_open_elsewhere(folder, capsys, uri, message):
    assert message in refuse(capsys, uri)
    assert message in refuse(capsys, uri, "--offline")
    assert main(["compare", "g", "--tracking-uri", uri]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    for command in ("sync", "ui"):
        assert fake_launch.run([command, "--tracking-uri", uri]) == 2
        assert message in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_artifacts_in_a_folder_that_mlflow_cannot_name(folder, capsys, database, monkeypatch):
    Path("raw\udcff").mkdir()
    monkeypatch.chdir("raw\udcff")
    said = refuse(capsys, f"sqlite:///{database}")
    assert "artifact_location=" in said
    assert "expected a path in UTF-8" in said


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("/a#b/c?d/e%20f", "/a#b/c?d/e f"),
        ("file:///a%23b/c%3Fd/e%2520f", "/a#b/c?d/e%20f"),
        ("s3://bucket/a", None),
    ],
)
def test_artifacts_are_looked_for_where_mlflow_puts_them(uri: str, place: str | None) -> None:
    assert _local_folder(uri) == (None if place is None else Path(place))
    assert place in (None, local_file_uri_to_path(uri))
