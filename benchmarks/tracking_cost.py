#!/usr/bin/env python
"""Measure what logging costs the thread that trains, one CSV row for each store.

    python benchmarks/tracking_cost.py OUT.csv

Each of the ranks logs 200 metrics a step as a worker does, to the run of its mode and to its own,
and tells of the step where the launcher looks for it. It is a process of its own that computes on
one thread in between, over more memory than the processor's caches hold, as training would. The
launcher's thread in another process ships the records: to SQLite, to an MLflow server, to one that
is killed in the middle, and nowhere. Times are wall times of all that a step logs, and CPU times of
the thread. `load` is that of the machine in the last minute: where it exceeds the cores, the wall
times measure the scheduler as well.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dpsgd_track.config import Settings  # noqa: E402
from dpsgd_track.record.plan import STARTED_JOB, GroupPlan, StartedJob, Suite  # noqa: E402
from dpsgd_track.store.opening import open_store  # noqa: E402
from dpsgd_track.store.run_tree import RunTree  # noqa: E402
from dpsgd_track.store.shipper import Shipper  # noqa: E402
from dpsgd_track.store.shipping import Shipping  # noqa: E402
from dpsgd_track.store.spool import CONTROL, RECORDS, SpoolWriter  # noqa: E402
from dpsgd_track.store.spooled import SpooledGroup  # noqa: E402
from dpsgd_track.training.worker import Worker  # noqa: E402
from tests.support.synthetic_group import ENVIRONMENT, job, setup  # noqa: E402
from tests.support.tracking_servers import MlflowServer  # noqa: E402

NUM_METRICS = 200
NUM_OWN = 20
"""Of these, those of a rank alone; rank 0 logs the others."""
_WORKING_SET_BYTES = 64 << 20
Times = list[tuple[float, float]]
STORES = ("offline", "sqlite", "http", "dead")


def train(folder: str, job_text: str, rank: int, compute_s: float) -> Times:
    """Log every step of a job; wall and CPU time of each step's logging, in ms."""
    os.environ["RANK"] = str(rank)
    started = STARTED_JOB.loads(job_text)
    writer = SpoolWriter(Path(folder), f"rank{rank}{RECORDS}")
    worker = Worker(started, writer)
    rng = np.random.default_rng(rank)
    weights = rng.normal(size=_WORKING_SET_BYTES // 8)
    took_ms = []
    for step in range(started.job.regimes[0].num_iter):
        until = time.perf_counter() + compute_s
        while time.perf_counter() < until:
            weights *= 0.999
        norms = rng.normal(size=NUM_METRICS - NUM_OWN).tolist()
        values = {f"layer_grad_norm/{i}": value for i, value in enumerate(norms)}
        own = {f"sample_norm/{i}": value for i, value in enumerate(norms[:NUM_OWN])}
        start, cpu_start = time.perf_counter(), time.thread_time()
        worker._log(0, step, values, is_global=True)
        worker._log(0, step, own, is_global=False)
        worker._progress(0, "step", step, norms[0])
        cpu_s, wall_s = time.thread_time() - cpu_start, time.perf_counter() - start
        took_ms.append((wall_s * 1000, cpu_s * 1000))
    writer.close()
    return took_ms


def a_job(folder: Path, tree: RunTree, ranks: int, num_steps: int) -> StartedJob:
    """One regime of one mode, with its runs."""
    planned = job("no_dp", setup("train", num_iter=num_steps), num_ranks=ranks)
    plan = GroupPlan(suite=Suite.SINGLE, jobs=(planned,), num_ranks=ranks, environment=ENVIRONMENT)
    tree.start_group(plan)
    run, own = tree.start_mode(planned, planned.regimes[0], range(ranks))
    return StartedJob(
        job=planned,
        environment=ENVIRONMENT,
        mode_runs=(run,),
        rank_runs=(own,),
        work_dir=str(folder),
    )


def measure(store: str, folder: Path, ranks: int, num_steps: int, compute_s: float) -> Times:
    """Times of all calls of all ranks."""
    folder.mkdir()
    group = SpooledGroup(folder / "spool" / "g")
    group.folder.mkdir(parents=True)
    control = SpoolWriter(group.folder, f"launcher{CONTROL}")
    tree = RunTree(control, "dpsgd-track", "g")
    handed = STARTED_JOB.dumps(a_job(folder, tree, ranks, num_steps))
    server = MlflowServer(folder) if store in ("http", "dead") else None
    shipping = None
    if store != "offline":
        uri = server.uri if server else f"sqlite:///{folder}/mlflow.db"
        client, experiment_id = open_store(Settings(tracking_uri=uri))
        shipping = Shipping(Shipper(group, client, uri, experiment_id), uri, print)
        shipping.start()
    if server and store == "dead":
        threading.Timer(num_steps * compute_s / 3, server.kill).start()
    with multiprocessing.get_context("spawn").Pool(ranks) as pool:
        jobs = [(str(group.folder), handed, rank, compute_s) for rank in range(ranks)]
        times = pool.starmap(train, jobs, chunksize=1)
    control.close()
    if shipping:
        shipping.close(timeout_s=5.0, away_timeout_s=1.0)
    if server:
        server.kill()
    return [took for of_rank in times for took in of_rank[1:]]


def main() -> None:
    """Measure every store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--compute-ms", type=float, default=20.0)
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    rows = []
    for store in STORES:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / store
            times = measure(store, place, args.ranks, args.num_steps, args.compute_ms / 1000)
        wall, cpu = np.transpose(times)
        row = {
            "store": store,
            "metrics": NUM_METRICS,
            "ranks": args.ranks,
            "steps": args.num_steps,
            "compute_ms": args.compute_ms,
            "median_ms": f"{np.median(wall):.4f}",
            "p99_ms": f"{np.percentile(wall, 99):.4f}",
            "max_ms": f"{wall.max():.3f}",
            "cpu_median_ms": f"{np.median(cpu):.4f}",
            "cpu_p99_ms": f"{np.percentile(cpu, 99):.4f}",
            "load": f"{os.getloadavg()[0]:.1f}",
            "cores": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "mlflow": version("mlflow"),
            "commit": commit,
        }
        print(row, flush=True)
        rows.append(row)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
