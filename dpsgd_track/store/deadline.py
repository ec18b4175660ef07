"""A client of a tracking server whose calls end in time, whatever the server does.

The timeout of a request is that of each part of the answer, so that a server which drips bytes
would be waited for without end. Here a call has a deadline as a whole, and an answer that is none
of MLflow's is an error of the server, not of this program.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from requests import RequestException

DEADLINE_S = 15.0
"""Longest time in seconds for a call."""
FILE_DEADLINE_S = 300.0
"""The same for a call that moves a file."""
_OF_FILES = ("log_artifact", "download_artifacts")
_OF_THE_SERVER = (MlflowException, RequestException, OSError)


class NoAnswer(Exception):
    """The server did not answer in time, or not as MLflow does."""


class DeadlineClient:
    """Stands in for `MlflowClient`."""

    def __init__(self, client: MlflowClient, deadline_s: float = DEADLINE_S) -> None:
        self._client, self._deadline_s = client, deadline_s

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        return partial(self._call, name, attribute) if callable(attribute) else attribute

    def _call(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(method(*args, **kwargs))
            except BaseException as error:
                errors.append(error)

        # A thread that is never joined: it may wait for the server as long as this process lives.
        thread = threading.Thread(target=run, name="request", daemon=True)
        thread.start()
        deadline_s = FILE_DEADLINE_S if name in _OF_FILES else self._deadline_s
        thread.join(deadline_s)
        if results:
            return results[0]
        if not errors:
            raise NoAnswer(f"The server did not end its answer within {deadline_s:g} s.")
        (error,) = errors
        if isinstance(error, _OF_THE_SERVER):
            raise error
        raise NoAnswer(
            f"The server's answer is none of MLflow's: {type(error).__name__}: {error}"
        ) from error
