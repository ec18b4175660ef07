"""Run in every rank: every job of a folder, without launcher or tracking.

FOLDER/NAME.json holds a StartedJob. The record of its n-th regime becomes NAME-n.npz, and each
rank's own NAME-n-rankR.npz; the ranks' metrics of each step become NAME-n-rankR.json.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from dpsgd_track.config import SILENT, JobConfig
from dpsgd_track.record.plan import STARTED_JOB
from dpsgd_track.training.loop import RegimeRun
from dpsgd_track.training.recorder import rank_metrics
from tests.support.forked_ranks import ForkedRanks
from tests.support.synthetic_group import started


def main(folder_name: str) -> None:
    """Run the jobs of FOLDER."""
    folder = Path(folder_name)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for file in sorted(folder.glob("*.json")):
        job = STARTED_JOB.loads(file.read_text()).job
        silent = None
        for number, regime in enumerate(job.regimes):
            run = RegimeRun(job, regime, torch.device("cpu"), None if regime.replay else silent)
            if regime.replay == SILENT:
                silent = run.taken
            own = [rank_metrics(done.local, 1.0, 1.0) for done, _ in run.steps()]
            stem = f"{file.stem}-{number}"
            out = folder / "out"
            run.records[1].trajectory().save(out / f"{stem}-rank{rank}.npz")
            (out / f"{stem}-rank{rank}.json").write_text(json.dumps(own))
            if rank == 0:
                run.records[0].trajectory().save(out / f"{stem}.npz")
    dist.barrier()
    dist.destroy_process_group()


def run_jobs(
    rank_host: ForkedRanks, folder: Path, world_size: int, jobs: dict[str, JobConfig]
) -> Path:
    """Run `jobs` on `world_size` ranks; returns the folder of their records."""
    (folder / "out").mkdir(parents=True)
    for name, job in jobs.items():
        (folder / f"{name}.json").write_text(started(job))
    done = rank_host.run("tests.support.torchrun_regimes", str(folder), num_ranks=world_size)
    assert done.code == 0, done.log[-3000:]
    return folder / "out"
