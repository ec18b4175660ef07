"""Ranks that leave or hang are noticed, told from slow ones, and blamed by their stacks."""

import json
import os
import time
from pathlib import Path

import pytest

from dpsgd_track.config import JobConfig
from dpsgd_track.launcher.fork_client import WorkerHost
from dpsgd_track.launcher.fork_server import Request
from dpsgd_track.launcher.stalls import blamed, standstill
from dpsgd_track.record.failure import FAILURE, FailureKind
from tests.support import fake_launch, warm
from tests.support.launches import living, start
from tests.support.spooled_group import planned

PACKAGE = Path(fake_launch.__file__).parent.parent.parent / "dpsgd_track"


def stacks(*frames: tuple[str, int, str]) -> str:
    """What the interpreter writes of a rank with a second thread."""
    other = 'Thread 0x01 (most recent call first):\n  File "/usr/lib/x.py", line 1 in wait\n'
    lines = [f'  File "{file}", line {line} in {function}' for file, line, function in frames]
    return "\n".join(["Timeout (0:01:00)!", other, "Thread 0x02 (most recent call first):", *lines])


@pytest.fixture(scope="module")
def job() -> JobConfig:
    return planned()


@pytest.fixture(scope="module")
def torch_file() -> str:
    import torch.distributed.distributed_c10d as module

    return module.__file__


def test_the_rank_outside_of_torch_is_blamed(job, torch_file):
    ours = str(PACKAGE / "distributed" / "reduction.py")
    waiting = stacks((torch_file, 90, "all_reduce"), (ours, 88, "total"))
    mine = "/home/somebody/forks/mine.py"
    stands = [
        standstill(0, waiting, job),
        standstill(1, stacks((mine, 31, "step"), (ours, 12, "run")), job),
    ]
    assert str(stands[0]) == "rank 0 waits in all_reduce, in reduction.py:88 of dpsgd_track"
    assert str(stands[1]) == "rank 1 is in mine.py:31 of forks"
    assert blamed(stands) == stands[1]


def test_of_ranks_that_all_wait_the_one_in_foreign_code_is_blamed(job, torch_file):
    ours = str(PACKAGE / "distributed" / "reduction.py")
    stands = [
        standstill(0, stacks((torch_file, 90, "all_reduce"), (ours, 88, "total")), job),
        standstill(1, stacks((torch_file, 70, "barrier"), ("/a/b/mine.py", 7, "step")), job),
    ]
    assert blamed(stands) == stands[1]


def test_a_rank_that_does_not_even_write_its_stacks_is_blamed(job):
    stands = [standstill(0, stacks(("/a/b/mine.py", 7, "step")), job), standstill(1, "", job)]
    assert blamed(stands) == stands[1]
    assert str(stands[1]) == "rank 1 does not answer"


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[int, str, Path]:
    """Modes of which a rank leaves, takes long for a step, and hangs."""
    folder = tmp_path_factory.mktemp("hangs")
    modes = {
        "no_dp": {"do": "leave", "rank": 1},
        "flash_fsdp": {"do": "pause", "rank": 1},
        # The fork server is ended with it.
        "flash_fsdp_bk": {"do": "hang", "rank": 1, "step": 0},
    }
    argv = ("full", "--mode", ",".join(modes), "--regime", "accuracy", "--offline", "--group", "g")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(fake_launch.STALL_VARIABLE, "2")
        temporary = tmp_path_factory.mktemp("temporary")
        patch.setenv("TMPDIR", str(temporary))
        process = start(folder, *argv, "--nproc-per-node", "2", "--num-iter", "3", plan=modes)
    out, _ = process.communicate(timeout=200)
    assert not living(folder)
    # torch's own cache of compiled code stays.
    assert {each.name.partition("_")[0] for each in temporary.iterdir()} <= {"torchinductor"}
    assert not list(folder.rglob("torchelastic*"))
    return process.returncode, out, folder / "results" / "g" / "logs"


def test_a_rank_that_leaves_with_exit_code_0_fails_its_mode(launched):
    code, out, logs = launched
    assert code == 1
    assert "no_dp: FAILED" in out
    assert "a rank ended in mid-run, with exit code 0 at rank 1." in out
    failure = FAILURE.loads((logs / "no_dp" / "failure-rank1.json").read_bytes())
    assert (failure.kind, failure.rank) == (FailureKind.LEFT, 1)


def test_a_rank_that_hangs_fails_its_mode_and_is_named(launched):
    _, out, logs = launched
    assert "flash_fsdp_bk: no progress for 2 s: rank 0 is in fake_worker.py:" in out
    assert "Ending flash_fsdp_bk, which hangs." in out
    (line,) = (line for line in out.splitlines() if line.startswith("flash_fsdp_bk: FAILED"))
    assert "the ranks hang at rank " in line
    for rank in range(2):
        assert "fake_worker.py" in (logs / "flash_fsdp_bk" / f"stacks-rank{rank}.txt").read_text()


def test_a_slow_step_is_told_and_goes_on(launched):
    _, out, logs = launched
    assert "flash_fsdp: no progress for 2 s" in out
    assert "flash_fsdp: FINISHED" in out
    lines = (logs / "flash_fsdp" / "progress.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "end"


TALKS_AND_FAILS = """
import sys
def preload(): pass
def main(job_file):
    # As torch does, once ranks talk to each other.
    sys.excepthook = lambda *_: print("a line", file=sys.stderr, flush=True)
    raise ValueError(job_file)
"""


def test_a_rank_that_fails_while_the_logs_disk_is_full_leaves_nothing(tmp_path):
    code, temporary = tmp_path / "code", tmp_path / "temporary"
    code.mkdir()
    temporary.mkdir()
    (code / "talks_and_fails.py").write_text(TALKS_AND_FAILS)
    search_path = os.pathsep.join([str(code), str(PACKAGE.parent)])
    environment = {**os.environ, "PYTHONPATH": search_path, "TMPDIR": str(temporary)}
    request = Request(job_file="job.json", log="/dev/full", num_ranks=1, grace_s=1.0)
    with warm.imports_done(), WorkerHost("talks_and_fails") as host:
        host.start(request, environment)
        while (exit_code := host.poll()) is None:
            time.sleep(0.02)
    assert exit_code == 1
    assert {each.name.partition("_")[0] for each in temporary.iterdir()} <= {"torchinductor"}
