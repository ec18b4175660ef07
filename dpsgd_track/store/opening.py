"""Opens the tracking store, before any process starts, and reports problems in one line."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpsgd_track.config import Settings
from dpsgd_track.record import names
from dpsgd_track.redaction import redact_uri
from dpsgd_track.store.client import connect, one_line
from dpsgd_track.store.sqlite_file import absolute_uri, require_utf8, sqlite_path
from dpsgd_track.store.ui_views import EXPERIMENT_TAGS

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCK_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 10
_URI = re.compile(r"[A-Za-z][\w+.-]*:/")

# Pattern in a store's error -> advice.
_ADVICE = {
    "error code 401": "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN.",
    "Host header": "Add the name used here to the server's --allowed-hosts.",
    "error code 403": "These credentials may not write there: ask who runs the server.",
    "CERTIFICATE_VERIFY_FAILED": "Name the authority that signed the server's certificate in "
    "MLFLOW_TRACKING_SERVER_CERT_PATH.",
    "out-of-date database schema": "Back the database up, then run `mlflow db upgrade` on it, or "
    "install the MLflow it belongs to.",
    "No module named": "Install the driver that the URI names, or name another, such as "
    "postgresql+psycopg2://.",
    "disk is full": "Make room where the store is.",
    "No space left": "Make room where the store is.",
    "readonly": "Make it writable, or choose another --tracking-uri.",
    "read-only": "Make it writable, or choose another --tracking-uri.",
}


def open_store(settings: Settings) -> tuple[MlflowClient, str]:
    """A client of the store, created if missing, and the id of its experiment.

    Raises:
        ValueError: a URI or path in the settings cannot be used.
        StoreError: the store cannot be used; a one-line message, within 15 seconds.
    """
    uri = absolute_uri(settings.tracking_uri)
    path = sqlite_path(uri)
    location = artifact_location(settings)
    try:
        if path is not None:
            _check_sqlite(path)
        elif not uri.startswith("http"):
            _check_database(uri)
        with _creation_lock(path):
            client = connect(uri)
            return client, _experiment_id(client, settings, location)
    except _StoreProblem as problem:
        reason = str(problem)
    except Exception as error:
        raise unusable(settings, error) from error
    raise _unusable(settings, reason)


def unusable(settings: Settings, error: Exception) -> StoreError:
    """The problem of the store that `error` reports, in one line with advice."""
    reason = one_line(error)
    advice = next((words for sign, words in _ADVICE.items() if sign in reason), "")
    if not advice and settings.tracking_uri.startswith("http"):
        advice = "Start the server, or check --tracking-uri."
    return _unusable(settings, f"{reason} {advice}".rstrip())


def _unusable(settings: Settings, reason: str) -> StoreError:
    return StoreError(
        f"tracking_uri={redact_uri(settings.tracking_uri)!r}: expected a usable tracking store. "
        f"{reason}"
    )


class StoreError(ValueError):
    """The tracking store cannot be used; the message has the reason and advice."""


class _StoreProblem(Exception):
    """A problem of the store, in one sentence."""


def _check_sqlite(path: Path) -> None:
    # MLflow retries an unreadable file for a minute and creates missing folders.
    if not path.parent.is_dir():
        raise _StoreProblem(f"The folder {path.parent} does not exist.")
    if path.is_dir():
        raise _StoreProblem(f"{path} is a folder.")
    target = path if path.exists() else path.parent
    if not os.access(target, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise _StoreProblem(f"{target} cannot be written to.")
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT_S)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute("SELECT count(*) FROM sqlite_master")
            database.rollback()
    except sqlite3.DatabaseError as error:
        raise _StoreProblem(f"{path}: {error}.") from error


def _check_database(uri: str) -> None:
    import sqlalchemy

    arguments = {"connect_timeout": _CONNECT_TIMEOUT_S}
    engine = sqlalchemy.create_engine(uri, connect_args=arguments)
    try:
        engine.connect().close()
    finally:
        engine.dispose()


@contextlib.contextmanager
def _creation_lock(path: Path | None) -> Iterator[None]:
    """Lock out other launchers: two that create one SQLite store at the same time both fail."""
    if path is None:
        yield
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def has_group(client: MlflowClient, experiment_id: str, group: str) -> bool:
    """True if the experiment has a group of this name."""
    query = f"tags.`{names.GROUP}` = '{group}'"
    return bool(client.search_runs([experiment_id], query, max_results=1))


def _experiment_id(client: MlflowClient, settings: Settings, location: str | None) -> str:
    experiment = client.get_experiment_by_name(settings.experiment)
    if experiment is None:
        try:
            return str(client.create_experiment(settings.experiment, location, EXPERIMENT_TAGS))
        except Exception:
            # Another launcher may have created it first.
            experiment = client.get_experiment_by_name(settings.experiment)
            if experiment is None:
                raise
    if experiment.lifecycle_stage not in ("active", "deleted"):
        raise _StoreProblem("What answers there is no MLflow server.")
    if experiment.lifecycle_stage == "deleted":
        raise _StoreProblem(
            f"The experiment {settings.experiment!r} is deleted. Restore it with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`, "
            "or set another `experiment` in mlflow.yaml."
        )
    return str(experiment.experiment_id)


def artifact_location(settings: Settings) -> str | None:
    """Artifact location of a new experiment; None lets the server decide.

    A relative folder is local to this machine, so with an HTTP server other machines could not
    reach it: the server decides then.

    Raises:
        ValueError: MLflow cannot store the name of the folder.
    """
    location = settings.artifact_location
    if not location or _URI.match(location):
        return location or None
    if settings.tracking_uri.startswith("http") and not Path(location).is_absolute():
        return None
    folder = Path(location).absolute()
    require_utf8("artifact_location", folder)
    return folder.as_uri()
