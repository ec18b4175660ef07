"""What arrived in a store of a group that was logged or launched, as counts."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dpsgd_track.record import names
from dpsgd_track.record.plan import STARTED_JOB
from dpsgd_track.store.history import all_points, as_stored
from tests.support.spooled_group import logged

TITLES = ("no_dp/clip", "rank 0", "rank 1")
"""Of the runs that `spool_a_group` and `log_a_group` give values."""


@dataclass
class Tally:
    """What came of faults."""

    times: int = 0
    """Faults that were injected."""
    values: int = 0
    """Values of metrics, and files, that were looked for."""
    lost: int = 0
    """Of these, those that are not there as they were logged."""
    doubled: int = 0
    """Values and runs that are there more often than they were logged."""
    running: int = 0
    """Runs that are left RUNNING."""
    left: int = 0
    """Files outside spool, results and store, processes, and shared memory, that are left."""

    def __iadd__(self, other: Tally) -> Tally:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    @property
    def is_clean(self) -> bool:
        """True if nothing was lost, doubled or left."""
        return not (self.lost or self.doubled or self.running or self.left)


def _stored_runs(client: Any, experiment_id: str, group: str) -> list[Any]:
    query = f"tags.`{names.GROUP}` = '{group}'"
    return list(client.search_runs([experiment_id], query, max_results=1000))


def _tally_of(stored: Iterable[tuple[int, int, float | None]], wanted: Mapping[int, Any]) -> Tally:
    """One metric's points, by step."""
    held: dict[int, list[float | None]] = {}
    for step, _, value in stored:
        held.setdefault(step, []).append(value)
    lost = sum(value not in held.get(step, []) for step, value in wanted.items())
    doubled = sum(map(len, held.values())) - len(held.keys() & wanted.keys())
    return Tally(values=len(wanted), lost=lost, doubled=doubled)


def arrived(client: Any, experiment_id: str, group: str, steps: int) -> Tally:
    """What a store has of a group that `log_a_group` or `spool_a_group` logged."""
    runs = _stored_runs(client, experiment_id, group)
    by_title = {run.info.run_name: run for run in runs}
    found = Tally(running=sum(run.info.status == "RUNNING" for run in runs))
    found.doubled += len(runs) - len(by_title)
    for title in TITLES:
        run = by_title.get(title)
        seed = int(run.data.tags.get(names.RANK, 9)) if run else 0
        wanted = {step: logged(step, seed) for step in range(steps)}
        points = dict(all_points(client, run.info.run_id, logged(0))) if run else {}
        for metric in logged(0):
            values = {step: as_stored(wanted[step][metric]) for step in wanted}
            found += _tally_of(points.get(metric, ()), values)
        if title.startswith("rank"):
            files = client.list_artifacts(run.info.run_id) if run else ()
            has_file = any(file.path == "trajectory.npz" for file in files)
            found += Tally(values=1, lost=not has_file)
    return found


def told_of(work_dir: Path) -> dict[int, list[int]]:
    """Steps that rank 0 reported, by regime: a worker tells of a step once it has logged it."""
    told: dict[int, list[int]] = {number: [] for number in range(10)}
    with contextlib.suppress(FileNotFoundError):
        text = (work_dir / "progress.jsonl").read_text()
        # A line that was cut off tells of nothing.
        for line in text[: text.rfind("\n") + 1].splitlines():
            event = json.loads(line)
            if event["event"] == "step":
                told[event["regime"]].append(event["step"])
    return told


def launched(client: Any, experiment_id: str, folder: Path, group: str) -> Tally:
    """What a store has of a group that was launched in `folder`, by what its workers told.

    Of ranks other than the one that tells, only gaps count as lost while their run is not FINISHED:
    they may be behind.
    """
    runs = _stored_runs(client, experiment_id, group)
    keys = Counter(run.data.tags[names.KEY] for run in runs)
    by_key = {run.data.tags[names.KEY]: run for run in runs}
    found = Tally(running=sum(run.info.status == "RUNNING" for run in runs))
    found.doubled += len(runs) - len(keys)
    for work_dir in (folder / "results" / group / "logs").iterdir():
        if not (work_dir / "job.json").exists():
            continue
        started = STARTED_JOB.loads((work_dir / "job.json").read_bytes())
        told = told_of(work_dir)
        for regime, mode_run in enumerate(started.mode_runs):
            for rank, key in enumerate((mode_run, *started.rank_runs[regime]), -1):
                if key:
                    run = by_key.get(key)
                    found += _of_run(client, run, told[regime], is_teller=rank < 1)
    return found


def _of_run(client: Any, run: Any, told: list[int], *, is_teller: bool) -> Tally:
    points = dict(all_points(client, run.info.run_id, ["loss"])) if run else {}
    steps = [step for step, _, _ in points.get("loss", ())]
    is_whole = run is not None and run.info.status == "FINISHED"
    wanted = set(told) if is_teller or is_whole else set(range(max(steps, default=-1) + 1))
    return Tally(
        values=len(wanted),
        lost=len(wanted - set(steps)),
        doubled=len(steps) - len(set(steps)),
    )
