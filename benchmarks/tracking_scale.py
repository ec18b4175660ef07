#!/usr/bin/env python
"""Measure how much tracking a server takes from many ranks, one CSV row for each measurement.

    python benchmarks/tracking_scale.py OUT.csv
    python benchmarks/tracking_scale.py OUT.csv --table    # of what was measured before

The ranks are made up: a few processes stand for all of them, and append to each rank's spool what
a real one logs, so many steps a second. Everything after that is real: launchers that ship what is
spooled, as processes of their own, an `mlflow server` and its PostgreSQL, all on this machine's
loopback. The cores are shared by all of them.

There are two layouts. `one`: all ranks on one host, with one launcher that ships them all. `nodes`:
a host for every 8 ranks, each with a spool and a launcher of its own, as with `--nnodes`; the first
one creates the runs. Before the first step runs are created (`create_s`), and each launcher looks
up those of its own ranks (`join_s`); how long that took is in the row.

At the end every value in the spools is held against the database: what is lost (or had not arrived
within `--limit-s`) or doubled is in the row too, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import multiprocessing
import os
import platform
import queue
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dpsgd_track.config import Settings, layer_norm_steps, logged_ranks  # noqa: E402
from dpsgd_track.record.plan import GroupPlan, Suite  # noqa: E402
from dpsgd_track.record.run import Status  # noqa: E402
from dpsgd_track.store.client import connect  # noqa: E402
from dpsgd_track.store.contents import Contents  # noqa: E402
from dpsgd_track.store.history import all_points  # noqa: E402
from dpsgd_track.store.opening import open_store  # noqa: E402
from dpsgd_track.store.run_tree import RunTree  # noqa: E402
from dpsgd_track.store.shipper import Shipper  # noqa: E402
from dpsgd_track.store.shipping import Shipping  # noqa: E402
from dpsgd_track.store.spool import CONTROL, RECORDS, SpoolWriter  # noqa: E402
from dpsgd_track.store.spooled import SpooledGroup, join, leave, part_of  # noqa: E402
from tests.support.synthetic_group import ENVIRONMENT, job, setup  # noqa: E402
from tests.support.tracking_servers import MlflowServer, postgres  # noqa: E402

if TYPE_CHECKING:
    from mlflow import MlflowClient

ONE, NODES = "one", "nodes"
POSTGRESQL, SQLITE, FILE = "postgresql", "sqlite", "file"
RANKS_PER_NODE = 8
NUM_SCALARS = 10
"""Of a mode run's metrics, those that are logged in every step; the others are layers' norms."""
GROUP = "scale"
_WINDOW_S = 2.0
CONTEXT = multiprocessing.get_context("forkserver")

Request = tuple[float, float, int]
"""Unix time at which it was answered, seconds it took, metrics in it."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One measurement."""

    ranks: int
    layout: str
    """one or nodes."""
    log_ranks: str = "all"
    layer_norms: str = "all"
    steps: int = 40
    steps_per_second: float = 2.0
    mode_metrics: int = 200
    """Metrics of a step on the mode's run, where layers' norms are recorded."""
    rank_metrics: int = 10
    """Metrics of a step on each logged rank's run."""
    store: str = POSTGRESQL
    """Database of the server: postgresql or sqlite. file: SQLite without a server."""
    server_workers: int = 1
    connections: int = 45
    """That each worker of the server may have to its database; 0 leaves it to MLflow, which has 15.
    A batch of metrics takes two, one after the other, and 40 are worked on at once: where all
    connections are held by those that wait for their second, everybody waits for 30 s."""
    limit_s: float = 400.0
    """Time in which the rest may arrive after the last step."""

    @property
    def logged(self) -> tuple[int, ...]:
        """Ranks that have a run of their own."""
        return logged_ranks(self.log_ranks, self.ranks)

    @property
    def num_metrics(self) -> int:
        """All that is logged."""
        every, thinned = self.mode_metrics, min(self.mode_metrics, NUM_SCALARS)
        num_whole = len(layer_norm_steps(self.layer_norms, self.steps))
        of_mode = num_whole * every + (self.steps - num_whole) * thinned
        return of_mode + self.steps * len(self.logged) * self.rank_metrics

    def node_of(self, rank: int) -> int:
        """The host that a rank is on."""
        return 0 if self.layout == ONE else rank // RANKS_PER_NODE


def work(shape: Shape, folder: str, ranks: Sequence[int], runs: dict[int, str], start: Any) -> None:
    """Stand for several ranks: append each one's steps to its own spool, at the pace asked for.

    Args:
        runs: of each rank, and under -1 the mode's.
        start: carries the Unix time of the first step.
    """
    with_layers = layer_norm_steps(shape.layer_norms, shape.steps)
    writers = {
        rank: SpoolWriter(spool_of(Path(folder), shape.node_of(rank)), f"rank{rank}{RECORDS}")
        for rank in ranks
        if rank == 0 or runs[rank]
    }
    rng = np.random.default_rng(ranks[0])
    own = [f"sample_norm/{i:03d}" for i in range(shape.rank_metrics)]
    of_mode = [f"scalar_{i}" for i in range(min(shape.mode_metrics, NUM_SCALARS))]
    of_mode += [f"layer_grad_norm/layers.{i}" for i in range(shape.mode_metrics - len(of_mode))]
    begin = start.recv()
    for step in range(shape.steps):
        time.sleep(max(0.0, begin + step / shape.steps_per_second - time.time()))
        for rank, writer in writers.items():
            if runs[rank]:
                values = rng.normal(size=len(own)).tolist()
                writer.log_metrics(runs[rank], step, dict(zip(own, values, strict=True)))
            if rank == 0:
                known = of_mode if step in with_layers else of_mode[:NUM_SCALARS]
                values = rng.normal(size=len(known)).tolist()
                writer.log_metrics(runs[-1], step, dict(zip(known, values, strict=True)))
    for writer in writers.values():
        writer.close()


class Timed:
    """A client that notes how long each batch of metrics took."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self.tracking_uri = client.tracking_uri
        self.requests: list[Request] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def log_batch(self, run_id: str, metrics: Sequence[Any] = (), **more: Any) -> None:
        """As the client's."""
        start = time.perf_counter()
        self._client.log_batch(run_id, metrics=metrics, **more)
        if metrics:
            self.requests.append((time.time(), time.perf_counter() - start, len(metrics)))


def spool_of(folder: Path, node: int) -> Path:
    """A host's spool of the group."""
    return folder / str(node) / (part_of(GROUP, node) if node else GROUP)


def launcher(
    folder: str, uri: str, experiment_id: str, limit_s: float, go: Any, done: Any, told: Any
) -> None:
    """Ship one host's spool as a launcher does, until all of it has arrived."""
    client = Timed(connect(uri))
    shipper = Shipper(SpooledGroup(Path(folder)), client, uri, experiment_id)  # type: ignore[arg-type]
    shipping = Shipping(shipper, uri, lambda line: None)
    # Where many look for their runs at once, some get no answer in time.
    deadline = time.time() + limit_s
    while True:
        try:
            shipper.ship()
            break
        except Exception:
            if time.time() > deadline:
                raise
            time.sleep(random.uniform(0.5, 5.0))
    told.put("ready")
    go.wait()
    busy = time.process_time()
    shipping.start()
    done.wait()
    trouble = shipping.close(timeout_s=limit_s, away_timeout_s=limit_s)
    told.put((client.requests, time.process_time() - busy, trouble))


@dataclass(frozen=True)
class Store:
    """Store that everything is shipped to."""

    uri: str
    """As launchers know it."""
    database: str
    """Behind the server."""
    server: psutil.Process | None
    postgres: psutil.Process | None


@contextlib.contextmanager
def store(shape: Shape, folder: Path) -> Iterator[Store]:
    """An empty one; its processes are ended at the end."""
    if shape.store == FILE:
        uri = f"sqlite:///{folder}/mlflow.db"
        yield Store(uri, uri, None, None)
        return
    before = set(psutil.Process().children())
    pool = {
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": str(shape.connections),
        "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "0",
    }
    with contextlib.ExitStack() as ended:
        of_database: set[psutil.Process] = set()
        database = f"sqlite:///{folder}/server.db"
        if shape.store == POSTGRESQL:
            database = ended.enter_context(postgres(folder))
            of_database = set(psutil.Process().children()) - before
        server = MlflowServer(
            folder,
            database,
            *("--workers", str(shape.server_workers)),
            environment=pool if shape.connections and of_database else None,
        )
        ended.callback(server.kill)
        (process,) = set(psutil.Process().children()) - before - of_database
        yield Store(server.uri, database, process, next(iter(of_database), None))


def cpu_s(process: psutil.Process | None) -> float:
    """CPU time of a process and all of its children, those that have ended too."""
    if process is None:
        return 0.0
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            # User and system, its own and that of children which have ended.
            total += sum(each.cpu_times()[:4])
    return total


def database_bytes(uri: str) -> int:
    """Bytes of the database on its disk."""
    if uri.startswith("sqlite"):
        return Path(uri.removeprefix("sqlite:///")).stat().st_size
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    with engine.connect() as connection:
        query = sqlalchemy.text("SELECT pg_database_size(current_database())")
        size = int(connection.execute(query).scalar_one())
    engine.dispose()
    return size


def lost_and_doubled(
    groups: Sequence[SpooledGroup], database: str, run_ids: dict[str, str]
) -> tuple[int, int]:
    """Values that are in a spool and not in the database, and rows there that nobody logged."""
    client = connect(database)
    lost = doubled = 0
    for group in groups:
        for part in Contents(group).parts(lambda run: True):
            for run in dict.fromkeys(run for run, _ in part):
                metrics = [metric for of, metric in part if of == run]
                for metric, held in all_points(client, run_ids[run], metrics):
                    wanted = part[run, metric]
                    lost += len(wanted - set(held))
                    doubled += len(held) - len(wanted & set(held))
    return lost, doubled


def measure(shape: Shape, folder: Path) -> dict[str, Any]:
    """One row."""
    with store(shape, folder) as place, contextlib.ExitStack() as ended:
        settings = Settings(tracking_uri=place.uri)
        client, experiment_id = open_store(settings)
        nodes = sorted({shape.node_of(rank) for rank in range(shape.ranks)})
        groups = [SpooledGroup(spool_of(folder, node)) for node in nodes]
        for group in groups:
            group.folder.mkdir(parents=True)
        control = SpoolWriter(groups[0].folder, f"launcher{CONTROL}")
        tree = RunTree(control, settings.experiment, GROUP)
        planned = job("no_dp", setup("train", num_iter=shape.steps), num_ranks=shape.ranks)
        plan = GroupPlan(
            suite=Suite.SINGLE, jobs=(planned,), num_ranks=shape.ranks, environment=ENVIRONMENT
        )
        tree.start_group(plan)
        mode, of_ranks = tree.start_mode(planned, planned.regimes[0], shape.logged)
        parts = _joined(shape, groups, of_ranks)
        begin = time.time()
        creator = Shipper(groups[0], client, place.uri, experiment_id)
        creator.ship()
        create_s = time.time() - begin
        empty_bytes = database_bytes(place.database)

        go, done, told = CONTEXT.Event(), CONTEXT.Event(), CONTEXT.Queue()
        processes = []
        for group in groups:
            # A host that logs nothing has nothing to ship.
            if any(shape.node_of(rank) == groups.index(group) for rank in (0, *shape.logged)):
                host = (str(group.folder), place.uri, experiment_id, shape.limit_s)
                processes.append(CONTEXT.Process(target=launcher, args=(*host, go, done, told)))
        num_shippers = len(processes)
        runs = {-1: mode, **dict(enumerate(of_ranks))}
        pipes, num_processes = [], max(1, min(shape.ranks // 8, 4))
        for number in range(num_processes):
            near, far = CONTEXT.Pipe()
            pipes.append(near)
            share = range(number, shape.ranks, num_processes)
            of_worker = (shape, str(folder), share, runs, far)
            processes.append(CONTEXT.Process(target=work, args=of_worker))
        begin = time.time()
        for process in processes:
            process.start()
            ended.callback(_end, process)
        for _ in range(num_shippers):
            assert _next(told, processes) == "ready"
        join_s = time.time() - begin
        before = cpu_s(place.server), cpu_s(place.postgres)
        first = time.time() + 0.2
        go.set()
        for pipe in pipes:
            pipe.send(first)
        for process in processes[num_shippers:]:
            process.join(shape.steps / shape.steps_per_second + shape.limit_s)
            assert process.exitcode == 0, "a fake worker failed"
        last_logged = time.time()
        for run in (*filter(None, of_ranks), mode, tree.group_run):
            tree.finish(run, Status.FINISHED)
        control.close()
        for part, of_part in parts:
            leave(part, of_part)
            part.close()
        done.set()
        answers = [_next(told, processes) for _ in range(num_shippers)]
        last = time.time()
        after = cpu_s(place.server), cpu_s(place.postgres)
        for process in processes:
            process.join(30)
        troubles = [trouble for _, _, trouble in answers if trouble]
        size = database_bytes(place.database) - empty_bytes
        lost, doubled = lost_and_doubled(groups, place.database, creator.run_ids)
        row = _row(shape, [r for requests, _, _ in answers for r in requests], first)
        files = [file for group in groups for file in group.folder.glob(f"*{RECORDS}")]
        num_bytes = sum(file.stat().st_size for file in files)
        of_rank = [f.stat().st_size for f in files if not f.name.endswith(f"-rank0{RECORDS}")]
        per_step = sum(of_rank) / max(1, len(of_rank)) / shape.steps
        row |= {
            "shippers": num_shippers,
            "create_s": round(create_s, 1),
            "join_s": round(join_s, 1),
            "logging_s": round(last_logged - first, 1),
            "drain_s": round(max([0.0, row.pop("last_answer") - last_logged]), 1),
            "end_s": round(last - last_logged, 1),
            "spool_bytes_per_metric": round(num_bytes / shape.num_metrics, 1),
            "spool_bytes_per_rank_step": round(per_step, 1),
            "server_cpu_s": round(after[0] - before[0], 1),
            "server_cores": round((after[0] - before[0]) / (last - first), 2),
            "database_cpu_s": round(after[1] - before[1], 1),
            "shippers_cpu_s": round(sum(busy for _, busy, _ in answers), 1),
            "database_mib": round(size / 2**20, 1),
            "database_bytes_per_metric": round(size / shape.num_metrics),
            "lost": lost,
            "doubled": doubled,
            "trouble": "; ".join(troubles),
        }
    return row


def _joined(
    shape: Shape, groups: Sequence[SpooledGroup], of_ranks: Sequence[str]
) -> list[tuple[SpoolWriter, list[str]]]:
    """Part of every host but the first: its launcher's file, and the runs."""
    found = []
    for node, group in enumerate(groups[1:], 1):
        writer = SpoolWriter(group.folder, f"launcher{CONTROL}")
        runs = [run for rank, run in enumerate(of_ranks) if run and shape.node_of(rank) == node]
        join(writer, Settings().experiment, runs)
        found.append((writer, runs))
    return found


def _next(told: Any, processes: Sequence[Any]) -> Any:
    while True:
        with contextlib.suppress(queue.Empty):
            return told.get(timeout=1.0)
        failed = [process.name for process in processes if process.exitcode not in (0, None)]
        assert not failed, f"{failed} failed"


def _end(process: Any) -> None:
    if process.is_alive():
        process.kill()
    process.join()


def _row(shape: Shape, requests: list[Request], first: float) -> dict[str, Any]:
    """Figures of the requests."""
    at, took_s, sizes = (np.array(column) for column in zip(*sorted(requests), strict=True))
    arrived_s = at[-1] - first
    # Whole windows until the last answer: what arrived in each, a second.
    edges = np.arange(0, max(arrived_s, _WINDOW_S) + 1e-9, _WINDOW_S)
    per_s = np.histogram(at - first, edges, weights=sizes)[0] / _WINDOW_S
    windows = np.percentile(per_s, (50, 20, 80)).tolist()
    took = np.percentile(took_s * 1e3, (50, 20, 80)).tolist()
    return {
        "ranks": shape.ranks,
        "logged_ranks": len(shape.logged),
        "layout": shape.layout,
        "store": shape.store,
        "server_workers": shape.server_workers if shape.store != FILE else 0,
        "connections": shape.connections if shape.store == POSTGRESQL else 0,
        "layer_norms": shape.layer_norms,
        "steps": shape.steps,
        "steps_per_second": shape.steps_per_second,
        "mode_metrics": shape.mode_metrics,
        "rank_metrics": shape.rank_metrics,
        "metrics": shape.num_metrics,
        "logged_per_s": round(shape.num_metrics / shape.steps * shape.steps_per_second),
        "arrived": int(sizes.sum()),
        "arrived_per_s": round(sizes.sum() / arrived_s),
        "arrived_per_s_median": round(windows[0]),
        "arrived_per_s_p20": round(windows[1]),
        "arrived_per_s_p80": round(windows[2]),
        "requests": len(requests),
        "metrics_per_request": round(float(sizes.mean()), 1),
        "request_ms_median": round(took[0], 1),
        "request_ms_p20": round(took[1], 1),
        "request_ms_p80": round(took[2], 1),
        "request_ms_max": round(float(took_s.max()) * 1e3, 1),
        "last_answer": float(at[-1]),
    }


def circumstances() -> dict[str, Any]:
    """Of a row: the machine as it is now, and versions."""
    said = subprocess.run(["postgres", "--version"], capture_output=True, text=True).stdout
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    return {
        "load": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "mlflow": version("mlflow"),
        "postgresql": said.split()[2] if said else "",
        "commit": commit,
    }


QUICK = Shape(
    ranks=16,
    layout=ONE,
    steps=8,
    steps_per_second=40.0,
    mode_metrics=30,
    store=FILE,
    limit_s=60.0,
)


_PLAIN = ("steps", "steps_per_second", "mode_metrics", "rank_metrics", "limit_s", "store")
"""Options that hold for every row."""


def shapes(args: argparse.Namespace) -> list[Shape]:
    """Shapes that the arguments ask for."""
    shape = replace(
        QUICK if args.quick else Shape(ranks=1, layout=ONE),
        **{name: value for name in _PLAIN if (value := getattr(args, name)) is not None},
    )
    ranks = args.ranks or ([QUICK.ranks] if args.quick else [64, 128, 256, 512])
    return [
        replace(
            shape,
            ranks=num_ranks,
            layout=layout,
            log_ranks=log_ranks,
            layer_norms=layer_norms,
            server_workers=workers,
            connections=connections,
        )
        for workers in args.server_workers
        for connections in args.connections
        for layer_norms in args.layer_norms
        for log_ranks in args.log_ranks
        for num_ranks in ranks
        for layout in args.layout
        for _ in range(args.repeats)
    ]


_COLUMNS = {
    "ranks": "{ranks}",
    "logged": "{logged_ranks}",
    "launchers": "{shippers}",
    "server": "{server}",
    "logged a second": "{logged_per_s}",
    "arrived a second": "{arrived_per_s} ({arrived_per_s_p20} to {arrived_per_s_p80})",
    "values a request": "{metrics_per_request}",
    "request ms (longest)": "{request_ms_median} ({request_ms_max})",
    "rest s": "{drain_s}",
    "CPU us a value: server, database": "{server_us}, {database_us}",
    "missing, doubled": "{lost}, {doubled}",
    "load": "{load}",
}


def table(path: Path) -> str:
    """The rows of a CSV file as a Markdown table."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = [list(_COLUMNS), ["---"] * len(_COLUMNS)]
    for row in rows:
        server = [row["store"].replace("postgresql", "PostgreSQL").replace("sqlite", "SQLite")]
        if row["server_workers"] != "1":
            server.append(f"{row['server_workers']} workers")
        if row["store"] == POSTGRESQL and row["connections"] == "0":
            server.append("15 connections")
        if row["layer_norms"] != "all":
            server.append(f"layer norms {row['layer_norms']}")
        per_value = 1e6 / float(row["metrics"])
        named = {**row, "server": ", ".join(server)}
        for name in ("server", "database"):
            named[f"{name}_us"] = f"{float(row[f'{name}_cpu_s']) * per_value:.0f}"
        lines.append([form.format(**named) for form in _COLUMNS.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""

    def listed(kind: Any) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path, help="CSV file; rows are added to one that is there")
    parser.add_argument("--table", action="store_true", help="only print the file as a table")
    parser.add_argument("--quick", action="store_true", help="16 ranks, SQLite, seconds")
    parser.add_argument("--ranks", type=listed(int), metavar="N,...")
    parser.add_argument("--layout", type=listed(str), default=[ONE, NODES], metavar="one,nodes")
    parser.add_argument("--log-ranks", type=listed(str), default=["all"], metavar="WHICH,...")
    parser.add_argument("--layer-norms", type=listed(str), default=["all"], metavar="WHICH,...")
    parser.add_argument("--server-workers", type=listed(int), default=[1], metavar="N,...")
    parser.add_argument("--connections", type=listed(int), default=[45], metavar="N,...")
    parser.add_argument("--store", choices=(POSTGRESQL, SQLITE, FILE))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--steps-per-second", type=float)
    parser.add_argument("--mode-metrics", type=int)
    parser.add_argument("--rank-metrics", type=int)
    parser.add_argument("--limit-s", type=float)
    parser.add_argument("--repeats", type=int, default=1)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything that is asked for; 1 where anything was lost or doubled."""
    args = parser().parse_args(argv)
    if args.table:
        print(table(args.out))
        return 0
    CONTEXT.set_forkserver_preload(["__main__", "mlflow.tracking", "mlflow.entities"])
    is_whole = True
    for shape in shapes(args):
        with tempfile.TemporaryDirectory(prefix="dpsgd-track-scale-") as folder:
            row = measure(shape, Path(folder)) | circumstances()
        print(row, flush=True)
        is_whole &= not row["lost"] and not row["doubled"] and not row["trouble"]
        is_new = not args.out.exists()
        with args.out.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
