"""Runs a suite as one group: its run tree, its modes one after the other, its exit code."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, count
from pathlib import Path

from dpsgd_track.config import (
    CLIP,
    PROFILE,
    JobConfig,
    RegimeConfig,
    VariantConfig,
    logged_ranks,
    require,
)
from dpsgd_track.launcher import EXIT_FAILED, EXIT_FINISHED, EXIT_INTERRUPTED, variants
from dpsgd_track.launcher.fork_client import WorkerHost
from dpsgd_track.launcher.interruption import Interruption
from dpsgd_track.launcher.output import write_output
from dpsgd_track.launcher.process_group import Launch, Outcome, run_mode
from dpsgd_track.launcher.progress import Display
from dpsgd_track.launcher.recording import Recording
from dpsgd_track.launcher.several_machines.meeting import Leader
from dpsgd_track.launcher.suites import Suite
from dpsgd_track.modes.table import REFERENCE
from dpsgd_track.record import failure as troubleshooting
from dpsgd_track.record import names
from dpsgd_track.record.environment import environment
from dpsgd_track.record.failure import Failure
from dpsgd_track.record.names import TRAJECTORY_FILE
from dpsgd_track.record.trajectory import Trajectory
from dpsgd_track.store.opening import StoreError
from dpsgd_track.store.run_tree import FAILED, FINISHED, KILLED, flatten

CLIP_BOUNDS_FILE = "clip_bounds.json"
OUT_OF_MEMORY = "OUT OF MEMORY"
"""What is said of a run of a profile that had too little memory: a result, not a failure."""


class GroupRun:
    """One group in the making."""

    def __init__(
        self,
        suite: Suite,
        recording: Recording,
        launch: Launch,
        display: Display,
        leader: Leader | None = None,
    ) -> None:
        """
        Args:
            leader: where other machines take part.
        """
        self._suite = suite
        self._leader = leader
        self._recording = recording
        self._tree = recording.tree
        self._folder = recording.folder
        self._launch = launch
        self._host = WorkerHost(launch.worker_module)
        self._display = display
        self._environment = {f"environment.{k}": v for k, v in environment().items()}
        self._clip_bounds: dict[str, tuple[float, ...]] = {}
        """C of each step as the reference measured it, by regime."""
        self._finished: dict[VariantConfig, list[tuple[str, bool]]] = defaultdict(list)
        """Mode runs of each variant that finished, and whether they imported anything of it."""

    def know_clip_bounds(self, bounds: Mapping[str, tuple[float, ...]]) -> None:
        """Take C of each step of clip regimes, by name, from an earlier run of the reference."""
        self._clip_bounds.update(bounds)

    def run(self, command: str) -> int:
        """Run every mode; one that fails does not stop the others.

        Args:
            command: the command line to record; a group that is resumed has its own.
        Returns:
            The exit code.

        Raises:
            StoreError: the store takes nothing; no mode was started.
        """
        with Interruption() as interruption, self._host:
            if not self._tree.group_run:
                self._tree.start_group(self._suite.expected_runs, self._group_params(command))
            self._start_recording()
            code, said = EXIT_FAILED, "node 0's launcher failed"
            try:
                code, said = self._run_modes(interruption)
                return code
            except Exception as error:
                self._tree.finish_open(FAILED, f"the launcher failed: {error}")
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

    def _run_modes(self, interruption: Interruption) -> tuple[int, str]:
        """Run them; returns the exit code and a summary."""
        failed: list[str] = []
        num_out_of_memory = 0
        total = len(self._suite.jobs)
        for number, job in enumerate(self._suite.jobs, 1):
            place = f"[{number}/{total}] " if self._suite.name == PROFILE else ""
            status = KILLED if interruption.requested else self._run_mode(job, interruption, place)
            if status == KILLED:
                self._tree.finish_open(KILLED, interruption.reason)
                self._display.say(f"group {self._folder.name}: {interruption.reason}")
                return EXIT_INTERRUPTED, interruption.reason
            if status == FAILED:
                failed.append(job.title)
            if self._leader and self._leader.lost:
                # The other modes need that machine, too.
                failed += [job.title for job in self._suite.jobs[number:]]
                break
            num_out_of_memory += status == OUT_OF_MEMORY
        unused = self._fail_unused_variants()
        what = "runs" if self._suite.name == PROFILE else "modes"
        summary = f"{total - len(failed) - num_out_of_memory} of {total} {what} finished"
        summary += f", {num_out_of_memory} out of memory" * bool(num_out_of_memory)
        if failed or unused:
            causes = [f"failed: {', '.join(failed)}"] * bool(failed) + unused
            reason = "; ".join([summary, *causes])
            self._tree.finish(self._tree.group_run, FAILED, reason)
        else:
            self._tree.finish(self._tree.group_run, FINISHED)
        self._display.say(f"group {self._folder.name}: {summary}")
        return EXIT_FAILED if failed or unused else EXIT_FINISHED, summary

    def _fail_unused_variants(self) -> list[str]:
        """Fail the runs of each variant that no mode imported anything of; why, for each."""
        reasons = []
        for variant, runs in self._finished.items():
            if any(is_used for _, is_used in runs):
                continue
            reasons.append(variants.unused(variant))
            for run_id, _ in runs:
                self._tree.finish(run_id, FAILED, reasons[-1])
            self._display.say(reasons[-1])
        return reasons

    def _run_mode(self, job: JobConfig, interruption: Interruption, place: str) -> str:
        """Run one mode with its runs around it.

        Args:
            place: which of many it is, as it is shown.
        Returns:
            FINISHED, FAILED where a regime failed, OUT_OF_MEMORY where that is all, or KILLED.
        """
        ready, blocked = self._split_regimes(job)
        work_dir = self._work_dir(job)
        runs = [self._start_runs(job, regime) for regime in (*ready, *blocked)]
        self._display.start_mode(f"{place}{job.title}", ready)
        outcomes: tuple[Outcome, ...] = ()
        if ready:
            job = replace(
                job,
                regimes=ready,
                spool=str(self._recording.spool.absolute()),
                run_ids=tuple(mode_run for mode_run, _ in runs[: len(ready)]),
                rank_run_ids=tuple(ranks for _, ranks in runs[: len(ready)]),
                work_dir=str(work_dir.absolute()),
            )
            with self._recording.quiet() if job.is_timed else contextlib.nullcontext():
                outcomes = run_mode(
                    job, self._launch, self._host, interruption, self._display, self._leader
                )
            outcomes = self._read_results(job, outcomes)
        unknown = Failure(kind=troubleshooting.NO_CLIP_BOUNDS)
        outcomes += tuple(Outcome(FAILED, unknown) for _ in blocked)
        regimes = (*ready, *blocked)
        for (mode_run, ranks), regime, outcome in zip(runs, regimes, outcomes, strict=True):
            if _ran_out_of_memory(regime, outcome):
                self._tree.mark(mode_run, names.OUT_OF_MEMORY)
            for run_id in filter(None, (*ranks, mode_run)):
                self._finish(run_id, outcome, work_dir, interruption)
            if job.variant and outcome.status == FINISHED:
                self._finished[job.variant].append((mode_run, bool(variants.imports_of(job))))
        return self._show(regimes, outcomes, work_dir)

    def _split_regimes(
        self, job: JobConfig
    ) -> tuple[tuple[RegimeConfig, ...], tuple[RegimeConfig, ...]]:
        """Regimes with C as the reference measured it, and those that need it in vain."""
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

    def _start_runs(self, job: JobConfig, regime: RegimeConfig) -> tuple[str, tuple[str, ...]]:
        config = asdict(job.run_in(regime))
        for key in ("regimes", "run_ids", "rank_run_ids", "spool", "work_dir", "variant"):
            del config[key]
        variant = job.variant
        if variant:
            config["variant"] = {"name": variant.name, **variants.facts(variant)}
        params = flatten({**config, "regime": asdict(regime)}) | self._environment
        name = variant.name if variant else ""
        logged = logged_ranks(job.log_ranks, job.num_ranks)
        return self._tree.start_mode(job.mode, regime, job.num_ranks, params, name, logged)

    def _read_results(self, job: JobConfig, outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
        """Take what later steps need; a result that cannot be read is a failure."""
        checked = []
        for index, (regime, outcome) in enumerate(zip(job.regimes, outcomes, strict=True)):
            folder = Path(job.work_dir) / str(index)
            try:
                if outcome.status == FINISHED:
                    self._read_result(job, regime, folder)
            except (OSError, ValueError, KeyError, TypeError) as error:
                outcome = Outcome(FAILED, Failure(kind=troubleshooting.ERROR, message=str(error)))
            checked.append(outcome)
        return tuple(checked)

    def _read_result(self, job: JobConfig, regime: RegimeConfig, folder: Path) -> None:
        if job.mode == REFERENCE and regime.kind == CLIP and not regime.replay:
            text = (folder / CLIP_BOUNDS_FILE).read_text(encoding="utf-8")
            bounds = tuple(float(bound) for bound in json.loads(text)["max_grad_norms"])
            require(bool(bounds), CLIP_BOUNDS_FILE, bounds, "one bound for each step")
            # RegimeConfig checks their number and values.
            checked = replace(regime, max_grad_norms=bounds)
            self._clip_bounds[regime.name] = checked.max_grad_norms
        if job.variant is not None:
            variants.imports_of(job)
        elif self._suite.output is not None and regime.kind != PROFILE:
            write_output(Trajectory.load(folder / TRAJECTORY_FILE), self._suite.output)

    def _finish(
        self, run_id: str, outcome: Outcome, work_dir: Path, interruption: Interruption
    ) -> None:
        failure = outcome.failure
        if failure is not None:
            advice = f"{failure.advice} Log: {work_dir / 'output.log'}"
            self._tree.finish(run_id, outcome.status, failure.reason, advice)
        else:
            reason = interruption.reason if outcome.status == KILLED else ""
            self._tree.finish(run_id, outcome.status, reason)

    def _show(
        self, regimes: Sequence[RegimeConfig], outcomes: Sequence[Outcome], work_dir: Path
    ) -> str:
        statuses = [outcome.status for outcome in outcomes]
        status = next((s for s in (KILLED, FAILED) if s in statuses), FINISHED)
        if status == FAILED and any(map(_ran_out_of_memory, regimes, outcomes)):
            # Regimes after it could not start.
            status = OUT_OF_MEMORY
        failures = [outcome.failure for outcome in outcomes if outcome.failure]
        reason = ""
        if failures:
            advice = "" if status == OUT_OF_MEMORY else f" {failures[0].advice}"
            reason = f"{failures[0].reason}{advice} Log: {work_dir / 'output.log'}"
        self._display.end_mode(status, reason)
        return status

    def _work_dir(self, job: JobConfig) -> Path:
        # A dash is in no mode's name, so that two modes never share a folder.
        points = [f"-{regime.point}" for regime in job.regimes if regime.point]
        logs = self._folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        name = "".join([job.label.replace(":", "-"), *points])
        taken = {folder.name for folder in logs.iterdir()}
        # Attempts of a group that is resumed stay beside each other.
        attempts = chain((name,), (f"{name}-{number}" for number in count(2)))
        folder = logs / next(attempt for attempt in attempts if attempt not in taken)
        folder.mkdir()
        return folder

    def _group_params(self, command: str) -> dict[str, str]:
        suite = self._suite
        shared = asdict(suite.jobs[0])
        params = {
            "command": command,
            "suite": suite.name,
            "modes": list(dict.fromkeys(job.label for job in suite.jobs)),
            "variant": {v.name: variants.facts(v) for job in suite.jobs if (v := job.variant)},
            "regimes": list(dict.fromkeys(run[1] for run in suite.expected_runs)),
            "num_ranks": suite.num_ranks,
            **{key: shared[key] for key in ("model", "data", "performance", "seed")},
            **{key: shared[key] for key in ("layer_norms", "log_ranks")},
        }
        every = {key: [getattr(job.data, key) for job in suite.jobs] for key in shared["data"]}
        # Lengths and batch sizes of a profile.
        params["data"] = {key: list(dict.fromkeys(found)) for key, found in every.items()}
        return flatten(params) | self._environment


def _ran_out_of_memory(regime: RegimeConfig, outcome: Outcome) -> bool:
    failure = outcome.failure
    is_timed = regime.kind == PROFILE
    return is_timed and failure is not None and failure.kind == troubleshooting.OUT_OF_MEMORY
