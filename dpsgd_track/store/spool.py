"""One process's records as a file that is appended to, and that a killed process leaves readable.

A file is a line `dpsgd-track spool 1` and then frames: length (u32), checksum (u32), kind (u8),
content. The checksum (CRC-32) covers kind and content. A frame that is cut short or does not fit
its checksum ends what can be read. Kinds:

- `J`: an event, a JSON object. `do` says what: run, params, tags, file, end. `time_ms` says when.
- `K`: a run, and names of metrics, under a number (u32), as JSON; the numbers are the file's own.
- `M`: values of those metrics in one step: number (u32), step (i64), Unix time in ms (i64), and the
  values (float64).

Every record is handed to the operating system in one write, so that it outlives the process. It
is not forced to the disk: a machine that loses power may lose the last half minute.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import struct
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsgd_track.store.client import TrackingError

SCHEMA_VERSION = 1
MAGIC = f"dpsgd-track spool {SCHEMA_VERSION}\n".encode()
CONTROL, RECORDS = ".control", ".records"
"""Suffixes: what creates and ends runs, and what workers observe. Control files are read first."""
FILES = "files"
"""Folder beside the spool files that holds files to be uploaded."""

_FRAME = struct.Struct("<IIB")
_METRICS = struct.Struct("<Iqq")
_EVENT, _KEYS, _VALUES = ord("J"), ord("K"), ord("M")
_MAX_HELD_BYTES = 64 << 20

Event = Mapping[str, Any]


def now_ms() -> int:
    """Unix time."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class MetricRow:
    """Values of one step of one run."""

    run: str
    keys: tuple[str, ...]
    step: int
    time_ms: int
    values: tuple[float, ...]


class SpoolDamaged(Exception):
    """A spool file does not begin as this version begins one; the message names it."""


class SpoolWriter:
    """Appends one process's records to a file of its own. Calls may come from any thread.

    Where the disk is full, records are held in memory and written as soon as there is room; what
    could not be written by `close` makes it raise. Without a folder, nothing is kept.
    """

    def __init__(
        self,
        folder: Path | None,
        name: str,
        *,
        tell: Callable[[str], object] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        """
        Args:
            folder: the group's; None keeps nothing.
            name: of the process, with one of the suffixes CONTROL and RECORDS.
            tell: is told, once, that the disk is full.
        """
        self._folder = folder
        self._tell = tell
        self._lock = threading.Lock()
        self._tables: dict[tuple[str, tuple[str, ...]], tuple[int, struct.Struct]] = {}
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._trouble = ""
        self._end = 0
        self._descriptor = -1
        self.path = Path(os.devnull)
        """The file; nowhere without a folder."""
        if folder is not None:
            self.path, self._descriptor = _create(folder, name)
            self._append(MAGIC)

    def log_metrics(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        """Keep one step's values, stamped with the time of this call."""
        if self._folder is None:
            return
        keys = tuple(metrics)
        with self._lock:
            number, values = self._tables.get((run, keys)) or self._define(run, keys)
            content = _METRICS.pack(number, step, now_ms()) + values.pack(*metrics.values())
            self._append(_framed(_VALUES, content))

    def log_params(self, run: str, params: Mapping[str, str]) -> None:
        """Keep params."""
        self.add("params", run, params=dict(params))

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Keep tags; a later value of a tag replaces an earlier one."""
        self.add("tags", run, tags=dict(tags))

    def upload(self, run: str, path: Path, folder: str = "") -> None:
        """Keep a file, to become an artifact of the run in `folder`."""
        if self._folder is not None:
            self.add("file", run, path=self._kept(path), folder=folder)

    def add(self, what: str, run: str, **values: object) -> None:
        """Keep an event."""
        if self._folder is None:
            return
        event = {"do": what, "run": run, "time_ms": now_ms(), **values}
        with self._lock:
            self._append(_framed(_EVENT, json.dumps(event).encode()))

    def close(self) -> None:
        """Write what is held. Closing twice does nothing.

        Raises:
            TrackingError: something could not be written.
        """
        with self._lock:
            if self._descriptor < 0:
                return
            if self._held:
                self._flush()
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
            if self._held:
                raise TrackingError(self._complaint())

    def _define(self, run: str, keys: tuple[str, ...]) -> tuple[int, struct.Struct]:
        table = (len(self._tables), struct.Struct(f"<{len(keys)}d"))
        content = json.dumps({"number": table[0], "run": run, "keys": keys}).encode()
        self._append(_framed(_KEYS, content))
        # Not before it is kept: nobody could read the values that follow it.
        self._tables[run, keys] = table
        return table

    def _append(self, frame: bytes) -> None:
        assert self._descriptor >= 0, "the spool is closed"
        if self._held:
            # In order: there may be room by now.
            self._flush()
        if self._held:
            self._hold(frame)
            return
        try:
            self._write(frame)
        except OSError as error:
            self._trouble = os.strerror(error.errno or errno.EIO)
            self._hold(frame)
            self._tell(f"{self._complaint()} They are held in memory; training goes on.")

    def _flush(self) -> None:
        try:
            while self._held:
                self._write(self._held[0])
                self._held_bytes -= len(self._held.pop(0))
        except OSError as error:
            self._trouble = os.strerror(error.errno or errno.EIO)

    def _hold(self, frame: bytes) -> None:
        if self._held_bytes + len(frame) > _MAX_HELD_BYTES:
            raise TrackingError(self._complaint())
        self._held.append(frame)
        self._held_bytes += len(frame)

    def _write(self, frame: bytes) -> None:
        """Append `frame` whole, or not at all."""
        written = os.write(self._descriptor, frame)
        try:
            while written < len(frame):
                written += os.write(self._descriptor, frame[written:])
        except OSError:
            os.ftruncate(self._descriptor, self._end)
            raise
        self._end += written

    def _complaint(self) -> str:
        return (
            f"spool_dir={str(self._folder)!r}: expected room for records, but {len(self._held)} "
            f"could not be written. {self._trouble}."
        )

    def _kept(self, path: Path) -> str:
        """Where the file stays as it is now: a hard link, else a copy, else the file itself."""
        assert self._folder is not None
        place = Path(FILES) / uuid.uuid4().hex[:12]
        target = self._folder / place / path.name
        try:
            # The group's own folder is not made anew where it was removed.
            (self._folder / FILES).mkdir(exist_ok=True)
            target.parent.mkdir()
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
        except OSError:
            target.unlink(missing_ok=True)
            return str(path.absolute())
        return str(place / path.name)


def _create(folder: Path, name: str) -> tuple[Path, int]:
    """A new file, numbered so that names are in order of creation, locked while it is written."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
    while True:
        taken = [int(file.name[:6]) for file in spool_files(folder)]
        path = folder / f"{max(taken, default=0) + 1:06d}-{name}"
        # Two processes may use the same name at the same time.
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, flags, 0o666)
            break
    # Who asks whether it is being written holds the lock for a moment.
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return path, descriptor


def _framed(kind: int, content: bytes) -> bytes:
    checksum = zlib.crc32(content, zlib.crc32(bytes((kind,))))
    return _FRAME.pack(len(content), checksum, kind) + content


def spool_files(folder: Path) -> list[Path]:
    """The spool files of a group, in order of creation, control files first."""
    found = [
        file
        for file in folder.iterdir()
        if file.suffix in (CONTROL, RECORDS) and file.name[:6].isdigit()
    ]
    return sorted(found, key=lambda file: (file.suffix != CONTROL, file.name))


def is_being_written(file: Path) -> bool:
    """Whether the process that writes a spool file is alive."""
    with file.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class SpoolReader:
    """Reads a spool file from front to back, as far as it is whole; it may grow meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        """Byte up to which records were read."""
        self._tables: dict[int, tuple[str, tuple[str, ...], struct.Struct]] = {}

    def size(self) -> int:
        """Bytes of the file, torn ones included."""
        return self.path.stat().st_size

    def records(self) -> Iterator[tuple[int, MetricRow | Event]]:
        """What was not read yet, each with the byte after it; `offset` goes on as it is taken.

        Raises:
            SpoolDamaged: the file is of another version.
        """
        with self.path.open("rb") as file:
            if self.offset == 0:
                magic = file.read(len(MAGIC))
                if not magic.endswith(b"\n") and MAGIC.startswith(magic):
                    return
                if magic != MAGIC:
                    raise SpoolDamaged(
                        f"{self.path}: expected a spool file of version {SCHEMA_VERSION}. "
                        "Ship it with the dpsgd-track that wrote it, or move its folder away."
                    )
                self.offset = len(MAGIC)
            file.seek(self.offset)
            while True:
                header = file.read(_FRAME.size)
                if len(header) < _FRAME.size:
                    return
                length, checksum, kind = _FRAME.unpack(header)
                content = file.read(length)
                if len(content) < length:
                    return
                if zlib.crc32(content, zlib.crc32(header[-1:])) != checksum:
                    return
                self.offset += _FRAME.size + length
                if kind == _KEYS:
                    table = json.loads(content)
                    keys = tuple(table["keys"])
                    layout = struct.Struct(f"<{len(keys)}d")
                    self._tables[table["number"]] = (table["run"], keys, layout)
                elif kind == _VALUES:
                    number, step, time_ms = _METRICS.unpack_from(content)
                    run, keys, layout = self._tables[number]
                    values = layout.unpack_from(content, _METRICS.size)
                    yield self.offset, MetricRow(run, keys, step, time_ms, values)
                elif kind == _EVENT:
                    yield self.offset, json.loads(content)
