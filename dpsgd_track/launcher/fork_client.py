"""The launcher's side of the fork server."""

from __future__ import annotations

import contextlib
import select
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from dpsgd_track.launcher.fork_server import REQUEST, Request
from dpsgd_track.launcher.processes import Session

_PROGRAM = "dpsgd_track.launcher.fork_server"


class WorkerHost:
    """Runs one process group at a time, forked from a process with its imports done.

    That process starts with the first group, and anew if it is gone or the environment changes. If
    it dies, so does its group, whose exit code is then that process's own. Its output goes to the
    log of the group it was started for.
    """

    def __init__(self, worker_module: str) -> None:
        """
        Args:
            worker_module: has `preload()`, called once, and `main(job_file) -> exit code`, called
                in every rank.
        """
        self._worker_module = worker_module
        self._environment: dict[str, str] = {}
        self._session: Session | None = None
        self._channel: socket.socket | None = None
        self._code: int | None = None
        self._grace_s = 0.0

    def __enter__(self) -> WorkerHost:
        return self

    def __exit__(self, *_: object) -> None:
        self._close(0.0)

    def start(self, request: Request, environment: Mapping[str, str]) -> None:
        """Start a process group; the previous one has ended."""
        log = Path(request.log)
        log.touch()
        is_gone = self._session is None or self._session.poll() is not None
        if is_gone or environment != self._environment:
            self._open(dict(environment), log)
        assert self._channel is not None
        self._code, self._grace_s = None, request.grace_s
        # If the process is gone, `poll` says so.
        with contextlib.suppress(ConnectionError):
            self._channel.sendall(f"{REQUEST.dumps(request)}\n".encode())

    def poll(self) -> int | None:
        """Exit code of the group, negative for a signal; None while it runs."""
        if self._code is not None:
            return self._code
        assert self._channel is not None
        assert self._session is not None
        if not select.select([self._channel], [], [], 0)[0]:
            return None
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = self._channel.recv(64)
        if answer:
            self._code = int(answer)
        else:
            # It closes the socket before it exits; its own exit code counts.
            code = self._session.wait(self._grace_s)
            self._close(0.0)
            self._code = code or 1
        return self._code

    def cpu_s(self) -> float:
        """CPU time in seconds of the group so far."""
        return self._session.cpu_s() if self._session else 0.0

    def end(self) -> None:
        """End the group, within its grace period; no process of it is left."""
        if self._session is None:
            return
        if self.poll() is None:
            self._close(self._grace_s)
        elif self._session is not None:
            self._session.kill_others()

    def _open(self, environment: dict[str, str], log: Path) -> None:
        self._close(0.0)
        self._channel, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", _PROGRAM, self._worker_module]
            self._session = Session(command, environment, log, stdin=theirs.fileno())
        self._environment = environment

    def _close(self, grace_s: float) -> None:
        if self._session is not None:
            self._session.end(grace_s)
        if self._channel is not None:
            self._channel.close()
        self._session = self._channel = None
