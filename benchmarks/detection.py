#!/usr/bin/env python
"""Write the page of the detection matrix, with several launches at a time.

    python benchmarks/detection.py docs/detection.md --jobs 12 --folder /tmp/detection
    python benchmarks/detection.py docs/detection-bf16.md --jobs 12 --folder /tmp/detection \\
        --param-dtype bfloat16

The page is the one that `launch.py faults` writes. The catalogue is cut into as many parts as there
are jobs, or `--parts`, and each part is launched and compared as a group of its own; every group
has the healthy modes. The page is written anew as each part ends, so that it has what there is if
the rest is cut short. Other options go to every launch. Exits with 1 if a fault is missed that
should be found, or if a healthy mode of any part raises an alarm.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from dpsgd_track.config import load_settings
from dpsgd_track.mutants.catalogue import MUTANTS
from dpsgd_track.mutants.choice import chosen_mutants
from dpsgd_track.mutants.matrix import Matrix, matrix_of
from dpsgd_track.mutants.matrix_text import markdown
from dpsgd_track.store.find_group import read_group_anywhere

ROOT = Path(__file__).resolve().parent.parent
ENDED = (0, 1)
"""Exit codes of a launch that ran to its end; 1 is a fault that was missed."""


def main() -> int:
    """Launch all parts, and write one page of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="launches at a time")
    parser.add_argument("--parts", type=int, help="groups; by default as many as jobs")
    parser.add_argument("--every", type=int, default=1, help="take each Nth fault alone")
    parser.add_argument("--folder", type=Path, required=True, help="new folder for records")
    args, options = parser.parse_known_args()
    args.folder.mkdir(parents=True)
    names = [mutant.name for mutant in chosen_mutants(())][:: args.every]
    num_parts = args.parts or args.jobs
    command = shlex.join(["python", "launch.py", "faults", "--output", str(args.page), *options])
    matrices: list[Matrix] = []
    with ThreadPoolExecutor(args.jobs) as pool:
        launches = {}
        for part in range(num_parts):
            folder = args.folder.resolve() / str(part)
            launches[pool.submit(_launch, folder, names[part::num_parts], options)] = folder
        for launch in as_completed(launches):
            if launch.result() not in ENDED:
                print(f"failed; see {launches[launch] / 'output.log'}", flush=True)
                continue
            matrices.append(_matrix(launches[launch]))
            args.page.write_text(markdown(_merged(matrices), command), encoding="utf-8")
    if len(matrices) < num_parts:
        return max(launch.result() for launch in launches)
    matrix = _merged(matrices)
    for row in matrix.missed:
        print(f"missed: {row.label}: {row.sentence}")
    for mode in matrix.false_alarms:
        print(f"false alarm: {mode.sentence}")
    return int(bool(matrix.unexplained or matrix.false_alarms))


def _launch(folder: Path, faults: Sequence[str], options: Sequence[str]) -> int:
    """Launch one part in `folder`, and compare it."""
    folder.mkdir()
    command = [sys.executable, str(ROOT / "launch.py"), "faults", "--fault", ",".join(faults)]
    command += ["--group", _group(folder), "--offline", "--spool", str(folder / "spool"), *options]
    with (folder / "output.log").open("w", encoding="utf-8") as log:
        return subprocess.run(command, cwd=folder, stdout=log, stderr=log, check=False).returncode


def _matrix(folder: Path) -> Matrix:
    settings = replace(load_settings(None), spool_dir=str(folder / "spool"))
    found = read_group_anywhere(settings, _group(folder), lambda _: None)
    return matrix_of(found.group, settings.thresholds)


def _group(folder: Path) -> str:
    return f"detection-{folder.name}"


def _merged(parts: Sequence[Matrix]) -> Matrix:
    """All rows in the order of the catalogue; of each healthy mode, its worst verdict."""
    places = {name: number for number, name in enumerate(MUTANTS)}
    rows = sorted((r for part in parts for r in part.rows), key=lambda r: places[r.fault.name])
    modes = {mode.label: mode for mode in parts[0].healthy}
    for mode in (mode for part in parts for mode in part.healthy):
        modes[mode.label] = max(modes[mode.label], mode, key=lambda m: m.verdict.severity)
    alarms = dict.fromkeys(label for part in parts for label in part.naive_alarms)
    return replace(
        parts[0], rows=tuple(rows), healthy=tuple(modes.values()), naive_alarms=tuple(alarms)
    )


if __name__ == "__main__":
    sys.exit(main())
