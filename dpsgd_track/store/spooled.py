"""A group's folder in the spool directory: its lock, its contents, its shipping state.

SPOOL_DIR/GROUP/lock              held by the launcher, or by the process that ships the group
SPOOL_DIR/GROUP/000001-*.control  events of the launcher: runs, their params, tags and ends
SPOOL_DIR/GROUP/000002-*.records  observations of a worker
SPOOL_DIR/GROUP/files/            files to be uploaded
SPOOL_DIR/GROUP/state             for each store: ids of the runs there, bytes acknowledged; its
                                  CRC-32, a space, and JSON

On a machine that only takes part in a group, SPOOL_DIR/GROUP+nodeR holds the same for the records
that it adds to node 0's runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import uuid
import zlib
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
    digest,
    is_being_written,
    spool_files,
)

# No group's name contains it.
_PART = "+node"
_LOCK, _STATE = "lock", "state"
_GONE = ".gone-"


class Busy(Exception):
    """Another process writes or ships the group; the message names the group."""


@dataclass(frozen=True)
class KeptFile:
    """A file in the spool that becomes an artifact."""

    group: Path
    """The group's folder."""
    place: str
    """Path in it."""
    folder: str
    """Artifact folder."""
    num_bytes: int
    crc32: int
    """Size and checksum with which it was put there."""

    @classmethod
    def of(cls, event: Event, group: Path) -> KeptFile:
        """The file of an event, in the group's folder."""
        return cls(group, event["path"], event["folder"], event["bytes"], event["crc32"])

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.group / self.place

    def damage(self) -> str:
        """Difference from the file that was put there; empty without one."""
        try:
            # A link in the spool could lead to any file of this machine.
            if self.path.resolve() != self.group.resolve() / self.place or not self.path.is_file():
                return f"{self.path}: it is not there."
            size, crc32 = digest(self.path)
        except OSError as error:
            return f"{self.path}: {error.strerror}."
        if size != self.num_bytes:
            return f"{self.path}: {size:,} of {self.num_bytes:,} bytes are there."
        return "" if crc32 == self.crc32 else f"{self.path}: it does not fit its checksum."


@dataclass
class SpooledRun:
    """A run, as far as this machine knows it."""

    key: str
    """Key of the run in the spool; its id in a store differs."""
    experiment: str = ""
    title: str = ""
    start_ms: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    status: Status = Status.RUNNING
    inputs: dict[str, str] = field(default_factory=dict)
    """Names of the data it trained on, by their digests."""
    files: list[KeptFile] = field(default_factory=list)
    rows: list[MetricRow] = field(default_factory=list)
    is_joined: bool = False
    """True if another machine keeps the run."""
    is_resumed: bool = False
    """For a group run: True if the rest of the group may be in the store alone."""

    @property
    def kind(self) -> str:
        """group, mode or rank."""
        return self.tags.get(names.KIND, "")

    @property
    def parent(self) -> str:
        """Key of the parent run; empty for a group run."""
        return self.tags.get(names.PARENT_RUN, "")

    def apply(self, event: dict[str, Any], folder: Path) -> None:
        """Apply an event of this run."""
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
                self.status = Status.RUNNING
            case "params":
                self.params |= event["params"]
            case "tags":
                self.tags |= event["tags"]
            case "file":
                self.files.append(KeptFile.of(event, folder))
            case "input":
                self.inputs[event["digest"]] = event["name"]
            case "end" | "status":
                self.status = Status(event["status"])

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
        """True if another machine keeps the group's runs."""
        return _PART in self.folder.name

    @property
    def label(self) -> str:
        """The group's name, with the node's rank on machines other than node 0."""
        return self.folder.name

    def experiment(self) -> str:
        """The experiment that it belongs to; empty if even that record is incomplete."""
        experiments = (
            run.experiment for run in self.runs(with_rows=False).values() if run.experiment
        )
        return next(experiments, "")

    def hold(self) -> IO[bytes]:
        """Keep others from writing and shipping, until the returned lock file is closed.

        Raises:
            Busy: another process does, or workers are still alive.
        """
        lock = (self.folder / _LOCK).open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = self.is_being_written()
        except BlockingIOError:
            busy = True
        if busy:
            lock.close()
            raise Busy(self.name)
        return lock

    def runs(self, *, with_rows: bool = True) -> dict[str, SpooledRun]:
        """Every run by its key, in order of creation.

        Records in an unreadable file of a worker are missing; `Shipper.refused` reports them.

        Raises:
            SpoolDamaged: a file of the launcher cannot be read.
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
        """The group's own run; None if even that record is incomplete."""
        group_runs = (
            run for run in self.runs(with_rows=False).values() if run.kind == names.KIND_GROUP
        )
        return next(group_runs, None)

    def close_left_open(self) -> int:
        """End abandoned runs, as KILLED. The caller holds the group.

        Returns:
            The number of such runs.
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
            writer.set_tags(run.key, tags_of(Status.KILLED, failure, failure.advice(self.name)))
            writer.add("end", run.key, status=Status.KILLED)
        writer.close()
        return len(left)

    def sizes(self) -> dict[str, int]:
        """Bytes of each spool file."""
        return {file.name: file.stat().st_size for file in spool_files(self.folder)}

    def is_being_written(self) -> bool:
        """True if some process has one of its files open for writing."""
        return any(map(is_being_written, spool_files(self.folder)))

    def state(self) -> dict[str, Any]:
        """Records acknowledged by each store, by its URI without credentials."""
        try:
            checksum, _, text = (self.folder / _STATE).read_bytes().partition(b" ")
            if checksum != _checksum(text):
                return {}
            state = json.loads(text)
        except (OSError, ValueError):
            # It can be rebuilt: runs carry their keys, and sending twice changes nothing.
            return {}
        return state if _is_state(state) else {}

    def save_state(self, state: dict[str, Any]) -> None:
        """Write the state, whole or not at all."""
        partial = self.folder / f"{_STATE}.partial"
        text = json.dumps(state).encode()
        partial.write_bytes(b"%b %b" % (_checksum(text), text))
        partial.replace(self.folder / _STATE)

    def remove(self) -> None:
        """Remove the folder: other processes see all of it or nothing."""
        gone = self.folder.with_name(f"{_GONE}{uuid.uuid4().hex}")
        self.folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def records_of(reader: SpoolReader) -> Iterator[MetricRow | Event]:
    """Records of a file; none if it is a worker's file of another version.

    Raises:
        SpoolDamaged: a launcher's file is of another version.
    """
    try:
        for _, record in reader.records():
            yield record
    except SpoolDamaged:
        if reader.path.suffix == CONTROL:
            raise


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def _is_state(state: Any) -> bool:
    if not isinstance(state, dict) or not all(isinstance(each, dict) for each in state.values()):
        return False
    return all(
        isinstance(each.get("run_ids"), dict) and isinstance(each.get("acknowledged"), dict)
        for each in state.values()
    )


def part_of(group: str, node_rank: int) -> str:
    """Folder name for the records that a machine adds to a group of node 0."""
    return f"{group}{_PART}{node_rank}"


def join(writer: SpoolWriter, experiment: str, runs: Iterable[str]) -> None:
    """Take part in runs that another machine keeps."""
    for run in runs:
        writer.add("join", run, experiment=experiment)


def leave(writer: SpoolWriter, runs: Iterable[str]) -> None:
    """End this machine's part in those runs."""
    for run in runs:
        writer.add("end", run, status=Status.ELSEWHERE)


def spooled_groups(spool_dir: Path) -> list[SpooledGroup]:
    """Groups in the spool directory, by name."""
    if not spool_dir.is_dir():
        return []
    groups = []
    for folder in sorted(spool_dir.iterdir()):
        if folder.name.startswith(_GONE):
            # The process that removed it was killed meanwhile.
            shutil.rmtree(folder, ignore_errors=True)
            continue
        # It may just be being removed, or belong to another user.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            if spool_files(folder):
                groups.append(SpooledGroup(folder))
    return groups


def claim(spool_dir: Path, group: str) -> SpooledGroup | None:
    """A new folder for a group; None if one of that name exists.

    Raises:
        ValueError: the folder is not writable.
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
    """Raise OSError if no non-empty file can be written to `folder`."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        # More than fits on a full file system.
        probe.write(os.urandom(65536))


def _no_room(spool_dir: Path, error: OSError) -> ValueError:
    return ValueError(
        f"spool_dir={str(spool_dir)!r}: expected a folder with room to write to. "
        f"{error.strerror}. Choose another with --spool."
    )
