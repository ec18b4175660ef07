"""Contents of a spooled group: counts, values in parts, and damage.

The values of a long run take far more memory than their counts. They are read again from the files
for every part, which costs much less than querying a store for them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from dpsgd_track.record import names
from dpsgd_track.record.run import Status
from dpsgd_track.store.history import Point, as_stored
from dpsgd_track.store.spool import CONTROL, MetricRow, SpoolReader, spool_files
from dpsgd_track.store.spooled import SpooledGroup, SpooledRun, records_of

MAX_POINTS = 100_000
"""Values in a part, unless a single metric has more. With the store's answer, a value takes about
350 bytes."""

Name = tuple[str, str]
"""Key of a run, and metric."""
Points = set[Point]
"""Points as a store keeps them."""


class Contents:
    """The runs of a group, and the number of values of each metric that each run logged."""

    def __init__(self, group: SpooledGroup) -> None:
        self.runs: dict[str, SpooledRun] = {}
        """Runs by key, in order of creation; without their rows."""
        self.metrics: dict[str, set[str]] = defaultdict(set)
        """Names of metrics by run."""
        self._sizes: Counter[Name] = Counter()
        self._files: dict[str, dict[Path, None]] = defaultdict(dict)
        self._readers = [SpoolReader(file) for file in spool_files(group.folder)]
        for reader in self._readers:
            self._count(reader, group.folder)

    def _count(self, reader: SpoolReader, folder: Path) -> None:
        num_rows: Counter[tuple[str, tuple[str, ...]]] = Counter()
        for record in records_of(reader):
            if isinstance(record, MetricRow):
                num_rows[record.run, record.keys] += 1
            else:
                run = self.runs.setdefault(record["run"], SpooledRun(record["run"]))
                run.apply(dict(record), folder)
        for (key, metrics), count in num_rows.items():
            self.runs.setdefault(key, SpooledRun(key))
            self.metrics[key].update(metrics)
            self._files[key][reader.path] = None
            for metric in metrics:
                self._sizes[key, metric] += count

    def __str__(self) -> str:
        files = sum(len(run.files) for run in self.runs.values())
        values = self._sizes.total()
        return f"{len(self.runs)} runs, {values:,} values of metrics and {files} files"

    def damage(self) -> list[str]:
        """Losses of the files, by file and line. No process may still write to them.

        A worker whose mode finished has closed its file; one that was killed has not, and neither
        has a launcher that was.
        """
        problems = [problem for reader in self._readers for problem in reader.damage()]
        for reader in self._readers:
            runs = [self.runs[run] for run in reader.runs if run in self.runs]
            # Any worker may add to the group's run, however the others end.
            statuses = {run.status for run in runs if run.kind != names.KIND_GROUP}
            is_worker = reader.path.suffix != CONTROL
            if is_worker and statuses == {Status.FINISHED} and not reader.is_closed:
                end = f"it ends after line {reader.num_lines} without having been closed"
                problems.append(f"{reader.path}: {end}, though its mode finished.")
        files = {file: None for run in self.runs.values() for file in run.files}
        return problems + [problem for file in files if (problem := file.damage())]

    def parts(self, is_wanted: Callable[[str], bool]) -> Iterator[dict[Name, Points]]:
        """The values of all runs whose keys are wanted, at most MAX_POINTS at a time."""
        part: list[Name] = []
        size = 0
        for name, count in self._sizes.items():
            if not is_wanted(name[0]):
                continue
            if part and size + count > MAX_POINTS:
                yield self._points(part)
                part, size = [], 0
            part.append(name)
            size += count
        if part:
            yield self._points(part)

    def _points(self, part: list[Name]) -> dict[Name, Points]:
        points: dict[Name, Points] = {name: set() for name in part}
        files = dict.fromkeys(file for run, _ in part for file in self._files[run])
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
                    held.add((row.step, row.time_ms, as_stored(row.values[column])))
        return points
