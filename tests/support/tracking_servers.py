"""Real MLflow servers and a real PostgreSQL on loopback, what stands in front of them, and a wire
to them that can be cut."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import http.client
import ipaddress
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

_START_TIMEOUT_S = 90.0


def closed_port() -> int:
    """One that nobody is given meanwhile: below those that the system hands out by itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass(frozen=True)
class Certificate:
    """What a server on loopback shows of itself, and the authority that signed it."""

    authority: Path
    """What a client has to trust."""
    chain: Path
    key: Path

    def serving(self) -> ssl.SSLContext:
        """Of a server that shows it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.chain, self.key)
        return context

    def trusting(self) -> ssl.SSLContext:
        """Of a client that trusts the authority, and nobody else."""
        return ssl.create_default_context(cafile=str(self.authority))


def certificate(folder: Path) -> Certificate:
    """A new authority and a certificate for 127.0.0.1, both valid for a day."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    titles = [
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, title)])
        for title in ("an authority of the tests", "127.0.0.1")
    ]

    def sign(subject: int, *extensions: x509.ExtensionType) -> bytes:
        public = keys[subject].public_key()
        builder = (
            x509.CertificateBuilder(titles[0], titles[subject], public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day)
            .not_valid_after(now + day)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        )
        for extension in extensions:
            is_critical = isinstance(extension, x509.BasicConstraints)
            builder = builder.add_extension(extension, critical=is_critical)
        return builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    of_authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key())
    place = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = Certificate(folder / "authority.pem", folder / "chain.pem", folder / "key.pem")
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    made.authority.write_bytes(sign(0, x509.BasicConstraints(ca=True, path_length=0), usage))
    made.chain.write_bytes(sign(1, x509.SubjectAlternativeName([place]), of_authority))
    made.key.write_bytes(
        keys[1].private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return made


class MlflowServer:
    """`mlflow server` as a process of its own, with artifacts proxied."""

    def __init__(
        self,
        folder: Path,
        store: str | None = None,
        *options: str,
        environment: Mapping[str, str] | None = None,
        certificate: Certificate | None = None,
    ) -> None:
        self.store = store or f"sqlite:///{folder}/server.db"
        self.port = closed_port()
        scheme = "https" if certificate else "http"
        self.uri = f"{scheme}://127.0.0.1:{self.port}"
        self._context = None
        if certificate:
            self._context = certificate.trusting()
            files = f"--ssl-certfile {certificate.chain} --ssl-keyfile {certificate.key}"
            options += ("--uvicorn-opts", files)
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
                address = f"{self.uri}/health"
                urllib.request.urlopen(address, timeout=5, context=self._context).close()
                return
            assert self._process.poll() is None, (self._folder / "server.log").read_text()[-2000:]
            time.sleep(0.1)
        raise AssertionError("the MLflow server did not start")

    def connection(self) -> http.client.HTTPConnection:
        """A new connection to it."""
        if self._context:
            return http.client.HTTPSConnection("127.0.0.1", self.port, context=self._context)
        return http.client.HTTPConnection("127.0.0.1", self.port)

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


class Gate(ThreadingHTTPServer):
    """Stands in front of a server: asks for credentials, speaks TLS, changes the host's name."""

    daemon_threads = True

    def __init__(
        self,
        server: MlflowServer,
        *,
        wanted: str = "",
        host: str = "",
        status: int = 401,
        passes_on: str = "",
        shows: Certificate | None = None,
    ) -> None:
        """
        Args:
            wanted: Authorization that a request must have; any if empty.
            host: what the server is told that it was called; its address if empty.
            status: of the answer to a request that has another.
            passes_on: Authorization that the server is shown; that of the request if empty.
            shows: speaks TLS with this certificate.
        """
        self.to, self.wanted, self.host, self.status = server, wanted, host, status
        self.passes_on = passes_on
        self.fault: Callable[[socket.socket], object] | None = None
        """Answers in place of the server, on the connection of a request; the server never sees
        it."""
        self.num_faults = 0
        super().__init__(("127.0.0.1", 0), _Handler)
        if shows:
            self.socket = shows.serving().wrap_socket(self.socket, server_side=True)
        scheme = "https" if shows else "http"
        self.uri = f"{scheme}://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Gate

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if fault := self.server.fault:
            self.server.num_faults += 1
            self.close_connection = True
            with contextlib.suppress(OSError):
                fault(self.connection)
            return None
        if self.server.wanted and self.headers.get("Authorization") != self.server.wanted:
            return self._answer(self.server.status, b"You are not authenticated.")
        connection = self.server.to.connection()
        headers = dict(self.headers)
        headers["Host"] = self.server.host or f"127.0.0.1:{self.server.to.port}"
        if self.server.passes_on:
            headers["Authorization"] = self.server.passes_on
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return self._answer(answer.status, content)

    do_GET = do_POST = do_PUT = do_PATCH = _pass

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def gate(server: MlflowServer, **options: Any) -> Iterator[Gate]:
    """A gate that is taken away at the end."""
    made = Gate(server, **options)
    try:
        yield made
    finally:
        made.shutdown()
        made.server_close()


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

    @property
    def is_cut(self) -> bool:
        """True while nothing comes through."""
        return self._listener is None

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


class PostgresServer:
    """A PostgreSQL server with an empty database."""

    def __init__(self, folder: Path) -> None:
        """Set it up in `folder`, and start it; skips where there is none."""
        pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
        initdb, self._server, createdb = map(_program, ("initdb", "postgres", "createdb"))
        self._user: str | None = None
        if os.geteuid() == 0:
            import pwd

            # It refuses to run as root.
            users = (u.pw_name for u in pwd.getpwall() if u.pw_name in ("postgres",))
            self._user = next(users, "nobody")
        self._folder, self.port = folder, closed_port()
        data = folder / "data"
        data.mkdir()
        if self._user is not None:
            shutil.chown(data, self._user)
            for parent in (folder, *folder.parents):
                with contextlib.suppress(PermissionError):
                    parent.chmod(parent.stat().st_mode | 0o011)
        made = subprocess.run(
            [initdb, "-D", str(data), "-U", "tracker", "-A", "trust", "-N"],
            capture_output=True,
            text=True,
            user=self._user,
            cwd="/",
        )
        if made.returncode:
            pytest.skip(f"PostgreSQL cannot be set up here: {made.stderr.strip()[-200:]}")
        self.start()
        address = ("-h", "127.0.0.1", "-p", str(self.port), "-U", "tracker", "mlflow")
        self._until(
            lambda: not subprocess.run([createdb, *address], capture_output=True).returncode
        )
        self.uri = f"postgresql+psycopg2://tracker@127.0.0.1:{self.port}/mlflow"

    def start(self) -> None:
        """Start it, without waiting for it to answer."""
        options = ("-p", str(self.port), "-h", "127.0.0.1", "-k", "", "-c", "fsync=off")
        command = [self._server, "-D", str(self._folder / "data"), *options]
        with (self._folder / "postgres.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, user=self._user, cwd="/"
            )

    def stop(self, number: int = signal.SIGINT) -> None:
        """End it: SIGINT breaks off what is under way, SIGQUIT leaves the rest to recovery."""
        self._process.send_signal(number)
        self._process.wait(30)

    def _until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not holds():
            log_text = (self._folder / "postgres.log").read_text()[-500:]
            assert self._process.poll() is None, log_text
            assert time.monotonic() < deadline, log_text
            time.sleep(0.1)


@contextlib.contextmanager
def postgres_server(folder: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL server that is ended at the end; skips where there is none."""
    server = PostgresServer(folder)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """The URI of an empty database of a PostgreSQL server; skips where there is none."""
    with postgres_server(folder) as server:
        yield server.uri
