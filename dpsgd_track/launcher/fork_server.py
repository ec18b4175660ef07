"""Fork server: forks process groups from a process with its imports done.

Usage: `python -m dpsgd_track.launcher.fork_server WORKER_MODULE`, with a socket as standard input.
Imports the worker and torch's launcher once. Then each line read from the socket, a `Request`, is
answered by the exit code of the process group it asks for. A group is an agent in a session of its
own, which runs torch's launcher, and the ranks that the launcher forks:

    launcher -> fork server -> agent -> ranks

No process outlives its parent: when the socket closes, or on SIGTERM, the server ends its agent
and itself; the kernel kills an agent without its server, and ranks without their agent.

multiprocessing's fork server cannot replace this one: an interpreter has a single one, with the
environment and import path of its start, while a variant's workers need another path and every
number of ranks another OMP_NUM_THREADS; and descendants of its children outlive them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.abc
import importlib.machinery
import multiprocessing
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType

from dpsgd_track.launcher.sign_off import SignOffs
from dpsgd_track.record.codec import Codec
from dpsgd_track.record.failure import FAILURE, Failure, FailureKind
from dpsgd_track.record.names import VARIANT_VARIABLE
from dpsgd_track.store.scratch import scratch

_POLL_S = 0.05
_FORK_TIMEOUT_S = 60.0
_RENDEZVOUS_TIMEOUT_S = 60
_PR_SET_PDEATHSIG = 1
_ADDRESS = "127.0.0.1"

WorkerMain = Callable[[str], int]


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """Rendezvous of the ranks of a job on several machines."""

    num_nodes: int
    """Machines."""
    node_rank: int
    """Index of this machine."""
    host: str
    """Address, from this machine, of the store that node 0's launcher serves for this job alone."""
    port: int
    """Port of that store."""
    run_id: str
    """Id of the rendezvous, the same on every machine."""
    interface: str
    """Network interface towards the ranks of other machines; empty to leave the choice open."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One process group, or this machine's part of one."""

    job_file: str
    """Path passed to the worker's `main`."""
    log: str
    """File to which the group's output is appended."""
    num_ranks: int
    """Processes on this machine."""
    grace_s: float
    """Time in seconds for the group to end by itself."""
    meeting: Meeting | None = None
    """None if no other machine takes part."""


REQUEST = Codec(Request, "dpsgd-track/request", 1)


class _Host:
    """Runs one process group after the other, each in a fresh fork."""

    def __init__(self, channel: socket.socket, main: WorkerMain) -> None:
        self._channel, self._main = channel, main
        self._told_to_end = False
        signal.signal(signal.SIGTERM, self._note)
        # Ctrl-C and a closed terminal are for the launcher, which then tells this process.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def serve(self) -> None:
        """Serve requests until the launcher is gone, or asks to end."""
        requests = self._channel.makefile("rb")
        while not self._told_to_end:
            if not self._is_readable():
                continue
            line = requests.readline()
            if not line:
                return
            code = self._run(REQUEST.loads(line))
            if code is not None:
                self._channel.sendall(f"{code}\n".encode())

    def _run(self, request: Request) -> int | None:
        """The group's exit code; None if it was ended."""
        # torch's launcher keeps errors of ranks there while a group runs.
        with scratch() as folder:
            return self._lead(request, folder)

    def _lead(self, request: Request, logs: str) -> int | None:
        host = os.getpid()
        sign_offs = SignOffs(request.num_ranks)
        agent = os.fork()
        if agent == 0:
            # The closed socket tells the launcher that this process is gone: no other may hold it.
            os.close(self._channel.detach())
            _lead(request, logs, self._main, host, sign_offs)
        while not self._told_to_end:
            code = _exit_code(agent)
            if (deserter := sign_offs.deserter()) is not None:
                _report_deserter(request, deserter)
                if code is None:
                    self._end(agent, request.grace_s)
                return code or 1
            if code is not None:
                return code
            # No request comes while a group runs: this is the launcher's end of the socket
            # being closed.
            if self._is_readable():
                self._told_to_end = True
        self._end(agent, request.grace_s)
        return None

    def _end(self, agent: int, grace_s: float) -> None:
        """End a group. If the agent does not end its ranks in time, the kernel does."""
        os.kill(agent, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while _exit_code(agent) is None:
            if time.monotonic() > deadline:
                os.kill(agent, signal.SIGKILL)
                os.waitpid(agent, 0)
                return
            time.sleep(_POLL_S)

    def _is_readable(self) -> bool:
        return bool(select.select([self._channel], [], [], _POLL_S)[0])

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._told_to_end = True


def _exit_code(child: int) -> int | None:
    """Exit code of an ended child, negative for a signal; None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def _report_deserter(request: Request, local_rank: int) -> None:
    node_rank = request.meeting.node_rank if request.meeting else 0
    rank = node_rank * request.num_ranks + local_rank
    path = Path(request.job_file).with_name(f"failure-rank{rank}.json")
    path.write_text(FAILURE.dumps(Failure(kind=FailureKind.LEFT, rank=rank)), encoding="utf-8")


def _lead(request: Request, logs: str, main: WorkerMain, host: int, sign_offs: SignOffs) -> None:
    """Run the agent, in its fork."""
    code = 1
    try:
        os.setsid()
        _die_with(host, signal.SIGKILL)
        _reset_signals()
        signal.signal(signal.SIGCHLD, sign_offs.note_exits)
        log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        os.close(log)
        _launch(request, logs, main, sign_offs)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(code)


def _launch(request: Request, logs: str, main: WorkerMain, sign_offs: SignOffs) -> None:
    """Run the ranks with torch's launcher.

    Raises:
        ChildFailedError: a rank failed; the text says which and how.
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The static rendezvous, unlike c10d, starts no thread that could hold a lock at the fork.
    if (meeting := request.meeting) is None:
        # Ranks find this server by its port: choosing a free one in advance would be a race.
        server = TCPStore(_ADDRESS, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        run_id = Path(request.job_file).parent.name
        meeting = Meeting(
            num_nodes=1,
            node_rank=0,
            host=_ADDRESS,
            port=server.port,
            run_id=run_id,
            interface="",
        )
        backend = "static"
    else:
        backend = _serve_elsewhere()
    config = LaunchConfig(
        min_nodes=meeting.num_nodes,
        max_nodes=meeting.num_nodes,
        nproc_per_node=request.num_ranks,
        run_id=meeting.run_id,
        rdzv_backend=backend,
        rdzv_endpoint=f"{meeting.host}:{meeting.port}",
        rdzv_configs={"rank": meeting.node_rank, "timeout": _RENDEZVOUS_TIMEOUT_S},
        local_addr=_ADDRESS if meeting.num_nodes == 1 else None,
        max_restarts=0,
        start_method="fork",
        # By default, in a folder that stays.
        logs_specs=DefaultLogsSpecs(log_dir=logs),
    )
    agent = os.getpid()
    # The server's thread lives in this process. While it serves one rank, the fork of another
    # could inherit a lock that it holds, and hang: no rank talks to it until all are forked.
    all_forked = multiprocessing.get_context("fork").Barrier(request.num_ranks)

    def run_rank(job_file: str) -> None:
        _reset_signals()
        _die_with(agent, signal.SIGKILL)
        local_rank = int(os.environ["LOCAL_RANK"])
        sign_offs.sign_on(local_rank)
        all_forked.wait(_FORK_TIMEOUT_S)
        try:
            code = main(job_file)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            _tell_exception()
            code = 1
        # torch's launcher waits for a successful rank to return.
        if code != 0:
            _leave(code)
        sign_offs.sign_off(local_rank)

    elastic_launch(config, run_rank)(request.job_file)


def _tell_exception() -> None:
    """Print the current exception; torch's hook prefixes each line with the rank."""
    # The log's disk may be full. What a rank raises, torch's launcher keeps in a file that stays.
    with contextlib.suppress(OSError):
        sys.excepthook(*sys.exc_info())


def _serve_elsewhere() -> str:
    """Register a static rendezvous whose store node 0's launcher serves; returns its name.

    In torch's own, the agent of node 0 serves the store, and forks its ranks while other machines
    talk to it.
    """
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import (
        RendezvousInfo,
        RendezvousParameters,
        rendezvous_handler_registry,
    )
    from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

    name = "served-elsewhere"

    class ServedElsewhere(StaticTCPRendezvous):
        def get_backend(self) -> str:
            return name

        def next_rendezvous(self) -> RendezvousInfo:
            self._store = TCPStore(
                self.master_addr,
                self.master_port,
                is_master=False,
                wait_for_workers=False,
                timeout=self.timeout,
            )
            return super().next_rendezvous()

    def create(parameters: RendezvousParameters) -> ServedElsewhere:
        host, _, port = parameters.endpoint.rpartition(":")
        rank, timeout = parameters.config["rank"], parameters.config["timeout"]
        nodes = parameters.max_nodes
        return ServedElsewhere(host, int(port), rank, nodes, parameters.run_id, timeout)

    rendezvous_handler_registry.register(name, create)
    return name


def _reset_signals() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)


def _die_with(parent: int, number: int) -> None:
    """Have the kernel send signal `number` to this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def _leave(code: int) -> None:
    """Exit without the interpreter's teardown, which can block on a broken process group."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


class _First(importlib.abc.MetaPathFinder):
    """Finds the packages of one folder before any other finder.

    The finder of an editable install may come before the import path.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if path is not None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, [self._root], target)
        # A folder without __init__.py, such as docs, must not shadow a real package.
        return spec if spec and spec.loader else None


def main() -> None:
    """Import, then serve."""
    # During its imports, this process does not watch the socket.
    _die_with(os.getppid(), signal.SIGTERM)
    if root := os.environ.get(VARIANT_VARIABLE):
        sys.meta_path.insert(0, _First(root))
    channel = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    worker = importlib.import_module(sys.argv[1])
    worker.preload()
    import torch
    import torch.distributed.launcher.api

    # A fork cannot use a device that was initialised before.
    assert not torch.cuda.is_initialized(), "preloading touched CUDA"
    # Frozen objects are never collected, so their pages stay shared with the forks.
    gc.collect()
    gc.freeze()
    _Host(channel, worker.main).serve()


if __name__ == "__main__":
    main()
