"""A launcher that takes part in another machine's group: it runs its ranks of each job."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dpsgd_track.launcher import EXIT_FAILED, EXIT_INTERRUPTED
from dpsgd_track.launcher.fork_client import WorkerHost
from dpsgd_track.launcher.interruption import Interruption
from dpsgd_track.launcher.process_group import Launch, report_of, start
from dpsgd_track.launcher.recording import Recording
from dpsgd_track.launcher.several_machines.meeting import Follower, NodeJob, NodeLost, Report
from dpsgd_track.record.failure import Failure, FailureKind
from dpsgd_track.record.plan import StartedJob

_POLL_S = 0.1


def follow(
    follower: Follower, recording: Recording, launch: Launch, tell: Callable[[str], object]
) -> int:
    """Run the jobs that node 0 hands out to the end; returns the exit code, node 0's if known.

    Args:
        recording: for the records that this machine adds to the group.
        tell: called with progress, line by line.

    Raises:
        StoreError: the store accepts nothing.
    """
    node = f"node {follower.nodes.node_rank}"
    host = WorkerHost(launch.worker_module)
    interruption = Interruption()
    part = _Part(follower, recording, launch, host, interruption, tell)
    with interruption, host:
        recording.start(tell)
        try:
            while not interruption.requested:
                received = follower.next_job()
                if isinstance(received, NodeJob):
                    part.run(received)
                elif received is not None:
                    code, summary = received
                    tell(f"{node}: group {recording.group}: {summary}")
                    return code
                else:
                    time.sleep(_POLL_S)
            tell(f"{node}: {interruption.reason}")
            return EXIT_INTERRUPTED
        except NodeLost as error:
            tell(f"{node}: {error} Nothing more can be run here.")
            return EXIT_FAILED
        finally:
            recording.close(lambda: interruption.requested)


class _Part:
    """This machine's part of each job."""

    def __init__(
        self,
        follower: Follower,
        recording: Recording,
        launch: Launch,
        host: WorkerHost,
        interruption: Interruption,
        tell: Callable[[str], object],
    ) -> None:
        self._follower = follower
        self._recording = recording
        self._launch = launch
        self._host = host
        self._interruption = interruption
        self._tell = tell

    def run(self, node_job: NodeJob) -> None:
        """Run one job to its end, and report its outcome.

        Raises:
            NodeLost: node 0 is gone; so are this machine's ranks.
        """
        node_rank = self._follower.nodes.node_rank
        meeting, started = node_job.meeting, self._placed(node_job.job, node_rank)
        job = started.job
        num_ranks = job.num_ranks // meeting.num_nodes
        first = node_rank * num_ranks
        runs = [
            run for ranks in started.rank_runs for run in ranks[first : first + num_ranks] if run
        ]
        self._recording.join(runs)
        self._tell(f"node {node_rank}: {job.title}: started {num_ranks} ranks")
        with self._recording.quiet() if job.is_timed else contextlib.nullcontext():
            try:
                start(started, self._launch, self._host, meeting)
                code, reason = self._wait()
            finally:
                self._host.end()
                self._recording.leave(runs)
        report = self._report(Path(started.work_dir), code)
        self._follower.done(report)
        outcome = f"ended: {reason}" if reason else "finished"
        if report.failure:
            outcome = f"failed: {report.failure.reason}"
        self._tell(f"node {node_rank}: {job.title}: {outcome}")

    def _placed(self, job: StartedJob, node_rank: int) -> StartedJob:
        """The job with this machine's folders."""
        # Machines that share a disk have separate folders all the same.
        name = f"{Path(job.work_dir).name}-node{node_rank}"
        folder = self._recording.folder / "logs" / name
        folder.mkdir(parents=True, exist_ok=True)
        return replace(
            job, work_dir=str(folder.absolute()), spool=str(self._recording.spool.absolute())
        )

    def _wait(self) -> tuple[int | None, str]:
        """Exit code of the ranks, None if they are to be ended, and the reason."""
        while (code := self._host.poll()) is None:
            if self._interruption.requested:
                return None, self._interruption.reason
            if reason := self._follower.is_to_end():
                return None, reason
            time.sleep(_POLL_S)
        return code, ""

    def _report(self, work_dir: Path, code: int | None) -> Report:
        if code:
            return report_of(work_dir, code)
        failure = None
        if code is None and self._interruption.requested:
            failure = Failure(kind=FailureKind.INTERRUPTED, message=self._interruption.name)
        return Report(failure=failure)
