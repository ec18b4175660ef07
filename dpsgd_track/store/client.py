"""MLflow client of launcher and reader: quiet, with short timeouts and clear errors."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dpsgd_track.config import require
from dpsgd_track.redaction import redact_uri, redacted
from dpsgd_track.store.sqlite_file import sqlalchemy_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRACKING_URI_VARIABLE = "MLFLOW_TRACKING_URI"

# MLflow's own defaults stall a caller for four minutes when the server is gone, and write
# migrations and addresses to the terminal. A value the user has set wins.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Timeout of libpq, which by default waits for ever.
    "PGCONNECT_TIMEOUT": "10",
}
# Retries happen in this package, where they delay nobody.
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
# The only way to set a store's default.
_ARTIFACT_ROOT = "_MLFLOW_SERVER_ARTIFACT_ROOT"
_INSECURE = "MLFLOW_TRACKING_INSECURE_TLS"
_ABOUT_THE_RECORD = (
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
)

# Statuses by which a proxy or an artifact store refuses one file.
_ABOUT_THE_FILE = (400, 404, 405, 409, 411, 413, 414, 415, 422)

# The actual error, within the long messages of urllib3 and SQLAlchemy.
_CAUSES = (
    re.compile(r"Caused by \w+\([\"'].*?\): (.*?)\.?[\"']\)"),
    re.compile(r"Caused by \w+\('Connection aborted\.', \w+\((?:\d+, )?'(.*?)'\)"),
    re.compile(r"failed with timeout exception .*?\): (.*?)\. \("),
    re.compile(r"\((?:sqlite3|psycopg2\.?\w*)\.\w+\) (.+)"),
)


class TrackingError(RuntimeError):
    """Records could not be stored."""


def connect(tracking_uri: str) -> MlflowClient:
    """A client of the store at `tracking_uri`; creates an SQL store that does not exist yet."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[_RETRIES] = "0"
    insecure = os.environ.get(_INSECURE, "")
    require(
        insecure.lower() not in ("true", "1"),
        _INSECURE,
        insecure,
        "false, as certificates are verified",
        "Name the authority that signed the server's in MLFLOW_TRACKING_SERVER_CERT_PATH.",
    )
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
    with _default_artifact_root():
        client = MlflowClient(sqlalchemy_uri(with_credentials(tracking_uri)))
    if not tracking_uri.startswith("http"):
        return client
    from dpsgd_track.store.deadline import DeadlineClient

    return cast("MlflowClient", DeadlineClient(client))


@contextlib.contextmanager
def _default_artifact_root() -> Iterator[None]:
    """Set MLflow's default artifact root, the folder `mlruns`, as a URI.

    Given a path, MLflow would decode %XX in it, and insert it into SQL with its quotes.
    """
    if _ARTIFACT_ROOT in os.environ:
        yield
        return
    os.environ[_ARTIFACT_ROOT] = Path("mlruns").absolute().as_uri()
    try:
        yield
    finally:
        # If it stayed set, MLflow would take this process for a server.
        os.environ.pop(_ARTIFACT_ROOT, None)


def with_credentials(tracking_uri: str) -> str:
    """The URI from the environment if `tracking_uri` is its redacted form.

    This passes a password to workers without writing it to a file.
    """
    secret = os.environ.get(TRACKING_URI_VARIABLE, "")
    return secret if secret and redact_uri(secret) == tracking_uri else tracking_uri


def is_about_the_record(error: Exception) -> bool:
    """True if a store rejected the record itself; any other error may be temporary."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    if isinstance(error, MlflowException):
        return error.error_code in _ABOUT_THE_RECORD
    if isinstance(error, HTTPError) and error.response is not None:
        return error.response.status_code in _ABOUT_THE_FILE
    return isinstance(error, LookupError | FileNotFoundError)


def one_line(error: BaseException) -> str:
    """First line of an error's text, without the credentials of its addresses."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    matches = (cause.search(str(error)) for cause in _CAUSES)
    if caused := next(filter(None, matches), None):
        text = f"{caused[1].strip()}."
    return redacted(text)[:500] or type(error).__name__
