#!/usr/bin/env python
"""Run a zoo of tiny architectures privately, and say of each whether its gradients were exact.

    python benchmarks/coverage.py benchmarks/coverage.csv --page docs/coverage.md

Every model of `coverage_zoo.py` goes through `make_private` without noise and is held against
plain autograd, one sample at a time: the norms, the clipped sum, and by how much the sum changes
without its largest sample. That is done with B samples for a B that is no length of the model, for
a B that is, and for one after the other, as Poisson sampling brings them. One CSV row for each
architecture, batch and mode. Exits with 1 where anything was wrong or crashed.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.coverage_judge import FAILURES, Row, judge  # noqa: E402
from benchmarks.coverage_page import counted, page  # noqa: E402
from benchmarks.coverage_zoo import ARCHITECTURES  # noqa: E402


def main() -> int:
    """Judge; 1 where something was wrong or crashed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=Path)
    parser.add_argument("--page", type=Path, help="Markdown table to write")
    parser.add_argument("--only", action="append", choices=ARCHITECTURES, metavar="NAME")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit of one case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        for name in args.only or ARCHITECTURES:
            for row in judge(name, ARCHITECTURES[name], args.seconds):
                rows.append(row)
                writer.writerow(_cells(row))
                if row.outcome in FAILURES:
                    where = f"{name}, {row.batch}, {row.mode}"
                    print(f"{row.outcome}: {where}: {row.sentence}", flush=True)
            file.flush()
    if args.page:
        args.page.write_text(page(rows), encoding="utf-8")
    print(counted(rows))
    return int(any(row.outcome in FAILURES for row in rows))


def _cells(row: Row) -> dict[str, Any]:
    return {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in asdict(row).items()}


if __name__ == "__main__":
    sys.exit(main())
