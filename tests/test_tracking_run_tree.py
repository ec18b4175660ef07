import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dpsgd_track.config import RegimeConfig, Settings
from dpsgd_track.record import names
from dpsgd_track.record.environment import environment
from dpsgd_track.store import opening as store
from dpsgd_track.store.client import one_line, with_credentials
from dpsgd_track.store.reader import read_group
from dpsgd_track.store.run_tree import (
    FAILED,
    FINISHED,
    KILLED,
    MAX_PARAM_LENGTH,
    MAX_TAG_LENGTH,
    RunTree,
    flatten,
)
from dpsgd_track.store.shipper import Shipper, settle
from dpsgd_track.store.spool import CONTROL, SpoolWriter
from dpsgd_track.store.spooled import claim
from tests.support.tracking_servers import closed_port


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("store")
    return Settings(
        tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=str(folder / "artifacts")
    )


@pytest.fixture
def client(settings) -> MlflowClient:
    return MlflowClient(settings.tracking_uri)


@contextlib.contextmanager
def planted(settings: Settings, spool: Path, group: str) -> Iterator[RunTree]:
    """A run tree that is in the store, under its own keys, at the end."""
    claimed = claim(spool, group)
    assert claimed is not None
    writer = SpoolWriter(claimed.folder, f"launcher{CONTROL}")
    yield RunTree(writer, settings.experiment, group)
    writer.close()
    shipper = Shipper(claimed, *_store(settings))
    assert settle(shipper, count=True) == []
    IDS.update(shipper.run_ids)


IDS: dict[str, str] = {}


def _store(settings: Settings) -> tuple[MlflowClient, str, str]:
    client, experiment_id = store.open_store(settings)
    return client, settings.tracking_uri, experiment_id


def test_runs_nest_three_deep_and_carry_their_tags(settings, client, tmp_path, capfd):
    regime = RegimeConfig(name="accuracy", num_iter=1, noise_matched=True, replay="permuted")
    with planted(settings, tmp_path, "g1") as tree:
        group = tree.start_group([("no_dp", "accuracy", "", "permuted")], {"suite": "quick"})
        mode, ranks = tree.start_mode("no_dp", regime, 2, {"long": "x" * 10_000})
        tree.finish_open(FINISHED, "")
    tags = client.get_run(IDS[ranks[1]]).data.tags
    assert tags[names.PARENT_RUN] == IDS[mode]
    assert tags[names.RANK] == "1"
    assert tags["mlflow.runName"] == "rank 1"
    run = client.get_run(IDS[mode])
    assert (
        run.data.tags
        | {
            names.GROUP: "g1",
            names.KIND: names.KIND_MODE,
            names.MODE: "no_dp",
            names.REGIME: "accuracy",
            names.VARIANT: "",
            names.REPLAY: "permuted",
            names.NOISE_MATCHED: "true",
            names.PARENT_RUN: IDS[group],
            "mlflow.runName": "no_dp/accuracy (permuted)",
        }
        == run.data.tags
    )
    assert len(run.data.params["long"]) == MAX_PARAM_LENGTH
    expected = json.loads(client.get_run(IDS[group]).data.tags[names.EXPECTED_RUNS])
    assert expected == [["no_dp", "accuracy", "", "permuted"]]
    experiment_id = run.info.experiment_id
    assert store.has_group(client, experiment_id, "g1")
    assert not store.has_group(client, experiment_id, "g2")
    assert run.info.artifact_uri.startswith("file:///")
    # Creating a store makes MLflow talk about migrations.
    assert capfd.readouterr() == ("", "")


def test_finish_sets_status_reason_and_note(settings, client, tmp_path):
    with planted(settings, tmp_path, "g3") as tree:
        group = tree.start_group([], {})
        mode, ranks = tree.start_mode("no_dp", RegimeConfig(name="clip", num_iter=1), 1, {})
        tree.finish(mode, FAILED, "out of memory.", "Try a smaller batch.")
        tree.finish_open(KILLED, "interrupted.")
    run = client.get_run(IDS[mode])
    assert run.info.status == FAILED
    assert run.data.tags[names.REASON] == "out of memory. Try a smaller batch."
    assert "Try a smaller batch." in run.data.tags[names.NOTE]
    assert {client.get_run(IDS[run]).info.status for run in (group, *ranks)} == {KILLED}


def refuse(**changes) -> str:
    start = time.monotonic()
    with pytest.raises(ValueError, match="expected a usable tracking store") as caught:
        store.open_store(Settings(**changes))
    assert time.monotonic() - start < 15
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unreachable_server_is_said_in_a_line():
    message = refuse(tracking_uri=f"http://me:secret@127.0.0.1:{closed_port()}")
    assert "Start the server" in message
    assert "secret" not in message


def test_a_missing_folder_is_said_in_a_line(tmp_path):
    assert "does not exist" in refuse(tracking_uri=f"sqlite:///{tmp_path}/none/mlflow.db")
    assert not (tmp_path / "none").exists()


def test_a_file_that_is_no_database_is_said_in_a_line(tmp_path):
    (tmp_path / "mlflow.db").write_text("not a database " * 1000)
    assert "not a database" in refuse(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")


def test_a_locked_database_is_said_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "LOCK_TIMEOUT_S", 0.2)
    lock = sqlite3.connect(tmp_path / "mlflow.db")
    lock.execute("BEGIN EXCLUSIVE")
    assert "locked" in refuse(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    lock.close()


@pytest.mark.parametrize("uri", ["sqlite:mlflow.db", "sqlite://", "sqlite:///:memory:"])
def test_an_sqlite_uri_without_a_file_is_refused(uri):
    with pytest.raises(ValueError, match="expected sqlite:///FILE"):
        store.open_store(Settings(tracking_uri=uri))


def test_an_unknown_driver_is_said_in_a_line():
    refuse(tracking_uri="postgresql+nodriver://host/db")


@pytest.mark.parametrize(
    ("uri", "location", "wanted"),
    [
        ("http://host", "mlartifacts", None),
        ("http://host", "/shared/artifacts", "file:///shared/artifacts"),
        ("sqlite:///x.db", "s3://bucket/a", "s3://bucket/a"),
        ("sqlite:///x.db", None, None),
        ("sqlite:///x.db", "/data/c:/a%20b", "file:///data/c%3A/a%2520b"),
    ],
)
def test_where_artifacts_go(uri, location, wanted):
    settings = Settings(tracking_uri=uri, artifact_location=location)
    assert store.artifact_location(settings) == wanted


def test_flatten():
    assert flatten({"a": {"b": 1, "c": (1.0, 2.0)}, "d": None}) == {
        "a.b": "1",
        "a.c": "1.0, 2.0",
        "d": "None",
    }


def test_environment_names_versions_without_importing_them():
    facts = environment()
    assert {"python", "platform", "cpu", "torch", "mlflow", "opacus"} <= facts.keys()
    assert all(facts.values())


def test_a_redacted_uri_stands_for_the_one_in_the_environment(monkeypatch):
    secret = "postgresql://user:secret@host/db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", secret)
    assert with_credentials("postgresql://***@host/db") == secret
    assert with_credentials("sqlite:///other.db") == "sqlite:///other.db"


ROUND = "HTTPConnectionPool(host='h', port=1): Max retries exceeded with url: /x (Caused by "


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (
            ROUND + "NewConnectionError(\"HTTPConnection(host='h', port=1): Failed to establish a "
            'new connection: [Errno 111] Connection refused"))',
            "Failed to establish a new connection: [Errno 111] Connection refused.",
        ),
        (
            ROUND + "ProtocolError('Connection aborted.', ConnectionResetError(104, 'Connection "
            "reset by peer')))",
            "Connection reset by peer.",
        ),
        (
            "API request to x failed with timeout exception HTTPConnectionPool(host='h', port=1): "
            "Read timed out. (read timeout=10). To increase the timeout, set a variable.",
            "Read timed out.",
        ),
        (
            "(raised as a result of Query-invoked autoflush)\n"
            "(sqlite3.OperationalError) database or disk is full\n[SQL: INSERT]",
            "database or disk is full.",
        ),
        (
            "413 Client Error: too large for url: http://me:a@secret@host:1/x",
            "413 Client Error: too large for url: http://***@host:1/x",
        ),
    ],
)
def test_what_went_wrong_is_said_without_everything_around_it(said, wanted):
    assert one_line(RuntimeError(said)) == wanted


def test_what_a_group_sets_out_to_do_fits_into_tags_however_long(settings, client, tmp_path):
    expected = [(f"mode-{i}", "accuracy", "variant", "again") for i in range(200)]
    with planted(settings, tmp_path, "long") as tree:
        tree.start_group(expected, {})
        tree.finish_open(FINISHED, "")
    data = client.get_run(IDS[tree.group_run]).data
    assert all(len(value) <= MAX_TAG_LENGTH for value in data.tags.values())
    runs = read_group(client, settings, "long").runs
    assert [(r.mode, r.regime, r.variant, r.replay) for r in runs] == expected
