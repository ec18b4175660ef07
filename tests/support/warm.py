"""Commands that start with their imports done: forked from a template, in place of `python ...`.

Importing torch, transformers and MLflow takes a launch longer than most of what a test has it do,
and the fork server that it starts imports them again. Here both are forks:

    pytest -> template -> keeper -> command -> spare, which becomes the command's fork server

A spare is forked before the command has threads, and is its child, as a fork server is. What is
told of a process by its environment is of its first one, where the session's mark has a place held
free. Not for tests of what a fresh interpreter imports, or of how long that takes.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from dpsgd_track.launcher.processes import MARKER
from dpsgd_track.record.names import VARIANT_VARIABLE
from tests.support import ROOT

NUM_SPARES = 2
"""Fork servers that a command may have before it starts fresh ones."""
_RESERVED = "X" + MARKER[1:]
_MARK_LENGTH = 32
_FRESH = subprocess.Popen
_LARGEST_REQUEST = 1 << 18
_PRELOADED = (
    "dpsgd_track.cli.compare",
    "dpsgd_track.cli.faults",
    "dpsgd_track.cli.profile",
    "dpsgd_track.cli.main",
    "dpsgd_track.launcher.fork_server",
    "dpsgd_track.mutants",
    "dpsgd_track.report.write",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.tracking",
    "tests.support.fake_launch",
    "tests.support.fake_worker",
    "torch.distributed.launcher.api",
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A command, as `Popen` takes it; standard input, output and error go with it."""

    arguments: list[str]
    """`-m MODULE ...` or `SCRIPT ...`, for an interpreter."""
    cwd: str
    environment: dict[str, str]
    leads_session: bool


class Process(subprocess.Popen[str]):
    """`Popen` that has the template fork what is a module or a script of this checkout."""

    _channel: socket.socket | None = None

    def _execute_child(self, args: Any, *options: Any) -> None:
        pipes, request = _taken(args, options)
        if request is None:
            super()._execute_child(args, *options)  # type: ignore[misc]
            return
        self._channel, theirs = socket.socketpair()
        with theirs:
            _send(_template(), request, [*_standard(pipes), theirs.fileno()])
        pid = self._channel.recv(64)
        assert pid, "the template of commands has ended: its own output says why"
        self.pid = int(pid)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self._channel is None:
            return super().poll()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Exit code once it has ended."""
        if self._channel is None:
            return super().wait(timeout)
        if self.returncode is None:
            if not select.select([self._channel], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            with self._channel:
                self.returncode = int(self._channel.recv(64) or -signal.SIGKILL)
        return self.returncode


def run(
    *arguments: str, cwd: Path, environment: Mapping[str, str], timeout_s: float = 280
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run([sys.executable, *arguments])` would do, imports apart."""
    with start(*arguments, cwd=cwd, environment=environment) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start(*arguments: str, cwd: Path, environment: Mapping[str, str]) -> Process:
    """A command whose output is read from pipes."""
    return Process(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def imports_done() -> Iterator[None]:
    """Has what this process starts meanwhile forked as well."""
    with mock.patch("subprocess.Popen", Process):
        yield


@cache
def _template() -> socket.socket:
    """The other end of the template's requests."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {
        **os.environ,
        _RESERVED: "0" * _MARK_LENGTH,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": "",
    }
    with theirs:
        process = _FRESH(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )

    def end() -> None:
        mine.close()
        process.wait(10)

    atexit.register(end)
    return mine


def _taken(args: Any, options: Sequence[Any]) -> tuple[tuple[int, ...], Request | None]:
    """What `Popen` gives to the function that starts a child: its pipes, and the rest.

    None for what is not ours, and for what imports other things than everyone does.
    """
    _, _, _, _, cwd, env, _, _, _, *numbers = options
    environment = dict(os.environ if env is None else env)
    pipes = tuple(numbers[:6])
    if not isinstance(args, list) or args[0] != sys.executable or VARIANT_VARIABLE in environment:
        return pipes, None
    is_module = args[1] == "-m" and args[2].startswith(("dpsgd_track.", "tests."))
    if not is_module and Path(args[1]).parent not in (ROOT, ROOT / "examples"):
        return pipes, None
    return pipes, Request(
        arguments=args[1:],
        cwd=os.fspath(cwd or os.getcwd()),
        environment=environment,
        leads_session=bool(numbers[-2]),
    )


def _standard(pipes: Sequence[int]) -> list[int]:
    """The ends of the pipes that are the child's standard input, output and error."""
    ends = pipes[0], pipes[3], pipes[5]
    return [number if end == -1 else end for number, end in enumerate(ends)]


def _send(channel: socket.socket, request: Request, files: list[int]) -> None:
    socket.send_fds(channel, [json.dumps(asdict(request)).encode()], files)


def _receive(channel: socket.socket) -> tuple[Request, list[int]] | None:
    message, files, _, _ = socket.recv_fds(channel, _LARGEST_REQUEST, 4)
    return (Request(**json.loads(message)), files) if message else None


def main() -> None:
    """Import, and fork whatever is asked for."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    _Forking.place_of_mark = _place_of_mark()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in _PRELOADED:
        importlib.import_module(name)
    for name in ("dpsgd_track.training.worker", "tests.support.forked_ranks"):
        importlib.import_module(name).preload()
    assert threading.active_count() == 1, "a fork has no other thread"
    gc.collect()
    gc.freeze()
    while (received := _receive(channel)) is not None:
        request, (*standard, teller) = received
        if os.fork() == 0:
            channel.close()
            _keep(request, standard, socket.socket(fileno=teller))
        for file in (*standard, teller):
            os.close(file)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    _leave_with(lambda: None)


def _keep(request: Request, standard: list[int], teller: socket.socket) -> None:
    """Fork the command, and tell its process id and its exit code."""
    command = os.fork()
    if command == 0:
        teller.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(request.cwd)
        _Forking.spares = _spares()
        subprocess.Popen = _Forking  # type: ignore[misc]
        _become(request, standard)
    for file in standard:
        os.close(file)
    teller.sendall(f"{command}\n".encode())
    _, status = os.waitpid(command, 0)
    with contextlib.suppress(ConnectionError):  # nobody asks any more
        teller.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _spares() -> list[tuple[int, socket.socket]]:
    """Children that wait to become something; they end with this process."""
    spares: list[tuple[int, socket.socket]] = []
    for _ in range(NUM_SPARES):
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if (pid := os.fork()) == 0:
            for channel in (mine, *(channel for _, channel in spares)):
                channel.close()
            _wait_to_become(theirs)
        theirs.close()
        spares.append((pid, mine))
    return spares


def _wait_to_become(channel: socket.socket) -> None:
    silent = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(silent, number)
    os.close(silent)
    received = _receive(channel)
    if received is None:
        os._exit(0)
    channel.close()
    _become(*received)


def _place_of_mark() -> int:
    """Address of what was reserved in the environment that others read of this process."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    value: int = libc.getenv(_RESERVED.encode())
    return value - len(_RESERVED) - 1


def _hold_mark(mark: str) -> None:
    assert len(mark) == _MARK_LENGTH
    text = f"{MARKER}={mark}".encode()
    ctypes.memmove(_Forking.place_of_mark, text, len(text))


class _Forking(subprocess.Popen[Any]):
    """`Popen` of a forked command: has spares become modules of ours, and starts all else."""

    spares: list[tuple[int, socket.socket]]
    place_of_mark: int

    def _execute_child(self, args: Any, *options: Any) -> None:
        pipes, request = _taken(args, options)
        if request is None or not self.spares:
            super()._execute_child(args, *options)  # type: ignore[misc]
            return
        self.pid, channel = self.spares.pop()
        with channel:
            _send(channel, request, _standard(pipes))
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _become(request: Request, standard: list[int]) -> NoReturn:
    """Run the command as a fresh interpreter would."""
    for number, file in enumerate(standard):
        os.dup2(file, number)
    for file in standard:
        if file > 2:
            os.close(file)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.environment)
    # Or else that of the template's environment, where it was asked for already.
    tempfile.tempdir = None
    if request.leads_session:
        os.setsid()
    if mark := request.environment.get(MARKER):
        _hold_mark(mark)
    _compute_on_cores()
    program, *arguments = request.arguments
    search_path = request.environment.get("PYTHONPATH", "").split(os.pathsep)
    if program == "-m":
        name, *arguments = arguments
        sys.argv = [name, *arguments]
        sys.path[:1] = [request.cwd, *filter(None, search_path)]
        # Or else the import system warns that it was imported before.
        sys.modules.pop(name, None)
        _leave_with(lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))
    sys.argv = [program, *arguments]
    sys.path[:1] = [os.path.dirname(program), *filter(None, search_path)]
    _leave_with(lambda: runpy.run_path(program, run_name="__main__"))


def _leave_with(run_program: Callable[[], object]) -> NoReturn:
    """Exit as an interpreter does, without taking apart what was imported: that takes seconds."""
    code: Any = 0
    try:
        run_program()
    except SystemExit as error:
        code = error.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _compute_on_cores() -> None:
    """On as many as the environment says, which torch reads when it is imported."""
    import torch

    cores = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    torch.set_num_threads(int(cores))


if __name__ == "__main__":
    main()
