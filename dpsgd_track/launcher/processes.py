"""A command in a session of its own, ended together with all its descendants."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

MARKER = "DPSGD_TRACK_SESSION"
"""Environment variable that identifies descendants after their parent is gone."""

_ROUNDS = 20
_OWNED = Path(__file__).with_name("owned.py")


class Session:
    """A running command and its descendants.

    Descendants may lead sessions of their own, so that signalling one process group does not
    reach them; they are found by a mark in the environment they started with.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        *,
        stdin: int | None = None,
    ) -> None:
        """Start `command`, with its output in `log`.

        Args:
            stdin: standard input, at whose end the command ends itself. Without, it is ended when
                this process is killed.
        """
        self._mark = uuid.uuid4().hex
        # It closes with this process.
        self._held: int | None = None
        with contextlib.ExitStack() as stack, log.open("ab") as output:
            if stdin is None:
                stdin, self._held = os.pipe()
                stack.callback(os.close, stdin)
                command = [sys.executable, "-I", str(_OWNED), *command]
            self._leader = subprocess.Popen(
                command,
                env={**environment, MARKER: self._mark},
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the command."""
        return self._leader.pid

    def poll(self) -> int | None:
        """Exit code of the command; None while it runs."""
        return self._leader.poll()

    def wait(self, timeout_s: float) -> int | None:
        """Exit code of the command once it ends by itself; None after `timeout_s`."""
        try:
            return self._leader.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def cpu_s(self) -> float:
        """CPU time in seconds of all descendants that are alive."""
        total = 0.0
        for process in self._descendants():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def end(self, grace_s: float) -> None:
        """End everything: ask the command to end, wait `grace_s`, then kill all that are left."""
        descendants = self._descendants()
        if self._leader.poll() is None:
            self._leader.terminate()
            try:
                self._leader.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._leader.kill()
                self._leader.wait()
        self.kill_others(descendants)
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def kill_others(self, known: Collection[psutil.Process] = ()) -> None:
        """Kill the descendants of the command, but not the command itself; and those in `known`."""
        # A process may start another while it is being killed: repeat until none is left.
        for _ in range(_ROUNDS):
            left = {*filter(_is_alive, known), *self._marked()}
            if not left:
                return
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=0.5)

    def _descendants(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _marked(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            if process.pid == self.pid:
                continue
            try:
                if process.environ().get(MARKER) == self._mark and _is_alive(process):
                    yield process
            except (psutil.Error, OSError):
                continue


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
