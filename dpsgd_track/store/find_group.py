"""Finds a group in the store, or in the spool while the store does not have all of it."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dpsgd_track.config import Settings
from dpsgd_track.record import names
from dpsgd_track.record.run import Group, Marks, Status
from dpsgd_track.redaction import redact_uri
from dpsgd_track.store.client import one_line
from dpsgd_track.store.history import History
from dpsgd_track.store.reader import (
    GroupNotFound,
    assembled,
    find_group,
    group_of,
    key_of,
    metrics_of_trajectory,
    open_client,
    runs_of,
)
from dpsgd_track.store.spool import CONTROL, SpoolDamaged, SpoolWriter, now_ms
from dpsgd_track.store.spooled import SpooledGroup, SpooledRun, spooled_groups
from dpsgd_track.store.sqlite_file import absolute_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Result = TypeVar("Result")


@dataclass(frozen=True)
class Found:
    """A group, and the place it was read from."""

    group: Group
    settings: Settings
    spooled: SpooledGroup | None = None
    """Its folder in the spool; None if it was read from the store."""

    def attach(self, files: Sequence[tuple[Path, str]], marks: Mapping[str, Marks]) -> None:
        """Add files, each in an artifact folder, to the group's run, and marks to runs.

        They are added where the group was read: those in the spool are shipped with the rest of it.

        Args:
            marks: by the id of the run there.
        """
        if self.spooled is not None:
            with contextlib.suppress(FileNotFoundError):
                self._spool(self.spooled, files, marks)
                return
        client = open_client(self.settings.tracking_uri)
        # If it was spooled, the store has all of it by now, with other ids for the runs.
        wanted = self.group.name if self.spooled else self.group.run_id
        group_run = find_group(client, self.settings, wanted)
        for path, folder in files:
            client.log_artifact(group_run.info.run_id, str(path), folder)
        for run in runs_of(client, group_run) if marks else ():
            mark = marks.get(run.info.run_id) or marks.get(run.data.tags.get(names.KEY, ""))
            if mark is not None:
                _mark(client, run, mark)

    def _spool(
        self,
        spooled: SpooledGroup,
        files: Sequence[tuple[Path, str]],
        marks: Mapping[str, Marks],
    ) -> None:
        """Add them to the spool; raises FileNotFoundError if that was removed meanwhile."""
        runs = spooled.runs(with_rows=False)
        writer = SpoolWriter(spooled.folder, f"attached{CONTROL}")
        for path, folder in files:
            writer.upload(self.group.run_id, path, folder)
        for key, mark in marks.items():
            if key not in runs:
                # A resumed group has other runs in the store alone.
                continue
            writer.set_tags(key, mark.tags)
            if mark.metrics:
                writer.log_metrics(key, 0, mark.metrics)
            status = runs[key].status
            has_failure = bool(runs[key].tags.get(names.FAILURE))
            if (shown := mark.status_after(status, has_failure=has_failure)) is not status:
                writer.add("status", key, status=shown)
        # Without its folder, it could not close.
        writer.path.stat()
        writer.close()
        # Writes to a folder renamed for removal are lost with it.
        writer.path.stat()


def _mark(client: MlflowClient, run: Run, mark: Marks) -> None:
    """Add `mark` to a run in the store."""
    from mlflow.entities import Metric, RunTag

    run_id = run.info.run_id
    time_ms = now_ms()
    client.log_batch(
        run_id,
        metrics=[Metric(name, value, time_ms, 0) for name, value in mark.metrics.items()],
        tags=[RunTag(name, value) for name, value in mark.tags.items()],
    )
    status = Status(run.info.status)
    has_failure = bool(run.data.tags.get(names.FAILURE))
    if (shown := mark.status_after(status, has_failure=has_failure)) is not status:
        client.update_run(run_id, shown)


def read_group_anywhere(settings: Settings, wanted: str, tell: Callable[[str], object]) -> Found:
    """The group that `wanted` names, with the trajectory of each mode run.

    Args:
        wanted: a group's name, a run id, or `latest`: the newest of both places.
        tell: called with a line if it was read from the spool.

    Raises:
        GroupNotFound: nothing matches.
        Exception: the store does not answer, and the spool does not have the group.
    """
    local = _newest_spooled(settings, wanted, tell)
    if local is not None and wanted != "latest":
        return _spooled(settings, local[0], tell)
    try:
        client = open_client(settings.tracking_uri)
        run = find_group(client, settings, wanted)
    except Exception as error:
        if local is None:
            raise
        if not isinstance(error, GroupNotFound):
            where = redact_uri(settings.tracking_uri)
            tell(f"{where} does not answer: {one_line(error)}")
        return _spooled(settings, local[0], tell)
    if local is not None and local[1].start_ms > (run.info.start_time or 0):
        return _spooled(settings, local[0], tell)
    return Found(group_of(client, run), settings)


def _spooled(settings: Settings, group: SpooledGroup, tell: Callable[[str], object]) -> Found:
    tell(f"Read in {group.folder}, as the store does not have all of {group.name} yet.")
    recorded = read_spooled(group)
    run = group.group_run()
    if run is not None and run.is_resumed:
        client = open_client(settings.tracking_uri)
        recorded = _merged(group_of(client, find_group(client, settings, group.name)), recorded)
    return Found(recorded, settings, group)


def _merged(stored: Group, spooled: Group) -> Group:
    """A resumed group: runs from the spool, and the others from the store."""
    newer = {run.key: run for run in spooled.runs if run.run_id}
    runs = tuple(newer.pop(run.key, run) for run in stored.runs)
    # Profiles are not resumed.
    return replace(spooled, runs=(*runs, *newer.values()), timed_runs=stored.timed_runs)


def _newest_spooled(
    settings: Settings, wanted: str, tell: Callable[[str], object]
) -> tuple[SpooledGroup, SpooledRun] | None:
    """The newest matching group of the spool, with its run, if the store lacks any of it."""
    target = redact_uri(absolute_uri(settings.tracking_uri))
    candidates = []
    for group in spooled_groups(Path(settings.spool_dir)):
        try:
            run = group.group_run()
            if run is None or _is_shipped(group, target):
                continue
            is_meant = wanted in ("latest", group.name) or wanted in group.runs(with_rows=False)
            if is_meant or wanted in group.state().get(target, {}).get("run_ids", {}).values():
                candidates.append((group, run))
        except FileNotFoundError:
            # A group that is gone meanwhile is in the store.
            continue
        except SpoolDamaged as error:
            if wanted == group.name:
                raise GroupNotFound(str(error)) from error
            tell(str(error))
    return max(candidates, key=lambda pair: pair[1].start_ms, default=None)


def _is_shipped(group: SpooledGroup, target: str) -> bool:
    acknowledged = group.state().get(target, {}).get("acknowledged", {})
    return bool(acknowledged) and group.sizes() == acknowledged


def read_spooled(spooled: SpooledGroup) -> Group:
    """The group in a folder of the spool, as far as it is recorded.

    Raises:
        GroupNotFound: its launcher died before completing the first record.
    """
    runs = spooled.runs()
    group = next((run for run in runs.values() if run.kind == names.KIND_GROUP), None)
    if group is None:
        raise GroupNotFound(
            f"group={spooled.name!r}: expected the group's own run in {spooled.folder}."
        )
    modes = [run for run in runs.values() if run.kind == names.KIND_MODE]
    newest = {key_of(run.tags): run for run in sorted(modes, key=lambda run: run.start_ms)}
    kept = {run.key for run in newest.values()}
    ranks = [run for run in runs.values() if run.kind == names.KIND_RANK and run.parent in kept]
    return assembled(
        name=spooled.name,
        kept=_InSpool(group),
        start_time_ms=group.start_ms,
        newest={key: _InSpool(run) for key, run in newest.items()},
        rank_statuses=Counter(run.status for run in ranks),
        superseded=len(modes) - len(newest),
    )


@dataclass(frozen=True)
class _InSpool:
    """A run in the spool, read as one in the store."""

    run: SpooledRun

    @property
    def run_id(self) -> str:
        return self.run.key

    @property
    def status(self) -> Status:
        return self.run.status

    @property
    def tags(self) -> Mapping[str, str]:
        return self.run.tags

    @property
    def metrics(self) -> Mapping[str, float]:
        return self.run.last_metrics()

    def read(self, name: str, load: Callable[[Path], Result]) -> Result:
        file = next((file for file in reversed(self.run.files) if file.path.name == name), None)
        if file is None:
            raise LookupError(f"{name} was not written")
        if damage := file.damage():
            raise ValueError(damage)
        return load(file.path)

    def history(self) -> History:
        history: History = defaultdict(dict)
        for row in self.run.rows:
            for metric, value in zip(row.keys, row.values, strict=True):
                history[metric][row.step] = value
        return {metric: history[metric] for metric in metrics_of_trajectory(history)}
