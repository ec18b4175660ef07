"""A group as launcher and workers leave it in the spool, and whether it arrived whole."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path

from mlflow import MlflowClient

from dpsgd_track.config import RegimeConfig
from dpsgd_track.record import names
from dpsgd_track.store import exact
from dpsgd_track.store.history import all_points
from dpsgd_track.store.run_tree import RunTree
from dpsgd_track.store.spool import CONTROL, RECORDS, SpoolWriter
from dpsgd_track.store.spooled import claim

ODD = (math.inf, -math.inf, -0.0, math.nan, 5e-324, 1.7976931348623157e308, 1 / 3)
MODE = RegimeConfig(name="clip", num_iter=1)


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def logged(step: int, seed: int = 0) -> dict[str, float]:
    """What a step logs: ordinary numbers, and such as SQL cannot hold."""
    rng = random.Random(step * 1000 + seed)
    values = {f"layer/{i}": struct.unpack("<d", rng.randbytes(8))[0] for i in range(5)}
    return {**values, "odd": ODD[step % len(ODD)], "loss": step + 1 / 3}


def spool_a_group(spool: Path, name: str, steps: int = 30, status: str = "FINISHED") -> RunTree:
    """A finished group of one mode run and two rank runs, as launcher and workers leave it."""
    group = claim(spool, name)
    assert group is not None
    control = SpoolWriter(group.folder, f"launcher{CONTROL}")
    tree = RunTree(control, "dpsgd-track", name)
    tree.start_group([("no_dp", "clip", "", "")], {"suite": "quick"})
    mode, ranks = tree.start_mode("no_dp", MODE, 2, {"seed": "42"})
    trajectory = spool / "trajectory.npz"
    trajectory.write_bytes(name.encode())
    for rank, run in enumerate(ranks):
        worker = SpoolWriter(group.folder, f"no_dp-rank{rank}{RECORDS}")
        for step in range(steps):
            if rank == 0:
                worker.log_metrics(mode, step, logged(step, 9))
            worker.log_metrics(run, step, logged(step, rank))
        worker.upload(run, trajectory)
        worker.log_params(run, {"device.name": "cpu"})
        worker.close()
    for run in (*ranks, mode, tree.group_run):
        tree.finish(run, status, "" if status == "FINISHED" else "it broke.")
    control.close()
    return tree


def check_whole(client: MlflowClient, experiment_id: str, name: str, steps: int = 30) -> None:
    """Every value of a spooled group is there once, bit for bit."""
    runs = client.search_runs([experiment_id], f"tags.`{names.GROUP}` = '{name}'")
    assert sorted(run.info.run_name for run in runs) == sorted(
        [name, "no_dp/clip", "rank 0", "rank 1"]
    )
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(run.info.end_time >= run.info.start_time for run in runs)
    for run in runs:
        if run.data.tags[names.KIND] == names.KIND_GROUP:
            assert run.data.params == {"suite": "quick"}
            continue
        seed = int(run.data.tags.get(names.RANK, 9))
        points = dict(all_points(client, run.info.run_id, logged(0)))
        restored = exact.from_json(
            Path(client.download_artifacts(run.info.run_id, exact.FILE)).read_text()
        )
        assert int(run.data.tags[names.INEXACT_VALUES]) == len(restored)
        for metric, held in points.items():
            assert sorted(step for step, _, _ in held) == list(range(steps))
            for step, _, stored in held:
                value = restored.get((metric, step), math.nan if stored is None else stored)
                assert bits(value) == bits(logged(step, seed)[metric])
        files = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert ("trajectory.npz" in files) == (names.RANK in run.data.tags)
