"""A group as launcher and workers leave it in the spool, and whether it arrived whole."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path

from mlflow import MlflowClient

from dpsgd_track.config import JobConfig
from dpsgd_track.record import names
from dpsgd_track.record.failure import Failure, FailureKind
from dpsgd_track.record.plan import PLAN_FILE, GroupPlan, Suite
from dpsgd_track.record.run import Status
from dpsgd_track.store.history import all_points, as_stored
from dpsgd_track.store.run_tree import RunTree
from dpsgd_track.store.spool import CONTROL, RECORDS, SpoolWriter
from dpsgd_track.store.spooled import claim
from tests.support.synthetic_group import ENVIRONMENT, job, setup

ODD = (math.inf, -math.inf, -0.0, math.nan, 5e-324, 1.7976931348623157e308, 1 / 3)
STOPPED = Failure(kind=FailureKind.INTERRUPTED)


def logged(step: int, seed: int = 0) -> dict[str, float]:
    """What a step logs: ordinary numbers, and such as SQL cannot hold."""
    rng = random.Random(step * 1000 + seed)
    values = {f"layer/{i}": struct.unpack("<d", rng.randbytes(8))[0] for i in range(5)}
    return {**values, "odd": ODD[step % len(ODD)], "loss": step + 1 / 3}


def planned(num_ranks: int = 2, regime: str = "clip") -> JobConfig:
    """A job of one mode in one regime."""
    return job("no_dp", setup(regime), num_ranks=num_ranks)


def start_runs(
    tree: RunTree, num_ranks: int = 2, regime: str = "clip"
) -> tuple[str, tuple[str, ...]]:
    """Start the group and its one mode run; returns its key and those of its ranks' runs."""
    only = planned(num_ranks, regime)
    plan = GroupPlan(suite=Suite.QUICK, jobs=(only,), num_ranks=num_ranks, environment=ENVIRONMENT)
    tree.start_group(plan)
    return tree.start_mode(only, only.regimes[0], range(num_ranks))


def spool_a_group(
    spool: Path, name: str, steps: int = 30, status: Status = Status.FINISHED
) -> RunTree:
    """A finished group of one mode run and two rank runs, as launcher and workers leave it."""
    group = claim(spool, name)
    assert group is not None
    control = SpoolWriter(group.folder, f"launcher{CONTROL}")
    tree = RunTree(control, "dpsgd-track", name)
    mode, ranks = start_runs(tree)
    trajectory = spool / "trajectory.npz"
    trajectory.write_bytes(name.encode())
    for rank, run in enumerate(ranks):
        own = [mode, run] if rank == 0 else [run]
        worker = SpoolWriter(group.folder, f"no_dp-rank{rank}{RECORDS}", runs=own)
        if rank == 0:
            worker.log_input(mode, "synthetic", "5ca1ab1e")
        for step in range(steps):
            if rank == 0:
                worker.log_metrics(mode, step, logged(step, 9))
            worker.log_metrics(run, step, logged(step, rank))
        worker.upload(run, trajectory)
        worker.log_params(run, {"device.name": "cpu"})
        worker.close()
    for run in (*ranks, mode, tree.group_run):
        tree.finish(run, status, None if status is Status.FINISHED else STOPPED)
    control.close()
    return tree


def check_whole(client: MlflowClient, experiment_id: str, name: str, steps: int = 30) -> None:
    """Every value of a spooled group is there once, as SQL stores hold it."""
    runs = client.search_runs([experiment_id], f"tags.`{names.GROUP}` = '{name}'")
    assert sorted(run.info.run_name for run in runs) == sorted(
        [name, "no_dp/clip", "rank 0", "rank 1"]
    )
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(run.info.end_time >= run.info.start_time for run in runs)
    for run in runs:
        has_input = run.data.tags[names.KIND] == names.KIND_MODE
        assert len(run.inputs.dataset_inputs) == has_input
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        if run.data.tags[names.KIND] == names.KIND_GROUP:
            assert run.data.params["suite"] == "quick"
            assert files == {PLAN_FILE}
            continue
        seed = int(run.data.tags.get(names.RANK, 9))
        points = dict(all_points(client, run.info.run_id, logged(0)))
        for metric, held in points.items():
            assert sorted(step for step, _, _ in held) == list(range(steps))
            for step, _, stored in held:
                assert stored == as_stored(logged(step, seed)[metric])
        assert ("trajectory.npz" in files) == (names.RANK in run.data.tags)
