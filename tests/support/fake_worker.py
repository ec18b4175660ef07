"""A worker that speaks the launcher's protocol and computes nothing.

What it does wrong is chosen by FAKE_WORKER, a JSON object: mode -> {"do": ..., "rank", "regime",
"step"}; `do` is one of crash, hang, slow, wide (slow, with many metrics), out_of_memory,
sigkill, stubborn, no_trajectory, environment, kill_host, leave, pause (compute for 4 s).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from dpsgd_track.config import CLIP
from dpsgd_track.modes.table import REFERENCE
from dpsgd_track.record.alternatives import SumFormula
from dpsgd_track.record.facts import FACTS, DeviceFacts, RunFacts
from dpsgd_track.record.failure import FAILURE, Failure, FailureKind
from dpsgd_track.record.names import stacks_file
from dpsgd_track.record.plan import STARTED_JOB, StartedJob
from dpsgd_track.record.trajectory import Trajectory
from dpsgd_track.store.spool import RECORDS, SpoolWriter
from dpsgd_track.training import stall_watch

SAMPLES, PROJECTIONS = 4, 3
modes_seen: list[str] = []
"""A mode's mark on its process, which no other mode may find."""


def trajectory(num_steps: int) -> Trajectory:
    steps = np.arange(num_steps)
    by_sample = np.ones((num_steps, SAMPLES))
    sketch = np.ones((num_steps, 1, PROJECTIONS))
    return Trajectory(
        step=steps,
        loss=1.0 / (1 + steps),
        grad_norm=np.full(num_steps, 2.0),
        grad_norm_noised=np.full(num_steps, 3.0),
        clip_fraction=np.full(num_steps, np.nan),
        max_grad_norm=np.ones(num_steps),
        step_time_ms=np.full(num_steps, 5.0),
        peak_memory_gib=np.full(num_steps, 0.5),
        tokens_per_second=np.ones(num_steps),
        layer_names=np.array(["head"]),
        layer_weight_norm=np.ones((num_steps, 1)),
        layer_grad_norm=np.full((num_steps, 1), 2.0),
        sample_index=np.arange(num_steps * SAMPLES).reshape(num_steps, SAMPLES),
        sample_rank=np.zeros((num_steps, SAMPLES), dtype=np.int64),
        sample_micro_batch=np.zeros((num_steps, SAMPLES), dtype=np.int64),
        sample_sketch=np.empty((num_steps, SAMPLES, 1, 0), dtype=np.float32),
        sample_shard_sketch=np.empty((num_steps, SAMPLES, 1, 0), dtype=np.float32),
        sample_other_norm=np.empty((num_steps, SAMPLES, 1, 0), dtype=np.float32),
        sample_other_loss=np.empty((num_steps, SAMPLES, 0), dtype=np.float32),
        sample_part_square=np.empty((num_steps, SAMPLES, 1, 0), dtype=np.float32),
        sample_target_loss=np.empty((num_steps, SAMPLES, 0), dtype=np.float32),
        sample_size=np.empty((num_steps, SAMPLES, 0), dtype=np.float32),
        part_sketch=np.empty((num_steps, 0, 1, 0), dtype=np.float32),
        moved_sketch=np.empty((num_steps, len(SumFormula), 1, 0), dtype=np.float32),
        sample_loss=by_sample,
        sample_norm=by_sample,
        clip_factor=by_sample,
        parameter_names=np.array(["head.weight"]),
        parameter_sizes=np.array([1]),
        sample_norm_by_parameter=by_sample[:, :, None],
        gradient_sketch=sketch,
        noised_sketch=sketch,
        weight_sketch=sketch,
        noise_samples=np.empty((num_steps, 0, 1, 0), dtype=np.float32),
        data_hash=np.array(["d"] * num_steps),
        initial_weights_hash="w",
        noise_std=1.0,
        expected_batch_size=SAMPLES,
    )


def misbehave(work_dir: Path, plan: dict, rank: int, regime: int, step: int) -> None:
    match plan["do"]:
        case "crash":
            raise RuntimeError("the fake worker crashed on purpose")
        case "out_of_memory":
            failure = Failure(
                kind=FailureKind.OUT_OF_MEMORY,
                message="tried to allocate 1 PiB",
                regime=regime,
                step=step,
                rank=rank,
            )
            (work_dir / f"failure-rank{rank}.json").write_text(FAILURE.dumps(failure))
            sys.exit(1)
        case "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        case "kill_host":
            agent = psutil.Process(os.getppid())
            agent.parent().kill()
            time.sleep(600)
        case "hang":
            time.sleep(600)
        case "leave":
            os._exit(0)
        case "pause":
            end = time.monotonic() + 4
            while time.monotonic() < end:
                pass


def wait_for_all_ranks(work_dir: Path, rank: int, place: str) -> None:
    (work_dir / f"{place}-{rank}").touch()
    while len(list(work_dir.glob(f"{place}-*"))) < int(os.environ["LOCAL_WORLD_SIZE"]):
        time.sleep(0.01)


def log(started: StartedJob, writer: SpoolWriter, rank: int, regime: int, step: int) -> None:
    if own := started.rank_runs[regime][rank]:
        writer.log_metrics(own, step, {"loss": step + rank / 3})
    if rank == 0:
        values = {"loss": 1.0 / (1 + step), "grad_norm": 2.0, "grad_norm_noised": 3.0}
        writer.log_metrics(started.mode_runs[regime], step, values)


def preload() -> None:
    if "unimportable" in os.environ.get("FAKE_WORKER", ""):
        raise ImportError("the fake worker lacks something")


def main(job_file: str) -> int:
    started = STARTED_JOB.loads(Path(job_file).read_text())
    job = started.job
    rank = int(os.environ["RANK"])
    work_dir = Path(started.work_dir)
    modes_seen.append(job.mode)
    num_ranks = len(psutil.Process(os.getppid()).children())
    (work_dir / f"process-rank{rank}.json").write_text(
        json.dumps([os.getpid(), modes_seen, num_ranks])
    )
    folder = Path(started.spool) if started.spool else None
    own = [ranks[rank] for ranks in started.rank_runs if ranks[rank]]
    runs = [*started.mode_runs, *own] if rank == 0 else own
    writer = SpoolWriter(folder, f"{work_dir.name}-rank{rank}{RECORDS}", runs=runs)
    plan = json.loads(os.environ.get("FAKE_WORKER", "{}")).get(job.mode, {"do": ""})
    if plan["do"] == "environment":
        shown = {"argv": sys.argv, "has_token": bool(os.environ.get("HF_TOKEN"))}
        (work_dir / f"environment-rank{rank}.json").write_text(json.dumps(shown))
    stall_watch.start(work_dir / stacks_file(rank), started.stall_s)
    for index, regime in enumerate(job.regimes):
        folder = work_dir / str(index)
        if rank == 0:
            folder.mkdir()
        with (work_dir / "progress.jsonl").open("a") if rank == 0 else open(os.devnull, "w") as out:

            def tell(event: str, step: int = 0, index=index, regime=regime, out=out) -> None:
                line = {
                    "regime": index,
                    "event": event,
                    "step": step,
                    "num_iter": regime.num_iter,
                    "loss": 1.0 / (1 + step),
                }
                print(json.dumps(line), file=out, flush=True)

            tell("start")
            tell("built")
            for step in range(regime.num_iter):
                at = (plan.get("rank", 0), plan.get("regime", 0), plan.get("step", 1))
                if at == (rank, index, step):
                    misbehave(work_dir, plan, rank, index, step)
                stall_watch.beat()
                log(started, writer, rank, index, step)
                if plan["do"] in ("slow", "wide"):
                    time.sleep(0.05)
                if plan["do"] == "wide" and started.rank_runs[index][rank]:
                    # As much as real steps log.
                    norms = {f"sample_norm/{i:03d}": 1.0 for i in range(100)}
                    writer.log_metrics(started.rank_runs[index][rank], step, norms)
                tell("step", step)
            wait_for_all_ranks(work_dir, rank, f"computed-{index}")
            if rank == 0 and plan["do"] != "no_trajectory":
                if job.mode == REFERENCE and regime.kind == CLIP:
                    bounds = {"max_grad_norms": [2.0, 2.0, 0.5, 0.5] * (regime.num_iter // 4)}
                    (folder / "clip_bounds.json").write_text(json.dumps(bounds))
                trajectory(regime.num_iter).save(folder / "trajectory.npz")
                writer.upload(started.mode_runs[index], folder / "trajectory.npz")
                device = DeviceFacts(torch_num_threads=1, allow_tf32=False, cudnn_allow_tf32=False)
                facts = RunFacts(environment=started.environment, device=device)
                (folder / "facts.json").write_text(FACTS.dumps(facts))
                writer.upload(started.mode_runs[index], folder / "facts.json")
            tell("end", regime.num_iter - 1)
            # A rank that fails in the next regime ends the others, whatever they are writing.
            wait_for_all_ranks(work_dir, rank, f"written-{index}")
    stall_watch.stop()
    writer.close()
    return 0
