"""Append-only file of one process's records as lines of JSON, readable after a SIGKILL.

A file begins with the line `{"dpsgd-track spool":3,"bytes":"00000000000004d2"}`: the version, and
the number of bytes written so far, as 16 hexadecimal digits, brought up to date after each record.
So a file that was cut short is told from one whose writer was killed. Each further line is a
record: its checksum (CRC-32, 8 hexadecimal digits), a space, and JSON on the same line. The JSON is
one of

- `{"do":"open","runs":[...]}`: keys of the runs that the file covers.
- `{"do":"names","number":0,"run":...,"keys":[...]}`: a run and names of metrics, under a number
  within the file.
- `[number,step,time_ms,"..."]`: values of those metrics in one step, as base64 of little-endian
  float64. Decimals would take nine times as long to write, and lose the payload of NaN.
- `{"do":...,"run":...,"time_ms":...}`: an event of a kind in `record_forms.EVENTS`. A file that is
  to be uploaded comes with its size and CRC-32.
- `{"do":"close","records":n}`: the end of a closed file, and the number of records before it.

Every record is passed to the operating system in one write, so that it outlives the process. It is
not flushed to disk: a machine that loses power may lose the last half minute.

A last line without a line break is not yet a record: its writer is still writing it, or was killed.
Any other line with a wrong checksum, or of another form, is damage, which a reader reports and
skips. Nothing that a file holds is trusted: others may have written it.
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import struct
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dpsgd_track.store.client import TrackingError
from dpsgd_track.store.record_forms import FILES, Event, has_form, is_row

SCHEMA_VERSION = 3
MAGIC = b'{"dpsgd-track spool":%d,"bytes":"' % SCHEMA_VERSION
HEADER_BYTES = len(MAGIC) + 19
"""Length of the first line."""
_HEADER = re.compile(re.escape(MAGIC) + rb'([0-9a-f]{16})"}\n')
# Lines of other versions do not match.
_SEED = zlib.crc32(MAGIC)
_COUNT_AT = len(MAGIC)
CONTROL, RECORDS = ".control", ".records"
"""Suffixes: creation and end of runs, and observations of workers. Control files are read first."""

MAX_HELD_BYTES = 64 << 20
"""Most bytes held in memory while the disk is full."""
MAX_LINE_BYTES = 64 << 20
"""Longest line that is read."""
_LINE_BREAK = ord("\n")


def now_ms() -> int:
    """Unix time."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class MetricRow:
    """Metric values of one step of one run."""

    run: str
    keys: tuple[str, ...]
    step: int
    time_ms: int
    values: tuple[float, ...]


class SpoolDamaged(Exception):
    """A file is not a spool file of this version; the message names it."""


class SpoolWriter:
    """Appends one process's records to a file of its own. Calls may come from any thread.

    While the disk is full, records are held in memory and written as soon as there is room; `close`
    raises if some remain. Without a folder, nothing is recorded.
    """

    def __init__(
        self,
        folder: Path | None,
        name: str,
        *,
        runs: Iterable[str] = (),
        tell: Callable[[str], object] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        """
        Args:
            folder: the group's; None to record nothing.
            name: name of the process, with one of the suffixes CONTROL and RECORDS.
            runs: keys of the runs that the file covers. If all of them finish and the file was
                never closed, a part of it is missing.
            tell: called once when the disk is full.
        """
        self._folder = folder
        self._tell = tell
        self._lock = threading.Lock()
        self._tables: dict[tuple[str, tuple[str, ...]], tuple[int, struct.Struct]] = {}
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._unkept: list[tuple[str, Path, str]] = []
        self._trouble = ""
        self._end = 0
        self._num_records = 1
        self._descriptor = self._header = -1
        self.path = Path(os.devnull)
        """Path of the file; the null device without a folder."""
        if folder is not None:
            self.path, self._descriptor = _create(folder, name)
            # Through the other descriptor every write appends.
            self._header = os.open(self.path, os.O_WRONLY)
            first = _line(_json({"do": "open", "runs": list(runs)}))
            self._put(_header(HEADER_BYTES + len(first)) + first)

    def log_metrics(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step's values, stamped with the time of this call."""
        if self._folder is None:
            return
        keys = tuple(metrics)
        with self._lock:
            number, layout = self._tables.get((run, keys)) or self._define(run, keys)
            packed = binascii.b2a_base64(layout.pack(*metrics.values()), newline=False)
            # `json.dumps` takes several times as long where the caches are cold.
            self._append(b'[%d,%d,%d,"%b"]' % (number, step, now_ms(), packed))

    def log_input(self, run: str, name: str, digest: str) -> None:
        """Record the data that a run trained on."""
        self.add("input", run, name=name, digest=digest)

    def log_params(self, run: str, params: Mapping[str, str]) -> None:
        """Record params."""
        self.add("params", run, params=dict(params))

    def set_tags(self, run: str, tags: Mapping[str, str]) -> None:
        """Record tags; a later value of a tag replaces an earlier one."""
        self.add("tags", run, tags=dict(tags))

    def upload(self, run: str, path: Path, folder: str = "") -> None:
        """Record a file, to become an artifact of the run in `folder`.

        While the disk is full, the file itself is kept in mind, and must stay as it is.
        """
        if self._folder is None:
            return
        with self._lock:
            self._unkept.append((run, path.absolute(), folder))
            self._keep_files()
            if self._unkept and not self._held:
                self._tell(f"{self._complaint()} They are kept in mind; training goes on.")

    def add(self, what: str, run: str, **values: object) -> None:
        """Record an event."""
        if self._folder is None:
            return
        event = {"do": what, "run": run, "time_ms": now_ms(), **values}
        with self._lock:
            self._append(_json(event))

    def close(self) -> None:
        """Write the records held in memory. A second call does nothing.

        Raises:
            TrackingError: some records could not be written.
        """
        with self._lock:
            if self._descriptor < 0:
                return
            self._keep_files()
            self._flush()
            if not self._num_kept_back:
                self._hold(_line(_json({"do": "close", "records": self._num_records})))
                self._flush()
            os.close(self._header)
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
            if not self._end:
                # An empty file is one that somebody emptied: there was no room for the first line.
                self.path.unlink(missing_ok=True)
            if self._num_kept_back:
                raise TrackingError(self._complaint())

    def _define(self, run: str, keys: tuple[str, ...]) -> tuple[int, struct.Struct]:
        table = (len(self._tables), struct.Struct(f"<{len(keys)}d"))
        self._append(_json({"do": "names", "number": table[0], "run": run, "keys": keys}))
        # Only once the names are recorded: the values that follow need them.
        self._tables[run, keys] = table
        return table

    def _append(self, content: bytes) -> None:
        assert self._descriptor >= 0, "the spool is closed"
        self._put(_line(content))
        self._num_records += 1

    def _put(self, line: bytes) -> None:
        if self._held:
            # Earlier records first: there may be room by now.
            self._flush()
        if self._held:
            self._hold(line)
            return
        try:
            self._write(line)
        except OSError as error:
            self._note(error)
            self._hold(line)
            self._tell(f"{self._complaint()} They are held in memory; training goes on.")

    def _flush(self) -> None:
        try:
            while self._held:
                self._write(self._held[0])
                self._held_bytes -= len(self._held.pop(0))
        except OSError as error:
            self._note(error)

    def _note(self, error: OSError) -> None:
        self._trouble = os.strerror(error.errno or errno.EIO)

    def _hold(self, line: bytes) -> None:
        if self._held_bytes + len(line) > MAX_HELD_BYTES:
            raise TrackingError(self._complaint())
        self._held.append(line)
        self._held_bytes += len(line)

    def _write(self, line: bytes) -> None:
        """Append `line` whole, or not at all."""
        written = os.write(self._descriptor, line)
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            os.ftruncate(self._descriptor, self._end)
            raise
        self._end += written
        if self._end > HEADER_BYTES + len(line):
            try:
                os.pwrite(self._header, b"%016x" % self._end, _COUNT_AT)
            except OSError:
                # A count that lags behind hides no record; the next one brings it up to date.
                return

    @property
    def _num_kept_back(self) -> int:
        return len(self._held) + len(self._unkept)

    def _complaint(self) -> str:
        return (
            f"spool_dir={str(self._folder)!r}: expected room for records, but "
            f"{self._num_kept_back} could not be written. {self._trouble}."
        )

    def _keep_files(self) -> None:
        """Record the files for which there was no room so far."""
        try:
            while self._unkept:
                run, path, folder = self._unkept[0]
                kept = {**self._kept(path), "folder": folder}
                self._append(_json({"do": "file", "run": run, "time_ms": now_ms(), **kept}))
                del self._unkept[0]
        except OSError as error:
            self._note(error)

    def _kept(self, path: Path) -> dict[str, object]:
        """Place, size and checksum of a frozen version of the file: a hard link, else a copy."""
        assert self._folder is not None
        place = Path(FILES) / uuid.uuid4().hex[:12]
        target = self._folder / place / path.name
        try:
            # The group's own folder is not recreated after its removal.
            (self._folder / FILES).mkdir(exist_ok=True)
            target.parent.mkdir()
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)
            num_bytes, checksum = digest(target)
        except OSError:
            target.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                target.parent.rmdir()
            raise
        return {"path": str(place / path.name), "bytes": num_bytes, "crc32": checksum}


def _create(folder: Path, name: str) -> tuple[Path, int]:
    """A new file, numbered so that names sort by creation, locked while it is written."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
    while True:
        taken = [int(file.name[:6]) for file in spool_files(folder)]
        path = folder / f"{max(taken, default=0) + 1:06d}-{name}"
        # Two processes may use the same name at the same time.
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, flags, 0o666)
            break
    # `is_being_written` holds the lock for a moment.
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return path, descriptor


def digest(path: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file."""
    num_bytes = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
            num_bytes += len(chunk)
    return num_bytes, checksum


def _json(value: Event) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _line(content: bytes) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(content, _SEED), content)


def _header(num_bytes: int) -> bytes:
    return MAGIC + b'%016x"}\n' % num_bytes


def _is_beginning(text: bytes) -> bool:
    """True for a part of a first line."""
    return len(text) < HEADER_BYTES and MAGIC.startswith(text[: len(MAGIC)])


def _content(line: bytes) -> bytes | None:
    """The JSON of a line; None if its checksum is wrong."""
    content = line[9:-1]
    return content if line == _line(content) else None


def spool_files(folder: Path) -> list[Path]:
    """The spool files of a group, in order of creation, control files first."""
    files = [
        file
        for file in folder.iterdir()
        if file.suffix in (CONTROL, RECORDS) and file.name[:6].isdigit()
    ]
    return sorted(files, key=lambda file: (file.suffix != CONTROL, file.name))


def is_being_written(file: Path) -> bool:
    """True if the process that writes a spool file is alive."""
    with file.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class SpoolReader:
    """Reads a spool file in order, skipping damaged lines; it may grow meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0
        """Offset up to which the file was read, in bytes."""
        self.runs: set[str] = set()
        """Keys of the runs that the file covers."""
        self.num_lines = 0
        """Number of lines read."""
        self._closed_at = self._num_nameless = 0
        self._damage: list[str] = []
        self._tables: dict[int, tuple[str, tuple[str, ...], struct.Struct]] = {}

    @property
    def is_closed(self) -> bool:
        """True once the closing record of the file was read."""
        return self._closed_at > 0

    def records(self) -> Iterator[tuple[int, MetricRow | Event]]:
        """Unread records, each with the offset of its end; `offset` advances as they are consumed.

        Raises:
            SpoolDamaged: the file is of another version.
        """
        with self.path.open("rb") as file:
            if self.offset == 0 and not self._begin(file):
                return
            file.seek(self.offset)
            while line := _next_line(file):
                self.offset = self.offset + len(line) if line[-1] == _LINE_BREAK else file.tell()
                self.num_lines += 1
                content = _content(line)
                if content is None:
                    self._note(f"line {self.num_lines} does not fit its checksum")
                    continue
                try:
                    record = self._record(json.loads(content))
                except (ValueError, RecursionError):
                    self._note(f"line {self.num_lines} is no record of this version")
                    continue
                if record is not None:
                    yield self.offset, record

    def damage(self) -> list[str]:
        """Damage found so far, each with file and line."""
        damage = list(self._damage)
        if self._num_nameless:
            where = f"{self.path}: {self._num_nameless} lines hold values"
            damage.append(f"{where} whose names are in a damaged line.")
        size = self.path.stat().st_size
        if self.is_closed and size > self._closed_at:
            damage.append(f"{self.path}: something follows the line that closed it.")
        if (missing := self._num_written() - self.offset) > 0:
            damage.append(
                f"{self.path}: {missing:,} bytes are missing after line {self.num_lines}."
            )
        return damage

    def _num_written(self) -> int:
        """Bytes written, by the first line; more than there are if that is not whole."""
        with self.path.open("rb") as file:
            first = file.read(HEADER_BYTES)
        if header := _HEADER.fullmatch(first):
            return int(header[1], 16)
        # A first line that is damaged, and not cut, is told as such.
        return HEADER_BYTES if len(first) < HEADER_BYTES else 0

    def _begin(self, file: IO[bytes]) -> bool:
        """Read the first line; False while it is incomplete."""
        first = file.readline(MAX_LINE_BYTES)
        if first[-1:] != b"\n" and _is_beginning(first):
            return False
        if not _HEADER.fullmatch(first):
            if _content(file.readline(MAX_LINE_BYTES)) is None:
                raise SpoolDamaged(
                    f"{self.path}: expected a spool file of version {SCHEMA_VERSION}. "
                    "Ship it with the dpsgd-track that wrote it, or move its folder away."
                )
            self._note("line 1 is damaged")
        self.offset, self.num_lines = len(first), 1
        return True

    def _record(self, record: Any) -> MetricRow | Event | None:
        """A line's record; None for one about the file itself.

        Raises:
            ValueError: it has another form.
        """
        if isinstance(record, list):
            return self._row(record)
        if not has_form(record):
            raise ValueError("unknown form")
        event: Event = record
        match event["do"]:
            case "open":
                self.runs.update(event["runs"])
            case "names":
                keys = tuple(event["keys"])
                layout = struct.Struct(f"<{len(keys)}d")
                self._tables[event["number"]] = (event["run"], keys, layout)
                self.runs.add(event["run"])
            case "close":
                self._closed_at = self.offset
                # The first line and this one are not records.
                num_records, num_written = self.num_lines - 2, event["records"]
                if num_records != num_written and not self._damage:
                    self._note(f"{num_records} of {num_written} records are there")
            case _:
                self.runs.add(event["run"])
                return event
        return None

    def _row(self, record: list[Any]) -> MetricRow | None:
        """A line of values; None if the line with their names is damaged."""
        if not is_row(record):
            raise ValueError("unknown form")
        number, step, time_ms, packed = record
        if number not in self._tables:
            self._num_nameless += 1
            return None
        run, keys, layout = self._tables[number]
        try:
            values = layout.unpack(binascii.a2b_base64(packed))
        except struct.error as error:
            raise ValueError("another number of values") from error
        return MetricRow(run, keys, step, time_ms, values)

    def _note(self, problem: str) -> None:
        self._damage.append(f"{self.path}: {problem}.")


def _next_line(file: IO[bytes]) -> bytes:
    """The next whole line; of one that is too long, the beginning; empty if there is none."""
    line = rest = file.readline(MAX_LINE_BYTES)
    while len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n"):
        rest = file.readline(MAX_LINE_BYTES)
    return line if rest.endswith(b"\n") else b""
