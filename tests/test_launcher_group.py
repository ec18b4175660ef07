"""A group's run tree when things go wrong around its modes; no process is started."""

import io
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dpsgd_track.launcher import choices, group, recording
from dpsgd_track.launcher.group import GroupRun
from dpsgd_track.launcher.process_group import Launch, Outcome
from dpsgd_track.launcher.progress import PlainDisplay
from dpsgd_track.launcher.recording import open_group
from dpsgd_track.record import names
from dpsgd_track.record.failure import Failure, FailureKind
from dpsgd_track.record.plan import Suite
from dpsgd_track.record.run import Status
from tests.support.planned import place, plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("groups")


@pytest.fixture(autouse=True)
def cpu_only(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(choices, "count_gpus", lambda: 0)


def run(name: str, *argv: str) -> int:
    options = ("quick", "--group", name, *argv)
    made = plan(*options)
    recording = open_group(made.suite, place(*options))
    return GroupRun(made, recording, Launch(), PlainDisplay(io.StringIO())).run()


def statuses(name: str) -> dict[str, tuple[str, str]]:
    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    experiment = client.get_experiment_by_name("dpsgd-track").experiment_id
    found = client.search_runs([experiment], f"tags.`{names.GROUP}` = '{name}'")
    return {
        run.info.run_name: (run.info.status, run.data.tags.get(names.REASON, ""))
        for run in found
        if run.data.tags[names.KIND] != names.KIND_RANK
    }


def test_a_mode_with_nothing_to_run_is_failed_and_not_started(monkeypatch):
    started = []

    def run_mode(job, *_):
        started.append(job.job.mode)
        failure = Failure(kind=FailureKind.OUT_OF_MEMORY, regime=0)
        return (Outcome(Status.FAILED, failure),) * len(job.job.regimes)

    monkeypatch.setattr(group, "run_mode", run_mode)
    assert run("blocked", "--mode", "flash_fsdp", "--regime", "clip") == 1
    assert started == ["reference"]
    status, reason = statuses("blocked")["flash_fsdp/clip"]
    assert status == "FAILED"
    assert reason.startswith("not started: the clipping bounds are unknown")


@pytest.mark.parametrize(
    "left", [None, "{", "{}", '{"max_grad_norms": [1.0]}', '{"max_grad_norms": [0, 0, 0, 0]}']
)
def test_bounds_that_cannot_be_used_fail_the_reference(left, monkeypatch):
    def run_mode(job, *_):
        if left is not None:
            (Path(job.work_dir) / "0").mkdir()
            (Path(job.work_dir) / "0" / "clip_bounds.json").write_text(left)
        return tuple(map(_finished, job.job.regimes))

    monkeypatch.setattr(group, "run_mode", run_mode)
    name = f"bounds-{abs(hash(left))}"
    assert run(name, "--mode", "flash_fsdp", "--regime", "clip") == 1
    found = statuses(name)
    assert found["reference/clip"][0] == "FAILED"
    assert found["flash_fsdp/clip"][0] == "FAILED"


def test_a_fault_of_the_launcher_leaves_nothing_running(monkeypatch):
    def run_mode(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(group, "run_mode", run_mode)
    with pytest.raises(OSError, match="no space"):
        run("fault", "--mode", "no_dp", "--regime", "accuracy")
    found = statuses("fault")
    replays = {f"no_dp/accuracy ({kind})" for kind in ("again", "permuted", "ulp")}
    assert set(found) == {"fault", "no_dp/accuracy", *replays}
    assert {status for status, _ in found.values()} == {"FAILED"}
    assert "no space left" in found["fault"][1]


def test_a_group_is_never_written_twice(monkeypatch):
    monkeypatch.setattr(group, "run_mode", lambda job, *_: tuple(map(_finished, job.job.regimes)))
    assert run("twice", "--mode", "no_dp", "--regime", "accuracy") == 0
    with pytest.raises(ValueError, match="group='twice': expected a name not used before"):
        run("twice", "--mode", "no_dp", "--regime", "accuracy")
    # Its folder may be gone; the store still knows it.
    shutil.rmtree("results/twice")
    with pytest.raises(ValueError, match="group='twice': expected a name not used before"):
        run("twice", "--mode", "no_dp", "--regime", "accuracy")


def test_two_groups_of_one_second_get_two_names(monkeypatch):
    monkeypatch.setattr(recording.time, "strftime", lambda _: "20260101-000000")
    recordings = [open_group(Suite.QUICK, place("quick")) for _ in range(3)]
    for each in recordings:
        each.close()
    assert [each.group for each in recordings] == [
        "quick-20260101-000000",
        "quick-20260101-000000-2",
        "quick-20260101-000000-3",
    ]


def _finished(_regime) -> Outcome:
    return Outcome(Status.FINISHED)
