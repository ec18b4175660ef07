"""A call to a server ends in time, and in one line, whatever the server answers."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from dpsgd_track.config import Settings
from dpsgd_track.store.client import connect, one_line
from dpsgd_track.store.deadline import DeadlineClient, NoAnswer
from dpsgd_track.store.opening import StoreError, open_store

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
DEADLINE_S = 0.5


def whole(document: object) -> bytes:
    body = json.dumps(document).encode()
    return OK + b"Content-Length: %d\r\n\r\n" % len(body) + body


def drip(line: socket.socket) -> None:
    line.sendall(OK + b"Content-Length: 100000\r\n\r\n")
    _repeat(line, b" ")


def drip_headers(line: socket.socket) -> None:
    line.sendall(OK)
    _repeat(line, b"X-A: b\r\n")


def _repeat(line: socket.socket, part: bytes) -> None:
    for _ in range(100):
        line.sendall(part)
        time.sleep(0.05)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[socket.socket], object]], str]]:
    """Starts servers that answer every request in one way; returns their addresses."""
    with contextlib.ExitStack() as stack:

        def start(answer: Callable[[socket.socket], object]) -> str:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def answer_one(line: socket.socket) -> None:
                # The client hangs up.
                with line, contextlib.suppress(OSError):
                    line.recv(65536)
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
    client = DeadlineClient(connect(serve(answer)), DEADLINE_S)
    start = time.monotonic()
    with pytest.raises(NoAnswer, match=r"did not end its answer within 0\.5 s"):
        client.get_experiment_by_name("x")
    assert time.monotonic() - start < 3


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
    from mlflow.exceptions import MlflowException

    assert isinstance(raised.value, NoAnswer | MlflowException)
    assert "\n" not in one_line(raised.value)


def test_what_answers_as_no_mlflow_server_does_is_no_store(serve) -> None:
    uri = serve(lambda line: line.sendall(whole({"experiment": {"name": "dpsgd-track"}})))
    with pytest.raises(StoreError, match="is no MLflow server"):
        open_store(Settings(tracking_uri=uri))
