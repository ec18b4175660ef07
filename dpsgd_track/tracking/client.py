"""The way to MLflow that run tree and writer share: a quiet client that fails soon and clearly."""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING

from dpsgd_track.config import redact_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRACKING_URI_VARIABLE = "MLFLOW_TRACKING_URI"

# MLflow's own defaults stall a caller for four minutes when the server is gone, and write
# migrations and addresses to the terminal. A value the user has set wins.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_TRANSIENT_CODES = ("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED")

# What went wrong, at the end of urllib3's account of everything around it.
_HTTP_CAUSE = re.compile(r"Caused by \w+\([\"'].*?\): (.*?)\.?[\"']\)")


class TrackingError(RuntimeError):
    """Something could not be written to the tracking store."""


def connect(tracking_uri: str) -> MlflowClient:
    """A client of the store at `tracking_uri`; creates an SQL store that does not exist yet."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(os.environ["MLFLOW_LOGGING_LEVEL"].upper())
    return MlflowClient(with_credentials(tracking_uri))


def with_credentials(tracking_uri: str) -> str:
    """The URI in the environment where `tracking_uri` is that one redacted.

    So a password reaches workers without being written to a file.
    """
    secret = os.environ.get(TRACKING_URI_VARIABLE, "")
    return secret if secret and redact_uri(secret) == tracking_uri else tracking_uri


def is_transient(error: Exception) -> bool:
    """Whether trying again may help: a locked database, a server that is away."""
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in _TRANSIENT_CODES
    return isinstance(error, ConnectionError | TimeoutError | requests.RequestException)


def one_line(error: BaseException, tracking_uri: str = "") -> str:
    """First line of an error's text, without the credentials `tracking_uri` may carry."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if caused := _HTTP_CAUSE.search(text):
        text = f"{caused[1]}."
    if tracking_uri:
        text = text.replace(tracking_uri, redact_uri(tracking_uri))
    return text[:500] or type(error).__name__
