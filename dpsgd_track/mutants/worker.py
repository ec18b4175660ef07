"""Training worker for modes with something planted in them."""

from __future__ import annotations

from dpsgd_track.mutants.planting import Planter
from dpsgd_track.training import worker
from dpsgd_track.training.worker import preload


def main(job_file: str) -> int:
    """Run the job and return the exit code of the process."""
    planter = Planter()
    return worker.main(job_file, planter.build, planter.unreached)


__all__ = ["main", "preload"]
