"""Groups that are cut short: nothing stays RUNNING, what was logged is there, the rest is run."""

import html
import json
import re
import shlex
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from dpsgd_track.config import Settings
from dpsgd_track.launcher import choices
from dpsgd_track.launcher.recording import Recording, open_group
from dpsgd_track.record import names
from dpsgd_track.record.run import Status
from dpsgd_track.store.find_group import read_group_anywhere
from dpsgd_track.store.opening import open_store
from dpsgd_track.store.shipper import Shipper
from dpsgd_track.store.spool import SpoolWriter
from tests.support import fake_launch, planned
from tests.support.launches import kill_all, living, start
from tests.support.spooled_group import STOPPED
from tests.support.synthetic_group import empty_tables
from tests.support.tracking_servers import MlflowServer, Wire, shared_server

NO_DP = ("--mode", "no_dp", "--regime", "accuracy")
SECRET = "a-secret-never-to-be-seen"
NUM_RUNS = 13
"""The group's, and those of no_dp and its three replays with two ranks each."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    shutil.copy(empty_tables(), tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choices, "count_gpus", lambda: 0)
    return tmp_path


def plan(monkeypatch: pytest.MonkeyPatch, **modes: dict) -> None:
    monkeypatch.setenv("FAKE_WORKER", json.dumps(modes))


def statuses(group: str, uri: str = "", experiment: str = "dpsgd-track") -> Counter[str]:
    settings = Settings(tracking_uri=uri or Settings().tracking_uri, experiment=experiment)
    client, experiment_id = open_store(settings)
    runs = client.search_runs([experiment_id], f"tags.`{names.GROUP}` = '{group}'")
    return Counter(run.info.status for run in runs)


def spooled() -> list[str]:
    return sorted(path.name for path in Path("spool").iterdir())


def until(holds, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_told(group: str) -> int:
    found = Path("results", group, "logs").glob("*/progress.jsonl")
    return sum(file.read_text().count('"step", ') for file in found)


def kill_a_launcher(folder: Path, group: str, after_steps: int = 3) -> None:
    """SIGKILL to a launcher in the middle of a mode; returns when its workers are gone, too."""
    slow = {"no_dp": {"do": "slow"}}
    process = start(folder, "quick", *NO_DP, "--group", group, "--num-iter", "40", plan=slow)
    until(lambda: steps_told(group) >= after_steps)
    workers = living(folder)
    assert len(workers) >= 3
    process.kill()
    process.communicate()
    until(lambda: not any(worker.is_running() for worker in workers))


def test_a_launcher_killed_without_warning_leaves_nothing_running(folder, capsys):
    kill_a_launcher(folder, "first")
    told = steps_told("first")
    found = read_group_anywhere(Settings(), "first", print)
    run = next(run for run in found.group.runs if not run.replay)
    assert found.spooled is not None
    assert run.status == "RUNNING"
    assert run.trajectory is not None
    assert run.trajectory.num_steps >= told - 1
    assert fake_launch.run(["compare", "first", "--no-png"]) == 3

    assert fake_launch.run(["sync"]) == 0
    said = capsys.readouterr().out
    # The group, the mode run that had begun, its ranks, and its replays with theirs.
    assert f"first: closed {NUM_RUNS} runs, as its launcher died" in said
    assert "each value checked" in said
    assert spooled() == []
    assert statuses("first") == {"KILLED": NUM_RUNS}
    stored = read_group_anywhere(Settings(), "first", print)
    assert stored.spooled is None
    run = next(run for run in stored.group.runs if not run.replay)
    assert run.trajectory is not None
    assert run.trajectory.num_steps >= told - 1
    assert "launcher died" in run.reason
    # The report that was made meanwhile came along.
    assert stored.group.tags[names.VERDICT] == "INCONCLUSIVE"


@pytest.mark.soak
def test_the_pasted_command_of_a_report_makes_a_group_of_its_own(folder, monkeypatch):
    plan(monkeypatch)
    spool = ("--offline", "--spool", "a spool")
    assert fake_launch.run(["quick", *NO_DP, *spool, "--group=first", "--num-iter", "2"]) == 0
    fake_launch.run(["compare", "first", "--spool", "a spool", "--no-png"])
    page = Path("results/first/report.html").read_text(encoding="utf-8")
    shown = re.search(r'<code id="command">(.*?)</code>', page, re.DOTALL)
    # A shell's comment names the versions.
    *program, verb = ("python", "launch.py", "quick")
    words = shlex.split(html.unescape(re.sub("<[^>]+>", "", shown[1])), comments=True)
    assert words[:3] == [*program, verb]
    assert fake_launch.run(words[2:]) == 0
    first, second = (
        read_group_anywhere(Settings(spool_dir="a spool"), path.name, print).group
        for path in sorted(Path("a spool").iterdir(), key=lambda path: path.name != "first")
    )
    assert second.name != first.name
    assert second.plan.jobs == first.plan.jobs
    assert second.plan.environment == first.plan.environment
    assert second.plan.command == first.plan.command
    assert second.plan.environment.torch in page
    assert second.plan.environment.git_revision in page


def test_when_everything_dies_at_once_the_rest_is_run_and_the_group_is_whole(
    folder, monkeypatch, capsys
):
    options = ("--mode", "no_dp,flash_fsdp", "--regime", "accuracy", "--group", "g")
    slow = {"flash_fsdp": {"do": "slow"}}
    process = start(folder, "quick", *options, "--num-iter", "40", plan=slow)
    told = Path("results/g/logs/flash_fsdp/progress.jsonl")
    until(lambda: told.exists() and told.read_text().count('"step", ') >= 3)
    kill_all(process)
    process.communicate()
    assert not living(folder)
    steps = told.read_text().count('"step", ')
    found = {run.title: run for run in read_group_anywhere(Settings(), "g", print).group.runs}
    assert found["no_dp (ulp)"].status == "FINISHED"
    cut = found["flash_fsdp"]
    assert cut.trajectory is not None
    assert cut.trajectory.num_steps in (steps, steps + 1)
    assert fake_launch.run(["compare", "g", "--no-png"]) != 0
    capsys.readouterr()
    assert fake_launch.run(["resume", "g"]) == 0
    said = capsys.readouterr().out
    assert "flash_fsdp: started (accuracy)" in said
    assert "group g: 1 of 1 modes finished" in said
    # The run of flash_fsdp that was cut off and its two ranks; the group's own went on.
    assert statuses("g") == {"FINISHED": 1 + 3 * 4 + 3 + 0, "KILLED": 3}
    assert spooled() == []
    group = read_group_anywhere(Settings(), "g", print).group
    assert {run.status for run in group.runs} == {"FINISHED"}
    assert {run.trajectory.num_steps for run in group.runs if run.trajectory} == {40}
    assert group.superseded == 1


def a_group_in_the_making(group: str, *more: str) -> Recording:
    """What a launcher has open in the middle of a group."""
    options = ("quick", *NO_DP, "--group", group, *more)
    made = planned.plan(*options)
    recording = open_group(made.suite, planned.place(*options))
    recording.tree.start_group(made)
    recording.start(print)
    recording.tree.start_mode(made.jobs[0], made.jobs[0].regimes[0], (0, 1))
    return recording


def test_the_next_launch_closes_what_a_dead_launcher_left(folder, monkeypatch, capsys):
    # What is left is shipped while the launch runs, and no longer.
    plan(monkeypatch, no_dp={"do": "slow"})
    Path("other.yaml").write_text("experiment: other")
    a_group_in_the_making("first", "--config", "other.yaml").close()
    assert spooled() == ["first"]
    assert statuses("first", experiment="other") == {"RUNNING": 4}
    assert fake_launch.run(["quick", *NO_DP, "--group", "second", "--num-iter", "10"]) == 0
    assert "group first: closed 4 runs" in capsys.readouterr().out
    # It stayed in its own experiment.
    assert statuses("first", experiment="other") == {"KILLED": 4}
    assert statuses("first") == {}
    assert statuses("second") == {"FINISHED": NUM_RUNS}
    assert spooled() == []


def test_two_groups_at_once_do_not_disturb_each_other(folder):
    recordings = [a_group_in_the_making(group) for group in ("a", "b")]
    for each in recordings:
        each.tree.finish_open(Status.FINISHED, STOPPED)
        each.close()
        assert each.left_behind == ""
        assert statuses(each.group) == {"FINISHED": 4}
    assert spooled() == []


@pytest.mark.soak
def test_two_launches_at_once_on_a_fresh_store_do_not_disturb_each_other(tmp_path):
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        processes = [
            start(folder, "quick", *NO_DP, "--group", name, makes_store=True) for name in ("a", "b")
        ]
        for process in processes:
            out, err = process.communicate(timeout=90)
            assert process.returncode == 0, out + err
        uri = f"sqlite:///{folder}/mlflow.db"
        assert statuses("a", uri) == statuses("b", uri) == {"FINISHED": NUM_RUNS}
        assert not list((folder / "spool").iterdir())


def test_a_group_is_run_only_where_it_lacks_something(folder, monkeypatch, capsys):
    plan(monkeypatch, no_dp={"do": "crash", "regime": 1, "step": 2}, flash_fsdp={"do": "crash"})
    options = ("--mode", "no_dp,flash_fsdp", "--regime", "accuracy,clip", "--group", "g")
    assert fake_launch.run(["quick", *options, "--offline"]) == 1
    assert "resume:  python launch.py resume g" in capsys.readouterr().out
    plan(monkeypatch, flash_fsdp={"do": "crash", "regime": 1})
    assert fake_launch.run(["resume", "g", "--offline"]) == 1
    said = capsys.readouterr().out
    assert "no_dp: started (accuracy (again), accuracy (permuted), accuracy (ulp))" in said
    assert "flash_fsdp: started (accuracy, clip)" in said
    assert "reference: started" not in said
    assert statuses("g") == {}
    # It is the same from the store, once the spool is gone.
    assert fake_launch.run(["sync", "g"]) == 0
    plan(monkeypatch)
    assert fake_launch.run(["resume", "g"]) == 0
    assert "flash_fsdp: started (clip)" in capsys.readouterr().out
    assert spooled() == []
    group = read_group_anywhere(Settings(), "g", print).group
    assert {run.status for run in group.runs} == {"FINISHED"}
    assert group.superseded == 3 + 2 + 1
    assert group.tags[names.REASON] == ""
    client, _ = open_store(Settings())
    assert client.get_run(group.run_id).info.status == "FINISHED"
    # Its bounds are those that the reference measured the first time.
    flash = next(run for run in group.runs if (run.mode, run.regime) == ("flash_fsdp", "clip"))
    params = client.get_run(flash.run_id).data.params
    assert params["regime.max_grad_norms"] == "1.0, 1.0, 1.0, 1.0"
    assert fake_launch.run(["resume", "g"]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert fake_launch.run(["resume", "g", "-q"]) == 0
    assert capsys.readouterr().out == "group g: nothing is missing\n"


def test_a_matrix_that_was_cut_short_is_finished_and_told(folder, monkeypatch, capsys):
    planted = "flash_fsdp+bound_ignored"
    plan(monkeypatch, **{planted: {"do": "crash"}})
    options = ("--mode", "flash_fsdp", "--fault", planted.partition("+")[2])
    options += ("--nproc-per-node", "1")
    # What the fake worker makes up is found to be wrong, with a fault and without.
    assert fake_launch.run(["faults", *options, "--group", "g", "--output", "matrix.md"]) == 1
    assert "resume:  python launch.py resume g" in capsys.readouterr().out
    Path("matrix.md").unlink()
    plan(monkeypatch)
    assert fake_launch.run(["resume", "g", "--output", "matrix.md"]) == 1
    said = capsys.readouterr().out
    assert f"{planted}: started" in said
    assert said.count(": started") == 1
    assert "Matrix: results/g/faults.md" in said
    assert f"python launch.py faults {shlex.join(options)}" in Path("matrix.md").read_text()
    # Once it is whole it is told again, and nothing is run.
    assert fake_launch.run(["resume", "g"]) == 1
    said = capsys.readouterr().out
    assert "group g: nothing is missing" in said
    assert "Matrix: results/g/faults.md" in said
    outcome = r"g: [01] of 1 \(\d+%\) faults found; .*\d false alarms on \d healthy modes\n"
    assert fake_launch.run(["resume", "g", "-q"]) == 1
    assert re.fullmatch(outcome, capsys.readouterr().out)
    assert fake_launch.run(["faults", *options, "-q"]) == 1
    assert re.fullmatch("faults-" + outcome.replace("g:", r"[\d-]+:"), capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("resume", "none"), "expected"),
        (("sync", "none"), "group='none': expected a group in the spool"),
    ],
)
def test_a_group_that_is_not_there(folder, capsys, argv, said):
    open_store(Settings())
    assert fake_launch.run(list(argv)) == 2
    assert said in capsys.readouterr().err


def test_a_group_is_left_alone_while_its_launcher_lives(folder, capsys):
    recording = a_group_in_the_making("g")
    assert fake_launch.run(["sync"]) == 1
    assert "is at work" in capsys.readouterr().out
    assert fake_launch.run(["resume", "g"]) == 2
    assert "nobody works on" in capsys.readouterr().err
    recording.tree.finish_open(Status.FINISHED, STOPPED)
    recording.close()
    assert spooled() == []


def test_a_spool_that_cannot_be_read_is_in_nobodys_way(folder, capsys):
    a_group_in_the_making("first").close()
    other = Path("spool/other")
    other.mkdir()
    (other / "000001-launcher.control").write_bytes(b"dpsgd-track spool 1\n")
    assert read_group_anywhere(Settings(), "latest", print).group.name == "first"
    assert "other/000001-launcher.control: expected a spool file of version 3" in (
        capsys.readouterr().out
    )
    a_group_in_the_making("second").close()
    assert "group other: spool/other/000001-launcher.control: " in capsys.readouterr().out
    assert fake_launch.run(["compare", "other"]) == 2
    said = capsys.readouterr().err
    assert said.count("expected a spool file of version 3. Ship it with") == 1
    assert said.count("\n") == 1
    # Damage may have made it unreadable.
    for argv in (["sync", "other"], ["sync"]):
        assert fake_launch.run(argv) == 1
        assert "other: NOT shipped. " in capsys.readouterr().out
    assert spooled() == ["other"]
    assert statuses("first") == statuses("second") == {"KILLED": 4}


def test_one_workers_damaged_file_keeps_back_nothing_else(folder, capsys):
    recording = a_group_in_the_making("g")
    recording.tree.finish_open(Status.FINISHED, STOPPED)
    (recording.spool / "000002-no_dp-rank0.records").write_bytes(bytes(100))
    recording.close()
    assert "expected a spool file of version 3" in recording.left_behind
    assert fake_launch.run(["sync"]) == 1
    assert "NOT all of it is at" in capsys.readouterr().out
    assert statuses("g") == {"FINISHED": 4}
    assert spooled() == ["g"]


def test_records_are_kept_where_those_of_the_launcher_were_lost(folder, capsys):
    group = Path("spool/g")
    group.mkdir(parents=True)
    worker = SpoolWriter(group, "no_dp-rank0.records")
    worker.log_metrics("run", 0, {"loss": 1.0})
    worker.close()
    assert fake_launch.run(["sync"]) == 1
    assert "belongs to no run that is known" in capsys.readouterr().out
    assert spooled() == ["g"]


def test_a_group_that_cannot_be_shipped_does_not_keep_the_others(folder, capsys):
    Path("other.yaml").write_text("experiment: other")
    a_group_in_the_making("a", "--config", "other.yaml").close()
    a_group_in_the_making("b").close()
    client, experiment_id = open_store(Settings(experiment="other"))
    client.delete_experiment(experiment_id)
    assert fake_launch.run(["sync"]) == 1
    said = capsys.readouterr().out
    assert "a: NOT shipped." in said
    assert "experiment 'other' is deleted" in said
    assert spooled() == ["a"]
    assert statuses("b") == {"KILLED": 4}


def test_a_group_is_as_it_was_where_it_could_not_be_resumed(folder, monkeypatch, capsys):
    recording = a_group_in_the_making("g")
    recording.tree.finish_open(Status.KILLED, STOPPED)
    monkeypatch.setattr(Shipper, "differences", lambda *_, **__: ["something is missing"])
    recording.close()

    def refuse(*_: object) -> None:
        raise OSError("the store takes nothing")

    monkeypatch.setattr(Shipper, "ship", refuse)
    assert fake_launch.run(["resume", "g"]) == 2
    assert "the store takes nothing" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert fake_launch.run(["sync"]) == 0
    # Nothing was left open that a later launch would have to end.
    assert "closed" not in capsys.readouterr().out
    assert statuses("g") == {"KILLED": 4}


@pytest.fixture(scope="module")
def server() -> MlflowServer:
    return shared_server()


def test_a_launch_goes_on_when_its_server_dies(folder, server, monkeypatch, capsys):
    plan(monkeypatch, no_dp={"do": "slow"})
    wire = Wire(server.port)

    def cut() -> None:
        until(lambda: steps_told("g") >= 5)
        wire.cut()

    threading.Thread(target=cut).start()
    arguments = ("quick", *NO_DP, "--group", "g", "--num-iter", "8", "--tracking-uri", wire.uri)
    began = time.monotonic()
    assert fake_launch.run(list(arguments)) == 0
    assert time.monotonic() - began < 60
    said = capsys.readouterr().out
    assert said.count("takes nothing at the moment") == 1
    assert f"ship:    python launch.py sync g --tracking-uri {wire.uri}" in said
    assert spooled() == ["g"]
    for wanted in ("g", "latest"):
        found = read_group_anywhere(Settings(tracking_uri=wire.uri), wanted, print)
        assert found.group.name == "g"
        assert "Read in spool/g" in capsys.readouterr().out
    assert fake_launch.run(["sync", "g", "--tracking-uri", wire.uri]) == 2
    wire.mend()
    assert fake_launch.run(["sync", "g", "--tracking-uri", wire.uri]) == 0
    assert statuses("g", wire.uri) == {"FINISHED": NUM_RUNS}
    assert spooled() == []
    wire.cut()


def test_an_offline_group_is_created_on_a_server_later(folder, server, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    uri = f"http://me:{SECRET}@127.0.0.1:1"
    options = ("--group", "later", "--offline", "--spool", "elsewhere", "--tracking-uri", uri)
    assert fake_launch.run(["quick", *NO_DP, *options]) == 0
    said = capsys.readouterr()
    command = (
        "python launch.py sync later --tracking-uri 'http://***@127.0.0.1:1' --spool elsewhere"
    )
    assert f"ship:    {command}" in said.out
    kept = b"".join(file.read_bytes() for file in Path().rglob("*") if file.is_file())
    assert b"no_dp" in kept
    assert SECRET.encode() not in kept
    assert SECRET not in said.out + said.err
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    place = ("--spool", "elsewhere", "--tracking-uri", server.uri)
    assert fake_launch.run(["sync", *place]) == 0
    assert statuses("later", server.uri) == {"FINISHED": NUM_RUNS}
    found = read_group_anywhere(Settings(tracking_uri=server.uri), "later", print)
    assert found.spooled is None
    assert all(run.trajectory and not run.trajectory_missing for run in found.group.runs)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_four_ranks_start_on_a_fresh_store_twenty_times(folder):
    for attempt in range(20):
        uri = f"sqlite:///{folder}/{attempt}.db"
        options = ("--group", f"g{attempt}", "--nproc-per-node", "4", "--tracking-uri", uri)
        assert fake_launch.run(["quick", *NO_DP, *options]) == 0
        assert statuses(f"g{attempt}", uri) == {"FINISHED": 21}
