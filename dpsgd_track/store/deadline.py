"""A client of a tracking server whose calls end in time and in memory, whatever the server does.

The timeout of a request is that of each part of the answer, so that a server which drips bytes
would be waited for without end. Here a call has a deadline as a whole, and an answer that is none
of MLflow's is an error of the server, not of this program.

requests reads an answer to its end before anybody sees it, and MLflow has no place for an adapter
of one's own. So that an answer without end does not fill the memory, two methods of the libraries
do something else in the threads of calls: `HTTPAdapter.build_response` of requests has bytes
counted, and `HTTPResponse.drain_conn` of urllib3 closes the connection, whose answer nobody wants.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from requests import PreparedRequest, RequestException, Response
from requests.adapters import HTTPAdapter
from urllib3 import HTTPResponse

DEADLINE_S = 15.0
"""Longest time in seconds for a call."""
FILE_DEADLINE_S = 300.0
"""The same for a call that moves a file."""
MOST_BYTES = 128 << 20
"""Longest answer in bytes. A page of 500 runs takes some 30 MB where each has 250 metrics."""
_DOWNLOAD = "download_artifacts"
_OF_FILES = ("log_artifact", _DOWNLOAD)
_OF_THE_SERVER = (MlflowException, RequestException, OSError)


class NoAnswer(Exception):
    """The server did not answer in time, or not as MLflow does."""


class _Call(threading.Thread):
    """A thread that is never joined: it may wait for the server as long as this process lives."""

    def __init__(self, method: Callable[[], Any], most_bytes: int | None) -> None:
        super().__init__(name="request", daemon=True)
        self._method, self._most_bytes = method, most_bytes
        self.results: list[Any] = []
        self.errors: list[BaseException] = []
        self._answer: Any = None
        self._is_given_up = False

    def run(self) -> None:
        try:
            self.results.append(self._method())
        except BaseException as error:
            self.errors.append(error)

    def bound(self, answer: Any) -> None:
        """Have `answer`, a response of urllib3, read no further than it may be long."""
        self._answer = answer
        if answer.get_redirect_location():
            # Only where it leads is looked at.
            answer.close()
        answer.stream = partial(self._parts, answer.stream)

    def give_up(self) -> None:
        """Read nothing more; nobody waits for it."""
        self._is_given_up = True
        if self._answer is not None:
            # The socket may be gone by now, and urllib3 has no such method before 2.3.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                self._answer.shutdown()

    def _parts(self, stream: Callable[..., Iterator[bytes]], *args: Any, **kwargs: Any) -> Any:
        num_bytes = 0
        for part in stream(*args, **kwargs):
            num_bytes += len(part)
            if self._most_bytes is not None and num_bytes > self._most_bytes:
                self._answer.close()
                raise NoAnswer(f"The server's answer is longer than {self._most_bytes:,} bytes.")
            if self._is_given_up:
                return
            yield part


_build_response = HTTPAdapter.build_response
_drain_conn = HTTPResponse.drain_conn


def _build_bounded(self: HTTPAdapter, req: PreparedRequest, resp: Any) -> Response:
    if isinstance(call := threading.current_thread(), _Call):
        call.bound(resp)
    return _build_response(self, req, resp)


def _drain_or_close(self: HTTPResponse) -> None:
    if isinstance(threading.current_thread(), _Call):
        self.close()
    else:
        _drain_conn(self)


HTTPAdapter.build_response = _build_bounded  # type: ignore[method-assign]
HTTPResponse.drain_conn = _drain_or_close  # type: ignore[method-assign]


class DeadlineClient:
    """Stands in for `MlflowClient`."""

    def __init__(
        self,
        client: MlflowClient,
        deadline_s: float = DEADLINE_S,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._client, self._deadline_s, self._most_bytes = client, deadline_s, most_bytes

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        return partial(self._call, name, attribute) if callable(attribute) else attribute

    def _call(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        deadline_s = FILE_DEADLINE_S if name in _OF_FILES else self._deadline_s
        most_bytes = None if name == _DOWNLOAD else self._most_bytes
        call = _Call(partial(method, *args, **kwargs), most_bytes)
        call.start()
        call.join(deadline_s)
        if call.results:
            return call.results[0]
        if not call.errors:
            call.give_up()
            raise NoAnswer(f"The server did not end its answer within {deadline_s:g} s.")
        (error,) = call.errors
        if isinstance(error, _OF_THE_SERVER):
            raise error
        raise NoAnswer(
            f"The server's answer is none of MLflow's: {type(error).__name__}: {error}"
        ) from error
