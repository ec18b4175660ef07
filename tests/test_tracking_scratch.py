"""Temporary folders go with their process, or with the next one's start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dpsgd_track.store.scratch import scratch, sweep
from tests.support import ROOT

HOLDER = """
import sys
from dpsgd_track.store.scratch import scratch
with scratch() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def age(folder: Path) -> None:
    os.utime(folder, (0, 0))


def test_only_what_nobody_holds_is_swept_away(temporary: Path) -> None:
    (temporary / "dpsgd-track-quick-abcdefgh.txt").touch()
    foreign = temporary / "somebody-abcdefgh"
    foreign.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    folders = []
    for holder in holders:
        assert holder.stdout is not None
        folders.append(Path(holder.stdout.readline().strip()))
    dead, alive = folders
    holders[0].send_signal(signal.SIGKILL)
    holders[0].wait()
    sweep()
    # It may just have been created.
    assert dead.is_dir()
    for folder in (dead, alive, foreign):
        age(folder)
    sweep()
    assert not dead.exists()
    assert alive.is_dir()
    holders[1].communicate("", timeout=30)
    assert not alive.exists()
    assert {each.name for each in temporary.iterdir()} == {
        "dpsgd-track-quick-abcdefgh.txt",
        "somebody-abcdefgh",
    }


def test_a_folder_is_removed_when_it_is_left(temporary: Path) -> None:
    with scratch() as folder:
        assert Path(folder).parent == temporary
    assert not list(temporary.iterdir())
