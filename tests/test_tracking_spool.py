"""Records on disk: what is appended is read back bit for bit, but for what was damaged or cut."""

import base64
import json
import math
import os
import random
import signal
import statistics
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from dpsgd_track.store import spool
from dpsgd_track.store.client import TrackingError
from dpsgd_track.store.history import as_stored, restored
from dpsgd_track.store.spool import (
    CONTROL,
    RECORDS,
    MetricRow,
    SpoolDamaged,
    SpoolReader,
    SpoolWriter,
    is_being_written,
    spool_files,
)

ODD = (math.inf, -math.inf, -0.0, 0.0, math.nan, 5e-324, 1.7976931348623157e308, 1 / 3)
NEGATIVE_NAN = struct.unpack("<d", bytes.fromhex("010000000000f8ff"))[0]


def bits(values) -> list[bytes]:
    return [struct.pack("<d", value) for value in values]


def read(path: Path) -> list:
    return [record for _, record in SpoolReader(path).records()]


def write(folder: Path, steps: int, num_metrics: int = 3) -> Path:
    writer = SpoolWriter(folder, f"a{RECORDS}")
    for step in range(steps):
        writer.log_metrics("run", step, {f"m{i}": step + i / 7 for i in range(num_metrics)})
    writer.close()
    return spool_files(folder)[-1]


def test_values_come_back_bit_for_bit(tmp_path):
    writer = SpoolWriter(tmp_path, f"rank0{RECORDS}")
    rng = random.Random(0)
    values = [*ODD, NEGATIVE_NAN, *(struct.unpack("<d", rng.randbytes(8))[0] for _ in range(500))]
    before = spool.now_ms()
    writer.log_metrics("run", 7, {f"m/{i}": value for i, value in enumerate(values)})
    writer.log_params("run", {"a": "é\n"})
    writer.log_metrics("other", -1, {"m/0": 1.0})
    writer.close()
    row, params, other = read(spool_files(tmp_path)[0])
    assert bits(row.values) == bits(values)
    assert row.keys == tuple(f"m/{i}" for i in range(len(values)))
    assert (row.run, row.step) == ("run", 7)
    assert before <= row.time_ms <= spool.now_ms()
    assert params["params"] == {"a": "é\n"}
    assert other == MetricRow("other", ("m/0",), -1, other.time_ms, (1.0,))


def test_a_file_cut_anywhere_is_read_up_to_the_cut(tmp_path):
    whole = write(tmp_path, 4).read_bytes()
    ends = [offset for offset, _ in SpoolReader(spool_files(tmp_path)[0]).records()]
    cut = tmp_path / f"000009-cut{RECORDS}"
    for length in range(len(whole) + 1):
        cut.write_bytes(whole[:length])
        assert len(read(cut)) == sum(end <= length for end in ends)


@pytest.mark.parametrize("tail", [bytes(100), b"\xff" * 100], ids=["zeros", "ones"])
def test_what_a_crash_of_the_machine_leaves_at_the_end_is_no_record(tmp_path, tail):
    path = write(tmp_path, 4)
    path.write_bytes(path.read_bytes() + tail)
    assert len(read(path)) == 4


def test_a_record_with_one_bit_turned_is_not_believed_and_those_after_it_are(tmp_path):
    path = write(tmp_path, 3)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    rows = read(path)
    num_names = len(b"".join(lines[:3]))
    for place in range(len(whole)):
        number = whole[:place].count(b"\n") + 1
        for bit in (1, 4, 128):
            path.write_bytes(whole[:place] + bytes((whole[place] ^ bit,)) + whole[place + 1 :])
            reader = SpoolReader(path)
            found = [record for _, record in reader.records()]
            assert all(row in rows for row in found)
            if not reader.damage():
                # The count of bytes may lag behind.
                assert place < spool.HEADER_BYTES
                assert found == rows
                continue
            assert str(path) in reader.damage()[0]
            if spool.HEADER_BYTES <= place < len(whole) - 1:
                assert f"line {number} " in reader.damage()[0]
            if place >= num_names:
                # A line break that is turned takes the next line with it.
                lost = {number - 4, number - 3} if whole[place] == 10 else {number - 4}
                assert found == [row for row in rows if row.step not in lost]
    path.write_bytes(whole)
    assert read(path) == rows


@pytest.mark.parametrize("number", range(7))
def test_a_line_that_is_missing_is_noticed_by_the_count_at_the_end(tmp_path, number):
    path = write(tmp_path, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7
    del lines[number]
    path.write_bytes(b"".join(lines))
    reader = SpoolReader(path)
    list(reader.records())
    assert reader.is_closed == (number < 6)
    assert reader.damage()


@pytest.mark.parametrize("tail", [b"x", b"x\n", bytes(10)])
def test_what_follows_the_end_of_a_closed_file_is_damage(tmp_path, tail):
    path = write(tmp_path, 3)
    path.write_bytes(path.read_bytes() + tail)
    reader = SpoolReader(path)
    assert len(list(reader.records())) == 3
    assert reader.damage()[-1] == f"{path}: something follows the line that closed it."


def test_values_whose_names_were_damaged_are_counted(tmp_path):
    path = write(tmp_path, 3)
    path.write_bytes(path.read_bytes().replace(b'"m1"', b'"m9"'))
    reader = SpoolReader(path)
    assert list(reader.records()) == []
    assert reader.damage() == [
        f"{path}: line 3 does not fit its checksum.",
        f"{path}: 3 lines hold values whose names are in a damaged line.",
    ]


def test_a_file_is_readable_with_other_tools(tmp_path):
    """Every line but the first, which is JSON alone, is a checksum, a space, and JSON."""
    writer = SpoolWriter(tmp_path, f"a{RECORDS}", runs=["run", "other"])
    writer.log_metrics("run", 7, {"loss": 1.5, "norm": -0.0})
    writer.set_tags("run", {"a": "b"})
    writer.close()
    (file,) = spool_files(tmp_path)
    first, *lines = file.read_text().splitlines()
    assert json.loads(first) == {"dpsgd-track spool": 3, "bytes": f"{file.stat().st_size:016x}"}
    opened, names, row, event, closed = (json.loads(line[9:]) for line in lines)
    assert opened == {"do": "open", "runs": ["run", "other"]}
    assert names == {"do": "names", "number": 0, "run": "run", "keys": ["loss", "norm"]}
    assert row[:2] == [0, 7]
    assert struct.unpack("<2d", base64.b64decode(row[3])) == (1.5, -0.0)
    assert (event["do"], event["tags"]) == ("tags", {"a": "b"})
    assert closed == {"do": "close", "records": 4}


def test_a_growing_file_is_read_on_from_where_it_was(tmp_path):
    writer = SpoolWriter(tmp_path, f"a{RECORDS}")
    reader = SpoolReader(spool_files(tmp_path)[0])
    seen = []
    for step in range(5):
        writer.log_metrics("run", step, {"loss": 1.0 * step})
        seen += [record.step for _, record in reader.records()]
    assert seen == list(range(5))
    writer.close()


def test_another_version_is_refused(tmp_path):
    path = tmp_path / f"000001-a{CONTROL}"
    whole = write(tmp_path, 3).read_bytes()
    later = whole.replace(b'spool":3', b'spool":4')
    line = b'{"do":"open","runs":[]}'
    alike = later[: spool.HEADER_BYTES] + b"%08x %b\n" % (zlib.crc32(line), line)
    for content in (b"dpsgd-track spool 1\nwhatever", b"\n", later[: spool.HEADER_BYTES], alike):
        path.write_bytes(content)
        with pytest.raises(SpoolDamaged, match="version 3"):
            read(path)
    # What fits the checksums of this version is of this version.
    path.write_bytes(later)
    assert len(read(path)) == 3


def test_it_is_known_whether_the_writer_lives(tmp_path):
    writer = SpoolWriter(tmp_path, f"a{RECORDS}")
    (file,) = spool_files(tmp_path)
    assert is_being_written(file)
    writer.close()
    assert not is_being_written(file)


def test_two_writers_of_one_name_at_the_same_time_have_files_of_their_own(tmp_path, monkeypatch):
    first = SpoolWriter(tmp_path, f"attached{CONTROL}")
    listed = [[], spool_files(tmp_path)]
    monkeypatch.setattr(spool, "spool_files", lambda folder: listed.pop(0))
    second = SpoolWriter(tmp_path, f"attached{CONTROL}")
    assert [first.path.name[:6], second.path.name[:6]] == ["000001", "000002"]
    first.close()
    second.close()


KILLED_WRITER = """
import sys
from pathlib import Path
from dpsgd_track.store.spool import SpoolWriter
writer = SpoolWriter(Path(sys.argv[1]), "a.records")
step = 0
while True:
    writer.log_metrics("run", step, {f"m{i}": float(step) for i in range(200)})
    print(step, flush=True)
    step += 1
"""


def kill_a_writer(folder: Path, after_s: float) -> tuple[int, int]:
    """Kill a process that logs without end; how many steps it logged, and how many are there."""
    folder.mkdir()
    command = [sys.executable, "-c", KILLED_WRITER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(after_s)
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().split("\n")
    logged = max([0, *map(int, filter(None, rest[:-1]))]) + 1
    rows = read(spool_files(folder)[0])
    assert [row.step for row in rows] == list(range(len(rows)))
    assert all(set(row.values) == {float(row.step)} for row in rows)
    return logged, len(rows)


def test_sigkill_loses_at_most_the_step_in_flight(tmp_path):
    logged, kept = kill_a_writer(tmp_path / "0", 0.05)
    assert kept >= logged > 1


@pytest.mark.soak
def test_sigkill_at_twenty_moments_loses_at_most_the_step_in_flight(tmp_path):
    rng = random.Random(1)
    for attempt in range(20):
        logged, kept = kill_a_writer(tmp_path / str(attempt), rng.uniform(0, 0.3))
        assert kept >= logged


class FullDisk:
    """Takes `room` bytes, and parts of a write like a real one."""

    def __init__(self, monkeypatch, room: int) -> None:
        self.room = room
        self._write = os.write
        monkeypatch.setattr(spool.os, "write", self.write)

    def write(self, descriptor: int, data: bytes) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        written = self._write(descriptor, data[: self.room])
        self.room -= written
        return written


def test_a_full_disk_stops_nothing_and_nothing_is_lost_once_there_is_room(tmp_path, monkeypatch):
    said: list[str] = []
    writer = SpoolWriter(tmp_path, f"a{RECORDS}", tell=said.append)
    disk = FullDisk(monkeypatch, 500)
    for step in range(100):
        writer.log_metrics("run", step, {"loss": step + 1 / 3})
    whole = read(spool_files(tmp_path)[0])
    assert 0 < len(whole) < 20
    assert len(said) == 1
    assert "No space left on device" in said[0]
    disk.room = 1 << 20
    writer.log_metrics("run", 100, {"loss": 100 + 1 / 3})
    writer.close()
    rows = read(spool_files(tmp_path)[0])
    assert [(row.step, row.values) for row in rows] == [(s, (s + 1 / 3,)) for s in range(101)]


def test_a_disk_that_stays_full_is_said_at_the_end(tmp_path, monkeypatch):
    writer = SpoolWriter(tmp_path, f"a{RECORDS}", tell=lambda line: None)
    FullDisk(monkeypatch, 300)
    for step in range(20):
        writer.log_metrics("run", step, {"loss": 1.0})
    with pytest.raises(TrackingError, match=r"expected room for records, but 1\d could not"):
        writer.close()
    assert read(spool_files(tmp_path)[0])


def test_a_disk_that_was_full_from_the_start_leaves_no_file_to_be_called_damaged(
    tmp_path, monkeypatch
):
    FullDisk(monkeypatch, 0)
    writer = SpoolWriter(tmp_path, f"a{RECORDS}", runs=("run",), tell=lambda line: None)
    writer.log_metrics("run", 0, {"loss": 1.0})
    with pytest.raises(TrackingError, match="expected room for records, but 3 could not"):
        writer.close()
    assert spool_files(tmp_path) == []


def test_a_writer_that_can_never_write_does_not_take_all_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "MAX_HELD_BYTES", 10_000)
    writer = SpoolWriter(tmp_path, f"a{RECORDS}", tell=lambda line: None)
    FullDisk(monkeypatch, 0)
    values = {f"m{i}": 1.0 for i in range(1000)}
    writer.log_metrics("run", 0, dict.fromkeys("abc", 1.0))
    with pytest.raises(TrackingError, match="No space left"):
        writer.log_metrics("run", 0, values)


def test_a_file_stays_as_it_was_when_it_was_handed_over(tmp_path):
    source = tmp_path / "trajectory.npz"
    source.write_bytes(b"first")
    writer = SpoolWriter(tmp_path, f"a{RECORDS}")
    writer.upload("run", source, "there")
    source.unlink()
    source.write_bytes(b"second")
    writer.close()
    (event,) = read(spool_files(tmp_path)[0])
    assert (tmp_path / event["path"]).read_bytes() == b"first"
    assert (tmp_path / event["path"]).name == "trajectory.npz"
    assert event["folder"] == "there"


def test_nothing_is_kept_without_a_folder(tmp_path):
    writer = SpoolWriter(None, "a")
    writer.log_metrics("", 0, {"loss": 1.0})
    writer.log_params("", {})
    writer.upload("", tmp_path)
    writer.close()


def test_logging_two_hundred_values_takes_a_fifth_of_a_millisecond_and_seldom_more(tmp_path):
    writer = SpoolWriter(tmp_path, f"a{RECORDS}")
    values = {f"layer_grad_norm/{i}": math.pi / (i + 1) for i in range(200)}
    took_s = []
    for step in range(300):
        start = time.thread_time()
        writer.log_metrics("run", step, values)
        took_s.append(time.thread_time() - start)
    writer.close()
    # CPU time, as the machine may be busy with something else.
    assert statistics.median(took_s) < 0.2e-3
    assert sorted(took_s)[-4] < 1e-3


def test_every_record_is_one_write(tmp_path, monkeypatch):
    written: list[bytes] = []
    real_write = os.write
    monkeypatch.setattr(spool.os, "write", lambda *a: written.append(a[1]) or real_write(*a))
    writer = SpoolWriter(tmp_path, f"a{RECORDS}", runs=["run"])
    for step in range(3):
        writer.log_metrics("run", step, {"loss": 1.0})
    writer.close()
    # Its beginning, names, three steps, and its end.
    assert len(written) == 6
    assert all(each.endswith(b"\n") for each in written)


def test_infinities_come_back_from_what_a_store_makes_of_them():
    stored = list(map(as_stored, ODD))
    largest = sys.float_info.max
    assert stored == [largest, -largest, 0.0, 0.0, None, 5e-324, largest, 1 / 3]
    back = restored(stored).tolist()
    assert back[:2] == [math.inf, -math.inf]
    assert math.isnan(back[4])
    assert back[5:] == [5e-324, math.inf, 1 / 3]
