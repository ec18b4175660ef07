"""Groups that are logged while they are shipped, to stores that go and come back."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpsgd_track.config import Settings
from dpsgd_track.record.run import Status
from dpsgd_track.store.opening import open_store
from dpsgd_track.store.run_tree import RunTree
from dpsgd_track.store.shipper import Shipper, settle
from dpsgd_track.store.shipping import Shipping
from dpsgd_track.store.spool import CONTROL, RECORDS, SpoolWriter
from dpsgd_track.store.spooled import claim, spooled_groups
from tests.support.spooled_group import check_whole, logged, start_runs
from tests.support.tracking_servers import MlflowServer

STEP_S = 0.02


def log_a_group(
    spool: Path,
    name: str,
    uri: str,
    steps: int,
    at_step: Callable[[int, list[str]], object],
    client: Any = None,
) -> tuple[list[float], list[str], str]:
    """Log a group while it is shipped; how long each step's logging took (ms), and what was said.

    Args:
        at_step: called before each step, with what was said so far.
        client: of the store, in place of the one that a launcher has.
    """
    group = claim(spool, name)
    assert group is not None
    opened, experiment_id = open_store(Settings(tracking_uri=uri))
    client = client or opened
    control = SpoolWriter(group.folder, f"launcher{CONTROL}")
    tree = RunTree(control, "dpsgd-track", name)
    mode, ranks = start_runs(tree)
    shipper = Shipper(group, client, uri, experiment_id)
    said: list[str] = []
    shipping = Shipping(shipper, uri, said.append, interval_s=0.05)
    shipping.start()
    workers = [SpoolWriter(group.folder, f"no_dp-rank{rank}{RECORDS}") for rank in (0, 1)]
    workers[0].log_input(mode, "synthetic", "5ca1ab1e")
    took_ms = []
    for step in range(steps):
        at_step(step, said)
        metrics = logged(step, 9)
        start = time.thread_time()
        workers[0].log_metrics(mode, step, metrics)
        took_ms.append((time.thread_time() - start) * 1000)
        for rank in (0, 1):
            workers[rank].log_metrics(ranks[rank], step, logged(step, rank))
        time.sleep(STEP_S)
    file = spool / "trajectory.npz"
    file.write_bytes(b"exact")
    for rank, worker in enumerate(workers):
        worker.upload(ranks[rank], file)
        worker.log_params(ranks[rank], {"device.name": "cpu"})
        worker.close()
    for run in (*ranks, mode, tree.group_run):
        tree.finish(run, Status.FINISHED)
    control.close()
    left = shipping.close(timeout_s=60, away_timeout_s=1)
    if not left:
        assert settle(shipper, count=True) == []
    return took_ms, said, left


def sync(spool: Path, uri: str) -> None:
    (group,) = spooled_groups(spool)
    client, experiment_id = open_store(Settings(tracking_uri=uri))
    with group.hold():
        assert settle(Shipper(group, client, uri, experiment_id), count=True) == []


def kill_and_restart(server: MlflowServer, spool: Path, name: str, times: int) -> None:
    """SIGKILL to the server at random steps, over and over, in one group."""
    rng = random.Random(11)
    due = {rng.randrange(60) + 60 * i for i in range(times)}

    def at_step(step: int, said: list[str]) -> None:
        if step not in due:
            return
        server.kill()
        server.start()
        # It takes seconds to start. At times it is killed again before it is there.
        if rng.random() < 0.75:
            server.wait()
            while said and "is back" not in said[-1]:
                time.sleep(0.05)

    took_ms, said, left = log_a_group(spool, name, server.uri, 60 * times, at_step)
    if left:
        server.wait()
        sync(spool, server.uri)
    check_whole(*open_store(Settings(tracking_uri=server.uri)), name, 60 * times)
    print(f"{name}: {times} kills, {len(said)} lines, p50 {statistics.median(took_ms):.3f} ms")
