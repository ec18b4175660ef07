"""A server as others run it: who may write there is asked, over TLS, with runs in PostgreSQL."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from sqlalchemy import Connection, create_engine, text

from dpsgd_track.cli.main import main
from dpsgd_track.config import Settings
from dpsgd_track.launcher import choices
from dpsgd_track.record import names
from dpsgd_track.store.reader import open_client, read_group
from dpsgd_track.store.spooled import spooled_groups
from tests.support import fake_launch
from tests.support.spooled_group import spool_a_group
from tests.support.store_launches import SECRET, launch, refuse, statuses
from tests.support.tracking_servers import Certificate, MlflowServer, certificate, gate, postgres

WRITER, READER, STRANGER = "writer", "reader", "stranger"
NUM_RUNS = 13
"""The group's, and those of no_dp and its three replays with two ranks each."""
CERTIFICATE_VARIABLES = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE")

_CONFIGURATION = f"""
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = sqlite:///{{folder}}/users.db
admin_username = admin
admin_password = admin-{SECRET}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""


@dataclass
class Guarded:
    """A server that knows its users."""

    server: MlflowServer
    certificate: Certificate
    database: str
    """What keeps its runs, or why it is not PostgreSQL."""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    folder = tmp_path_factory.mktemp("guarded")
    shown = certificate(folder)
    configuration = folder / "auth.ini"
    configuration.write_text(_CONFIGURATION.format(folder=folder))
    databases = postgres(tmp_path_factory.mktemp("postgres"))
    try:
        uri, database = databases.__enter__(), "postgresql"
    except pytest.skip.Exception as reason:
        uri, database = f"sqlite:///{folder}/server.db", str(reason)
    server = MlflowServer(
        folder,
        uri,
        *("--app-name", "basic-auth"),
        certificate=shown,
        environment={
            "MLFLOW_AUTH_CONFIG_PATH": str(configuration),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": SECRET,
        },
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            know(patch, shown)
            be(patch, "admin")
            _add_users(server)
        yield Guarded(server, shown, database)
    finally:
        server.kill()
        if database == "postgresql":
            databases.__exit__(None, None, None)


def _add_users(server: MlflowServer) -> None:
    experiment_id = MlflowClient(server.uri).create_experiment("dpsgd-track")
    for user, permission in ((WRITER, "EDIT"), (READER, "READ"), (STRANGER, "")):
        _ask(server, "2.0/mlflow/users/create", username=user, password=f"{user}-{SECRET}")
        if permission:
            about = {"resource_type": "experiment", "resource_id": experiment_id}
            path = "3.0/mlflow/users/permissions/grant"
            _ask(server, path, username=user, permission=permission, **about)


def _ask(server: MlflowServer, path: str, **body: str) -> None:
    """As the administrator. MLflow's own client would import its whole server."""
    headers = {"Authorization": basic("admin"), "Content-Type": "application/json"}
    with closing(server.connection()) as connection:
        connection.request("POST", f"/api/{path}", json.dumps(body), headers)
        answer = connection.getresponse()
        assert answer.status < 300, answer.read()


def basic(user: str) -> str:
    """What HTTP calls a user and a password."""
    return "Basic " + base64.b64encode(f"{user}:{user}-{SECRET}".encode()).decode()


def be(patch: pytest.MonkeyPatch, user: str, password: str = "") -> None:
    patch.setenv("MLFLOW_TRACKING_USERNAME", user)
    patch.setenv("MLFLOW_TRACKING_PASSWORD", password or f"{user}-{SECRET}")


def know(patch: pytest.MonkeyPatch, shown: Certificate) -> None:
    patch.setenv(CERTIFICATE_VARIABLES[0], str(shown.authority))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choices, "count_gpus", lambda: 0)
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    for name in CERTIFICATE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_user_and_a_password_take_a_group_from_launch_to_report(
    folder: Path, guarded: Guarded, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    know(monkeypatch, guarded.certificate)
    be(monkeypatch, WRITER)
    uri = guarded.server.uri
    assert launch(uri, "--group", "whole") == 0
    assert "takes nothing" not in capsys.readouterr().out
    # What the fake worker makes up is found to be wrong in itself.
    assert main(["compare", "whole", "--no-png", "--tracking-uri", uri]) == 1
    assert statuses(uri, "whole") == {"FINISHED": NUM_RUNS - 1, "FAILED": 1}
    assert not list(Path("spool").iterdir())
    client = open_client(uri)
    found = read_group(client, Settings(tracking_uri=uri), "whole")
    assert all(run.trajectory and not run.trajectory_missing for run in found.runs)
    assert found.tags[names.VERDICT] == "BUG"
    files = client.list_artifacts(found.run_id, "comparison")
    assert "report.html" in {Path(file.path).name for file in files}
    # They go through the server, which alone knows the folder.
    assert client.get_run(found.run_id).info.artifact_uri.startswith("mlflow-artifacts:")


def test_sync_shows_a_token_and_reads_everything_back(
    folder: Path, guarded: Guarded, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    spool_a_group(folder / "spool", "later")
    # The other variable that names an authority is one of the library below MLflow.
    monkeypatch.setenv(CERTIFICATE_VARIABLES[1], str(guarded.certificate.authority))
    options = {"passes_on": basic(WRITER), "shows": guarded.certificate}
    with gate(guarded.server, wanted=f"Bearer {SECRET}", **options) as asked:
        sync = ["sync", "--tracking-uri", asked.uri]
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", f"not-{SECRET}")
        assert fake_launch.run(sync) == 2
        said = capsys.readouterr()
        assert "401" in said.err
        assert SECRET not in said.out + said.err
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
        assert fake_launch.run(sync) == 0
        assert "each value checked" in capsys.readouterr().out
        assert not spooled_groups(folder / "spool")
        assert statuses(asked.uri, "later") == {"FINISHED": 4}


@pytest.mark.parametrize(
    ("user", "password", "said"),
    [
        ("", "", "MLFLOW_TRACKING_USERNAME"),
        (WRITER, f"not-{SECRET}", "MLFLOW_TRACKING_USERNAME"),
        (READER, "", "These credentials may not write there"),
        (STRANGER, "", "These credentials may not write there"),
    ],
    ids=["nobody", "wrong password", "may only read", "may do nothing"],
)
def test_who_may_not_write_is_told_before_anything_starts(
    folder: Path, guarded: Guarded, monkeypatch, capsys, user: str, password: str, said: str
) -> None:
    know(monkeypatch, guarded.certificate)
    if user:
        be(monkeypatch, user, password)
    told = refuse(capsys, guarded.server.uri)
    assert said in told
    assert ("401" if "USERNAME" in said else "403") in told
    be(monkeypatch, "admin")
    assert "FINISHED" not in statuses(guarded.server.uri, "nobody")


def test_an_authority_that_nobody_named_is_not_trusted(
    folder: Path, guarded: Guarded, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    be(monkeypatch, WRITER)
    said = refuse(capsys, guarded.server.uri)
    assert "CERTIFICATE_VERIFY_FAILED" in said
    assert "MLFLOW_TRACKING_SERVER_CERT_PATH" in said
    (tmp_path / "other").mkdir()
    other = certificate(tmp_path / "other")
    know(monkeypatch, other)
    assert "CERTIFICATE_VERIFY_FAILED" in refuse(capsys, guarded.server.uri)


@pytest.fixture
def database(guarded: Guarded) -> Iterator[Connection]:
    """The database behind the server, to be looked into."""
    if guarded.database != "postgresql":
        pytest.skip(guarded.database)
    engine = create_engine(guarded.server.store, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.mark.postgres
def test_its_runs_are_in_postgresql(database: Connection) -> None:
    found = database.execute(text("SELECT name FROM runs WHERE status != 'RUNNING'"))
    assert {"whole", "later"} <= {name for (name,) in found}


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("statement", "undo", "said"),
    [
        (
            "ALTER DATABASE mlflow SET default_transaction_read_only = on",
            "ALTER DATABASE mlflow RESET default_transaction_read_only",
            "read-only transaction. Make it writable",
        ),
        (
            "UPDATE alembic_version SET version_num = 'abcdef012345'",
            "UPDATE alembic_version SET version_num = '{version}'",
            "install the MLflow it belongs to",
        ),
    ],
    ids=["that can only be read", "of another MLflow"],
)
def test_a_postgresql(
    folder: Path, guarded: Guarded, database: Connection, capsys, statement, undo, said
) -> None:
    version = database.execute(text("SELECT version_num FROM alembic_version")).scalar()
    database.execute(text(statement))
    try:
        # MLflow keeps what it opened by its name, and connections that know of no change.
        assert said in refuse(capsys, f"{guarded.server.store}?application_name={said[0]}")
    finally:
        database.execute(text(undo.format(version=version)))


@pytest.mark.postgres
def test_a_postgresql_that_knows_nobody_of_that_name(
    folder: Path, guarded: Guarded, database: Connection, capsys
) -> None:
    uri = guarded.server.store.replace("tracker@", f"me:{SECRET}@")
    assert 'role "me" does not exist' in refuse(capsys, uri)
