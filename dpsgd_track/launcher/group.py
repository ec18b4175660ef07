"""Runs the jobs of a plan as one group: its run tree, one job after the other, its exit code."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

from dpsgd_track.config import (
    CLIP,
    PROFILE,
    JobConfig,
    RegimeConfig,
    logged_ranks,
    require,
)
from dpsgd_track.launcher import EXIT_FAILED, EXIT_FINISHED, EXIT_INTERRUPTED
from dpsgd_track.launcher.fork_client import WorkerHost
from dpsgd_track.launcher.interruption import Interruption
from dpsgd_track.launcher.output import write_output
from dpsgd_track.launcher.process_group import Launch, Outcome, run_mode
from dpsgd_track.launcher.progress import Display
from dpsgd_track.launcher.recording import Recording
from dpsgd_track.launcher.several_machines.meeting import Leader
from dpsgd_track.modes.table import REFERENCE
from dpsgd_track.record.environment import environment
from dpsgd_track.record.facts import FACTS, FACTS_FILE
from dpsgd_track.record.failure import Failure, FailureKind
from dpsgd_track.record.names import TRAJECTORY_FILE
from dpsgd_track.record.plan import GroupPlan, StartedJob, Suite
from dpsgd_track.record.run import Status
from dpsgd_track.record.trajectory import Trajectory
from dpsgd_track.store.opening import StoreError

CLIP_BOUNDS_FILE = "clip_bounds.json"
OUT_OF_MEMORY = "OUT OF MEMORY"
"""Status shown for a timed run out of memory: a result, not a failure."""


class GroupRun:
    """The execution of one group."""

    def __init__(
        self,
        plan: GroupPlan,
        recording: Recording,
        launch: Launch,
        display: Display,
        leader: Leader | None = None,
        *,
        output: Path | None = None,
    ) -> None:
        """
        Args:
            plan: the jobs to run: for a resumed group, the missing ones.
            leader: given if other machines take part.
            output: JSON file for the results of a single run.
        """
        self._plan = plan
        self._output = output
        self._leader = leader
        self._recording = recording
        self._tree = recording.tree
        self._folder = recording.folder
        self._launch = launch
        self._host = WorkerHost(launch.worker_module)
        self._display = display
        self._environment = environment()
        self._clip_bounds: dict[str, tuple[float, ...]] = {}
        """C of each step as the reference measured it, by regime."""

    def know_clip_bounds(self, bounds: Mapping[str, tuple[float, ...]]) -> None:
        """Set C of each step of clip regimes, by name, from an earlier run of the reference."""
        self._clip_bounds.update(bounds)

    def run(self) -> int:
        """Run every job; one that fails does not stop the others.

        Returns:
            The exit code.

        Raises:
            StoreError: the store accepts nothing; no job was started.
        """
        with Interruption() as interruption, self._host:
            if not self._tree.group_run:
                self._tree.start_group(self._plan)
            self._start_recording()
            code, said = EXIT_FAILED, "node 0's launcher failed"
            try:
                code, said = self._run_jobs(interruption)
                return code
            except Exception as error:
                failure = Failure(kind=FailureKind.ERROR, message=f"the launcher failed: {error}")
                self._tree.finish_open(Status.FAILED, failure)
                raise
            finally:
                if self._leader:
                    self._leader.close(code, said)
                self._recording.close(lambda: interruption.requested)

    def _start_recording(self) -> None:
        try:
            self._recording.start(self._display.say)
        except StoreError as error:
            if self._leader:
                self._leader.refuse(str(error))
            raise
        if self._leader:
            self._leader.welcome(self._recording.group)

    def _run_jobs(self, interruption: Interruption) -> tuple[int, str]:
        """Run them; returns the exit code and a summary."""
        failed: list[str] = []
        num_out_of_memory = 0
        jobs, is_profile = self._plan.jobs, self._plan.suite is Suite.PROFILE
        self._display.start_group(sum(regime.num_iter for _, _, regime in self._plan.runs()))
        for number, job in enumerate(jobs, 1):
            place = f"[{number}/{len(jobs)}] " if is_profile else ""
            if interruption.requested:
                status: str = Status.KILLED
            else:
                status = self._run_job(job, interruption, place)
            if status == Status.KILLED:
                stopped = Failure(kind=FailureKind.INTERRUPTED, message=interruption.name)
                self._tree.finish_open(Status.KILLED, stopped)
                self._display.conclude(f"group {self._folder.name}: {interruption.reason}")
                return EXIT_INTERRUPTED, interruption.reason
            if status == Status.FAILED:
                failed.append(job.title)
            if self._leader and self._leader.lost:
                # The other jobs need that machine, too.
                failed += [job.title for job in jobs[number:]]
                break
            num_out_of_memory += status == OUT_OF_MEMORY
        what = "runs" if is_profile else "modes"
        summary = f"{len(jobs) - len(failed) - num_out_of_memory} of {len(jobs)} {what} finished"
        summary += f", {num_out_of_memory} out of memory" * bool(num_out_of_memory)
        if failed:
            message = f"{summary}; failed: {', '.join(failed)}"
            failure = Failure(kind=FailureKind.RUNS_FAILED, message=message)
            self._tree.finish(self._tree.group_run, Status.FAILED, failure)
        else:
            self._tree.finish(self._tree.group_run, Status.FINISHED)
        is_last = bool(failed) or not self._plan.suite.is_judged
        self._display.conclude(f"group {self._folder.name}: {summary}", is_last=is_last)
        return EXIT_FAILED if failed else EXIT_FINISHED, summary

    def _run_job(self, job: JobConfig, interruption: Interruption, place: str) -> str:
        """Run one mode and record its runs.

        Args:
            place: its position among the jobs, for display.
        Returns:
            FINISHED, FAILED where a regime failed, OUT_OF_MEMORY where that is all, or KILLED.
        """
        ready, blocked = self._split_regimes(job)
        work_dir = self._work_dir(job)
        logged = logged_ranks(job.log_ranks, job.num_ranks)
        runs = [self._tree.start_mode(job, regime, logged) for regime in (*ready, *blocked)]
        self._display.start_mode(f"{place}{job.title}", ready)
        outcomes: tuple[Outcome, ...] = ()
        if ready:
            started = StartedJob(
                job=replace(job, regimes=ready),
                environment=self._environment,
                work_dir=str(work_dir.absolute()),
                spool=str(self._recording.spool.absolute()),
                group_run=self._tree.group_run if self._plan.suite.is_charted else "",
                mode_runs=tuple(mode_run for mode_run, _ in runs[: len(ready)]),
                rank_runs=tuple(ranks for _, ranks in runs[: len(ready)]),
                stall_s=self._launch.stall_s,
            )
            with self._recording.quiet() if job.is_timed else contextlib.nullcontext():
                outcomes = run_mode(
                    started, self._launch, self._host, interruption, self._display, self._leader
                )
            outcomes = self._read_results(started, outcomes)
        unknown = Failure(kind=FailureKind.NO_CLIP_BOUNDS)
        outcomes += tuple(Outcome(Status.FAILED, unknown) for _ in blocked)
        regimes = (*ready, *blocked)
        for (mode_run, ranks), outcome in zip(runs, outcomes, strict=True):
            for run_id in filter(None, (*ranks, mode_run)):
                log = f"Log: {work_dir / 'output.log'}"
                self._tree.finish(run_id, outcome.status, outcome.failure, log)
        self._tell_warnings(job, work_dir)
        return self._show(job, regimes, outcomes, work_dir)

    def _tell_warnings(self, job: JobConfig, work_dir: Path) -> None:
        """Show what the code under test warned of, each warning once."""
        warnings: dict[str, None] = {}
        for index in range(len(job.regimes)):
            # A file that cannot be read has failed its run already.
            with contextlib.suppress(OSError, ValueError):
                facts = FACTS.loads((work_dir / str(index) / FACTS_FILE).read_bytes())
                warnings |= dict.fromkeys(facts.warnings)
        for warning in warnings:
            self._display.say(f"{job.title} warned: {warning}.")

    def _split_regimes(
        self, job: JobConfig
    ) -> tuple[tuple[RegimeConfig, ...], tuple[RegimeConfig, ...]]:
        """Regimes with C as measured by the reference, and those whose C is missing."""
        if job.mode == REFERENCE:
            return job.regimes, ()
        ready, blocked = [], []
        for regime in job.regimes:
            if regime.kind != CLIP:
                ready.append(regime)
            elif bounds := self._clip_bounds.get(regime.name):
                ready.append(replace(regime, max_grad_norms=bounds))
            else:
                blocked.append(regime)
        return tuple(ready), tuple(blocked)

    def _read_results(
        self, started: StartedJob, outcomes: Sequence[Outcome]
    ) -> tuple[Outcome, ...]:
        """Read the results that later jobs need; an unreadable one is a failure."""
        checked = []
        job = started.job
        for index, (regime, outcome) in enumerate(zip(job.regimes, outcomes, strict=True)):
            folder = Path(started.work_dir) / str(index)
            try:
                if outcome.status is Status.FINISHED:
                    outcome = self._read_result(job, regime, folder)
            except (OSError, ValueError, KeyError, TypeError) as error:
                failure = Failure(kind=FailureKind.ERROR, message=str(error))
                outcome = Outcome(Status.FAILED, failure)
            checked.append(outcome)
        return tuple(checked)

    def _read_result(self, job: JobConfig, regime: RegimeConfig, folder: Path) -> Outcome:
        if job.mode == REFERENCE and regime.kind == CLIP and not regime.replay:
            text = (folder / CLIP_BOUNDS_FILE).read_text(encoding="utf-8")
            bounds = tuple(float(bound) for bound in json.loads(text)["max_grad_norms"])
            require(bool(bounds), CLIP_BOUNDS_FILE, bounds, "one bound for each step")
            # RegimeConfig checks their number and values.
            checked = replace(regime, max_grad_norms=bounds)
            self._clip_bounds[regime.name] = checked.max_grad_norms
        if variant := job.variant:
            facts = FACTS.loads((folder / FACTS_FILE).read_bytes())
            if variant.root and not facts.imported:
                message = f"--variant {variant.option}"
                failure = Failure(kind=FailureKind.UNUSED_VARIANT, message=message)
                return Outcome(Status.FAILED, failure)
        elif self._output is not None and regime.kind != PROFILE:
            write_output(Trajectory.load(folder / TRAJECTORY_FILE), self._output)
        return Outcome(Status.FINISHED)

    def _show(
        self,
        job: JobConfig,
        regimes: Sequence[RegimeConfig],
        outcomes: Sequence[Outcome],
        work_dir: Path,
    ) -> str:
        statuses = [outcome.status for outcome in outcomes]
        by_severity = (Status.KILLED, Status.FAILED)
        status: str = next((s for s in by_severity if s in statuses), Status.FINISHED)
        if status == Status.FAILED and any(map(_ran_out_of_memory, regimes, outcomes)):
            # Regimes after it could not start.
            status = OUT_OF_MEMORY
        failed = [outcome for outcome in outcomes if outcome.status is Status.FAILED]
        failures = [outcome.failure for outcome in failed if outcome.failure]
        reason = ""
        if failures:
            sentences = [failures[0].reason]
            if status != OUT_OF_MEMORY:
                sentences.append(failures[0].advice(self._folder.name, job))
            reason = f"{' '.join(sentences)} Log: {work_dir / 'output.log'}"
        self._display.end_mode(status, reason)
        return status

    def _work_dir(self, job: JobConfig) -> Path:
        # No mode's name has a dash, so that two modes never share a folder.
        shape = f"-T{job.data.seq_length}-B{job.data.batch_size}"
        timed = [f"{shape}-{regime.order}" for regime in job.regimes if regime.order]
        logs = self._folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        name = "".join([job.label.replace(":", "-"), *timed])
        taken = {folder.name for folder in logs.iterdir()}
        # Attempts of a resumed group keep separate folders.
        attempts = chain((name,), (f"{name}-{number}" for number in count(2)))
        folder = logs / next(attempt for attempt in attempts if attempt not in taken)
        folder.mkdir()
        return folder


def _ran_out_of_memory(regime: RegimeConfig, outcome: Outcome) -> bool:
    failure = outcome.failure
    is_timed = regime.kind == PROFILE
    return is_timed and failure is not None and failure.kind is FailureKind.OUT_OF_MEMORY
