"""A group's folder in the spool directory: who writes it, what it holds, how far it was shipped.

SPOOL_DIR/GROUP/lock              held by the launcher, or by what ships the group
SPOOL_DIR/GROUP/000001-*.control  events of the launcher: runs, their params, tags and ends
SPOOL_DIR/GROUP/000002-*.records  what a worker observed
SPOOL_DIR/GROUP/files/            files to be uploaded
SPOOL_DIR/GROUP/state.json        for each store: ids of the runs there, bytes acknowledged

On a machine that only takes part in a group, SPOOL_DIR/GROUP+nodeR holds the like: what it adds to
runs that node 0 keeps.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dpsgd_track.record import names
from dpsgd_track.record.failure import Failure, FailureKind
from dpsgd_track.record.run import Status
from dpsgd_track.store.run_tree import tags_of
from dpsgd_track.store.spool import (
    CONTROL,
    Event,
    MetricRow,
    SpoolDamaged,
    SpoolReader,
    SpoolWriter,
    is_being_written,
    spool_files,
)

# No group's name holds it.
_PART = "+node"
_LOCK, _STATE = "lock", "state.json"
_GONE = ".gone-"


class Busy(Exception):
    """Another process writes or ships the group; the message says which group."""


@dataclass
class SpooledRun:
    """A run as far as it is known on this machine."""

    key: str
    """Its name in the spool; a store gives it an id of its own."""
    experiment: str = ""
    title: str = ""
    start_ms: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    status: Status = Status.RUNNING
    end_ms: int = 0
    files: list[tuple[Path, str]] = field(default_factory=list)
    """Files, and the artifact folder of each."""
    rows: list[MetricRow] = field(default_factory=list)
    is_joined: bool = False
    """Another machine keeps it."""
    is_resumed: bool = False
    """Of a group run: what else belongs to the group may be in the store alone."""

    @property
    def kind(self) -> str:
        """group, mode or rank."""
        return self.tags.get(names.KIND, "")

    @property
    def parent(self) -> str:
        """Key of the run above; empty for a group run."""
        return self.tags.get(names.PARENT_RUN, "")

    def apply(self, event: dict[str, Any], folder: Path) -> None:
        """Take in an event of this run."""
        match event["do"]:
            case "run":
                self.experiment, self.title = event["experiment"], event["title"]
                self.start_ms = event["time_ms"]
                self.is_resumed |= event.get("is_resumed", False)
                self.tags |= event["tags"]
                self.params |= event["params"]
            case "join":
                self.experiment, self.is_joined = event["experiment"], True
            case "reopen":
                self.status, self.end_ms = Status.RUNNING, 0
            case "params":
                self.params |= event["params"]
            case "tags":
                self.tags |= event["tags"]
            case "file":
                self.files.append((folder / event["path"], event["folder"]))
            case "end":
                self.status, self.end_ms = Status(event["status"]), event["time_ms"]

    def last_metrics(self) -> dict[str, float]:
        """The newest value of each metric."""
        newest: dict[str, tuple[int, int, float]] = {}
        for row in self.rows:
            for key, value in zip(row.keys, row.values, strict=True):
                if key not in newest or newest[key][:2] <= (row.step, row.time_ms):
                    newest[key] = (row.step, row.time_ms, value)
        return {key: value for key, (_, _, value) in newest.items()}


class SpooledGroup:
    """A group's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def name(self) -> str:
        """The group's name."""
        return self.folder.name.partition(_PART)[0]

    @property
    def is_part(self) -> bool:
        """Whether another machine keeps the group's runs."""
        return _PART in self.folder.name

    @property
    def label(self) -> str:
        """The group's name, and on another machine than node 0 which one it is."""
        return self.folder.name

    def experiment(self) -> str:
        """The experiment that it belongs to; empty where not even that was written whole."""
        found = (run.experiment for run in self.runs(with_rows=False).values() if run.experiment)
        return next(found, "")

    def hold(self) -> IO[bytes]:
        """Keep others from writing and shipping, until what is returned is closed.

        Raises:
            Busy: somebody does, or its workers are not gone yet.
        """
        held = (self.folder / _LOCK).open("ab")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = self.is_being_written()
        except BlockingIOError:
            busy = True
        if busy:
            held.close()
            raise Busy(self.name)
        return held

    def runs(self, *, with_rows: bool = True) -> dict[str, SpooledRun]:
        """Every run by its key, in order of creation.

        What a worker left in a file that cannot be read is missing; `Shipper.refused` says so.

        Raises:
            SpoolDamaged: what the launcher left cannot be read.
        """
        runs: dict[str, SpooledRun] = {}
        for file in spool_files(self.folder):
            if file.suffix != CONTROL and not with_rows:
                continue
            for record in records_of(SpoolReader(file)):
                if isinstance(record, MetricRow):
                    runs.setdefault(record.run, SpooledRun(record.run)).rows.append(record)
                else:
                    key = record["run"]
                    runs.setdefault(key, SpooledRun(key)).apply(dict(record), self.folder)
        return runs

    def group_run(self) -> SpooledRun | None:
        """The group's own run; None where not even that was written whole."""
        found = (run for run in self.runs(with_rows=False).values() if run.kind == names.KIND_GROUP)
        return next(found, None)

    def close_left_open(self) -> int:
        """End runs that nobody will end, as KILLED. The group is held by the caller.

        Returns:
            How many there were.
        """
        left = [run for run in self.runs(with_rows=False).values() if run.status is Status.RUNNING]
        if not left:
            return 0
        writer = SpoolWriter(self.folder, f"closing{CONTROL}")
        for run in reversed(left):
            if run.is_joined:
                leave(writer, [run.key])
                continue
            failure = Failure(kind=FailureKind.LAUNCHER_DIED)
            writer.set_tags(run.key, tags_of(Status.KILLED, failure))
            writer.add("end", run.key, status=Status.KILLED)
        writer.close()
        return len(left)

    def sizes(self) -> dict[str, int]:
        """Bytes of each spool file."""
        return {file.name: file.stat().st_size for file in spool_files(self.folder)}

    def is_being_written(self) -> bool:
        """Whether some process has one of its files open, to write to it."""
        return any(map(is_being_written, spool_files(self.folder)))

    def state(self) -> dict[str, Any]:
        """What each store has acknowledged, by its URI without credentials."""
        try:
            state = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # It can be found out again: runs carry their keys, and sending twice changes nothing.
            return {}
        return state if isinstance(state, dict) else {}

    def save_state(self, state: dict[str, Any]) -> None:
        """Keep it, whole or not at all."""
        partial = self.folder / f"{_STATE}.partial"
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(self.folder / _STATE)

    def remove(self) -> None:
        """Remove all of it. Whoever looks meanwhile sees all or nothing."""
        gone = self.folder.with_name(f"{_GONE}{uuid.uuid4().hex}")
        self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def records_of(reader: SpoolReader) -> Iterator[MetricRow | Event]:
    """Records of a file; none of a worker's file of another version.

    Raises:
        SpoolDamaged: a launcher's file is of another version.
    """
    try:
        for _, record in reader.records():
            yield record
    except SpoolDamaged:
        if reader.path.suffix == CONTROL:
            raise


def part_of(group: str, node_rank: int) -> str:
    """The folder of what a machine adds to a group that node 0 keeps."""
    return f"{group}{_PART}{node_rank}"


def join(writer: SpoolWriter, experiment: str, runs: Iterable[str]) -> None:
    """Take part in runs that another machine keeps."""
    for run in runs:
        writer.add("join", run, experiment=experiment)


def leave(writer: SpoolWriter, runs: Iterable[str]) -> None:
    """What this machine had to say of them was said."""
    for run in runs:
        writer.add("end", run, status=Status.ELSEWHERE)


def spooled_groups(spool_dir: Path) -> list[SpooledGroup]:
    """Groups in the spool directory, by name."""
    if not spool_dir.is_dir():
        return []
    found = []
    for folder in sorted(spool_dir.iterdir()):
        if folder.name.startswith(_GONE):
            # Its process was killed while it removed it.
            shutil.rmtree(folder, ignore_errors=True)
            continue
        # It may be removed at this moment, or be somebody else's.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            if spool_files(folder):
                found.append(SpooledGroup(folder))
    return found


def claim(spool_dir: Path, group: str) -> SpooledGroup | None:
    """A new folder for a group; None where one of that name is there.

    Raises:
        ValueError: nothing can be written there.
    """
    folder = spool_dir / group
    try:
        spool_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_room(spool_dir, error) from error
    try:
        folder.mkdir()
        check_room(folder)
    except FileExistsError:
        return None
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _no_room(spool_dir, error) from error
    return SpooledGroup(folder)


def check_room(folder: Path) -> None:
    """Raise OSError where `folder` takes no file with something in it."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        # More than a file system grants where it is full.
        probe.write(os.urandom(65536))


def _no_room(spool_dir: Path, error: OSError) -> ValueError:
    return ValueError(
        f"spool_dir={str(spool_dir)!r}: expected a folder with room to write to. "
        f"{error.strerror}. Choose another with --spool."
    )
