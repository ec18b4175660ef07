"""Where output cannot be written, the work is done all the same, and its exit code is its own."""

from __future__ import annotations

import os
import pty
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT

PROGRAM = """
import sys, time
from pathlib import Path
from dpsgd_track.cli.lasting_output import lasting_output
with lasting_output():
    for number in range(2000):
        print("a line", flush=True)
        print("a line", file=sys.stderr)
    opened = open("opened", "w")
    Path("done").write_text(str(opened.fileno()))
sys.exit(3)
"""
SHELLS = ("{} | head -1", "{} > /dev/full 2>&1", "{} >&- 2>&- <&-", "{} 2>&1 | true")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_work_is_done_and_the_exit_code_is_its_own(shell: str, tmp_path: Path) -> None:
    command = shlex.join([sys.executable, "-c", PROGRAM])
    wrapped = f"set -o pipefail; {shell.format(command)}"
    # Buffered, as at a user's: what is left at the end cannot be written either.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    ended = subprocess.run(
        ["bash", "-c", wrapped], cwd=tmp_path, env=environment, capture_output=True, timeout=60
    )
    assert ended.returncode == 3
    # No file of the program got the number of an output.
    assert int((tmp_path / "done").read_text()) > 2
    assert (tmp_path / "opened").read_text() == ""
    assert b"Traceback" not in ended.stderr
    assert b"Exception ignored" not in ended.stderr


LAUNCH = (
    *(sys.executable, "-m", "tests.support.fake_launch", "single", "--mode", "no_dp"),
    *("--num-iter", "20", "--nproc-per-node", "2"),
)


def _environment(plan: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "FAKE_WORKER": plan}


@pytest.mark.soak
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(("plan", "code"), [("{}", 0), ('{"no_dp": {"do": "crash"}}', 1)])
def test_a_launch_without_output_is_tracked(
    shell: str, plan: str, code: int, tmp_path: Path
) -> None:
    wrapped = f"set -o pipefail; {shell.format(shlex.join(LAUNCH))}"
    ended = subprocess.run(
        ["bash", "-c", wrapped], cwd=tmp_path, env=_environment(plan), timeout=250
    )
    assert ended.returncode == code
    assert (tmp_path / "mlflow.db").is_file()
    assert not list((tmp_path / "spool").iterdir())


@pytest.mark.soak
def test_a_launch_outlives_its_terminal(tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, LAUNCH, _environment('{"no_dp": {"do": "slow"}}'))
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("results/*/logs/no_dp/progress.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not list((tmp_path / "spool").iterdir())
