"""Commands that are forked with their imports done do what fresh ones do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support import ROOT, warm
from tests.support.launches import living, start

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["quick", "--mode", "nonsense"], 2), (["sync"], 0)]
)
def test_code_and_output_are_those_of_a_fresh_interpreter(
    tmp_path: Path, arguments: list[str], code: int
) -> None:
    script = str(ROOT / "launch.py")
    forked = warm.run(script, *arguments, cwd=tmp_path, environment=ENVIRONMENT)
    fresh = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert fresh.returncode == code
    assert (forked.returncode, forked.stdout, forked.stderr) == (code, fresh.stdout, fresh.stderr)


def test_a_signal_is_its_exit_code_and_nothing_is_left(tmp_path: Path) -> None:
    process = start(tmp_path, "single", "--mode", "no_dp", plan={"no_dp": {"do": "hang"}})
    while not (servers := living(tmp_path)):
        assert process.poll() is None
    # The fork server is the launcher's own child, as a fresh one is.
    assert psutil.Process(process.pid) in [server.parent() for server in servers]
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    psutil.wait_procs(servers, timeout=20)
    assert not living(tmp_path)


def test_what_is_not_of_the_checkout_starts_fresh() -> None:
    with warm.imports_done():
        done = subprocess.run(
            [sys.executable, "-c", "import sys; print('torch' in sys.modules)"],
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout == "False\n"
