"""A group of many modes as launcher and workers leave it in a store, without a launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpsgd_track.config import RegimeConfig
from dpsgd_track.record import names
from dpsgd_track.record.plan import GroupPlan, Suite
from dpsgd_track.record.run import Status
from dpsgd_track.record.trajectory import SCALAR_METRICS
from dpsgd_track.store.run_tree import RunTree
from dpsgd_track.store.shipper import Shipper, settle
from dpsgd_track.store.spool import CONTROL, RECORDS, SpoolWriter
from dpsgd_track.store.spooled import claim
from tests.support.synthetic_group import ENVIRONMENT, job, setup, trajectory


def ship_a_group(
    store: tuple[Any, str],
    uri: str,
    spool: Path,
    name: str,
    modes: Sequence[str],
    regimes: Sequence[RegimeConfig] = (setup("accuracy"), setup("clip")),
) -> None:
    """Ship a finished group with a trajectory for each of `modes`.

    Args:
        store: client, and id of the experiment.
    """
    spooled = claim(spool, name)
    assert spooled is not None
    control = SpoolWriter(spooled.folder, f"launcher{CONTROL}")
    tree = RunTree(control, "dpsgd-track", name)
    jobs = tuple(job(mode, *regimes) for mode in modes)
    measured_on = replace(ENVIRONMENT, git_revision="0a7250e" * 5)
    tree.start_group(GroupPlan(suite=Suite.FULL, jobs=jobs, num_ranks=2, environment=measured_on))
    worker = SpoolWriter(spooled.folder, f"modes{RECORDS}")
    for number, planned in enumerate(jobs):
        for regime in regimes:
            run, ranks = tree.start_mode(planned, regime, range(2))
            record = trajectory(noise_std=0.0 if regime.name == "clip" else 100.0, seed=number)
            for row, step in enumerate(record.step.tolist()):
                values = {metric: float(getattr(record, metric)[row]) for metric in SCALAR_METRICS}
                worker.log_metrics(run, step, values)
                charted = {
                    names.group_metric(metric, regime.name, planned.label): values[metric]
                    for metric in names.CHARTED
                }
                worker.log_metrics(tree.group_run, step, charted)
            for each in (*ranks, run):
                tree.finish(each, Status.FINISHED)
    tree.finish(tree.group_run, Status.FINISHED)
    worker.close()
    control.close()
    assert settle(Shipper(spooled, store[0], uri, store[1]), count=False) == []
