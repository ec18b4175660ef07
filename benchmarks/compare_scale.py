#!/usr/bin/env python
"""Make large run groups and write what comparing them costs, one CSV row each.

    python benchmarks/compare_scale.py OUT.csv --folder /tmp/scale

The groups are arithmetic instead of training, in a store as launch.py leaves it: runs with tags,
params and metric history, and a trajectory on each mode and rank run. Metrics go into MLflow's
tables directly, since logging millions of them through its client takes hours. Ranks' records are
links to their mode's: nothing reads them. One sample a rank and step, and one spike, in
flash_fsdp, that must be found where it was planted.

Rows are self-contained: what was compared and how, wall and CPU time from process start to exit,
the load of the machine meanwhile (this process alone makes 1), and the peak resident set of the
process and its children.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dpsgd_track.config import ACCURACY  # noqa: E402
from dpsgd_track.modes.table import FULL, REFERENCE  # noqa: E402
from dpsgd_track.record import names  # noqa: E402
from dpsgd_track.record.alternatives import SumFormula  # noqa: E402
from dpsgd_track.record.facts import FACTS as FACTS_CODEC  # noqa: E402
from dpsgd_track.record.facts import FACTS_FILE  # noqa: E402
from dpsgd_track.record.plan import PLAN, PLAN_FILE, GroupPlan, Suite  # noqa: E402
from dpsgd_track.record.trajectory import SCALAR_METRICS, Trajectory  # noqa: E402
from tests.support.synthetic_group import ENVIRONMENT, FACTS, job, setup  # noqa: E402

EXPERIMENT = "dpsgd-track"
SPIKED = "flash_fsdp"
SPIKE = 1.05
"""Factor of the spiked step's loss, norms and sketches."""
NUM_LAYERS = 21
NUM_PARAMETERS = 46
"""With loss, norm, loss of the sample and clip factor: 50 values a rank and step."""
NUM_PROJECTIONS = 16


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of a group."""

    name: str
    modes: tuple[str, ...] = FULL
    num_ranks: int
    """Also samples a step."""
    num_steps: int
    rank_metrics: bool = True
    """True if rank runs have metric history."""
    died: bool = False
    """True if every run ended before its record was uploaded."""
    over_http: bool = False
    """True if it is also compared through a server."""

    @property
    def spiked_step(self) -> int:
        """Neither first nor last, nor on a round number."""
        return self.num_steps * 5 // 8 + 3


SHAPES = (
    Shape(name="long", num_ranks=1, num_steps=2000, over_http=True),
    Shape(name="died", num_ranks=1, num_steps=2000, died=True),
    Shape(name="large", modes=(*FULL, REFERENCE), num_ranks=8, num_steps=10_000),
)


def record(shape: Shape) -> Trajectory:
    """Record of every mode of the group but for rounding; equal shapes make equal records."""
    rng = np.random.default_rng(7)
    S, N, P, K, L = shape.num_steps, shape.num_ranks, NUM_PARAMETERS, NUM_PROJECTIONS, NUM_LAYERS
    by_parameter = rng.uniform(0.5, 2.0, (S, N, P))
    gradient = rng.standard_normal((S, P, K)) * 5.0
    noised = gradient + rng.standard_normal((S, P, K)) * 100.0
    weights = rng.standard_normal((P, K)) * 30.0 - 1e-4 * np.cumsum(noised, axis=0)
    loss = np.linspace(7.0, 5.0, S)[:, None] + rng.normal(0, 0.1, (S, N))
    grad_norm = rng.uniform(1.0, 2.0, S)
    return Trajectory(
        step=np.arange(S),
        loss=loss.mean(axis=1),
        grad_norm=grad_norm,
        grad_norm_noised=grad_norm + 100.0,
        clip_fraction=np.zeros(S),
        max_grad_norm=np.full(S, 1e4),
        step_time_ms=rng.uniform(90, 110, S),
        peak_memory_gib=np.full(S, 1.5),
        tokens_per_second=np.full(S, 1e4),
        layer_names=np.array([f"model.layers.{i}.self_attn.q_proj" for i in range(L)]),
        layer_weight_norm=rng.uniform(3.0, 4.0, (S, L)),
        layer_grad_norm=rng.uniform(0.1, 0.5, (S, L)),
        sample_index=np.arange(S * N).reshape(S, N),
        sample_rank=np.tile(np.arange(N), (S, 1)),
        sample_micro_batch=np.zeros((S, N), dtype=np.int64),
        sample_sketch=np.empty((S, N, P, 0), dtype=np.float32),
        sample_shard_sketch=np.empty((S, N, P, 0), dtype=np.float32),
        sample_other_norm=np.empty((S, N, P, 0), dtype=np.float32),
        sample_other_loss=np.empty((S, N, 0), dtype=np.float32),
        sample_part_square=np.empty((S, N, P, 0), dtype=np.float32),
        sample_target_loss=np.empty((S, N, 0), dtype=np.float32),
        sample_size=np.empty((S, N, 0), dtype=np.float32),
        part_sketch=np.empty((S, 0, P, 0), dtype=np.float32),
        moved_sketch=np.empty((S, len(SumFormula), P, 0), dtype=np.float32),
        sample_loss=loss,
        sample_norm=np.sqrt(np.square(by_parameter).sum(axis=2)),
        clip_factor=np.ones((S, N)),
        parameter_names=np.array([f"model.layers.{i}.weight" for i in range(P)]),
        parameter_sizes=np.full(P, 10_000),
        sample_norm_by_parameter=by_parameter,
        gradient_sketch=gradient,
        noised_sketch=noised,
        weight_sketch=weights,
        noise_samples=np.empty((S, 0, P, 0), dtype=np.float32),
        data_hash=np.array([f"data-{step}" for step in range(S)]),
        initial_weights_hash="weights",
        noise_std=1.0,
        expected_batch_size=N,
    )


ROUNDED = (
    "loss",
    "grad_norm",
    "grad_norm_noised",
    "layer_weight_norm",
    "layer_grad_norm",
    "sample_loss",
    "sample_norm",
    "clip_factor",
    "sample_norm_by_parameter",
    "gradient_sketch",
    "noised_sketch",
    "weight_sketch",
)
SPIKES = ("loss", "grad_norm", "gradient_sketch", "sample_norm")


def of_mode(shared: Trajectory, shape: Shape, number: int) -> Trajectory:
    """`shared` as mode `number` records it: rounding of 1e-7 of its own, and its spike."""
    mode = shape.modes[number]
    rng = np.random.default_rng(number)
    changed: dict[str, Any] = {}
    for name in ROUNDED:
        values = getattr(shared, name)
        error = rng.standard_normal(values.shape, dtype=np.float32)
        changed[name] = values * (1 + 1e-7 * error)
    if mode == SPIKED:
        for name in SPIKES:
            changed[name][shape.spiked_step] *= SPIKE
    if mode == FULL[0]:
        blank = ("sample_norm", "clip_factor", "sample_norm_by_parameter")
        changed |= {name: np.full(changed[name].shape, np.nan) for name in blank}
    return replace(shared, **changed)


def write_group(folder: Path, shape: Shape, *, proxied: bool = False) -> str:
    """Write a group into the store in `folder`, made where it is missing; returns its URI.

    Args:
        proxied: its artifacts are to be had from a server of that store only.
    """
    from mlflow import MlflowClient

    folder.mkdir(parents=True, exist_ok=True)
    uri = f"sqlite:///{folder.absolute() / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    location = "mlflow-artifacts:/" if folder.name == "server" else (folder / "artifacts").as_uri()
    location = "mlflow-artifacts:/" if proxied else (folder / "artifacts").absolute().as_uri()
    experiment_id = (
        experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT, location)
    )
    group = client.create_run(
        experiment_id,
        run_name=shape.name,
        tags={
            names.GROUP: shape.name,
            names.KIND: names.KIND_GROUP,
        },
    )
    jobs = (job(mode, setup(ACCURACY), num_ranks=shape.num_ranks) for mode in shape.modes)
    plan = GroupPlan(
        suite=Suite.FULL, jobs=tuple(jobs), num_ranks=shape.num_ranks, environment=ENVIRONMENT
    )
    path = _artifacts(folder, group.info) / PLAN_FILE
    path.parent.mkdir(parents=True)
    path.write_text(PLAN.dumps(plan), encoding="utf-8")
    shared = record(shape)
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as tables:
        tables.execute("PRAGMA synchronous = OFF")
        for number in range(len(shape.modes)):
            trajectory = of_mode(shared, shape, number)
            _write_mode(client, tables, shape, number, trajectory, (folder, group.info))
    client.set_terminated(group.info.run_id)
    return uri


def _write_mode(
    client: Any,
    tables: sqlite3.Connection,
    shape: Shape,
    number: int,
    trajectory: Trajectory,
    place: tuple[Path, Any],
) -> None:
    mode = shape.modes[number]
    folder, group = place
    tags = {
        names.GROUP: shape.name,
        names.MODE: mode,
        names.REGIME: ACCURACY,
        names.VARIANT: "",
        names.REPLAY: "",
        names.NOISE_MATCHED: "true",
    }

    def start(title: str, parent: str, **more: str) -> Any:
        every = {**tags, names.PARENT_RUN: parent, **more}
        return client.create_run(group.experiment_id, run_name=title, tags=every).info

    run = start(f"{mode}/{ACCURACY}", group.run_id, **{names.KIND: names.KIND_MODE})
    client.log_param(run.run_id, "num_iter", shape.num_steps)
    _insert(tables, run.run_id, mode_metrics(trajectory))
    path = _artifacts(folder, run) / names.TRAJECTORY_FILE
    if not shape.died:
        path.parent.mkdir(parents=True)
        trajectory.save(path)
        path.with_name(FACTS_FILE).write_text(FACTS_CODEC.dumps(FACTS), encoding="utf-8")
    for rank in range(shape.num_ranks):
        kind = {names.KIND: names.KIND_RANK, names.RANK: str(rank)}
        own = start(f"rank {rank}", run.run_id, **kind)
        if shape.rank_metrics:
            _insert(tables, own.run_id, rank_metrics(trajectory, rank))
        if not shape.died:
            _artifacts(folder, own).mkdir(parents=True)
            os.link(path, _artifacts(folder, own) / names.TRAJECTORY_FILE)
        client.set_terminated(own.run_id, "FAILED" if shape.died else "FINISHED")
    client.set_terminated(run.run_id, "FAILED" if shape.died else "FINISHED")


def _artifacts(folder: Path, run: Any) -> Path:
    return (
        folder / "artifacts" / str(run.artifact_uri.partition("artifacts:")[2]).strip("/")
        if (run.artifact_uri.startswith("mlflow-artifacts:"))
        else Path(run.artifact_uri.removeprefix("file://"))
    )


def mode_metrics(t: Trajectory) -> dict[str, Any]:
    """[S] values of each of the 50 metrics of a mode run."""
    metrics = {name: getattr(t, name) for name in SCALAR_METRICS}
    for prefix, values in (
        (names.LAYER_WEIGHT_NORM, t.layer_weight_norm),
        (names.LAYER_GRAD_NORM, t.layer_grad_norm),
    ):
        metrics |= {f"{prefix}{layer}": values[:, i] for i, layer in enumerate(t.layer_names)}
    return metrics | {names.EPSILON_RDP: np.linspace(0.1, 3.0, t.num_steps)}


def rank_metrics(t: Trajectory, rank: int) -> dict[str, Any]:
    """[S] values of each metric of a rank run."""
    metrics = {
        "step_time_ms": t.step_time_ms,
        "peak_memory_gib": t.peak_memory_gib,
        "loss": t.sample_loss[:, rank],
        f"{names.SAMPLE_NORM}000": t.sample_norm[:, rank],
        f"{names.CLIP_FACTOR}000": t.clip_factor[:, rank],
    }
    return {name: values for name, values in metrics.items() if not np.isnan(values).any()}


def _insert(tables: sqlite3.Connection, run_id: str, metrics: dict[str, Any]) -> None:
    start_ms = 1_700_000_000_000
    with tables:
        for key, values in metrics.items():
            tables.executemany(
                "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) "
                "VALUES (?, ?, ?, ?, ?, 0)",
                ((key, v, start_ms + i, run_id, i) for i, v in enumerate(values.tolist())),
            )
            last = len(values) - 1
            tables.execute(
                "INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) "
                "VALUES (?, ?, ?, ?, 0, ?)",
                (key, float(values[-1]), start_ms + last, last, run_id),
            )


@contextlib.contextmanager
def _store(folder: Path, is_served: bool) -> Iterator[str]:
    """URI of the store in `folder`, or of an MLflow server of it with one worker on loopback."""
    if not is_served:
        yield f"sqlite:///{folder.absolute() / 'mlflow.db'}"
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{folder.absolute()}/mlflow.db"),
        *("--artifacts-destination", str(folder.absolute() / "artifacts")),
    ]
    with (folder / "server.log").open("w") as log:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(120):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/health"):
                break
            time.sleep(0.5)
        yield uri
    finally:
        server.terminate()
        server.wait(20)


def measure(uri: str, shape: Shape, results: Path) -> dict[str, Any]:
    """Compare the group in a process of its own."""
    command = [sys.executable, str(ROOT / "compare.py"), shape.name, "--no-png"]
    command += ["--tracking-uri", uri, "--results-dir", str(results)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    found = json.loads((results / shape.name / "drift.json").read_text(encoding="utf-8"))
    if not shape.died:
        _check_spike(found, shape)
    return {
        "group": shape.name,
        "store": "http" if uri.startswith("http") else "sqlite",
        "modes": len(shape.modes),
        "ranks": shape.num_ranks,
        "steps": shape.num_steps,
        "exit_code": process.returncode,
        "wall_s": f"{wall_s:.2f}",
        "cpu_s": f"{used.ru_utime + used.ru_stime:.2f}",
        "load": f"{os.getloadavg()[0]:.1f}",
        "peak_rss_gib": f"{used.ru_maxrss / 2**20:.3f}",
        "report_mb": f"{(results / shape.name / 'report.html').stat().st_size / 1e6:.2f}",
        "drift_json_mb": f"{(results / shape.name / 'drift.json').stat().st_size / 1e6:.2f}",
    }


def _check_spike(found: dict[str, Any], shape: Shape) -> None:
    """No speed of a comparison that found something else than what was planted."""
    pairs = found["regimes"][0]["pairs"]
    pair = next(p for p in pairs if (p["mode"], p["baseline"]) == (SPIKED, FULL[0]))
    drift = pair["drifts"]["grad_norm"]
    if drift["step"] != shape.spiked_step or not 0.049 < drift["max"] < 0.051:
        raise RuntimeError(f"{shape.name}: expected the spike at step {shape.spiked_step}: {drift}")


def _machine(commit: str) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "mlflow", "plotly")},
        "commit": commit,
    }


def _revision() -> str:
    """The checkout's commit; `unknown` outside of one."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def main() -> None:
    """Make the groups that are not there yet, compare each, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="where the stores are made")
    parser.add_argument("--only", nargs="*", default=[s.name for s in SHAPES], metavar="GROUP")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--commit", default=_revision(), help="what the rows name as the commit")
    args = parser.parse_args()
    rows = []
    for shape in (s for s in SHAPES if s.name in args.only):
        for proxied in (False, True)[: 1 + shape.over_http]:
            folder = args.folder / f"{shape.name}{'-http' * proxied}"
            if not (folder / "done").exists():
                write_group(folder, shape, proxied=proxied)
                (folder / "done").touch()
            with _store(folder, proxied) as uri:
                rows += [
                    measure(uri, shape, folder / "results") | _machine(args.commit)
                    for _ in range(args.repeats)
                ]
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
