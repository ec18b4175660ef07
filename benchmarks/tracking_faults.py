#!/usr/bin/env python
"""Inject faults of tracking, and count what was lost, doubled and left; write the table.

    python benchmarks/tracking_faults.py docs/tracking_faults.md

Every fault is real, and on loopback: servers and processes that are killed, disks that are full,
wires that are cut. The script ends only what it started, and works in a temporary folder of its
own. It takes about ten minutes on two cores. Exit code 1: something was lost, doubled or left.

    python benchmarks/tracking_faults.py --only wire,power --times 5
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import tracking_faults_launch, tracking_faults_store  # noqa: E402
from benchmarks.tracking_faults_kinds import FAULTS, Fault  # noqa: E402
from dpsgd_track.store.client import one_line  # noqa: E402
from tests.support.arrivals import Tally  # noqa: E402

# Importing them enters their faults.
assert tracking_faults_launch
assert tracking_faults_store

HEADING = """# Faults of tracking

This table says of each failure of a server, disk or process if a logged value is lost. It is made
by `python benchmarks/tracking_faults.py docs/tracking_faults.md`, which anybody can run. Each fault
was injected for real, on one machine, while a group was logged or launched. Afterwards every value
that had been logged was looked for in the store.

- **Lost**: values that were logged and are not in the store as they were; where a file was damaged
  or cut, those that are lost without being told. **Doubled**: values and runs that are there more
  often than they were logged.
- **RUNNING**: runs that the store still shows as such.
- **Left**: files outside spool, results and store, processes, and shared memory, that are left; and
  what is left in the spool. torch's cache of compiled code in the temporary folder is not counted.

*Stand-ins* are ranks that log as real ones do and compute nothing. Launcher, fork server, torch's
agent, spool and store are real in all rows with a launch; in the others the script itself logs and
ships, as ranks and launcher do. The clock that jumps is the one that the process reads. Where a
server keeps a call waiting, the call ends after 1 second in place of 15, and an answer is read up
to 1 MiB in place of 128. Power failure and damage are changes of the files in a copy of the spool,
which is then shipped to a store in memory. *A minute later* is not waited for: what was left in the
temporary folder is made a minute older.
"""
COLUMNS = ("fault", "times", "outcome", "values", "lost", "doubled", "RUNNING", "left")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault and what came of it."""

    fault: Fault
    tally: Tally
    took_s: float
    skipped: str = ""
    """Reason that it could not be tried here; empty if it was."""
    failed: str = ""
    """Error of an injection that went otherwise than expected; empty for none."""


def measure(fault: Fault, times: int | None, folder: Path) -> Row:
    """Inject a fault in a folder of its own."""
    own = folder / fault.name
    own.mkdir()
    before, start = Path.cwd(), time.monotonic()
    os.chdir(own)
    tally, skipped, failed = Tally(), "", ""
    try:
        tally = fault.inject(own, times or fault.times)
    except pytest.skip.Exception as reason:
        skipped = str(reason)
    except Exception as error:
        traceback.print_exc()
        failed = f"{type(error).__name__}: {one_line(error)}"
    finally:
        os.chdir(before)
    took_s = time.monotonic() - start
    return Row(fault=fault, tally=tally, took_s=took_s, skipped=skipped, failed=failed)


def line(row: Row) -> str:
    """A row of the table."""
    tally = row.tally
    cells = [row.fault.title, str(tally.times), row.fault.after, f"{tally.values:,}"]
    cells += map(str, (tally.lost, tally.doubled, tally.running, tally.left))
    if row.skipped or row.failed:
        what = f"not tried here: {row.skipped}" if row.skipped else f"FAILED: {row.failed}"
        cells[1:] = ["0", what, *["-"] * 5]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def page(rows: Sequence[Row]) -> str:
    """The Markdown page."""
    lines = [HEADING, f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += map(line, rows)
    total = Tally()
    for row in rows:
        total += row.tally
    lines += [
        "",
        f"{total.times:,} faults and {total.values:,} values: {total.lost} lost, {total.doubled} "
        f"doubled, {total.running} runs left RUNNING, {total.left} things left behind, in "
        f"{sum(row.took_s for row in rows) / 60:.0f} minutes on {os.cpu_count()} cores "
        f"({platform.system()}, Python {platform.python_version()}, MLflow {version('mlflow')}).",
        "",
        REST,
    ]
    return "\n".join(lines)


REST = """## Other tests

`python -m pytest -n 0 -m soak` does the same more often, and with real modes: 20 kills of a rank,
10 of the launcher and 5 of all processes at random moments (`tests/test_launcher_kills.py`), 20
kills of a server on SQLite and on PostgreSQL (`tests/test_tracking_outages.py`), and 20,000 damaged
spools (`tests/test_tracking_damage_anywhere.py`). [Tracking](tracking.md) says
what each fault means for you.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Inject what is asked for, and write or print the page."""
    summary = __doc__.splitlines()[0] if __doc__ else ""
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("page", type=Path, nargs="?", help="Markdown file; printed if left out")
    names = ", ".join(FAULTS)
    parser.add_argument("--only", help=f"faults to inject, with commas between them: {names}")
    parser.add_argument("--times", type=int, help="injections of each, in place of its default")
    args = parser.parse_args(argv)
    chosen = args.only.split(",") if args.only else list(FAULTS)
    if unknown := set(chosen) - FAULTS.keys():
        parser.error(f"--only: {', '.join(sorted(unknown))}: expected some of {names}.")
    rows = []
    with tempfile.TemporaryDirectory(prefix="tracking-faults-") as folder:
        for name in chosen:
            rows.append(measure(FAULTS[name], args.times, Path(folder)))
            print(
                f"{name} ({rows[-1].took_s:.1f} s): {line(rows[-1])}", file=sys.stderr, flush=True
            )
    text = page(rows)
    if args.page:
        args.page.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0 if all(row.tally.is_clean and not row.failed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
