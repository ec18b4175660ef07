"""Faults of launches: signals, kills, lost terminals and full disks, and what is left of them."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import psutil

from benchmarks.tracking_faults_kinds import fault
from benchmarks.tracking_faults_store import BY_ITSELF, a_store, until
from dpsgd_track.config import Settings
from dpsgd_track.store.opening import open_store
from tests.support import ROOT, fake_launch, warm
from tests.support.arrivals import Tally, launched
from tests.support.launches import kill_all
from tests.support.small_disk import fill, small_disk
from tests.support.tracking_servers import closed_port

SYNCED = "`sync` ends its runs as KILLED, and ships it"
MODES = ("no_dp", "flash_fsdp", "flash_fsdp_bk", "flash_fsdp_fuse", "flash_fsdp_fuse_bk")
_OWN = {"spool", "results", "mlflow.db", "mlartifacts", "mlruns", "mlflow.yaml"}
_SHARED_MEMORY = Path("/dev/shm")
Plan = Mapping[str, Mapping[str, object]]
SLOW: Plan = {"no_dp": {"do": "slow"}}


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


@dataclass
class Place:
    """A folder that a user works in, and what is to be left as it was."""

    folder: Path
    is_real: bool = False
    """Ranks train a tiny model; else they are stand-ins."""
    patience_s: float = 20.0
    """Longest time for processes to end."""
    shared: set[str] = field(default_factory=lambda: _names(_SHARED_MEMORY))

    @property
    def temporary(self) -> Path:
        """The temporary folder of what is started here."""
        return self.folder.with_name(f"{self.folder.name}-temporary")

    def start(self, *argv: str, plan: Plan | None = None) -> subprocess.Popen[str]:
        """A command of dpsgd-track."""
        program = ["-m", "tests.support.fake_launch"]
        if self.is_real:
            program = [str(ROOT / "launch.py")]
        return warm.start(*program, *argv, cwd=self.folder, environment=self.environment(plan))

    def environment(self, plan: Plan | None = None) -> dict[str, str]:
        """Environment of a command here."""
        own = {
            "CUDA_VISIBLE_DEVICES": "",
            "FAKE_WORKER": json.dumps(plan or {}),
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.temporary),
        }
        return {**os.environ, **own}

    def launch(self, group: str, *more: str, plan: Plan | None = None) -> subprocess.Popen[str]:
        """A launch of one mode on two ranks."""
        options = ("--mode", "no_dp", "--regime", "accuracy", "--nproc-per-node", "2")
        if self.is_real:
            options += ("--model-name", "llama-tiny", "--num-iter", "12")
        return self.start("quick", *options, "--group", group, *more, plan=plan)

    def run(self, *argv: str) -> int:
        """Exit code of a command."""
        process = self.start(*argv)
        process.communicate()
        return process.returncode

    def steps_told(self) -> int:
        """Steps that all groups here told of."""
        files = self.folder.glob("results/*/logs/*/progress.jsonl")
        return sum(file.read_text().count('"step", ') for file in files)

    def is_running(self) -> bool:
        """True if a process works here."""
        return bool(_processes(self.folder))

    def tally(self, *groups: str) -> Tally:
        """Counts of what the store has of groups, and of what is left here."""
        store = Settings(tracking_uri=f"sqlite:///{self.folder}/mlflow.db")
        found = Tally()
        for group in groups:
            found += launched(*open_store(store), self.folder, group)
        found.left = len(self.left())
        return found

    def wait_a_minute(self) -> int:
        """Make the temporary folders that killed processes left a minute older; returns how many.

        Younger ones are left alone: their process may not have locked them yet.
        """
        left = list(self.temporary.glob("dpsgd-track-*"))
        for folder in left:
            os.utime(folder, (time.time() - 90,) * 2)
        return len(left)

    def left(self) -> list[str]:
        """Names of things left outside spool, results and store, and in the spool."""
        files = sorted(_names(self.folder) - _OWN)
        files += _names(self.folder / "spool")
        files += [str(path) for path in self.folder.glob("results/**/torchelastic*")]
        files += [str(path) for path in self.folder.glob("results/**/*.partial")]
        files += [name for name in _names(self.temporary) if not name.startswith("torchinductor")]
        # A process that was sent a signal takes a moment.
        with contextlib.suppress(TimeoutError):
            until(lambda: not self.is_running(), self.patience_s)
        files += [f"process {each.pid}" for each in _processes(self.folder)]
        return files + sorted(_unowned(_names(_SHARED_MEMORY) - self.shared))


def _processes(folder: Path) -> list[psutil.Process]:
    """Processes that work in a folder, or in one of it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            here = Path(process.cwd()).is_relative_to(folder)
            if here and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _unowned(shared: set[str]) -> set[str]:
    """Shared memory that no process has mapped: others on this machine may use some."""
    # A semaphore is mapped under another name than the one it has: it is known by its inode.
    inodes = {}
    for name in shared:
        with contextlib.suppress(OSError):
            inodes[str((_SHARED_MEMORY / name).stat().st_ino)] = name
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            for line in (each for each in lines if str(_SHARED_MEMORY) in each):
                inodes.pop(line.split()[4], None)
    return set(inodes.values())


@contextlib.contextmanager
def _place(folder: Path, *, is_real: bool = False) -> Iterator[Place]:
    """A new folder to work in; processes that work there are ended at the end."""
    place = Place(folder, is_real=is_real)
    for own in (place.folder, place.temporary):
        own.mkdir()
    a_store(place.folder)
    try:
        yield place
    finally:
        for process in _processes(place.folder):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


InPlace = Callable[[Place], Tally]
"""Injects a fault once; returns the counts of what came of it."""


def _in_places(folder: Path, times: int, inject: InPlace, *, is_real: bool = False) -> Tally:
    """Inject a fault so many times, each in a place of its own."""
    found = Tally()
    for number in range(times):
        with _place(folder / str(number), is_real=is_real) as place:
            found += inject(place)
            found.times += 1
    return found


def _fault_in_place(
    name: str, title: str, *, times: int, after: str, is_real: bool = False
) -> Callable[[InPlace], InPlace]:
    """Enter the decorated function as a fault that is injected in places of its own."""

    def enter(inject: InPlace) -> InPlace:
        of_all = partial(_in_places, inject=inject, is_real=is_real)
        fault(name, title, times=times, after=after)(of_all)
        return inject

    return enter


def _ended(process: subprocess.Popen[str], codes: Sequence[int]) -> str:
    """Output of a command, which ends with one of `codes`."""
    out, err = process.communicate(timeout=240)
    assert process.returncode in codes, (
        f"exit code {process.returncode}: {out[-2000:]}{err[-2000:]}"
    )
    return out + err


def _in_mid_run(place: Place, process: subprocess.Popen[str], steps: int) -> None:
    until(lambda: place.steps_told() >= steps or process.poll() is not None)


Act = Callable[[Place, subprocess.Popen[str]], object]


def _each(
    folder: Path,
    times: int,
    act: Act,
    codes: Sequence[int],
    *,
    syncs: bool = False,
    real: bool = False,
) -> Tally:
    """Launch, and do something to it after a few steps; counts of what is left in the end."""
    rng = random.Random(1)

    def inject(place: Place) -> Tally:
        process = place.launch("g", *(() if real else ("--num-iter", "20")), plan=SLOW)
        _in_mid_run(place, process, rng.randrange(1, 30))
        act(place, process)
        _ended(process, codes)
        until(lambda: not place.is_running())
        if syncs:
            assert place.run("sync") == 0
        return place.tally("g")

    return _in_places(folder, times, inject, is_real=real)


def _entered(
    name: str, title: str, act: Act, codes: Sequence[int], *, times: int, syncs: bool = False
) -> None:
    """Enter a fault of launches: with stand-ins, and once with ranks that train."""
    after = SYNCED if syncs else BY_ITSELF
    for is_real, count in ((False, times), (True, 1)):

        def inject(folder: Path, times: int, is_real: bool = is_real) -> Tally:
            return _each(folder, times, act, codes, syncs=syncs, real=is_real)

        label = "real ranks" if is_real else "stand-ins"
        own = f"{name}-real" if is_real else name
        fault(own, f"{title} ({label})", times=count, after=after)(inject)


def _send(number: int) -> Act:
    return lambda place, process: os.kill(process.pid, number)


def _kill_a_rank(place: Place, process: subprocess.Popen[str]) -> None:
    """SIGKILL to a rank: launcher -> fork server -> agent -> ranks."""
    ranks = [
        rank
        for host in psutil.Process(process.pid).children()
        for agent in host.children()
        for rank in agent.children()
    ]
    with contextlib.suppress(psutil.NoSuchProcess):
        random.Random(process.pid).choice(ranks).kill()


_entered("success", "none: a launch that succeeds", lambda *_: None, (0,), times=1)
_entered("rank-killed", "SIGKILL to a rank", _kill_a_rank, (1,), times=3)
_entered("ctrl-c", "Ctrl-C", _send(signal.SIGINT), (130,), times=3)
_entered("sigkill", "SIGKILL to the launcher", _send(signal.SIGKILL), (-9,), times=3, syncs=True)


def _stand_ins(title: str) -> str:
    return f"{title} (stand-ins)"


@fault("sigterm", _stand_ins("SIGTERM to the launcher"), times=2, after=BY_ITSELF)
def _sigterm(folder: Path, times: int) -> Tally:
    return _each(folder, times, _send(signal.SIGTERM), (130, 143))


@fault("hangup", _stand_ins("SIGHUP to the launcher"), times=2, after="it runs on, and arrives")
def _hangup(folder: Path, times: int) -> Tally:
    return _each(folder, times, _send(signal.SIGHUP), (0,))


def _of_modes(folder: Path, times: int, plan: Mapping[str, object]) -> Tally:
    """Launches in which every mode has the same misfortune."""
    found = Tally()
    with mock.patch.dict(os.environ, {fake_launch.STALL_VARIABLE: "2"}):
        while found.times < times:
            modes = MODES[: times - found.times]
            options = ("--regime", "accuracy", "--num-iter", "4", "--nproc-per-node", "2")
            own = dict.fromkeys(modes, plan)
            arguments = ("full", "--mode", ",".join(modes), "--group", "g", *options)
            with _place(folder / str(found.times)) as place:
                _ended(place.start(*arguments, plan=own), (1,))
                found += place.tally("g")
            found.times += len(modes)
    return found


@fault("failure", _stand_ins("an exception in a rank"), times=5, after=BY_ITSELF)
def _failure(folder: Path, times: int) -> Tally:
    return _of_modes(folder, times, {"do": "crash", "rank": 1})


@fault("leaves", _stand_ins("one of two ranks leaves with exit code 0"), times=5, after=BY_ITSELF)
def _leaves(folder: Path, times: int) -> Tally:
    return _of_modes(folder, times, {"do": "leave", "rank": 1})


@fault("hangs", _stand_ins("a rank hangs"), times=2, after="its mode is ended; arrives by itself")
def _hangs(folder: Path, times: int) -> Tally:
    return _of_modes(folder, times, {"do": "hang", "rank": 1})


@_fault_in_place(
    "all-killed",
    _stand_ins("SIGKILL to all processes at once"),
    times=2,
    after="the next launch, a minute later, ends its runs as KILLED, ships it and tidies up",
)
def _all_killed(place: Place) -> Tally:
    process = place.launch("g", "--num-iter", "20", plan=SLOW)
    _in_mid_run(place, process, 5)
    kill_all(process)
    process.communicate()
    place.wait_a_minute()
    # As long as it takes to ship what was left.
    _ended(place.launch("next", "--num-iter", "40", plan=SLOW), (0,))
    return place.tally("g", "next")


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@_fault_in_place(
    "ui-killed",
    "SIGKILL to `ui`, which has a server and a temporary folder",
    times=1,
    after="the server ends with it; the next command, a minute later, tidies up",
)
def _ui_killed(place: Place) -> Tally:
    port = closed_port()
    process = place.start("ui", "--port", str(port))
    until(lambda: _answers(port))
    process.kill()
    process.communicate()
    assert place.wait_a_minute() == 1
    place.run("sync")
    return Tally(left=len(place.left()))


_LAUNCH = (
    *(sys.executable, "-m", "tests.support.fake_launch", "quick", "--mode", "no_dp", "--group"),
    *("g", "--regime", "accuracy", "--num-iter", "20", "--nproc-per-node", "2"),
)


@_fault_in_place(
    "terminal", _stand_ins("its terminal goes away"), times=1, after="it runs on, and arrives"
)
def _terminal(place: Place) -> Tally:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(place.folder)
        os.execve(sys.executable, _LAUNCH, place.environment(SLOW))
    until(lambda: place.steps_told() > 3)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return place.tally("g")


@_fault_in_place(
    "output",
    _stand_ins("output into `| head -1`, or onto a full device"),
    times=2,
    after="it runs on, and arrives",
)
def _output(place: Place) -> Tally:
    shell = ("{} | head -1", "{} > /dev/full 2>&1")[int(place.folder.name) % 2]
    command = f"set -o pipefail; {shell.format(shlex.join(_LAUNCH))}"
    ended = subprocess.run(
        ["bash", "-c", command],
        cwd=place.folder,
        env=place.environment(),
        capture_output=True,
    )
    assert ended.returncode == 0
    return place.tally("g")


@_fault_in_place(
    "same-name",
    _stand_ins("two launches at once, with one name"),
    times=2,
    after="one arrives by itself, the other is refused",
)
def _same_name(place: Place) -> Tally:
    both = [place.launch("g", "--num-iter", "4") for _ in range(2)]
    said = [_ended(process, (0, 2)) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    return place.tally("g")


@fault(
    "resume",
    _stand_ins("`resume` and `sync` of a group while it runs"),
    times=2,
    after="both say that its launcher is at work; arrives by itself",
)
def _resume(folder: Path, times: int) -> Tally:
    with _place(folder / "0") as place:
        process = place.launch("g", "--num-iter", "200", plan=SLOW)
        _in_mid_run(place, process, 3)
        for _ in range(times):
            assert place.run("resume", "g") == 2
            assert place.run("sync", "g") == 1
        assert process.poll() is None
        _ended(process, (0,))
        found = place.tally("g")
    found.times = 2 * times
    return found


@_fault_in_place(
    "results-disk",
    "the disk with results and logs is full (real ranks)",
    times=1,
    after="the mode fails, and says why; arrives by itself, and `resume` makes it whole",
    is_real=True,
)
def _results_disk(place: Place) -> Tally:
    with small_disk(place.folder, "64m") as disk:
        (place.folder / "results").symlink_to(disk)
        process = place.launch("g")
        _in_mid_run(place, process, 2)
        fill(disk)
        assert "the disk is full" in _ended(process, (1,))
        found = place.tally("g")
        (disk / "filler").unlink()
        _ended(place.start("resume", "g"), (0,))
        found += place.tally("g")
        # The disk itself, twice.
        found.left -= 2
    return found
