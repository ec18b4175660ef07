"""Real MLflow servers and a real PostgreSQL on loopback, and a wire to them that can be cut."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

_START_TIMEOUT_S = 90.0


def closed_port() -> int:
    """One that nobody is given meanwhile: below those that the system hands out by itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class MlflowServer:
    """`mlflow server` as a process of its own, with artifacts proxied."""

    def __init__(
        self,
        folder: Path,
        store: str | None = None,
        *options: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.store = store or f"sqlite:///{folder}/server.db"
        self.port = closed_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._options = options
        self._environment = environment or {}
        self.start()
        self.wait()

    def start(self) -> None:
        """Start it, without waiting for it to answer."""
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--artifacts-destination", str(self._folder / "artifacts")),
            *self._options,
        ]
        environment = {
            **os.environ,
            "MLFLOW_BACKEND_STORE_URI": self.store,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            **self._environment,
        }
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            assert self._process.poll() is None, (self._folder / "server.log").read_text()[-2000:]
            time.sleep(0.1)
        raise AssertionError("the MLflow server did not start")

    def kill(self) -> None:
        """SIGKILL to it and its workers, in the middle of whatever they do."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@cache
def shared_server() -> MlflowServer:
    """One server for all tests that leave it as it is: it takes seconds to start."""
    folder = Path(tempfile.mkdtemp(prefix="dpsgd-track-server-"))
    server = MlflowServer(folder)

    def end() -> None:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    return server


class Wire:
    """Passes a port of loopback on to another, until it is cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.port = closed_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._sockets: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.answers_left: int | None = None
        """How many pieces of answers still come through before it is cut; None for all."""
        self.mend()

    def mend(self) -> None:
        """Let everything through."""
        self.answers_left = None
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        """Drop every connection, in the middle of whatever it carries, and take no more."""
        listener, self._listener = self._listener, None
        for each in {listener, *self._sockets} - {None}:
            assert each is not None
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                return
            self._sockets |= {near, far}
            for source, target, is_answer in ((near, far, False), (far, near, True)):
                arguments = (source, target, is_answer)
                threading.Thread(target=self._pass, args=arguments, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_answer and self.answers_left is not None:
                    if not self.answers_left:
                        # The server has done what it was asked to; nobody will know.
                        self.cut()
                        return
                    self.answers_left -= 1
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def _program(name: str) -> str:
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which(name, path=os.pathsep.join([*map(str, places), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"PostgreSQL's {name} is not installed")
    return found


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The URI of an empty database of a PostgreSQL server; skips where there is none."""
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
    initdb, server, createdb = map(_program, ("initdb", "postgres", "createdb"))
    user: str | None = None
    if os.geteuid() == 0:
        import pwd

        # It refuses to run as root.
        user = next((u.pw_name for u in pwd.getpwall() if u.pw_name in ("postgres",)), "nobody")
    data, port = folder / "data", closed_port()
    data.mkdir()
    if user is not None:
        shutil.chown(data, user)
        for parent in (folder, *folder.parents):
            with contextlib.suppress(PermissionError):
                parent.chmod(parent.stat().st_mode | 0o011)
    made = subprocess.run(
        [initdb, "-D", str(data), "-U", "tracker", "-A", "trust", "-N"],
        capture_output=True,
        text=True,
        user=user,
        cwd="/",
    )
    if made.returncode:
        pytest.skip(f"PostgreSQL cannot be set up here: {made.stderr.strip()[-200:]}")
    options = ("-p", str(port), "-h", "127.0.0.1", "-k", "", "-c", "fsync=off")
    with (folder / "postgres.log").open("ab") as log:
        process = subprocess.Popen(
            [server, "-D", str(data), *options], stdout=log, stderr=log, user=user, cwd="/"
        )
    try:
        address = ("-h", "127.0.0.1", "-p", str(port), "-U", "tracker", "mlflow")
        deadline = time.monotonic() + 30
        while subprocess.run([createdb, *address], capture_output=True).returncode:
            log_text = (folder / "postgres.log").read_text()[-500:]
            assert process.poll() is None, log_text
            assert time.monotonic() < deadline, log_text
            time.sleep(0.1)
        yield f"postgresql+psycopg2://tracker@127.0.0.1:{port}/mlflow"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
