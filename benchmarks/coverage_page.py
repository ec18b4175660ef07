"""The Markdown page that says which architectures are exact."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.coverage_judge import APART, FAILURES, OUTCOMES, SAME, THEN, Row

HEADING = """# Exact architectures

This table lists architectures and says of each if `make_private` trains it exactly. It is made by
`python benchmarks/coverage.py benchmarks/coverage.csv --page docs/coverage.md`. Each is a
tiny model with random weights, as its users would run it, through `make_private` without noise. It
was held against plain autograd, one sample at a time: the norm of every sample, the clipped sum,
and how far the sum moves without its largest sample.

- **exact**: norms within 1e-8 in float64 (1e-4 where parts of the model compute in float32), the
  clipped sum within 1e-4, and no sample moves it by more than C.
- **refused**: a ValueError says which layer cannot be clipped, and what to do.
- **crash**: any other exception, or a ValueError that does not say what to do.
- **wrong**: gradients that differ from these, without a word.

Dropout draws its masks anew. With it, one sample's sum must be as long as its clipped norm, and
that of several no longer than their norms together.

B samples, T positions, patches or frames; *then* is a batch with B = T after one without, as
Poisson sampling brings it. *Copies* counts the layers without a rule of their own, which run on one
copy of their parameters for each sample. *Time* is that of a private step over a plain one: at
these sizes it is mostly Python's, and no measure of what a step costs at a real size.
"""


COLUMNS = ("architecture", APART, SAME, "then", "other B", "copies", "time", "message")


def page(rows: Sequence[Row]) -> str:
    """The Markdown page: counts, and a table for each kind."""
    batches = Counter(row.batch for row in rows)
    lines = [HEADING, f"{len({r.architecture for r in rows})} architectures: {counted(rows)}.", ""]
    lines += ["| batch | " + " | ".join(OUTCOMES) + " |", "|---" * (len(OUTCOMES) + 1) + "|"]
    for batch in batches:
        counts = Counter(row.outcome for row in rows if row.batch == batch)
        lines.append(f"| {batch} | " + " | ".join(str(counts[o]) for o in OUTCOMES) + " |")
    for kind in dict.fromkeys(row.kind for row in rows):
        lines += ["", f"## {kind[0].upper()}{kind[1:]}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for name in dict.fromkeys(row.architecture for row in rows if row.kind == kind):
            lines.append(_line(name, [row for row in rows if row.architecture == name]))
    return "\n".join(lines) + "\n"


def _line(name: str, rows: Sequence[Row]) -> str:
    by_batch = {row.batch: [r for r in rows if r.batch == row.batch] for row in rows}
    columns = (APART, SAME, THEN)
    cells = [_outcome(by_batch.get(batch, [])) for batch in columns]
    others = [f"{b}: {_outcome(r)}" for b, r in by_batch.items() if b not in columns]
    worst = max(rows, key=lambda row: OUTCOMES.index(row.outcome))
    times = [row.slowdown for row in rows if row.slowdown is not None]
    copies = max(row.num_on_copies for row in rows)
    by_sample = max(row.num_by_sample for row in rows)
    slow = f"{copies}" + (f", {by_sample} sample by sample" if by_sample else "")
    said = textwrap.shorten(worst.sentence, 320).replace("|", "\\|").replace("<", "&lt;")
    time_cell = f"{sorted(times)[len(times) // 2]:.1f}" if times else ""
    return "| " + " | ".join([name, *cells, ", ".join(others), slow, time_cell, said]) + " |"


def _outcome(rows: Sequence[Row]) -> str:
    worst = max((row.outcome for row in rows), key=OUTCOMES.index, default="")
    return f"**{worst}**" if worst in FAILURES else worst


def counted(rows: Iterable[Row]) -> str:
    """Number of rows with each outcome."""
    counts = Counter(row.outcome for row in rows)
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
