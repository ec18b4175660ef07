"""The table of tracking's faults: what is lost, doubled or left is counted, and nothing is."""

from __future__ import annotations

import multiprocessing
import sqlite3
import subprocess
import uuid
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.tracking_faults import main, measure
from benchmarks.tracking_faults_kinds import FAULTS, Fault
from benchmarks.tracking_faults_launch import Place
from benchmarks.tracking_faults_store import a_store
from dpsgd_track.config import Settings
from dpsgd_track.store.opening import open_store
from tests.support.arrivals import Tally, arrived
from tests.support.logged_group import sync
from tests.support.spooled_group import spool_a_group

STEPS = 5


def test_what_a_store_lost_doubled_and_left_running_is_counted(tmp_path: Path) -> None:
    uri = f"sqlite:///{a_store(tmp_path)}"
    settings = Settings(tracking_uri=uri, artifact_location=str(tmp_path / "artifacts"))
    open_store(settings)
    spool_a_group(tmp_path / "spool", "g", STEPS)
    sync(tmp_path / "spool", uri)
    whole = arrived(*open_store(settings), "g", STEPS)
    # Seven metrics of three runs, and a file of each rank.
    assert whole == Tally(values=3 * 7 * STEPS + 2)
    assert whole.is_clean
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        (run,) = database.execute("SELECT run_uuid FROM runs WHERE name = 'rank 1'").fetchone()
        for statement in (
            "DELETE FROM metrics WHERE run_uuid = ? AND key = 'loss' AND step = 4",
            "UPDATE metrics SET value = 5 WHERE run_uuid = ? AND key = 'layer/0' AND step = 3",
            "UPDATE metrics SET step = 1 WHERE run_uuid = ? AND key = 'layer/1' AND step = 2",
            "UPDATE runs SET status = 'RUNNING' WHERE run_uuid = ?",
        ):
            assert database.execute(statement, (run,)).rowcount == 1
        database.commit()
    found = arrived(*open_store(settings), "g", STEPS)
    assert found == Tally(values=whole.values, lost=3, doubled=1, running=1)
    assert not found.is_clean
    assert arrived(*open_store(settings), "other", STEPS).lost == whole.values


def test_what_is_left_of_a_launch_is_seen(tmp_path: Path) -> None:
    place = Place(tmp_path / "0", patience_s=0.0)
    shared = Path("/dev/shm") / f"left-{uuid.uuid4().hex}"
    for folder in (place.folder / "spool" / "g", place.temporary):
        folder.mkdir(parents=True)
    assert place.left() == ["g"]
    (place.folder / "core").touch()
    (place.temporary / "dpsgd-track-abcdefgh").mkdir()
    (place.temporary / "torchinductor_me").mkdir()
    shared.touch()
    # Of this process, which has it open: others on a machine have such as well.
    semaphore = multiprocessing.get_context("spawn").Semaphore()
    try:
        with subprocess.Popen(["sleep", "60"], cwd=place.folder) as process:
            left = place.left()
            process.kill()
    finally:
        shared.unlink()
        del semaphore
    assert left == ["core", "g", "dpsgd-track-abcdefgh", f"process {process.pid}", shared.name]


def test_the_script_writes_a_table_and_ends_with_0_where_nothing_was_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    assert main([str(page), "--only", "power,damage", "--times", "8"]) == 0
    text = page.read_text()
    assert f"| {FAULTS['power'].title} | 8 | " in text
    assert "16 faults and " in text
    assert "0 lost, 0 doubled, 0 runs left RUNNING" in text


def test_a_fault_that_loses_something_or_raises_is_told(tmp_path, monkeypatch, capsys) -> None:
    def raise_it(folder: Path, times: int) -> Tally:
        raise ValueError("two\nlines")

    bad = {"loses": lambda folder, times: Tally(times=times, lost=1), "raises": raise_it}
    for name, inject in bad.items():
        fault = Fault(name=name, title=name, times=2, after="", inject=inject)
        monkeypatch.setitem(FAULTS, name, fault)
        assert main(["--only", name]) == 1
    assert "| raises | 0 | FAILED: ValueError: two |" in capsys.readouterr().out


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAULTS)
def test_no_fault_loses_doubles_or_leaves_anything(tmp_path: Path, name: str) -> None:
    row = measure(FAULTS[name], None, tmp_path)
    if row.skipped:
        pytest.skip(row.skipped)
    assert not row.failed
    assert row.tally.is_clean, row.tally
    assert row.tally.times == FAULTS[name].times * (2 if name == "resume" else 1)
