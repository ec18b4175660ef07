"""Messages between the launchers of one group's machines, over a store of torch's rendezvous.

Node 0 serves the store at the endpoint and leads: it alone keeps the runs, and hands out one job
after the other. The others run their share of each and report its outcome. Keys:

- `joined/R`, `hello/R`: node R is there; its own plan and its environment.
- `welcome` or `refused`: the group's name, or why nothing starts.
- `job/N`: the N-th job, and the rendezvous of its ranks. `end/N`: end it, with the reason.
- `done/N/R`: its outcome on node R.
- `beat/R`: a heartbeat, a count that grows while node R lives.
- `over`: the group's exit code and summary. `bye/R`: node R has read it.

Anyone who can reach the endpoint can take part, as with every rendezvous of torch: it belongs on
a private network.

torch's rendezvous cannot replace it. It serves a single process group, while launchers have to
agree on a group's name before the first one and on the next job after each. Its backend `c10d`
orders machines by their names, whatever --node-rank says, and keeps itself alive by a thread that
runs while the agent forks its ranks. `static` has the agent of node 0 serve the store from a
thread, and fork its ranks while other machines talk to it: a lock held at that moment stays locked
in the rank. Neither notices a lost machine before a collective times out, after 10 minutes;
the heartbeat of each launcher, once a second, shows it after 20 s.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil

from dpsgd_track.config import NodesConfig
from dpsgd_track.launcher.fork_server import Meeting
from dpsgd_track.record.codec import Codec
from dpsgd_track.record.environment import Environment, environment
from dpsgd_track.record.failure import Failure, FailureKind
from dpsgd_track.record.plan import PLAN, GroupPlan, StartedJob

if TYPE_CHECKING:
    from torch.distributed import TCPStore

LOST_AFTER_S = 20.0
"""Longest silence of a machine, in seconds, before it counts as lost."""
BEAT_S = 1.0
"""Seconds between two heartbeats of a machine."""
BYE_TIMEOUT_S = 5.0
"""Seconds that each side waits at the end for the other's acknowledgement."""
_POLL_S, _DONE_TIMEOUT_S = 0.1, 60.0
_ANY = "127.0.0.1"
"""Address by which the server's own process connects; the server listens on every address."""
_ALIKE = ("dpsgd_track", "torch", "opacus", "transformers")
"""Fields of `Environment` that all machines must have in common."""

Tell = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Hello:
    """A machine's introduction to node 0."""

    host: str
    environment: Environment
    plan: GroupPlan | None
    """Its own plan; None if it adopts that of node 0."""
    problem: str = ""
    """Reason that it cannot take part; empty if it can."""


@dataclass(frozen=True, kw_only=True)
class NodeJob:
    """A job as handed to one machine."""

    job: StartedJob
    """The job with node 0's paths."""
    meeting: Meeting


@dataclass(frozen=True, kw_only=True)
class Report:
    """Outcome of a machine's part of a job."""

    failure: Failure | None
    """None if it succeeded."""
    age_s: float = 0.0
    """Seconds since the failure. It is no time, as the machines' clocks may differ."""


HELLO = Codec(Hello, "dpsgd-track/hello", 1)
NODE_JOB = Codec(NodeJob, "dpsgd-track/node-job", 1)
REPORT = Codec(Report, "dpsgd-track/report", 2)


class Refused(ValueError):
    """The group does not start; the message says why."""


class NodeLost(Exception):
    """A machine has gone silent; the message says which."""


def hello_of(plan: GroupPlan | None) -> Hello:
    """This machine's introduction.

    Args:
        plan: its own plan; None if it adopts that of node 0.
    """
    return Hello(host=socket.gethostname(), environment=environment(), plan=plan)


def interface_towards(host: str) -> str:
    """The network interface by which `host` is reached; empty if unknown."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            # Sends nothing: it only looks up the route.
            probe.connect(place)
            address = str(probe.getsockname()[0])
    except OSError:
        return ""
    for name, addresses in psutil.net_if_addrs().items():
        if address in {each.address.partition("%")[0] for each in addresses}:
            return name
    return ""


class Leader:
    """Node 0's side."""

    def __init__(self, nodes: NodesConfig, *, lost_after_s: float = LOST_AFTER_S) -> None:
        """Serve the store.

        Raises:
            Refused: the port is taken.
        """
        self.nodes = nodes
        self._lost_after_s = lost_after_s
        self._store = _serve(nodes.port, nodes)
        self._others = range(1, nodes.num_nodes)
        self._hosts: dict[int, str] = {}
        self._beats: dict[int, tuple[int, float]] = {}
        self._job_store: TCPStore | None = None
        self._number = -1
        self._arrived: dict[int, tuple[float, Report]] = {}
        """Reports on the job by node, with their times of arrival by this machine's clock."""
        self.lost = ""
        """The lost machine, in words; empty while all are there."""

    def gather(self, plan: GroupPlan | None, timeout_s: float, tell: Tell) -> None:
        """Wait for the other machines, and check that their plans agree.

        Raises:
            Refused: their plans differ, or one did not come; those that came are told.
        """
        endpoint = self.nodes.endpoint
        own = hello_of(plan)
        deadline = time.monotonic() + timeout_s
        waiting = set(self._others)
        tell(f"waiting at {endpoint} for {len(waiting)} other launchers")
        try:
            while waiting:
                if time.monotonic() > deadline:
                    who = ", ".join(map(str, sorted(waiting)))
                    raise Refused(
                        f"rdzv_endpoint={endpoint!r}: expected all of {self.nodes.num_nodes} "
                        f"machines within {timeout_s:g} s. Node {who} did not come."
                    )
                for rank in sorted(waiting):
                    if (said := _read(self._store, f"hello/{rank}")) is not None:
                        self._check(rank, own, HELLO.loads(said))
                        waiting.discard(rank)
                time.sleep(_POLL_S)
        except (Refused, KeyboardInterrupt) as error:
            self.refuse(str(error) or "node 0 was interrupted.")
            raise

    def _check(self, rank: int, own: Hello, theirs: Hello) -> None:
        self._hosts[rank] = theirs.host
        who = self._name(rank)
        if theirs.problem:
            raise Refused(f"{who}: {theirs.problem}")
        for name in _ALIKE:
            version, found = getattr(own.environment, name), getattr(theirs.environment, name)
            if found != version:
                raise Refused(
                    f"{name}={found!r} on {who}: expected {version}, as on node 0. "
                    "Install the same on all machines."
                )
        if theirs.plan is None or own.plan is None:
            return
        if different := first_difference(own.plan, theirs.plan):
            name, ours, found = different
            raise Refused(
                f"{name}={found!r} on {who}: expected {ours!r}, as on node 0. "
                "Start the same command on all machines, with another --node-rank each."
            )

    def refuse(self, reason: str) -> None:
        """Tell the others that nothing starts."""
        _write(self._store, "refused", {"reason": reason})
        self._wait_for_byes()

    def welcome(self, group: str) -> None:
        """Tell the others the group's name."""
        now = time.monotonic()
        self._beats = dict.fromkeys(self._others, (-1, now))
        _write(self._store, "welcome", {"group": group})

    def start(self, started: StartedJob, run_id: str) -> Meeting | None:
        """Hand out a job; None if this machine runs it alone."""
        if started.job.num_ranks < self.nodes.num_nodes:
            return None
        self._number += 1
        self._arrived = {}
        # Keys that one job leaves in a store would mislead the next.
        self._job_store = _serve(0, self.nodes)
        meeting = Meeting(
            num_nodes=self.nodes.num_nodes,
            node_rank=0,
            host=_ANY,
            port=self._job_store.port,
            run_id=run_id,
            interface=interface_towards(self.nodes.host),
        )
        node_job = NodeJob(job=started, meeting=meeting)
        _write(self._store, f"job/{self._number}", NODE_JOB.dumps(node_job))
        return meeting

    def trouble(self) -> str:
        """Reason that the job cannot go on, in words; empty while it can."""
        self._listen()
        if self.lost:
            return self.lost
        failed = [rank for rank, report in self._reports().items() if report.failure]
        return f"{self._name(failed[0])} failed." if failed else ""

    def settle(self, reason: str) -> list[Report]:
        """End the job everywhere, and collect the outcomes.

        Args:
            reason: why it is cut short; empty if this machine's part finished.
        Returns:
            The reports of the other machines that failed.
        """
        if reason:
            _write(self._store, f"end/{self._number}", {"reason": reason})
        deadline = time.monotonic() + _DONE_TIMEOUT_S
        while len(self._reports()) < len(self._others):
            self._listen()
            if self.lost or time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        reports = self._reports()
        silent = [rank for rank in self._others if rank not in reports]
        if silent and not self.lost:
            self.lost = f"{self._name(silent[0])} did not end its part."
        failures = [report for report in reports.values() if report.failure]
        if self.lost:
            failure = Failure(kind=FailureKind.MACHINE_LOST, message=self.lost)
            failures.append(Report(failure=failure))
        return failures

    def close(self, code: int, summary: str) -> None:
        """Tell the others that the group is over."""
        _write(self._store, "over", {"code": code, "summary": summary})
        self._wait_for_byes()

    def _listen(self) -> None:
        now = time.monotonic()
        for rank in self._others:
            beat = _read(self._store, f"beat/{rank}")
            seen, since = self._beats[rank]
            if beat is not None and beat != seen:
                self._beats[rank] = beat, now
            elif now - since > self._lost_after_s and not self.lost:
                self.lost = f"{self._name(rank)} was not heard of for {self._lost_after_s:g} s."

    def _reports(self) -> dict[int, Report]:
        """The reports that have arrived on the job, with ages as of now."""
        now = time.monotonic()
        for rank in set(self._others) - self._arrived.keys():
            if (text := _read(self._store, f"done/{self._number}/{rank}")) is not None:
                self._arrived[rank] = now, _named(REPORT.loads(text), self._name(rank))
        return {
            rank: replace(report, age_s=report.age_s + now - arrived_s)
            for rank, (arrived_s, report) in sorted(self._arrived.items())
        }

    def _name(self, rank: int) -> str:
        return f"node {rank} ({self._hosts[rank]})"

    def _wait_for_byes(self) -> None:
        """Keep serving the store until the other machines have read the end."""
        deadline = time.monotonic() + BYE_TIMEOUT_S
        here = [rank for rank in self._others if _read(self._store, f"hello/{rank}") is not None]
        while not self.lost and time.monotonic() < deadline:
            if all(_read(self._store, f"bye/{rank}") is not None for rank in here):
                return
            time.sleep(_POLL_S)


class Follower:
    """Another node's side. A thread talks to node 0, so that a lost connection blocks nothing."""

    def __init__(self, nodes: NodesConfig, *, lost_after_s: float = LOST_AFTER_S) -> None:
        self.nodes = nodes
        self._lost_after_s = lost_after_s
        self._lock = threading.Lock()
        self._to_tell: list[tuple[str, Any]] = []
        self._wanted: set[str] = set()
        self._heard: dict[str, Any] = {}
        self._last_contact = 0.0
        self._trouble = ""
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._number = -1

    def close(self) -> None:
        """Stop talking. A thread that returned during the interpreter's exit would abort it."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(BYE_TIMEOUT_S)

    def join(self, hello: Hello, timeout_s: float, tell: Tell) -> str:
        """Report to node 0; returns the group's name.

        Raises:
            Refused: node 0 does not answer, or starts nothing.
        """
        nodes = self.nodes
        endpoint = nodes.endpoint
        deadline = time.monotonic() + timeout_s
        tell(f"node {nodes.node_rank} of {nodes.num_nodes}: waiting for node 0 at {endpoint}")
        reason = _wait_for_port(nodes, deadline)
        if reason:
            raise Refused(
                f"rdzv_endpoint={endpoint!r}: expected node 0's launcher there within "
                f"{timeout_s:g} s. {reason}"
            )
        try:
            store = _connect(nodes)
            if store.add(f"joined/{nodes.node_rank}", 1) > 1:
                raise Refused(
                    f"node_rank={nodes.node_rank}: expected one launcher for each. Another has "
                    "joined with this one."
                )
        except RuntimeError as error:
            raise Refused(
                f"rdzv_endpoint={endpoint!r}: expected node 0's launcher there. {error}"
            ) from error
        self._tell(f"hello/{nodes.node_rank}", HELLO.dumps(hello))
        self._want("welcome", "refused")
        self._last_contact = time.monotonic()
        self._thread = threading.Thread(target=self._talk, args=(store,), name="node", daemon=True)
        self._thread.start()
        while True:
            if (said := self._said("refused")) is not None:
                self._leave()
                raise Refused(said["reason"])
            if (said := self._said("welcome")) is not None:
                self._want("over", "job/0")
                return str(said["group"])
            if problem := self._lost():
                raise Refused(problem)
            time.sleep(_POLL_S)

    def next_job(self) -> NodeJob | tuple[int, str] | None:
        """The next job, or the group's exit code and summary; None while there is neither.

        Raises:
            NodeLost: node 0 is not heard of any more.
        """
        if (said := self._said("over")) is not None:
            self._leave()
            return int(said["code"]), str(said["summary"])
        if (said := self._said(f"job/{self._number + 1}")) is not None:
            self._number += 1
            self._want("over", f"job/{self._number + 1}", f"end/{self._number}")
            node_job = NODE_JOB.loads(said)
            meeting = replace(
                node_job.meeting,
                node_rank=self.nodes.node_rank,
                host=self.nodes.host,
                interface=interface_towards(self.nodes.host),
            )
            return replace(node_job, meeting=meeting)
        if problem := self._lost():
            raise NodeLost(problem)
        return None

    def is_to_end(self) -> str:
        """Reason that this job is to end, in words; empty while it is to go on.

        Raises:
            NodeLost: node 0 is not heard of any more.
        """
        if (said := self._said(f"end/{self._number}")) is not None:
            return str(said["reason"])
        if problem := self._lost():
            raise NodeLost(problem)
        return ""

    def done(self, report: Report) -> None:
        """Say how this machine's part of the job went."""
        self._tell(f"done/{self._number}/{self.nodes.node_rank}", REPORT.dumps(report))

    def _lost(self) -> str:
        silent_s = time.monotonic() - self._last_contact
        if self._trouble:
            return f"node 0 ({self.nodes.host}) is gone: {self._trouble}"
        if silent_s > self._lost_after_s:
            return f"node 0 ({self.nodes.host}) was not heard of for {self._lost_after_s:g} s."
        return ""

    def _tell(self, key: str, value: object) -> None:
        with self._lock:
            self._to_tell.append((key, value))

    def _want(self, *keys: str) -> None:
        with self._lock:
            self._wanted = set(keys)

    def _said(self, key: str) -> Any:
        with self._lock:
            return self._heard.get(key)

    def _leave(self) -> None:
        """Have node 0 know that its last word was heard, if it still listens."""
        self._tell(f"bye/{self.nodes.node_rank}", True)
        self._is_over.wait(BYE_TIMEOUT_S)

    def _talk(self, store: TCPStore) -> None:
        count, next_beat = 0, 0.0
        try:
            while not self._is_over.is_set():
                now = time.monotonic()
                if now >= next_beat:
                    count, next_beat = count + 1, now + BEAT_S
                    _write(store, f"beat/{self.nodes.node_rank}", count)
                with self._lock:
                    to_tell, self._to_tell = self._to_tell, []
                    wanted = [key for key in self._wanted if key not in self._heard]
                for key, value in to_tell:
                    _write(store, key, value)
                    if key.startswith("bye/"):
                        self._is_over.set()
                for key in wanted:
                    if (said := _read(store, key)) is not None:
                        with self._lock:
                            self._heard[key] = said
                self._last_contact = time.monotonic()
                time.sleep(_POLL_S)
        except RuntimeError as error:
            self._trouble = _in_a_line(error)


def _serve(port: int, nodes: NodesConfig) -> TCPStore:
    from torch.distributed import TCPStore

    try:
        return TCPStore(_ANY, port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        raise Refused(
            f"rdzv_endpoint={nodes.endpoint!r}: expected a free port of this machine. "
            f"{_in_a_line(error)}"
        ) from error


def _connect(nodes: NodesConfig) -> TCPStore:
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=LOST_AFTER_S)
    return TCPStore(
        nodes.host, nodes.port, is_master=False, wait_for_workers=False, timeout=timeout
    )


def _wait_for_port(nodes: NodesConfig, deadline: float) -> str:
    """Until something listens at the endpoint; why nothing does, in words."""
    while True:
        try:
            with contextlib.closing(socket.create_connection((nodes.host, nodes.port), timeout=5)):
                return ""
        except OSError as error:
            reason = f"{error.strerror or error}."
        if time.monotonic() > deadline:
            return reason
        time.sleep(5 * _POLL_S)


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _read(store: TCPStore, key: str) -> Any:
    return json.loads(store.get(key)) if store.check([key]) else None


def _write(store: TCPStore, key: str, value: object) -> None:
    store.set(key, json.dumps(value))


def _named(report: Report, who: str) -> Report:
    """`report` with the machine's name in front of what it says."""
    if report.failure is None:
        return report
    message = f"{who}: {report.failure.message}".rstrip(": ")
    return replace(report, failure=replace(report.failure, message=message))


def first_difference(ours: GroupPlan, theirs: GroupPlan) -> tuple[str, str, str] | None:
    """(setting, here, there) of the first setting that is not the same; None where all are.

    Where a plan was made, and by which command line, may differ.
    """
    modes = [", ".join(job.label for job in plan.jobs) for plan in (ours, theirs)]
    if modes[0] != modes[1]:
        return "mode", modes[0], modes[1]
    here, there = (json.loads(PLAN.dumps(plan)) for plan in (ours, theirs))
    for document in (here, there):
        del document["environment"], document["command"]
    return _difference(here, there, "")


def _difference(here: Any, there: Any, name: str) -> tuple[str, str, str] | None:
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        # Which job it is does not matter: they are made from the same settings.
        pairs = [(name, *pair) for pair in zip(here, there, strict=True)]
    elif isinstance(here, dict) and isinstance(there, dict):
        pairs = [
            (f"{name}.{key}".removeprefix("jobs.").lstrip("."), here.get(key), there.get(key))
            for key in {**here, **there}
        ]
    else:
        return None if here == there else (name, str(here), str(there))
    return next(filter(None, (_difference(a, b, field) for field, a, b in pairs)), None)
