#!/usr/bin/env python
"""Measure what the private modes cost, and write the figures as CSV.

    python benchmarks/speed.py cpu benchmarks/speed_cpu.csv
    python benchmarks/speed.py gpu benchmarks/speed_gpu.csv

Runs `launch.py profile` once for each part of a machine's configuration, and puts the rows of all
into one file. Options after the file go to every launch, such as `--num-iter 20`. Exits with 1
where a run failed; out of memory is a result.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLASH = "flash_fsdp,flash_fsdp_bk,flash_fsdp_fuse,flash_fsdp_fuse_bk"
ON_GPUS = "--model-name llama-3.2-1b --param-dtype bfloat16 --device cuda --nproc-per-node 2"
CONFIGURATIONS = {
    "cpu": (
        f"--mode {FLASH},ghost_fsdp --model-name llama-small --param-dtype float32 --device cpu "
        "--nproc-per-node 2 --seq-length 256 --batch-size 4",
    ),
    "gpu": (
        # At this length the host decides, and it differs from process to process.
        f"{ON_GPUS} --mode {FLASH},ghost_fsdp --seq-length 1024 --batch-size 2 --rounds 6",
        f"{ON_GPUS} --mode {FLASH},ghost_fsdp --seq-length 4096 --batch-size 2 --rounds 2",
        # Opacus's mode would take minutes a step.
        f"{ON_GPUS} --mode {FLASH} --seq-length 16384 --batch-size 1",
    ),
}


def main() -> int:
    """Launch every part, and gather their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machine", choices=CONFIGURATIONS)
    parser.add_argument("csv", type=Path)
    args, options = parser.parse_known_args()
    code, lines = 0, []
    with tempfile.TemporaryDirectory() as folder:
        for number, configuration in enumerate(CONFIGURATIONS[args.machine]):
            part = Path(folder) / f"{number}.csv"
            command = [sys.executable, str(ROOT / "launch.py"), "profile", "--output", str(part)]
            done = subprocess.run([*command, *configuration.split(), *options], check=False)
            code = max(code, done.returncode)
            if part.exists():
                heading, *rows = part.read_text(encoding="utf-8").splitlines(keepends=True)
                lines += rows if lines else [heading, *rows]
    if lines:
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        args.csv.write_text("".join(lines), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
