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


def _holder(environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)


def _folder_of(holder: subprocess.Popen[str]) -> Path:
    assert holder.stdout is not None
    return Path(holder.stdout.readline().strip())


def test_only_what_nobody_holds_is_swept_away(temporary: Path) -> None:
    (temporary / "dpsgd-track-quick-abcdefgh.txt").touch()
    foreign = temporary / "somebody-abcdefgh"
    foreign.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    with _holder(environment) as first, _holder(environment) as second:
        dead, alive = map(_folder_of, (first, second))
        first.send_signal(signal.SIGKILL)
        first.wait()
        sweep()
        # It may just have been created.
        assert dead.is_dir()
        for folder in (dead, alive, foreign):
            os.utime(folder, (0, 0))
        sweep()
        assert not dead.exists()
        assert alive.is_dir()
        second.communicate("", timeout=30)
    assert not alive.exists()
    assert {each.name for each in temporary.iterdir()} == {
        "dpsgd-track-quick-abcdefgh.txt",
        "somebody-abcdefgh",
    }


def test_a_folder_is_removed_when_it_is_left(temporary: Path) -> None:
    with scratch() as folder:
        assert Path(folder).parent == temporary
    assert not list(temporary.iterdir())
