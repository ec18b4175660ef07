import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name

from dpsgd_track.config import ModelConfig, Settings
from dpsgd_track.record import names
from dpsgd_track.record.environment import environment
from dpsgd_track.record.failure import FAILURE, Failure, FailureKind
from dpsgd_track.record.run import Status
from dpsgd_track.store import opening as store
from dpsgd_track.store.client import one_line, with_credentials
from dpsgd_track.store.reader import read_group
from dpsgd_track.store.run_tree import MAX_PARAM_LENGTH, RunTree, flatten
from dpsgd_track.store.shipper import Shipper, settle
from dpsgd_track.store.spool import CONTROL, SpoolWriter
from dpsgd_track.store.spooled import claim
from tests.support.synthetic_group import job, mode_run, plan_of, setup
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
LONG = ModelConfig(name="x" * 10_000)
STOPPED = Failure(kind=FailureKind.INTERRUPTED)


def _store(settings: Settings) -> tuple[MlflowClient, str, str]:
    client, experiment_id = store.open_store(settings)
    return client, settings.tracking_uri, experiment_id


def test_runs_nest_three_deep_and_carry_their_tags(settings, client, tmp_path, capfd):
    planned = job("no_dp", setup("accuracy", replay="permuted"), model=LONG)
    with planted(settings, tmp_path, "g1") as tree:
        tree.start_group(plan_of([mode_run("no_dp", replay="permuted", job=planned)]))
        group = tree.group_run
        mode, ranks = tree.start_mode(planned, planned.regimes[0], (0, 1))
        tree.finish_open(Status.FINISHED, STOPPED)
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
    assert len(run.data.params["model.name"]) == MAX_PARAM_LENGTH
    (planned_run,) = read_group(client, settings, "g1").plan.runs()
    assert planned_run[0] == mode_run("no_dp", replay="permuted").key
    experiment_id = run.info.experiment_id
    assert store.has_group(client, experiment_id, "g1")
    assert not store.has_group(client, experiment_id, "g2")
    assert run.info.artifact_uri.startswith("file:///")
    # Creating a store makes MLflow talk about migrations.
    assert capfd.readouterr() == ("", "")


def test_finish_sets_status_reason_and_note(settings, client, tmp_path):
    planned = job("no_dp", setup("clip"))
    failure = Failure(kind=FailureKind.OUT_OF_MEMORY, step=3, rank=1)
    with planted(settings, tmp_path, "g3") as tree:
        tree.start_group(plan_of([mode_run("no_dp", "clip")]))
        mode, ranks = tree.start_mode(planned, planned.regimes[0], (0,))
        assert ranks[1] == ""
        tree.finish(mode, Status.FAILED, failure, "Log: x")
        tree.finish_open(Status.KILLED, STOPPED)
    run = client.get_run(IDS[mode])
    assert run.info.status == Status.FAILED
    said = "out of memory at step 3, rank 1. Try a smaller --batch-size"
    assert run.data.tags[names.REASON].startswith(said)
    assert run.data.tags[names.REASON].endswith("Log: x")
    assert "Try a smaller --batch-size" in run.data.tags[names.NOTE]
    assert FAILURE.loads(run.data.tags[names.FAILURE]) == failure
    others = {client.get_run(IDS[run]).info.status for run in (tree.group_run, ranks[0])}
    assert others == {Status.KILLED}


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
    facts = dict(environment().items())
    assert {"python", "platform", "cpu", "torch", "mlflow", "opacus"} <= facts.keys()
    assert all(value for name, value in facts.items() if not name.startswith("git"))


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


def test_a_plan_is_read_back_whole_however_long(settings, client, tmp_path):
    runs = [mode_run(f"mode-{i}", variant="variant", replay="again") for i in range(200)]
    with planted(settings, tmp_path, "long") as tree:
        tree.start_group(plan_of(runs))
        tree.finish_open(Status.FINISHED, STOPPED)
    read = read_group(client, settings, "long").runs
    assert [run.key for run in read] == [run.key for run in runs]


@pytest.mark.parametrize("label", ["my_module:make(1)@my-fork", "a/../b", "ä(1)" * 99])
def test_a_mode_is_charted_under_a_name_that_stores_take(label: str) -> None:
    name = names.group_metric("grad_norm", "clip", label)
    _validate_metric_name(name)
    assert len(name) <= MAX_ENTITY_KEY_LENGTH
    with pytest.raises(MlflowException):
        _validate_metric_name(f"grad_norm/clip/{label}")
