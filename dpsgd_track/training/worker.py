"""One rank of one mode's process group.

`main` runs in every rank, forked by torch's launcher after `preload`: the mode's regimes one after
the other, each from fresh weights. It appends its observations to the group's spool, and writes
trajectories, progress and the reason of a failure to the job's working folder.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import statistics
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dpsgd_track.config import CLIP, NOISE, PROFILE, SILENT, RegimeConfig
from dpsgd_track.demands import declined_by
from dpsgd_track.modes.build import ModeBuilder, build_mode
from dpsgd_track.modes.protocol import Mode, ModeContext
from dpsgd_track.record import names
from dpsgd_track.record.environment import imported_from
from dpsgd_track.record.facts import FACTS, FACTS_FILE, DeviceFacts, RunFacts
from dpsgd_track.record.failure import FAILURE
from dpsgd_track.record.names import TIMINGS_FILE, TRAJECTORY_FILE
from dpsgd_track.record.plan import STARTED_JOB, StartedJob
from dpsgd_track.record.timings import Timings
from dpsgd_track.store.run_tree import flatten
from dpsgd_track.store.spool import RECORDS, SpoolWriter
from dpsgd_track.training import stall_watch
from dpsgd_track.training.diagnosis import diagnose
from dpsgd_track.training.heard import HeardWarnings
from dpsgd_track.training.loop import RegimeRun
from dpsgd_track.training.noise_samples import Floats
from dpsgd_track.training.prepare import PreparedRun, not_optimized
from dpsgd_track.training.profile import ProfileRun
from dpsgd_track.training.recorder import data_digest, rank_metrics
from dpsgd_track.training.system_metrics import system_metrics

LEAVING_TIMEOUT_S = 5.0
"""Seconds that a worker told to stop may take to save its trajectories."""
COLLECTIVE_TIMEOUT = timedelta(minutes=10)

Unreached = Callable[[], tuple[str, ...]]
"""Returns the points at which the last mode's builder planted code that no step executed."""


class Worker:
    """The work of one rank: its regimes and their records."""

    def __init__(
        self,
        started: StartedJob,
        writer: SpoolWriter,
        build: ModeBuilder = build_mode,
        unreached: Unreached = tuple,
    ) -> None:
        """
        Args:
            build: builds the job's mode, once for each regime.
            unreached: asked once each regime is over.
        """
        self.started, self.job, self.writer = started, started.job, writer
        self._build, self._unreached = build, unreached
        self.rank = int(os.environ["RANK"])
        self.folder = Path(started.work_dir)
        self.clip_bounds: dict[str, tuple[float, ...]] = {}
        """C of each step, calibrated by each clip regime of this job; replays use the same."""
        self.silent: dict[int, Floats] = {}
        """Samples of the updates of the twin without noise, which the noisy run subtracts."""
        self.regime, self.step = 0, -1
        """Index of the current regime, and the current step; -1 before the first step."""
        self.is_leaving = threading.Event()
        """Set while the records of a regime that ended, successfully or not, are being saved."""
        self._progress_file: int | None = None
        self.warnings = HeardWarnings(self.job)
        self.is_told_to_stop = threading.Event()
        """Set when another rank failed, or the user interrupted the run."""

    def run(self) -> None:
        """Run all regimes of the job."""
        self.warnings.listen()
        device = self._join_group()
        for number in range(len(self.job.regimes)):
            self._run_regime(number, device)
            if device.type == "cuda":
                # A sharded model is full of reference cycles, and the next regime needs its memory.
                gc.collect()
        dist.barrier()
        dist.destroy_process_group()

    def report_failure(self, error: BaseException) -> None:
        """Write the failure where the launcher looks for it."""
        step = self.step if self.step >= 0 else None
        failure = diagnose(error, self.job, regime=self.regime, step=step, rank=self.rank)
        path = self.folder / f"failure-rank{self.rank}.json"
        _replace(path, FAILURE.dumps(failure))

    def _join_group(self) -> torch.device:
        if self.job.performance.device == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", timeout=COLLECTIVE_TIMEOUT, device_id=device)
        else:
            device = torch.device("cpu")
            dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
        return device

    def _run_regime(self, number: int, device: torch.device) -> None:
        regime = self.job.regimes[number]
        self.regime, self.step = number, -1
        stall_watch.beat()
        folder = self.folder / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        self._progress(number, "start", 0, None)
        self._leave_facts(number, folder, self._first_facts())
        if regime.kind == PROFILE:
            self._profile(number, folder, device)
            return
        if regime.kind == CLIP and regime.replay:
            regime = replace(regime, max_grad_norms=self.clip_bounds[regime.name])
        is_noisy = regime.kind == NOISE and not regime.replay
        silent = self.silent if is_noisy else None
        run = RegimeRun(self.job, regime, device, silent, self._built)
        if self.job.system_metrics:
            system_metrics(device)  # Processor use is that since the call before.
        if regime.replay == SILENT:
            self.silent = run.taken
        if regime.kind == CLIP and not regime.max_grad_norms:
            self.clip_bounds[regime.name] = run.max_grad_norms
            if self.rank == 0:
                bounds = json.dumps({"max_grad_norms": run.max_grad_norms})
                (folder / "clip_bounds.json").write_text(bounds, encoding="utf-8")
        try:
            for done, metrics in run.steps():
                self.step = done.seen.step
                self._log(number, done.seen.step, metrics, is_global=True)
                self._chart(regime, done.seen.step, metrics)
                own = rank_metrics(done.local, done.local_time_ms, done.local_memory_gib)
                if self.job.system_metrics:
                    own |= system_metrics(device)
                self._log(number, done.seen.step, own, is_global=False)
                self._progress(number, "step", done.seen.step, metrics["loss"])
        finally:
            self.is_leaving.set()
            self._leave_trajectories(number, folder, run)
            self._leave_facts(number, folder, self._last_facts(run, run.left_out_steps()))
            epsilon = self._log_epsilon(number, run)
        self.is_leaving.clear()
        self._progress(number, "end", regime.num_iter - 1, None, epsilon)

    def _built(self, name: str, model: nn.Module, context: ModeContext) -> Mode:
        """The mode, once every rank has it: from here on none waits for a download."""
        mode = self._build(name, model, context)
        dist.barrier()
        self._progress(self.regime, "built", 0, None)
        return mode

    def _profile(self, number: int, folder: Path, device: torch.device) -> None:
        """Time the steps; their records are saved once all are taken."""
        run = ProfileRun(self.job, self.job.regimes[number], device, self._built)
        timings, own = run.run(
            lambda step, seen: self._log(number, step, seen.metrics(), is_global=True)
        )
        self._log_timings(number, timings, is_global=True)
        self._log_timings(number, own, is_global=False)
        if self.rank == 0:
            path = folder / TIMINGS_FILE
            timings.save(path)
            if (run_id := self._run_id(number, is_global=True)) is not None:
                self.writer.upload(run_id, path)
        self._leave_facts(number, folder, self._last_facts(run, []))
        self._progress(number, "end", len(timings.step_time_ms) - 1, None, timings=timings)

    def _log_timings(self, number: int, timings: Timings, *, is_global: bool) -> None:
        for step, time_ms in enumerate(timings.step_time_ms):
            metrics = {"step_time_ms": time_ms, "peak_memory_gib": timings.peak_memory_gib}
            if is_global:
                metrics["tokens_per_second"] = timings.num_tokens[step] / time_ms * 1e3
            self._log(number, step, metrics, is_global=is_global)

    def _leave_facts(self, number: int, folder: Path, facts: RunFacts) -> None:
        """Write the facts of a run so far over the earlier ones; rank 0 does so for all."""
        if self.rank != 0:
            return
        path = folder / FACTS_FILE
        _replace(path, FACTS.dumps(facts))
        run_id = self._run_id(number, is_global=True)
        if run_id is not None:
            self.writer.upload(run_id, path)
            shown = {name: value for name, value in asdict(facts).items() if value}
            if self._has_other_code and not facts.imported:
                # The versions that run are known later, and a param never changes.
                del shown["environment"]
            self.writer.log_params(run_id, flatten(shown))

    @property
    def _has_other_code(self) -> bool:
        return self.job.variant is not None and bool(self.job.variant.root)

    def _first_facts(self) -> RunFacts:
        """Facts known before the mode is built."""
        device = _device_facts(self.job.performance.device)
        return RunFacts(environment=self.started.environment, device=device)

    def _last_facts(self, run: PreparedRun, left_out: list[int]) -> RunFacts:
        """Facts known once the mode has run."""
        mode, variant, first = run.mode, self.job.variant, self._first_facts()
        imported = imported_from(variant.root) if variant and variant.root else {}
        return replace(
            first,
            environment=first.environment.with_versions(imported),
            is_replicated=mode.replicated,
            left_out_steps=tuple(left_out),
            declined=declined_by(mode),
            norm_plan=mode.norm_plan(),
            imported=imported,
            warnings=tuple(dict.fromkeys((*self.warnings.sentences, *mode.notices()))),
            not_optimized=not_optimized(mode),
            unreached=self._unreached(),
        )

    def _log_epsilon(self, number: int, run: RegimeRun) -> float | None:
        """Log the epsilon spent after each step; returns the last one. Rank 0 alone computes it.

        Done once the steps are over, so that the computation does not affect the ranks' step times.
        """
        epsilon = None
        for step, metrics in run.accounting() if self.rank == 0 else ():
            self._log(number, step, metrics, is_global=True)
            epsilon = metrics.get(names.EPSILON_PRV, metrics[names.EPSILON_RDP])
        return epsilon

    def _log(self, number: int, step: int, metrics: dict[str, float], *, is_global: bool) -> None:
        run_id = self._run_id(number, is_global=is_global)
        if run_id is not None:
            self.writer.log_metrics(run_id, step, metrics)

    def _chart(self, regime: RegimeConfig, step: int, metrics: Mapping[str, float]) -> None:
        """Log what the group's run charts of every mode."""
        group = self.started.group_run
        if group and self.rank == 0 and not regime.replay:
            charted = {
                names.group_metric(metric, regime.name, self.job.label): metrics[metric]
                for metric in names.CHARTED
            }
            self.writer.log_metrics(group, step, charted)

    def _leave_trajectories(self, number: int, folder: Path, run: RegimeRun) -> None:
        """Write the observations so far, also of a regime that failed."""
        own_folder = folder / f"rank{self.rank}"
        own_folder.mkdir(exist_ok=True)
        wanted = [(False, own_folder, run.records[1])]
        if self.rank == 0:
            wanted.append((True, folder, run.records[0]))
        for is_global, target, recorder in wanted:
            if not recorder.rows:
                continue
            path = target / TRAJECTORY_FILE
            trajectory = recorder.trajectory()
            trajectory.save(path)
            run_id = self._run_id(number, is_global=is_global)
            if run_id is None:
                continue
            self.writer.upload(run_id, path)
            if is_global:
                source = self.job.run_in(self.job.regimes[number]).data.source
                self.writer.log_input(run_id, Path(source).name, data_digest(trajectory))

    def _run_id(self, number: int, *, is_global: bool) -> str | None:
        """Key of the run to write to; rank 0 writes global values.

        None if this rank has none: its own values are not logged, or nothing is.
        """
        started = self.started
        if not started.mode_runs or (is_global and self.rank != 0):
            return None
        if is_global:
            return started.mode_runs[number]
        return started.rank_runs[number][self.rank] or None

    def _progress(
        self,
        number: int,
        event: str,
        step: int,
        loss: float | None,
        epsilon: float | None = None,
        timings: Timings | None = None,
    ) -> None:
        if self.rank != 0:
            return
        line: dict[str, Any] = {
            "regime": number,
            "event": event,
            "step": step,
            "num_iter": self.job.regimes[number].num_iter,
            "loss": loss,
            "epsilon": epsilon,
        }
        if timings:
            line["step_time_ms"] = statistics.median(timings.step_time_ms)
            line["peak_memory_gib"] = timings.peak_memory_gib
        if self._progress_file is None:
            # Opening it costs more than logging a step.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._progress_file = os.open(self.folder / "progress.jsonl", flags, 0o666)
        os.write(self._progress_file, json.dumps(line).encode() + b"\n")


def _device_facts(device: str) -> DeviceFacts:
    is_cuda = device == "cuda"
    return DeviceFacts(
        torch_num_threads=torch.get_num_threads(),
        allow_tf32=torch.backends.cuda.matmul.allow_tf32,
        cudnn_allow_tf32=torch.backends.cudnn.allow_tf32,
        name=torch.cuda.get_device_name() if is_cuda else "",
        cuda=str(torch.version.cuda) if is_cuda else "",
        nccl=".".join(map(str, torch.cuda.nccl.version())) if is_cuda else "",
    )


def _replace(path: Path, text: str) -> None:
    """Write a file anew: readers see all of it or nothing, and links to an earlier one stay."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def _flush_when_told_to_stop(worker: Worker, is_done: threading.Event) -> None:
    """Leave on SIGTERM, even from inside a collective that hangs.

    A Python signal handler would wait for the main thread to return from it. The signals are
    blocked in every thread, so that this one can wait for them. When one rank fails, torch's
    launcher stops the others at once: one that is saving its records may finish.
    """

    def wait() -> None:
        number = signal.sigwait(STOP_SIGNALS)
        worker.is_told_to_stop.set()
        if worker.is_leaving.is_set():
            is_done.wait(LEAVING_TIMEOUT_S)
        try:
            worker.writer.close()
        finally:
            os._exit(128 + number)

    threading.Thread(target=wait, name="stop", daemon=True).start()


PRELOADED = (
    "dpsgd_track.modes.composed",
    "dpsgd_track.modes.reference",
    "opacus.accountants",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
)
"""Modules that most jobs import later."""


def preload() -> None:
    """Import the modules of a rank, in the process that ranks are forked from."""
    root = os.environ.get(names.VARIANT_VARIABLE)
    for name in PRELOADED:
        # A variant's packages are left to the modes to import, which shows if one uses them.
        if root is None or not Path(root, name.partition(".")[0]).exists():
            importlib.import_module(name)


def main(job_file: str, build: ModeBuilder = build_mode, unreached: Unreached = tuple) -> int:
    """Run the job; returns the process's exit code.

    Args:
        build: builds the job's mode, once for each regime.
        unreached: asked once each regime is over.
    """
    # Before any other thread starts: threads inherit the signal mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    started = STARTED_JOB.loads(Path(job_file).read_bytes())
    rank = int(os.environ["RANK"])
    # Rank 0 logs global values. A file that would stay empty is not created.
    own = [ranks[rank] for ranks in started.rank_runs if ranks[rank]]
    runs = [*started.mode_runs, *own] if rank == 0 else own
    folder = Path(started.spool) if started.spool and runs else None
    name = f"{Path(started.work_dir).name}-rank{rank}{RECORDS}"
    worker = Worker(started, SpoolWriter(folder, name, runs=runs), build, unreached)
    is_done = threading.Event()
    _flush_when_told_to_stop(worker, is_done)
    stall_watch.start(worker.folder / names.stacks_file(rank), started.stall_s)
    code = _run(worker)
    stall_watch.stop()
    is_done.set()
    return code


def _run(worker: Worker) -> int:
    try:
        worker.run()
        worker.writer.close()
    # A mode may call sys.exit, even with 0, and would then seem to have ended well.
    except BaseException as error:
        traceback.print_exc()
        # Errors during shutdown, such as logging to a closed writer, are not the reason.
        if not worker.is_told_to_stop.is_set():
            worker.report_failure(error)
        # The reason comes first; the remaining records follow.
        try:
            worker.writer.close()
        except Exception:
            traceback.print_exc()
        return 1
    return 0
