"""A call to a server ends in time, and in one line, whatever the server answers."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from dpsgd_track.config import Settings
from dpsgd_track.store.client import connect, one_line
from dpsgd_track.store.deadline import DeadlineClient, NoAnswer
from dpsgd_track.store.opening import StoreError, open_store

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
DEADLINE_S = 0.5


def client_of(uri: str, **bounds: float) -> Any:
    """A client of `uri` with bounds of its own, in an environment without retries."""
    connect(uri)
    return DeadlineClient(MlflowClient(uri), **bounds)


def whole(document: object) -> bytes:
    body = json.dumps(document).encode()
    return OK + b"Content-Length: %d\r\n\r\n" % len(body) + body


def drip(line: socket.socket) -> None:
    line.sendall(OK + b"Content-Length: 100000\r\n\r\n")
    _repeat(line, b" ")


def drip_headers(line: socket.socket) -> None:
    line.sendall(OK)
    _repeat(line, b"X-A: b\r\n")


def fill(line: socket.socket) -> None:
    line.sendall(OK + b"\r\n")
    _fill(line, bytes(65536))


def fill_in_chunks(line: socket.socket) -> None:
    line.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
    _fill(line, b"10000\r\n%b\r\n" % bytes(65536))


def fill_an_error(line: socket.socket) -> None:
    line.sendall(b"HTTP/1.1 500 Oops\r\n\r\n")
    # A page of text, of which nobody reads even the beginning.
    _fill(line, bytes(65536))


def fill_a_redirect(line: socket.socket) -> None:
    line.sendall(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\n\r\n")
    _fill(line, bytes(65536))


def _fill(line: socket.socket, part: bytes) -> None:
    while True:
        line.sendall(part)


def _repeat(line: socket.socket, part: bytes) -> None:
    for _ in range(100):
        line.sendall(part)
        time.sleep(0.05)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[socket.socket], object]], str]]:
    """Starts servers that answer every request in one way; returns their addresses."""
    with contextlib.ExitStack() as stack:

        def start(
            answer: Callable[[socket.socket], object], asked: list[bytes] | None = None
        ) -> str:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def answer_one(line: socket.socket) -> None:
                # The client hangs up.
                with line, contextlib.suppress(OSError):
                    request = line.recv(65536)
                    if asked is not None:
                        asked.append(request)
                    answer(line)

            def accept() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        line, _ = server.accept()
                        threading.Thread(target=answer_one, args=(line,), daemon=True).start()

            threading.Thread(target=accept, daemon=True).start()
            return f"http://127.0.0.1:{server.getsockname()[1]}"

        yield start


@pytest.mark.parametrize("answer", [drip, drip_headers])
def test_a_server_that_drips_is_given_up(serve, answer) -> None:
    client = client_of(serve(answer), deadline_s=DEADLINE_S)
    start = time.monotonic()
    with pytest.raises(NoAnswer, match=r"did not end its answer within 0\.5 s"):
        client.get_experiment_by_name("x")
    assert time.monotonic() - start < 3
    # Nor does anybody go on reading what it drips, but for headers, which are few.
    if answer is drip:
        deadline = time.monotonic() + 3
        while any(thread.name == "request" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (fill, "The server's answer is longer than 1,048,576 bytes."),
        (fill_in_chunks, "The server's answer is longer than 1,048,576 bytes."),
        (fill_an_error, "too many 500 error responses"),
        (fill_a_redirect, "Exceeded 30 redirects."),
    ],
)
def test_an_answer_without_end_fills_no_memory(serve, answer, said) -> None:
    client = client_of(serve(answer), most_bytes=1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(MlflowException) as raised:
            client.get_experiment_by_name("x")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert said in one_line(raised.value)
    assert peak_bytes < 8 << 20


def test_an_answer_that_is_merely_long_is_read(serve) -> None:
    document = {"experiment": {"name": "x" * 200_000, "lifecycle_stage": "active"}}
    client = client_of(serve(lambda line: line.sendall(whole(document))))
    assert client.get_experiment_by_name("x").name == "x" * 200_000


@pytest.mark.parametrize(
    "document",
    [
        {"runs": 7, "experiment": [1]},
        {"runs": [{"info": 3}]},
        [1, 2],
        "text",
        {"runs": [{"data": {"metrics": [{"value": {}}]}}]},
    ],
)
def test_an_answer_of_other_types_is_the_servers_fault(serve, document) -> None:
    client = connect(serve(lambda line: line.sendall(whole(document))))
    with pytest.raises(Exception) as raised:  # noqa: PT011
        client.search_runs(["0"])
    assert isinstance(raised.value, NoAnswer | MlflowException)
    assert "\n" not in one_line(raised.value)


def test_what_answers_as_no_mlflow_server_does_is_no_store(serve) -> None:
    uri = serve(lambda line: line.sendall(whole({"experiment": {"name": "dpsgd-track"}})))
    with pytest.raises(StoreError, match="is no MLflow server"):
        open_store(Settings(tracking_uri=uri))


def test_where_a_server_redirects_to_the_token_is_not_shown(serve, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-secret-never-to-be-seen")
    asked: list[bytes] = []
    seen: list[bytes] = []
    elsewhere = serve(lambda line: line.sendall(whole({})), seen).encode()
    redirect = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: %b/x\r\n\r\n" % elsewhere
    with contextlib.suppress(MlflowException, NoAnswer):
        client_of(serve(lambda line: line.sendall(redirect), asked)).search_runs(["0"])
    assert b"a-secret-never-to-be-seen" in asked[0]
    assert seen
    assert not any(b"a-secret-never-to-be-seen" in request for request in seen)
