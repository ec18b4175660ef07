"""The way to MLflow that launcher and reader share: a quiet client that fails soon and clearly."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dpsgd_track.config import redact_uri, require
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
    # Of libpq, whose own default is to wait for ever.
    "PGCONNECT_TIMEOUT": "10",
}
# What is to be tried again is tried again here, where it delays nobody.
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
# The only way to a store's default.
_ARTIFACT_ROOT = "_MLFLOW_SERVER_ARTIFACT_ROOT"
_INSECURE = "MLFLOW_TRACKING_INSECURE_TLS"
_ABOUT_THE_RECORD = (
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
)

# Statuses by which what stands between, or a store of files, refuses one file.
_ABOUT_THE_FILE = (400, 404, 405, 409, 411, 413, 414, 415, 422)

_CREDENTIALS = re.compile(r"(\w://)[^/\s]*@")
# What went wrong, in the middle of urllib3's and SQLAlchemy's account of everything around it.
_CAUSES = (
    re.compile(r"Caused by \w+\([\"'].*?\): (.*?)\.?[\"']\)"),
    re.compile(r"Caused by \w+\('Connection aborted\.', \w+\((?:\d+, )?'(.*?)'\)"),
    re.compile(r"failed with timeout exception .*?\): (.*?)\. \("),
    re.compile(r"\((?:sqlite3|psycopg2\.?\w*)\.\w+\) (.+)"),
)


class TrackingError(RuntimeError):
    """Records could not be kept."""


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
        return MlflowClient(sqlalchemy_uri(with_credentials(tracking_uri)))


@contextlib.contextmanager
def _default_artifact_root() -> Iterator[None]:
    """Give MLflow its own default, the folder `mlruns`, as a URI.

    As a path, MLflow would decode %XX in it, and paste it into SQL with its quotes.
    """
    if _ARTIFACT_ROOT in os.environ:
        yield
        return
    os.environ[_ARTIFACT_ROOT] = Path("mlruns").absolute().as_uri()
    try:
        yield
    finally:
        # Where it stays, MLflow takes this process for a server.
        os.environ.pop(_ARTIFACT_ROOT, None)


def with_credentials(tracking_uri: str) -> str:
    """The URI in the environment where `tracking_uri` is that one redacted.

    So a password reaches workers without being written to a file.
    """
    secret = os.environ.get(TRACKING_URI_VARIABLE, "")
    return secret if secret and redact_uri(secret) == tracking_uri else tracking_uri


def is_about_the_record(error: Exception) -> bool:
    """Whether a store refused what it was sent; anything else may be better another time."""
    from mlflow.exceptions import MlflowException
    from requests import HTTPError

    if isinstance(error, MlflowException):
        return error.error_code in _ABOUT_THE_RECORD
    if isinstance(error, HTTPError) and error.response is not None:
        return error.response.status_code in _ABOUT_THE_FILE
    return isinstance(error, LookupError | FileNotFoundError)


def one_line(error: BaseException) -> str:
    """First line of an error's text, without the credentials that addresses in it carry."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    found = (cause.search(str(error)) for cause in _CAUSES)
    if caused := next(filter(None, found), None):
        text = f"{caused[1].strip()}."
    return _CREDENTIALS.sub(r"\1***@", text)[:500] or type(error).__name__
