import io
import os
import signal

import pytest

from dpsgd_track.config import PerformanceConfig, RegimeConfig
from dpsgd_track.launcher import fork_client as worker_host
from dpsgd_track.launcher import process_group
from dpsgd_track.launcher.fork_client import WorkerHost
from dpsgd_track.launcher.fork_server import Request
from dpsgd_track.launcher.interruption import Interruption
from dpsgd_track.launcher.process_group import Launch, failure_of, outcomes
from dpsgd_track.launcher.progress import PlainDisplay
from dpsgd_track.record.failure import FAILURE, Failure, FailureKind
from dpsgd_track.record.plan import StartedJob
from dpsgd_track.record.run import Status
from tests.support.fake_worker import trajectory
from tests.support.synthetic_group import ENVIRONMENT, job

REGIMES = (RegimeConfig(name="accuracy", num_iter=2), RegimeConfig(name="clip", num_iter=3))


def handed(work_dir) -> StartedJob:
    return StartedJob(job=job("no_dp", *REGIMES), environment=ENVIRONMENT, work_dir=str(work_dir))


def test_success_without_a_trajectory_is_a_failure(tmp_path):
    (tmp_path / "0").mkdir()
    trajectory(2).save(tmp_path / "0" / "trajectory.npz")
    finished, failed = outcomes(handed(tmp_path), 0, {0, 1})
    assert finished.status is Status.FINISHED
    assert failed.failure is not None
    assert "without leaving a trajectory" in failed.failure.reason


def test_workers_know_of_no_store(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    seen = {}

    class Ended:
        def __init__(self, command, environment, log, *, stdin):
            seen.update(environment, command=command)

        def poll(self):
            return 1

        def wait(self, timeout_s):
            return 1

        def kill_others(self):
            pass

        def end(self, grace_s):
            pass

    monkeypatch.setattr(worker_host, "Session", Ended)
    display = PlainDisplay(io.StringIO())
    with WorkerHost("a.module") as host:
        process_group.run_mode(handed(tmp_path), Launch(), host, Interruption(), display)
    # They append to files: what could leak is not there.
    assert "MLFLOW_TRACKING_URI" not in seen
    assert "tracking" not in (tmp_path / "job.json").read_text() + " ".join(seen["command"])


@pytest.mark.parametrize(("device", "visible"), [("cpu", ""), ("cuda", "0,1")])
def test_ranks_on_the_cpu_see_no_gpu(device, visible, monkeypatch):
    # Opacus shards over GPUs wherever there are some.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    planned = job("ghost_fsdp", *REGIMES, performance=PerformanceConfig(device=device))
    request = Request(job_file="", log="", num_ranks=2, grace_s=1.0)
    assert process_group.environment_of(planned, request)["CUDA_VISIBLE_DEVICES"] == visible


@pytest.fixture
def handled():
    """SIGHUP as where nothing ignores it: tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("handled")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_once_and_raises_nothing(number):
    before = signal.getsignal(number)
    with Interruption(outlives_terminal=False) as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.reason == f"interrupted by {signal.Signals(number).name}."
    assert signal.getsignal(number) == before


@pytest.mark.usefixtures("handled")
def test_a_terminal_that_goes_away_ends_no_launch():
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interruption.requested


@pytest.mark.usefixtures("handled")
def test_a_hangup_that_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interruption(outlives_terminal=False) as interruption:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not interruption.requested


def report(folder, rank: int, failure: Failure) -> None:
    (folder / f"failure-rank{rank}.json").write_text(FAILURE.dumps(failure))


def test_the_first_report_counts(tmp_path):
    nan = FailureKind.NOT_FINITE
    report(tmp_path, 1, Failure(kind=nan, message="loss is nan", regime=0, step=3, rank=1))
    report(tmp_path, 0, Failure(kind=FailureKind.PEER, message="Connection closed by peer"))
    failure = failure_of(tmp_path, 1)
    assert failure.reason == "a value became NaN or infinite at step 3, rank 1: loss is nan."
    assert "--learning-rate" in failure.advice()


def test_a_torn_report_is_still_a_failure(tmp_path):
    (tmp_path / "failure-rank0.json").write_text('{"kind": "out_of_')
    assert "failure-rank0.json cannot be read" in failure_of(tmp_path, 1).reason


@pytest.mark.parametrize(
    ("log", "wanted"),
    [
        ("[rank1]: ValueError: a\n[rank1]: KeyError: 'b'\n", "KeyError: 'b'"),
        ("torch.OutOfMemoryError: CUDA out of memory.\n", "torch.OutOfMemoryError: CUDA"),
        ("one\n\ntwo\n", "one | two"),
        (
            "[rank1]: KeyError: 'b'\n[rank0]: RuntimeError: Connection closed by peer\n"
            "Root Cause (first observed failure):\n[0]:\n  rank      : 1 (local_rank: 1)\n",
            "at rank 1: KeyError: 'b'",
        ),
        ("Signal 15 (SIGTERM) received by PID 1\nSignal 9 (SIGKILL) received by PID 2", "signal 9"),
    ],
)
def test_the_log_says_what_happened(log, wanted, tmp_path):
    (tmp_path / "output.log").write_text(log)
    assert wanted in failure_of(tmp_path, 1).reason


def test_a_token_in_the_log_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "output.log").write_text("OSError: hf_secret is invalid\n")
    assert "OSError: *** is invalid" in failure_of(tmp_path, 1).reason
