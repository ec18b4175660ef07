"""Faults between the spool and the store; records are logged by the tests' stand-ins for ranks."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from mlflow import MlflowClient

from benchmarks.tracking_faults_kinds import fault
from dpsgd_track.config import Settings
from dpsgd_track.store.client import connect
from dpsgd_track.store.deadline import DeadlineClient
from dpsgd_track.store.opening import open_store
from dpsgd_track.store.spool import spool_files
from tests.support import ROOT, warm
from tests.support.arrivals import Tally, arrived
from tests.support.damaged_spools import SITUATIONS, Spools, damage_and_sync, sync_to
from tests.support.logged_group import log_a_group, sync
from tests.support.small_disk import fill, small_disk
from tests.support.spooled_group import spool_a_group
from tests.support.synthetic_group import empty_tables
from tests.support.tracking_servers import (
    MlflowServer,
    PostgresServer,
    Wire,
    gate,
    postgres_server,
    shared_server,
)

STEPS = 20
"""Steps for each fault."""
BY_ITSELF = "arrives by itself"
_PATIENCE_S = 60.0
_DEADLINE_S = 1.0
"""Deadline of a call to a server that keeps it waiting; a launch has 15 seconds."""


def until(holds: Callable[[], object], patience_s: float = _PATIENCE_S) -> None:
    """Wait until something holds.

    Raises:
        TimeoutError: it does not in time.
    """
    deadline = time.monotonic() + patience_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing came of it within {patience_s:g} s")
        time.sleep(0.02)


def logged_through(
    folder: Path,
    uri: str,
    times: int,
    begin: Callable[[list[str]], object],
    end: Callable[[list[str]], object],
    client: Any = None,
    steps: int = STEPS,
) -> Tally:
    """Log a group, with a fault that begins and ends again `times` times; what arrived of it.

    Args:
        client: of the store, in place of the one that a launcher has.
        steps: for each fault; it lasts for a third of them.
    """
    name = folder.name

    def at_step(step: int, said: list[str]) -> None:
        if step % steps == steps // 3:
            begin(said)
        elif step % steps == 2 * steps // 3:
            end(said)

    _, _, left = log_a_group(folder / "spool", name, uri, times * steps, at_step, client)
    if left:
        sync(folder / "spool", uri)
    found = arrived(*open_store(Settings(tracking_uri=uri)), name, times * steps)
    found.times, found.left = times, _left_in(folder / "spool")
    return found


def _left_in(spool: Path) -> int:
    """Number of files that the groups in a spool still have."""
    return len(list(spool.glob("*/*")))


def is_back(said: list[str]) -> bool:
    """True unless the last that was said is that the store takes nothing."""
    return not said or "is back" in said[-1]


@fault(
    "wire",
    "the wire to the server is cut in the middle of a request; in half of the cases the server has "
    "done what it was asked to, and its answer is lost",
    times=20,
    after=BY_ITSELF,
)
def _wire(folder: Path, times: int) -> Tally:
    server, rng = shared_server(), random.Random(5)
    wire = Wire(server.port)

    def cut(said: list[str]) -> None:
        if rng.random() < 0.5:
            wire.cut()
        else:
            # Of the answers that are under way; at the latest the next one.
            wire.answers_left = rng.randrange(2)
            until(lambda: wire.is_cut)

    def mend(said: list[str]) -> None:
        wire.mend()
        until(lambda: is_back(said))

    found = logged_through(folder, wire.uri, times, cut, mend)
    wire.cut()
    return found


@fault(
    "gone", "the server goes for good in mid-run", times=3, after="`sync`, once it is there again"
)
def _gone(folder: Path, times: int) -> Tally:
    found = Tally()
    server = shared_server()
    for number in range(times):
        wire = Wire(server.port)
        name = f"gone-{folder.name}-{number}"
        spool = folder / name
        _, _, left = log_a_group(
            spool, name, wire.uri, 40, lambda step, _, wire=wire: step == 20 and wire.cut()
        )
        assert left
        wire.mend()
        sync(spool, wire.uri)
        wire.cut()
        found += arrived(*open_store(Settings(tracking_uri=server.uri)), name, 40)
        found += Tally(times=1, left=_left_in(spool))
    return found


@fault("server", "SIGKILL to the MLflow server, which is started again", times=4, after=BY_ITSELF)
def _server(folder: Path, times: int) -> Tally:
    server = MlflowServer(folder)

    def back(said: list[str]) -> None:
        server.start()
        server.wait()
        until(lambda: is_back(said))

    try:
        return logged_through(folder, server.uri, times, lambda _: server.kill(), back)
    finally:
        server.kill()


@fault(
    "postgres",
    "PostgreSQL is restarted in mid-run, every other time without a checkpoint",
    times=6,
    after=BY_ITSELF,
)
def _postgres(folder: Path, times: int) -> Tally:
    numbers = iter([signal.SIGINT, signal.SIGQUIT] * times)

    def back(server: PostgresServer, said: list[str]) -> None:
        server.start()
        until(lambda: is_back(said))

    with postgres_server(folder) as server:
        return logged_through(
            folder,
            server.uri,
            times,
            lambda _: server.stop(next(numbers)),
            lambda said: back(server, said),
        )


@fault(
    "spool-disk", "the spool's disk is full, until there is room again", times=5, after=BY_ITSELF
)
def _spool_disk(folder: Path, times: int) -> Tally:
    with small_disk(folder, "2m") as disk:
        own = disk / folder.name
        own.mkdir()
        uri = f"sqlite:///{a_store(folder)}"
        filler, said = disk / "filler", io.StringIO()
        with contextlib.redirect_stderr(said):
            found = logged_through(
                own,
                uri,
                times,
                lambda _: fill(disk),
                lambda _: filler.unlink(),
                # More than what fits on the pages that were begun.
                steps=150,
            )
    assert said.getvalue().count("could not be written") >= times
    return found


def a_store(folder: Path) -> Path:
    """A new SQLite store."""
    path = folder / "mlflow.db"
    path.write_bytes(empty_tables().read_bytes())
    return path


@fault(
    "clock",
    "the clock jumps by up to a day, forth and back",
    times=40,
    after=BY_ITSELF,
)
def _clock(folder: Path, times: int) -> Tally:
    rng, real_ns, real = random.Random(3), time.time_ns, time.time
    offset_s = 0

    def jump(_: list[str]) -> None:
        nonlocal offset_s
        offset_s = rng.randrange(-86_400, 86_400)

    def time_ns() -> int:
        return real_ns() + offset_s * 1_000_000_000

    def time_s() -> float:
        return real() + offset_s

    with mock.patch("time.time_ns", time_ns), mock.patch("time.time", time_s):
        found = logged_through(folder, f"sqlite:///{a_store(folder)}", times // 2, jump, jump)
    found.times = times // 2 * 2
    return found


_HOLDER = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
for line in sys.stdin:
    database.execute(line)
    print(flush=True)
"""


@contextlib.contextmanager
def _holder(path: Path) -> Iterator[Callable[[str], object]]:
    """Another process, which executes statements on an SQLite file."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _HOLDER, str(path)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def execute(statement: str) -> None:
            print(statement, file=stdin, flush=True)
            stdout.readline()

        yield execute
        stdin.close()


@fault(
    "locked",
    "another process holds the SQLite store locked, for up to 8 seconds",
    times=4,
    after=BY_ITSELF,
)
def _locked(folder: Path, times: int) -> Tally:
    waits_s = iter([0.5, 2.0, 8.0, 1.0] * times)
    path = a_store(folder)
    with _holder(path) as execute:

        def release(_: list[str]) -> None:
            time.sleep(next(waits_s))
            execute("COMMIT")

        return logged_through(
            folder, f"sqlite:///{path}", times, lambda _: execute("BEGIN EXCLUSIVE"), release
        )


@fault("two-syncs", "`sync` twice at once", times=3, after="one ships it, the other says so")
def _two_syncs(folder: Path, times: int) -> Tally:
    found = Tally()
    for number in range(times):
        own = folder / f"{folder.name}-{number}"
        own.mkdir()
        a_store(own)
        spool_a_group(own / "spool", own.name)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        script = str(ROOT / "launch.py")
        both = [warm.start(script, "sync", cwd=own, environment=environment) for _ in range(2)]
        codes = []
        for process in both:
            process.communicate()
            codes.append(process.returncode)
        assert 0 in codes, codes
        store = Settings(tracking_uri=f"sqlite:///{own}/mlflow.db")
        found += arrived(*open_store(store), own.name, 30)
        found += Tally(times=1, left=_left_in(own / "spool"))
    return found


@fault(
    "power",
    "the power fails: of each file of the spool only a part of any length is on the disk",
    times=400,
    after="`sync` ships all whole records that are there, and names each file that was cut",
)
def _power(folder: Path, times: int) -> Tally:
    rng, found = random.Random(2), Tally()
    spools = Spools(folder, "nothing shipped")
    for _ in range(times):
        store = spools.lay_out()
        files = [file for file in spool_files(spools.group) if file.suffix == ".records"]
        kept = 0
        for file in files:
            with file.open("r+b") as opened:
                opened.truncate(rng.randrange(file.stat().st_size))
            kept += _whole_values(file)
        code, said = sync_to(spools, store)
        points = [run.metrics.get("loss", set()) for run in store.runs.values()]
        there = sum(map(len, points))
        found += Tally(
            times=1,
            values=kept,
            lost=max(0, kept - there) + (code == 0) + any(str(file) not in said for file in files),
            doubled=max(0, there - kept),
            running=sum(run.status == "RUNNING" for run in store.runs.values()),
        )
    return found


def _whole_values(file: Path) -> int:
    """Whole lines of values in a file, of runs whose names are there."""
    lines = file.read_bytes().split(b"\n")[:-1]
    return sum(line[9:10] == b"[" for line in lines)


@fault(
    "damage",
    "a file of the spool is damaged: a bit, a line, a page, its beginning or its end",
    times=400,
    after="arrives, or `sync` names the file, ends with 1 and keeps the spool",
)
def _damage(folder: Path, times: int) -> Tally:
    found = Tally()
    for situation in SITUATIONS:
        own = folder / situation.replace(" ", "-")
        spools = Spools(own, situation)
        whole = spools.lay_out()
        assert sync_to(spools, whole)[0] == 0
        expected = whole.contents()
        for seed in range(times // len(SITUATIONS)):
            damaged = damage_and_sync(spools, seed)
            is_whole = damaged.code == 0 and damaged.store.contents() == expected
            is_told = damaged.code == 1 and str(damaged.file) in damaged.said
            found += Tally(
                times=1,
                values=1,
                # Silently, that is: what is told is still in the spool.
                lost=not (is_whole or (is_told and damaged.is_kept_whole)),
            )
    return found


def _answer(head: bytes, body: bytes = b"") -> Callable[[socket.socket], object]:
    whole = b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (head, len(body), body)
    return lambda line: line.sendall(whole)


def _drip(line: socket.socket) -> None:
    line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    for _ in range(400):
        line.sendall(b" ")
        time.sleep(0.05)


def _endless(line: socket.socket) -> None:
    line.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        line.sendall(bytes(65536))


def _silent(line: socket.socket) -> None:
    # Nothing comes, and nobody hangs up, until the client does.
    line.settimeout(20)
    line.recv(1)


_PAGE = b"<html>Log in first</html>"
_ANSWERS: tuple[tuple[str, str, Callable[[socket.socket], object]], ...] = (
    ("429", "the server answers 429", _answer(b"429 Too Many Requests\r\nRetry-After: 1")),
    ("500", "the server answers 500", _answer(b"500 Internal Server Error", b"Oops")),
    (
        "redirect",
        "the server redirects every request to itself, without end",
        _answer(b"302 Found\r\nLocation: /x"),
    ),
    (
        "page",
        "a proxy answers 200, with a page in place of what was asked for",
        _answer(b"200 OK", _PAGE),
    ),
    ("half-open", "the server takes requests and never answers", _silent),
    ("drip", "the server drips its answer, a byte at a time", _drip),
    ("endless", "the server's answer never ends", _endless),
)


def _answered(answer: Callable[[socket.socket], object], folder: Path, times: int) -> Tally:
    server = shared_server()
    with gate(server) as front:
        connect(front.uri)
        client = DeadlineClient(MlflowClient(front.uri), _DEADLINE_S, most_bytes=1 << 20)

        def begin(_: list[str]) -> None:
            before, front.fault = front.num_faults, answer
            until(lambda: front.num_faults > before)

        def end(said: list[str]) -> None:
            front.fault = None
            until(lambda: is_back(said))

        return logged_through(folder, front.uri, times, begin, end, client)


def _enter_answers() -> None:
    for name, title, answer in _ANSWERS:

        def inject(folder: Path, times: int, answer: Any = answer) -> Tally:
            return _answered(answer, folder, times)

        fault(name, title, times=3, after=BY_ITSELF)(inject)


_enter_answers()
