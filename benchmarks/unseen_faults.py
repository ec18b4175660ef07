#!/usr/bin/env python
"""Judge faults that were written without a look at the comparison, and healthy modes beside them.

    python benchmarks/unseen_faults.py OUT.csv --jobs 8 --folder /tmp/unseen

`faults.py` of `unseen`, `unseen_second`, `unseen_third`, `unseen_fourth`, `unseen_fifth`,
`unseen_sixth` and `unseen_seventh` has them as users' modes, and `truth.csv` beside it says of each
what is wrong, and in which stage. From the fifth on names are numbers, so that headlines can be
graded blind. They run on the probe, in as many groups as there are jobs. One CSV row for each mode:
its verdict, whether the right stage is blamed, and the headline, which is to be read for the cause.
Exits with 1 if a fault that can show is missed, or a healthy mode raises an alarm.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETS = (
    "unseen",
    "unseen_second",
    "unseen_third",
    "unseen_fourth",
    "unseen_fifth",
    "unseen_sixth",
    "unseen_seventh",
)
HEALTHY = "healthy"
STAGES = {"updated weights": "update"}
"""Names of stages that may differ in `truth.csv`."""
COLUMNS = ("name", "category", "verdict", "stage", "has_right_stage", "cause", "headline")


def main() -> int:
    """Launch, compare and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="launches at a time")
    parser.add_argument("--folder", type=Path, required=True, help="new folder for records")
    parser.add_argument("--set", choices=SETS, default=SETS[0], help="which faults")
    args, options = parser.parse_known_args()
    args.folder.mkdir(parents=True)
    modes = ROOT / "benchmarks" / args.set
    with (modes / "truth.csv").open(encoding="utf-8") as file:
        truths = list(csv.DictReader(file))
    parts = [truths[job :: args.jobs] for job in range(args.jobs)]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = [args.folder.resolve() / str(job) for job in range(args.jobs)]
        judge = partial(_judged, modes=modes, options=options)
        every = pool.map(judge, folders, parts)
        rows = [row for part in every for row in part]
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    faults = [row for row in rows if row["category"] != HEALTHY]
    found = [row for row in faults if row["verdict"] in ("BUG", "DRIFT")]
    alarms = [r for r in rows if r["category"] == HEALTHY and r["verdict"] != "PASS"]
    right = sum(row["has_right_stage"] for row in found)
    print(f"{len(found)} of {len(faults)} found, {right} with the right stage")
    print(f"{len(alarms)} alarms on {len(rows) - len(faults)} healthy modes")
    can_show = {t["name"] for t in truths if not t["observable"].startswith("no")}
    missed = {row["name"] for row in faults} - {row["name"] for row in found}
    return int(bool(alarms or missed & can_show))


def _judged(
    folder: Path, truths: Sequence[dict[str, str]], *, modes: Path, options: Sequence[str]
) -> Iterator[dict[str, object]]:
    """Launch and compare one group; a row for each of its modes."""
    folder.mkdir()
    labels = ["no_dp", *(f"faults:{truth['name']}" for truth in truths)]
    launch = ["launch.py", "quick", "--model-name", "llama-tiny", "--mode", ",".join(labels)]
    launch += ["--regime", "probe-accuracy,probe-clip,probe-noise", "--group", "unseen"]
    launch += ["--offline", "--spool", "spool", *options]
    path = os.pathsep.join([str(modes), os.environ.get("PYTHONPATH", "")])
    for script, *arguments in (launch, ["compare.py", "unseen", "--spool", "spool", "--no-png"]):
        with (folder / "output.log").open("a", encoding="utf-8") as log:
            subprocess.run(
                [sys.executable, str(ROOT / script), *arguments],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path},
                stdout=log,
                stderr=log,
                check=False,
            )
    document = json.loads((folder / "results/unseen/drift.json").read_text(encoding="utf-8"))
    verdicts = {mode["label"].removeprefix("faults:"): mode for mode in document["modes"]}
    return (_row(truth, verdicts[truth["name"]]) for truth in truths)


def _row(truth: dict[str, str], mode: dict[str, object]) -> dict[str, object]:
    culprit = mode["culprit"]
    stage = str(culprit["stage"]) if isinstance(culprit, dict) else ""
    stage = STAGES.get(stage, stage)
    right = [STAGES.get(truth[name], truth[name]) for name in ("stage", "also_stage")]
    return {
        **{name: truth[name] for name in ("name", "category", "cause")},
        "verdict": mode["verdict"],
        "stage": stage,
        "has_right_stage": stage in right and bool(stage),
        "headline": mode["sentence"],
    }


if __name__ == "__main__":
    sys.exit(main())
