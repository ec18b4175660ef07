"""What a spooled group holds, without holding it: counted once, and handed out a part at a time.

The values of a long run are far larger than what is said of them. They are read again from the
files for every part, which costs much less than asking a store for them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from dpsgd_track.store import exact
from dpsgd_track.store.spool import MetricRow, SpoolReader, spool_files
from dpsgd_track.store.spooled import SpooledGroup, SpooledRun, records_of

MAX_POINTS = 100_000
"""Values in a part, unless a single metric has more. With the store's answer beside it, one takes
some 350 bytes."""

Name = tuple[str, str]
"""Key of a run, and metric."""
Points = set[tuple[int, int, float | None]]
"""(step, Unix time in ms, value as a store keeps it) of each."""


class Inventory:
    """The runs of a group, and how many values of which metric each of them logged."""

    def __init__(self, group: SpooledGroup) -> None:
        self.runs: dict[str, SpooledRun] = {}
        """By key, in order of creation; without their rows."""
        self.metrics: dict[str, set[str]] = defaultdict(set)
        """By run."""
        self._sizes: Counter[Name] = Counter()
        self._files: dict[str, dict[Path, None]] = defaultdict(dict)
        for file in spool_files(group.folder):
            self._count(file, group.folder)

    def _count(self, file: Path, folder: Path) -> None:
        num_rows: Counter[tuple[str, tuple[str, ...]]] = Counter()
        for record in records_of(file):
            if isinstance(record, MetricRow):
                num_rows[record.run, record.keys] += 1
            else:
                run = self.runs.setdefault(record["run"], SpooledRun(record["run"]))
                run.apply(dict(record), folder)
        for (key, metrics), count in num_rows.items():
            self.runs.setdefault(key, SpooledRun(key))
            self.metrics[key].update(metrics)
            self._files[key][file] = None
            for metric in metrics:
                self._sizes[key, metric] += count

    def __str__(self) -> str:
        files = sum(len(run.files) for run in self.runs.values())
        values = self._sizes.total()
        return f"{len(self.runs)} runs, {values:,} values of metrics and {files} files"

    def parts(self, is_wanted: Callable[[str], bool]) -> Iterator[dict[Name, Points]]:
        """The values of all runs that are wanted by their keys, at most MAX_POINTS at a time."""
        names: list[Name] = []
        size = 0
        for name, count in self._sizes.items():
            if not is_wanted(name[0]):
                continue
            if names and size + count > MAX_POINTS:
                yield self._points(names)
                names, size = [], 0
            names.append(name)
            size += count
        if names:
            yield self._points(names)

    def _points(self, names: list[Name]) -> dict[Name, Points]:
        points: dict[Name, Points] = {name: set() for name in names}
        files = dict.fromkeys(file for run, _ in names for file in self._files[run])
        columns: dict[tuple[str, tuple[str, ...]], list[tuple[int, Points]]] = {}
        for file in files:
            for _, row in SpoolReader(file).records():
                if not isinstance(row, MetricRow):
                    continue
                if (row.run, row.keys) not in columns:
                    columns[row.run, row.keys] = [
                        (column, points[row.run, metric])
                        for column, metric in enumerate(row.keys)
                        if (row.run, metric) in points
                    ]
                for column, held in columns[row.run, row.keys]:
                    held.add((row.step, row.time_ms, exact.as_stored(row.values[column])))
        return points
