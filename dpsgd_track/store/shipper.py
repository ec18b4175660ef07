"""Ships a spooled group to a tracking store, with retries, and checks that it arrived.

Sending is idempotent: a store keeps one of several equal (metric, step, time, value), params and
tags may be set again, a file replaces itself, and a run is found by the key it carries. So records
that were not acknowledged are simply sent again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dpsgd_track.record import names
from dpsgd_track.record.run import Status
from dpsgd_track.redaction import redact_uri
from dpsgd_track.store.client import is_about_the_record, one_line
from dpsgd_track.store.contents import Contents, Name, Points
from dpsgd_track.store.history import all_points
from dpsgd_track.store.run_tree import MAX_PARAM_LENGTH
from dpsgd_track.store.spool import (
    CONTROL,
    Event,
    MetricRow,
    SpoolDamaged,
    SpoolReader,
    spool_files,
)
from dpsgd_track.store.spooled import Busy, KeptFile, SpooledGroup, SpooledRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

Entity = TypeVar("Entity")

MAX_METRICS_PER_BATCH = 1000
MAX_PARAMS_PER_BATCH = 100
MAX_TAGS_PER_BATCH = 100
ROWS_AT_ONCE, VALUES_AT_ONCE = 200, 20_000
"""Most steps and values of a backlog held in memory at once; a single step may have more values."""
_REPORT_TIMEOUT_S = 10.0


class NotThereYet(Exception):
    """Runs kept by another machine are not in the store yet; call again later."""


class Shipper:
    """Ships one group to one store. The caller holds the group."""

    def __init__(
        self, group: SpooledGroup, client: MlflowClient, tracking_uri: str, experiment_id: str
    ) -> None:
        """
        Args:
            client: client of the store at `tracking_uri`.
            experiment_id: experiment in which runs are created.
        """
        self.group = group
        self._client = client
        self._experiment_id = experiment_id
        self._target = redact_uri(tracking_uri)
        state = group.state().get(self._target, {})
        self.run_ids: dict[str, str] = {}
        """Id in the store of each run, by its key."""
        self._acknowledged: dict[str, int] = {}
        if state.get("experiment_id") == experiment_id:
            self.run_ids, self._acknowledged = state["run_ids"], state["acknowledged"]
        self._readers: dict[str, SpoolReader] = {}
        self.refused: dict[str, str] = {}
        """Reasons that records of spool files can't be shipped, by the name of the file."""
        self._is_sure_of_runs = False

    def ship(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Ship the records that are not acknowledged yet.

        Returns:
            True if there were any.

        Raises:
            Exception: the store is unreachable, or refuses everything; call again later.
        """
        self._make_sure_of_runs()
        before = dict(self._acknowledged)
        ends: list[tuple[str, int, Event]] = []
        read: dict[str, int] = {}
        for file, offset, rows, event in self._unread():
            if should_stop():
                return True
            if offset <= self._acknowledged.get(file.name, 0):
                continue
            self._attempt(file, partial(self._ship_rows, rows))
            # The end of a run is held back until all earlier records are in the store.
            if event is not None and event["do"] in ("end", "status"):
                ends.append((file.name, offset, event))
            elif event is not None:
                if event["do"] == "reopen":
                    # It had ended before it was shipped, and was resumed.
                    ends = [end for end in ends if end[2]["run"] != event["run"]]
                self._attempt(file, partial(self._ship_event, event))
            read[file.name] = offset
            if not ends or file.suffix != CONTROL:
                self._acknowledge(file.name, offset)
        for name, offset, event in ends:
            self._attempt(self.group.folder / name, partial(self._end, event))
            self._acknowledge(name, offset)
        for name, offset in read.items():
            self._acknowledge(name, offset)
        if self._acknowledged != before:
            self._save()
        return bool(read)

    def _unread(self) -> Iterator[tuple[Path, int, list[MetricRow], Event | None]]:
        """Unread records, control files first, each with its file.

        Files of workers are listed only after control files were read to their end: a worker may
        have come and gone meanwhile, and its observations go before the end of its run.
        """
        for is_control in (True, False):
            for file in spool_files(self.group.folder):
                if (file.suffix == CONTROL) != is_control:
                    continue
                try:
                    for chunk in _chunks(self._reader(file)):
                        yield file, *chunk
                except SpoolDamaged as error:
                    self.refused.setdefault(file.name, str(error))

    def is_there(self) -> None:
        """Raise if the store does not answer; a cheap check."""
        self._client.get_experiment(self._experiment_id)

    # A failed attempt leaves its file at the old offset, so that the next process begins there.
    def _acknowledge(self, name: str, offset: int) -> None:
        if name not in self.refused:
            self._acknowledged[name] = offset

    def forget_acknowledged(self) -> None:
        """Send everything again the next time: a proxy may have taken it and handed nothing on."""
        self._acknowledged.clear()
        self._readers.clear()
        self._save()

    def _reader(self, file: Path) -> SpoolReader:
        return self._readers.setdefault(file.name, SpoolReader(file))

    def _attempt(self, file: Path, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            if not is_about_the_record(error):
                # Records that were read but not sent have to be read again.
                self._readers.clear()
                raise
            self.refused.setdefault(file.name, one_line(error))

    def _save(self) -> None:
        state = self.group.state()
        state[self._target] = {
            "experiment_id": self._experiment_id,
            "run_ids": self.run_ids,
            "acknowledged": self._acknowledged,
        }
        try:
            self.group.save_state(state)
        except OSError:
            # The next process only sends more than it needs to.
            return

    def _make_sure_of_runs(self) -> None:
        """Look up the runs in the store: an interrupted call may have created one."""
        if self._is_sure_of_runs:
            return
        if self.group.is_part:
            # Requests by every machine for all runs of a large group would overload a server.
            run_ids = {key: run_id for key in self.run_ids if (run_id := self._look_up(key))}
        else:
            run_ids = {
                key: before if (before := self.run_ids.get(key, "")) in ids else ids[0]
                for key, ids in self._found().items()
            }
        if not self.run_ids.items() <= run_ids.items():
            # The database is no longer the same.
            self._acknowledged.clear()
        self.run_ids = run_ids
        self._is_sure_of_runs = True

    def _found(self) -> dict[str, list[str]]:
        """Ids of the group's runs in the store, by their keys."""
        ids: dict[str, list[str]] = defaultdict(list)
        for run in self._search():
            if key := run.data.tags.get(names.KEY):
                ids[key].append(str(run.info.run_id))
        return ids

    def remove_doubles(self) -> None:
        """Delete duplicate runs, which the store created after the request had timed out."""
        for key, ids in self._found().items():
            for run_id in set(ids) - {self.run_ids.get(key, ids[0])}:
                self._client.delete_run(run_id)

    def _search(self) -> Iterator[Any]:
        token = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id],
                filter_string=f"tags.`{names.GROUP}` = '{self.group.name}'",
                max_results=500,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    def _ship_event(self, event: Event) -> None:
        match event["do"]:
            case "run":
                self._create(event)
            case "join":
                self._find(event["run"])
            case "reopen":
                self._client.update_run(self._id(event["run"]), Status.RUNNING)
            case "params":
                self._log_params(self._id(event["run"]), event["params"])
            case "tags":
                self._set_tags(self._id(event["run"]), event["tags"])
            case "input":
                self._log_input(self._id(event["run"]), event["name"], event["digest"])
            case "file":
                self._upload(self._id(event["run"]), KeptFile.of(event, self.group.folder))

    def _upload(self, run_id: str, file: KeptFile) -> None:
        if damage := file.damage():
            raise LookupError(damage)
        self._client.log_artifact(run_id, str(file.path), file.folder or None)

    def _find(self, key: str) -> None:
        if key in self.run_ids:
            return
        run_id = self._look_up(key)
        if not run_id:
            raise NotThereYet(f"Node 0 has not shipped {self.group.name} to there yet.")
        self.run_ids[key] = run_id

    def _look_up(self, key: str) -> str:
        """Id of a run in the store; empty if it is not there."""
        query = f"tags.`{names.KEY}` = '{key}'"
        order = ["attributes.start_time ASC"]
        runs = self._client.search_runs([self._experiment_id], query, max_results=1, order_by=order)
        return str(runs[0].info.run_id) if runs else ""

    def _id(self, key: str) -> str:
        """Id of a run in the store.

        Raises:
            LookupError: the launcher's record of it is missing or damaged.
        """
        if key not in self.run_ids:
            raise LookupError(f"Records belong to run {key}, which the launcher's file lacks.")
        return self.run_ids[key]

    def _create(self, event: Event) -> None:
        key = event["run"]
        if key not in self.run_ids:
            tags = {**event["tags"], names.KEY: key}
            if parent := tags.get(names.PARENT_RUN):
                tags[names.PARENT_RUN] = self._id(parent)
            self._is_sure_of_runs = False
            run = self._client.create_run(
                self._experiment_id, start_time=event["time_ms"], tags=tags, run_name=event["title"]
            )
            self._is_sure_of_runs = True
            self.run_ids[key] = str(run.info.run_id)
        self._log_params(self.run_ids[key], event["params"])

    def _end(self, event: Event) -> None:
        if event["do"] == "status":
            self._client.update_run(self._id(event["run"]), event["status"])
        elif event["status"] != Status.ELSEWHERE:
            run_id = self._id(event["run"])
            self._client.set_terminated(run_id, event["status"], event["time_ms"])

    def _log_params(self, run_id: str, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        entities = [Param(key, storable(value)) for key, value in params.items()]
        for batch in _batches(entities, MAX_PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=batch)

    def _set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        entities = [RunTag(key, storable(value)) for key, value in tags.items()]
        for batch in _batches(entities, MAX_TAGS_PER_BATCH):
            self._client.log_batch(run_id, tags=batch)

    def _log_input(self, run_id: str, name: str, digest: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(storable(name), digest, source_type="dpsgd-track", source=storable(name))
        tags = [InputTag("mlflow.data.context", "training")]
        self._client.log_inputs(run_id, datasets=[DatasetInput(data, tags)])

    def _ship_rows(self, rows: Sequence[MetricRow]) -> None:
        from mlflow.entities import Metric

        metrics: dict[str, list[Metric]] = defaultdict(list)
        for row in rows:
            metrics[row.run] += [
                Metric(key, value, row.time_ms, row.step)
                for key, value in zip(row.keys, row.values, strict=True)
            ]
        problem: Exception | None = None
        for run, entities in metrics.items():
            try:
                run_id = self._id(run)
            except LookupError as error:
                problem = error
                continue
            for batch in _batches(entities, MAX_METRICS_PER_BATCH):
                problem = self._log_metrics(run_id, batch) or problem
        if problem is not None:
            raise problem

    def _log_metrics(self, run_id: str, batch: Sequence[Metric]) -> Exception | None:
        """Log all of `batch`; one that the store refuses does not affect the others."""
        try:
            self._client.log_batch(run_id, metrics=batch)
        except Exception as error:
            if not is_about_the_record(error):
                raise
            if len(batch) == 1 or not _is_about_a_value(error):
                return error
            half = len(batch) // 2
            problems = [self._log_metrics(run_id, part) for part in (batch[:half], batch[half:])]
            return next(filter(None, problems), None)
        return None

    def differences(self, *, count: bool = True) -> list[str]:
        """Records that the store lacks or holds differently; empty if all are there.

        Damage in the spool comes first.

        Args:
            count: compare every value of every metric; else only that each metric, param, status
                and file is there.
        """
        found: list[str] = []
        contents = Contents(self.group)
        whole: set[str] = set()
        for run in contents.runs.values():
            if run.key not in self.run_ids:
                found.append(f"{run.title or run.key}: the run is not there")
                continue
            stored = self._client.get_run(self.run_ids[run.key])
            problems = list(self._differences(run, stored))
            if run.status is Status.ELSEWHERE:
                # As node 0 recorded it in the store.
                run.status, run.tags = Status(stored.info.status), dict(stored.data.tags)
            metrics = contents.metrics[run.key]
            if missing := metrics - stored.data.metrics.keys():
                problems.append(f"{len(missing)} of {len(metrics)} metrics are missing")
            else:
                whole.add(run.key)
            found += [f"{run.title or run.key}: {line}" for line in problems]
        for points in contents.parts(whole.__contains__) if count else ():
            found += self._other_values(contents.runs, points)
        return contents.damage() + found

    def _other_values(
        self, runs: Mapping[str, SpooledRun], points: Mapping[Name, Points]
    ) -> Iterator[str]:
        metrics: dict[str, list[str]] = defaultdict(list)
        for run, metric in points:
            metrics[run].append(metric)
        for run, asked in metrics.items():
            for metric, held in all_points(self._client, self.run_ids[run], asked):
                wanted = points[run, metric]
                if len(held) != len(wanted) or set(held) != wanted:
                    counts = f"{len(held)} values instead of {len(wanted)}"
                    yield f"{runs[run].title or run}: {metric}: {counts}"

    def _differences(self, run: SpooledRun, stored: Run) -> Iterator[str]:
        if run.status is Status.RUNNING:
            yield "it did not end"
        if run.status not in (stored.info.status, Status.ELSEWHERE):
            yield f"its status is {stored.info.status}, not {run.status}"
        run_id = self.run_ids[run.key]
        for what, kept, held in (
            ("params", run.params, stored.data.params),
            ("tags", run.tags, stored.data.tags),
        ):
            if missing := kept.keys() - held.keys():
                yield f"{len(missing)} of {len(kept)} {what} are missing"
        for key, param in run.params.items():
            ours = storable(param)[:MAX_PARAM_LENGTH]
            if (theirs := stored.data.params.get(key, ours)) != ours:
                yield f"its param {key} is {theirs[:80]!r}, not {ours[:80]!r}"
        inputs = stored.inputs.dataset_inputs if stored.inputs else []
        if missing := run.inputs.keys() - {each.dataset.digest for each in inputs}:
            yield f"{len(missing)} of {len(run.inputs)} datasets are missing"
        # The last of several files of one name stays.
        files = {(file.folder, file.path.name): file for file in run.files}
        for folder in {where for where, _ in files}:
            artifacts = self._client.list_artifacts(run_id, folder or None)
            listed = {artifact.path: artifact.file_size for artifact in artifacts}
            for (where, name), file in files.items():
                place = f"{where}/{name}" if where else name
                if where != folder:
                    continue
                if place not in listed:
                    yield f"{place} is missing"
                elif listed[place] not in (None, size := file.num_bytes):
                    yield f"{place} has {listed[place]} bytes instead of {size}"


def settle(
    shipper: Shipper, *, count: bool, should_stop: Callable[[], bool] = lambda: False
) -> list[str]:
    """Ship a group that nobody writes to, and remove its spool once the store is seen to have all.

    Args:
        count: compare every value of every metric.
    Returns:
        Records that the store lacks or holds differently; empty if the spool was removed.

    Raises:
        Busy: another process writes to it.
        Exception: the store is unreachable.
    """
    sizes: dict[str, int] = {}
    # A comparison may have added its report meanwhile.
    while sizes != (sizes := _sizes_at_rest(shipper.group)):
        while shipper.ship(should_stop):
            if should_stop():
                return ["not everything was shipped"]
        if differences := shipper.differences(count=count):
            shipper.forget_acknowledged()
        if problems := [*shipper.refused.values(), *differences]:
            return problems
    if not shipper.group.is_part:
        shipper.remove_doubles()
    if should_stop():
        return ["it was not removed from the spool"]
    shipper.group.remove()
    return []


def _sizes_at_rest(group: SpooledGroup) -> dict[str, int]:
    """Sizes of the spool files once nobody writes to them: a comparison adds its report."""
    deadline = time.monotonic() + _REPORT_TIMEOUT_S
    while group.is_being_written():
        if time.monotonic() > deadline:
            raise Busy(f"{group.name}: another process writes to it. Wait for it to end.")
        time.sleep(0.02)
    return group.sizes()


def storable(text: str) -> str:
    """`text` without characters that no database accepts: NUL and lone surrogates."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _batches(entities: Sequence[Entity], size: int) -> Iterator[Sequence[Entity]]:
    for start in range(0, len(entities), size):
        yield entities[start : start + size]


def _is_about_a_value(error: Exception) -> bool:
    return getattr(error, "error_code", "") in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


def _chunks(reader: SpoolReader) -> Iterator[tuple[int, list[MetricRow], Event | None]]:
    """Records of a file in order: rows, the event after them, and the offset of their end."""
    rows: list[MetricRow] = []
    num_values = 0
    offset = reader.offset
    for offset, record in reader.records():
        if isinstance(record, MetricRow):
            rows.append(record)
            num_values += len(record.values)
            if len(rows) < ROWS_AT_ONCE and num_values < VALUES_AT_ONCE:
                continue
            yield offset, rows, None
        else:
            yield offset, rows, record
        rows, num_values = [], 0
    # Past lines that are not records: damaged ones, and the one that closes the file.
    if rows or reader.offset > offset:
        yield reader.offset, rows, None
