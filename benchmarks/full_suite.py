#!/usr/bin/env python
"""Run `launch.py full` and write one CSV row for each mode and regime.

    python benchmarks/full_suite.py OUT.csv --model-name llama-3.2-1b --seq-length 1024 \
        --batch-size 2 --param-dtype bfloat16

Every option after the CSV file goes to launch.py. Rows are self-contained: what ran, on what, the
losses and norms that say whether it computed the right thing, and medians with the 20th and 80th
percentile of the step time. The first recorded step is left out of the times.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dpsgd_track.config import JobConfig, RegimeConfig  # noqa: E402
from dpsgd_track.record.plan import STARTED_JOB  # noqa: E402
from dpsgd_track.record.trajectory import Trajectory  # noqa: E402


def main() -> int:
    """Run, summarise, and pass on launch.py's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--commit", default=_revision(), help="what the rows name as the commit")
    args, options = parser.parse_known_args()
    group = f"benchmark-{time.strftime('%Y%m%d-%H%M%S')}"
    command = [sys.executable, str(ROOT / "launch.py"), "full", "--group", group, *options]
    code = subprocess.run(command, check=False).returncode
    rows = [
        row
        for job in sorted(Path("results").glob(f"{group}/logs/*/job.json"))
        for row in _rows(job, args.commit)
    ]
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return code


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


def _rows(job_file: Path, commit: str) -> list[dict[str, Any]]:
    started = STARTED_JOB.loads(job_file.read_text(encoding="utf-8"))
    rows = []
    for number, regime in enumerate(started.job.regimes):
        path = job_file.parent / str(number) / "trajectory.npz"
        trajectory = Trajectory.load(path) if path.exists() else None
        rows.append(_shape(started.job, regime) | _figures(trajectory) | _machine(commit))
    return rows


def _shape(job: JobConfig, regime: RegimeConfig) -> dict[str, Any]:
    return {
        "mode": job.mode,
        "regime": "-".join(filter(None, (regime.name, regime.replay))),
        "model": job.model.name,
        "param_dtype": job.performance.param_dtype,
        "num_ranks": job.num_ranks,
        "seq_length": job.data.seq_length,
        "batch_size": job.data.batch_size,
        "micro_batches": regime.micro_batches,
        "num_iter": regime.num_iter,
    }


def _figures(trajectory: Trajectory | None) -> dict[str, Any]:
    names = ("final_loss", "avg_grad_norm", "step_time_ms", "p20", "p80", "peak_memory_gib")
    if trajectory is None:
        return dict.fromkeys(names, "failed")
    times = trajectory.step_time_ms[1:] if trajectory.num_steps > 1 else trajectory.step_time_ms
    median, p20, p80 = np.percentile(times, [50, 20, 80])
    values = (
        f"{trajectory.loss[-1]:.8f}",
        f"{trajectory.grad_norm.mean():.8f}",
        f"{median:.2f}",
        f"{p20:.2f}",
        f"{p80:.2f}",
        f"{trajectory.peak_memory_gib.max():.3f}",
    )
    return dict(zip(names, values, strict=True))


def _machine(commit: str) -> dict[str, str]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "opacus": version("opacus"),
        "commit": commit,
    }


if __name__ == "__main__":
    sys.exit(main())
