"""One mode as one process group: starts, follows and ends it, and reports each regime's outcome.

Files of a worker in its work folder:

- `progress.jsonl`: one JSON object a line, by rank 0: regime, event (start, built, step, end),
  step, num_iter, loss, epsilon (in end, where noise was accounted for),
  step_time_ms and peak_memory_gib (in end, of a profile).
- `failure-rank{r}.json`: the `Failure` of rank r.
- `stacks-rank{r}.txt`: the stacks of rank r, while it makes no progress.
- `{regime}/facts.json`: the `RunFacts` of a regime.
- `{regime}/trajectory.npz`: the record of a finished regime; of a profile `timings.json`.
- `{regime}/clip_bounds.json`: C of each step, measured by the reference in the clip regime.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dpsgd_track
from dpsgd_track.config import PROFILE, JobConfig
from dpsgd_track.launcher.fork_client import WorkerHost
from dpsgd_track.launcher.fork_server import Meeting, Request
from dpsgd_track.launcher.hardware import num_cores
from dpsgd_track.launcher.interruption import Interruption
from dpsgd_track.launcher.progress import Display
from dpsgd_track.launcher.several_machines.meeting import LOST_AFTER_S, Leader, Report
from dpsgd_track.launcher.stalls import STALL_S, Stalls
from dpsgd_track.record.failure import FAILURE, Failure, FailureKind, names_lost_peer
from dpsgd_track.record.names import TIMINGS_FILE, TRAJECTORY_FILE, VARIANT_VARIABLE
from dpsgd_track.record.plan import STARTED_JOB, StartedJob
from dpsgd_track.record.run import Status
from dpsgd_track.redaction import redact_uri

WORKER = "dpsgd_track.training.worker"
GRACE_S = 10.0
_POLL_S = 0.1
_LOG_TAIL_BYTES = 65536
_LEAST_FREE_BYTES = 65536
_EXCEPTION = re.compile(
    r"^(?:\[rank(\d+)\]:\s*)?((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception|Exit)(?:: .*)?)$",
    re.MULTILINE,
)
_OF_LAUNCHER = re.compile(r"\b(?:ChildFailedError|ProcessExitedException)\b")
"""Messages of torch's launcher on a failed rank."""
_ROOT_CAUSE = re.compile(r"^Root Cause .*?^\s*rank\s*: (\d+)", re.MULTILINE | re.DOTALL)
_CREDENTIALS = ("MLFLOW_TRACKING_", "PGPASS", "PGSERVICE")
"""Beginnings of the names of variables that lead to the tracking store."""
_DATABASES = ("postgresql", "postgres", "mysql", "mssql")
_KILLED = re.compile(r"Signal (\d+) \((SIG\w+)\) received by PID")

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """Outcome of one regime of a mode."""

    status: Status
    """FINISHED, FAILED or KILLED."""
    failure: Failure | None = None
    """Reason that it did not finish."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Launch settings of workers; tests use other workers."""

    worker_module: str = WORKER
    """Module whose `main` runs in every rank, with the path of job.json; see WorkerHost."""
    grace_s: float = GRACE_S
    """Time in seconds for the group to end by itself."""
    lost_after_s: float = LOST_AFTER_S
    """Longest silence of another machine, in seconds, before it counts as lost."""
    stall_s: float = STALL_S
    """Seconds without progress before the stacks of all ranks are told."""


def run_mode(
    started: StartedJob,
    launch: Launch,
    host: WorkerHost,
    interruption: Interruption,
    display: Display,
    leader: Leader | None = None,
) -> tuple[Outcome, ...]:
    """Run a job to its end, or until an interruption; no process of it is left behind.

    Args:
        leader: given if other machines take part.
    Returns:
        The outcome of each regime.
    """
    work_dir, title = Path(started.work_dir), started.job.title
    progress = _Progress(work_dir / "progress.jsonl")
    meeting = leader.start(started, work_dir.name) if leader else None
    others = leader if meeting else None
    trouble = ""
    hung: Failure | None = None
    ranks = range(started.job.num_ranks // (meeting.num_nodes if meeting else 1))
    stalls = Stalls(started.job, work_dir, ranks, launch.stall_s, host.cpu_s)
    try:
        start(started, launch, host, meeting)
        while (code := host.poll()) is None and not interruption.requested:
            if others and (trouble := others.trouble()):
                display.say(f"{trouble} Ending {title}.")
                break
            progress.forward(display.event)
            if hung := stalls.look(display.say, has_begun=progress.has_begun):
                display.say(f"Ending {title}, which hangs.")
                break
            time.sleep(_POLL_S)
        if code is None and not trouble and not hung:
            display.say(f"{interruption.reason} Ending {title}.")
    finally:
        host.end()
    progress.forward(display.event)
    reports: list[Report] = []
    if others:
        # If this machine's part was cut short, so are the others'.
        own = interruption.reason if interruption.requested else "node 0 failed."
        own = hung.reason if hung else own
        reports = others.settle("" if code == 0 else trouble or own)
    # A scheduler's SIGTERM may reach the group before this process looks.
    if interruption.requested and code != 0:
        stopped = Failure(kind=FailureKind.INTERRUPTED, message=interruption.name)
        return outcomes(started, None, progress.ended, stopped)
    if hung:
        # What ranks say once they are told to end is not the reason.
        return outcomes(started, 1, progress.ended, hung)
    if code:
        reports.append(report_of(work_dir, code))
    return outcomes(started, 1 if code is None else code, progress.ended, cause(reports))


def start(started: StartedJob, launch: Launch, host: WorkerHost, meeting: Meeting | None) -> None:
    """Start this machine's ranks of a job."""
    job, work_dir = started.job, Path(started.work_dir)
    job_file = work_dir / "job.json"
    job_file.write_text(STARTED_JOB.dumps(started, indent=1), encoding="utf-8")
    request = Request(
        job_file=str(job_file),
        log=str(work_dir / "output.log"),
        num_ranks=job.num_ranks // (meeting.num_nodes if meeting else 1),
        grace_s=launch.grace_s,
        meeting=meeting,
    )
    host.start(request, environment_of(job, request))


def report_of(work_dir: Path, code: int) -> Report:
    """Reason that the group in `work_dir` exited with `code`, and the time since it failed."""
    now_s = time.time()
    times_s = [file.stat().st_mtime for file in work_dir.glob("failure-rank*.json")]
    age_s = max(0.0, now_s - min(times_s, default=now_s))
    return Report(failure=failure_of(work_dir, code), age_s=age_s)


def cause(reports: Sequence[Report]) -> Failure | None:
    """Root failure among the reports of several machines; None if there are no failures."""
    failures = [(each.age_s, each.failure) for each in reports if each.failure]
    if not failures:
        return None
    return min(failures, key=lambda each: (each[1].kind is FailureKind.PEER, -each[0]))[1]


def failure_of(work_dir: Path, code: int) -> Failure:
    """Failure of a group that exited with `code`: the first reported, else taken from the log."""
    files = sorted(work_dir.glob("failure-rank*.json"), key=lambda file: file.stat().st_mtime_ns)
    if files:
        # The first rank to fail, unless it only noticed the loss of another.
        return min(map(_read_report, files), key=lambda each: each.kind is FailureKind.PEER)
    log = _tail(work_dir / "output.log")
    if shutil.disk_usage(work_dir).free < _LEAST_FREE_BYTES:
        # The disk may have been too full for the report and the log.
        return Failure(kind=FailureKind.DISK_FULL, message=_last_words(log, None))
    # The launcher of the ranks ends the others with SIGTERM when one is gone.
    kills = [(number, name) for number, name in _KILLED.findall(log) if name != "SIGTERM"]
    if kills:
        number, name = kills[0]
        return Failure(kind=FailureKind.KILLED, message=f"signal {number} ({name}).")
    if code < 0:
        name = signal.Signals(-code).name
        return Failure(kind=FailureKind.KILLED, message=f"signal {-code} ({name}).")
    rank = _ROOT_CAUSE.search(log)
    root = int(rank[1]) if rank else None
    message = _last_words(log, root)
    kind = FailureKind.PEER if names_lost_peer(message) else FailureKind.ERROR
    return Failure(kind=kind, message=message, rank=root)


def environment_of(job: JobConfig, request: Request) -> dict[str, str]:
    """The launcher's environment, HF_TOKEN included, with the variables that ranks need.

    Nothing in it opens the tracking store.
    """
    package_root = str(Path(dpsgd_track.__file__).parent.parent)
    search_path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    environment = {
        # glibc would give every large tensor back to the system and fault its pages in anew.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "OMP_NUM_THREADS": str(max(1, num_cores() // request.num_ranks)),
        **_interface(request.meeting),
        **_without_credentials(os.environ),
        "PYTHONPATH": os.pathsep.join([*search_path, package_root]),
        # Counting GPUs through CUDA would make it unusable in processes forked afterwards.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if job.performance.device == "cpu":
        # Libraries such as Opacus shard over GPUs wherever there are some.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if (variant := job.variant) and variant.root:
        # `python -m` would put the working directory first, and with it a checkout there.
        ours = [variant.root, os.getcwd(), environment["PYTHONPATH"]]
        environment["PYTHONPATH"] = os.pathsep.join(ours)
        environment["PYTHONSAFEPATH"] = "1"
        environment[VARIANT_VARIABLE] = variant.root
    return environment


def _without_credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """Environment of ranks: they write to the spool, and need no tracking store."""
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(_CREDENTIALS)
        and not (value.startswith(_DATABASES) and redact_uri(value) != value)
    }


def _interface(meeting: Meeting | None) -> dict[str, str]:
    """Network interface for ranks on several machines: the one by which node 0 is reached."""
    if meeting is None or not meeting.interface:
        return {}
    # NCCL matches a name exactly if = precedes it.
    return {
        "GLOO_SOCKET_IFNAME": meeting.interface,
        "NCCL_SOCKET_IFNAME": f"={meeting.interface}",
    }


class _Progress:
    """Reads the progress file of rank 0, whole lines only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.ended: set[int] = set()
        """Indices of regimes that ended."""
        self.has_begun = False
        """True once every rank has built its mode."""

    def forward(self, on_event: Callable[[Event], object]) -> None:
        """Pass every new event to `on_event`."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            event = json.loads(line)
            if event["event"] == "end":
                self.ended.add(event["regime"])
            self.has_begun |= event["event"] in ("built", "step")
            on_event(event)


def outcomes(
    started: StartedJob, code: int | None, ended: set[int], failure: Failure | None = None
) -> tuple[Outcome, ...]:
    """Outcome of each regime, judged by its files.

    Args:
        code: exit code of the group; None where it was interrupted.
        ended: indices of the regimes whose end was reported.
        failure: why it did not finish, if known from outside its folder.
    """
    job, work_dir = started.job, Path(started.work_dir)
    indices = range(len(job.regimes))
    files = [TIMINGS_FILE if r.kind == PROFILE else TRAJECTORY_FILE for r in job.regimes]
    complete = [i in ended and (work_dir / str(i) / files[i]).is_file() for i in indices]
    finished = Outcome(Status.FINISHED)
    if code is None:
        return tuple(finished if done else Outcome(Status.KILLED, failure) for done in complete)
    if code == 0 and failure is None:
        missing = Outcome(Status.FAILED, Failure(kind=FailureKind.NO_TRAJECTORY))
        return tuple(finished if done else missing for done in complete)
    failure = failure or failure_of(work_dir, code)
    # A failure after the last regime, such as an upload, is the last regime's.
    in_flight = next((i for i in indices if not complete[i]), len(complete) - 1)
    at = failure.regime if failure.regime in indices else in_flight
    assert at is not None
    later = Failure(
        kind=FailureKind.NOT_STARTED,
        message=f"regime {job.regimes[at].name} failed first: {failure.reason}",
    )
    return tuple(
        Outcome(Status.FAILED, failure)
        if i == at
        else finished
        if done
        else Outcome(Status.FAILED, later)
        for i, done in enumerate(complete)
    )


def _read_report(path: Path) -> Failure:
    try:
        failure = FAILURE.loads(path.read_bytes())
        return replace(failure, message=_shorten(failure.message))
    except (ValueError, OSError) as error:
        rank = int(path.stem.removeprefix("failure-rank"))
        message = f"{path.name} cannot be read: {error}"
        return Failure(kind=FailureKind.ERROR, message=message, rank=rank)


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")


def _last_words(log: str, rank: int | None) -> str:
    """The last exception in the log, of `rank` if lines carry ranks; else its last lines."""
    exceptions = [
        raised for raised in _EXCEPTION.findall(log) if not _OF_LAUNCHER.search(raised[1])
    ]
    # Other ranks only report the loss of this one.
    raised = [text for of, text in exceptions if of == str(rank)] or [
        text for _, text in exceptions
    ]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return _shorten(raised[-1] if raised else " | ".join(lines[-5:]))


def _shorten(text: str) -> str:
    """`text` on one line, at most 500 characters, without the hub token."""
    token = os.environ.get("HF_TOKEN")
    if token:
        text = text.replace(token, "***")
    text = " ".join(text.split())
    return text if len(text) <= 500 else f"{text[:499]}…"
