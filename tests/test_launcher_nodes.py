"""A group on several machines: launchers that find each other, fail together and end together."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpsgd_track.config import (
    DataConfig,
    JobConfig,
    ModelConfig,
    NodesConfig,
    PerformanceConfig,
    RegimeConfig,
    Settings,
)
from dpsgd_track.launcher.group import GroupRun
from dpsgd_track.launcher.process_group import Launch, cause
from dpsgd_track.launcher.recording import open_part
from dpsgd_track.launcher.several_machines import meeting as nodes_module
from dpsgd_track.launcher.several_machines.meeting import (
    Follower,
    Hello,
    Leader,
    NodeJob,
    NodeLost,
    Refused,
    Report,
    hello_of,
    interface_towards,
)
from dpsgd_track.record import names
from dpsgd_track.record.failure import Failure, FailureKind
from dpsgd_track.record.plan import GroupPlan, StartedJob, Suite
from dpsgd_track.record.run import Status
from dpsgd_track.store.find_group import read_group_anywhere
from dpsgd_track.store.opening import StoreError, open_store
from dpsgd_track.store.spooled import SpooledGroup, part_of, spooled_groups
from tests.support import fake_launch
from tests.support.launches import living, start
from tests.support.planned import asked
from tests.support.synthetic_group import ENVIRONMENT
from tests.support.tracking_servers import MlflowServer, closed_port, shared_server


def job(mode: str = "no_dp", num_ranks: int = 2, seed: int = 42) -> JobConfig:
    return JobConfig(
        mode=mode,
        model=ModelConfig(name="llama-tiny"),
        data=DataConfig(source="synthetic", seq_length=8, batch_size=2),
        performance=PerformanceConfig(device="cpu"),
        regimes=(RegimeConfig(name="accuracy", num_iter=1),),
        num_ranks=num_ranks,
        seed=seed,
    )


def handed(*args, **more) -> StartedJob:
    return StartedJob(job=job(*args, **more), environment=ENVIRONMENT, work_dir="")


def plan_of(*jobs: JobConfig) -> GroupPlan:
    return GroupPlan(suite=Suite.FULL, jobs=jobs, num_ranks=2, environment=ENVIRONMENT)


@pytest.fixture(autouse=True)
def short_byes(monkeypatch) -> Iterator[None]:
    made: list[Follower] = []
    make = Follower.__init__

    def remember(self: Follower, *args, **options) -> None:
        make(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(nodes_module, "BYE_TIMEOUT_S", 1.0)
    monkeypatch.setattr(Follower, "__init__", remember)
    yield
    for follower in made:
        follower.close()


def machines(num_nodes: int = 2) -> list[NodesConfig]:
    port = closed_port()
    place = {"num_nodes": num_nodes, "host": "127.0.0.1", "port": port}
    return [NodesConfig(node_rank=rank, **place) for rank in range(num_nodes)]


def met(leader: Leader, *followers: Follower, plan: GroupPlan | None = None) -> None:
    """Have them find each other."""
    joined: list[str] = []

    def join(follower: Follower) -> None:
        joined.append(follower.join(hello_of(plan), 20, lambda line: None))

    threads = [threading.Thread(target=join, args=(each,)) for each in followers]
    for thread in threads:
        thread.start()
    leader.gather(plan, 20, lambda line: None)
    leader.welcome("g")
    for thread in threads:
        thread.join()
    assert joined == ["g"] * len(followers)


def two() -> tuple[Leader, Follower]:
    """Two machines that have found each other."""
    places = machines()
    leader, follower = Leader(places[0]), Follower(places[1])
    met(leader, follower)
    return leader, follower


def refused(follower: Follower, hello: Hello) -> None:
    with pytest.raises(Refused):
        follower.join(hello, 20, lambda line: None)


def next_job(follower: Follower) -> NodeJob | tuple[int, str]:
    deadline = time.monotonic() + 10
    while (received := follower.next_job()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return received


def test_jobs_are_handed_out_in_turn_and_reports_come_back():
    places = machines(3)
    leader, *followers = Leader(places[0]), Follower(places[1]), Follower(places[2])
    met(leader, *followers)
    fine, bad = (
        Report(failure=None),
        Failure(kind=FailureKind.NOT_FINITE, message="NaN", rank=1),
    )
    ports = set()
    for number in range(2):
        own = leader.start(handed(num_ranks=6, seed=number), f"run-{number}")
        handed_out = [next_job(follower) for follower in followers]
        assert own is not None
        assert [given.job.job.seed for given in handed_out] == [number] * 2
        assert [given.meeting.node_rank for given in handed_out] == [1, 2]
        assert {own.port, *(given.meeting.port for given in handed_out)} == {own.port}
        assert {own.run_id, *(given.meeting.run_id for given in handed_out)} == {f"run-{number}"}
        ports.add(own.port)
        followers[0].done(fine)
        followers[1].done(Report(failure=bad, age_s=5.0) if number else fine)
        reports = leader.settle("")
        assert [each.failure and each.failure.kind for each in reports] == [
            FailureKind.NOT_FINITE
        ] * number
    # A store that an earlier job has written to would mislead the next.
    assert len(ports) == 2
    (report,) = reports
    assert 5.0 <= report.age_s < 65.0
    assert report.failure.message == f"node 2 ({socket.gethostname()}): NaN"
    closing = threading.Thread(target=leader.close, args=(1, "1 of 2 modes finished"))
    closing.start()
    assert [next_job(each) for each in followers] == [(1, "1 of 2 modes finished")] * 2
    closing.join(3)
    assert not closing.is_alive()


def test_a_job_on_one_device_is_node_0s_alone():
    leader, follower = two()
    assert leader.start(handed("flash", num_ranks=1), "alone") is None
    assert follower.next_job() is None
    leader.close(0, "")


def test_a_job_that_is_cut_short_is_ended_everywhere():
    leader, follower = two()
    leader.start(handed(), "run")
    next_job(follower)
    assert leader.trouble() == ""
    assert follower.is_to_end() == ""

    def end() -> None:
        while not follower.is_to_end():
            time.sleep(0.02)
        follower.done(Report(failure=None))

    ending = threading.Thread(target=end)
    ending.start()
    assert leader.settle("node 0 failed.") == []
    ending.join()
    leader.close(1, "")


def test_a_failure_elsewhere_is_trouble_here():
    leader, follower = two()
    leader.start(handed(), "run")
    next_job(follower)
    follower.done(Report(failure=Failure(kind=FailureKind.KILLED, message="signal 9")))
    deadline = time.monotonic() + 5
    while not leader.trouble():
        assert time.monotonic() < deadline
    assert leader.trouble() == f"node 1 ({socket.gethostname()}) failed."
    # The failure grows old while node 0 ends its own part, whatever the machines' clocks show.
    time.sleep(0.3)
    (report,) = leader.settle("node 1 failed.")
    assert 0.25 <= report.age_s < 60
    assert leader.lost == ""
    leader.close(1, "")


def test_a_silent_machine_is_lost_and_a_slow_one_is_not(monkeypatch):
    monkeypatch.setattr(nodes_module, "BEAT_S", 0.2)
    places = machines(3)
    leader = Leader(places[0], lost_after_s=1.0)
    followers = [Follower(place, lost_after_s=1.0) for place in places[1:]]
    met(leader, *followers)
    leader.start(handed(num_ranks=3), "run")
    until = time.monotonic() + 2
    while time.monotonic() < until:
        assert leader.trouble() == ""
        time.sleep(0.05)
    followers[1]._is_over.set()  # its thread ends, as its process would
    (report,) = leader.settle("node 0 failed.")
    assert report.failure is not None
    assert report.failure.kind is FailureKind.MACHINE_LOST
    assert leader.lost == f"node 2 ({socket.gethostname()}) was not heard of for 1 s."
    leader.close(1, "")


def test_a_leader_that_goes_is_noticed():
    places = machines()
    leader, follower = Leader(places[0]), Follower(places[1], lost_after_s=1.0)
    met(leader, follower)
    del leader
    with pytest.raises(NodeLost, match=r"node 0 \(127.0.0.1\) (is gone|was not heard of)"):
        next_job(follower)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ([job(seed=7)], r"seed='7' on node 1 \(.*\): expected '42', as on node 0"),
        ([job(num_ranks=4)], r"num_ranks='4' on node 1 \(.*\): expected '2'"),
        ([job(), job("flash_fsdp")], r"mode='no_dp, flash_fsdp' on node 1 .*: expected 'no_dp'"),
        (None, ""),
    ],
    ids=["another-setting", "other-ranks", "more-modes", "takes-what-comes"],
)
def test_machines_that_would_run_something_else_are_refused(theirs, said):
    places = machines()
    leader, follower = Leader(places[0]), Follower(places[1])
    hello = hello_of(theirs and plan_of(*theirs))
    answers: list[str] = []

    def join() -> None:
        try:
            answers.append(follower.join(hello, 20, lambda line: None))
        except Refused as error:
            answers.append(str(error))

    joining = threading.Thread(target=join)
    joining.start()
    if not said:
        leader.gather(plan_of(job()), 20, lambda line: None)
        leader.welcome("g")
        joining.join()
        assert answers == ["g"]
        return
    with pytest.raises(Refused, match=said) as caught:
        leader.gather(plan_of(job()), 20, lambda line: None)
    joining.join()
    # Both sides say the same.
    assert answers == [str(caught.value)]


def test_other_versions_are_refused():
    places = machines()
    leader, follower = Leader(places[0]), Follower(places[1])
    hello = hello_of(plan_of(job()))
    hello = replace(hello, environment=replace(hello.environment, torch="1.0"))
    threading.Thread(target=refused, args=(follower, hello)).start()
    with pytest.raises(Refused, match=r"torch='1.0' on node 1 .*: expected"):
        leader.gather(plan_of(job()), 20, lambda line: None)


def test_one_that_does_not_come_is_named():
    leader = Leader(machines(3)[0])
    with pytest.raises(Refused, match=r"all of 3 machines within 0.3 s. Node 1, 2 did not come"):
        leader.gather(None, 0.3, lambda line: None)


def test_nobody_at_the_endpoint_is_an_error():
    with pytest.raises(Refused, match=r"expected node 0's launcher there within 0.3 s. Connection"):
        Follower(machines()[1]).join(hello_of(None), 0.3, lambda line: None)


def test_a_taken_port_is_an_error():
    place = machines()[0]
    leader = Leader(place)
    with pytest.raises(Refused, match="expected a free port of this machine"):
        Leader(place)
    del leader


def test_a_node_rank_is_taken_once():
    places = machines(3)
    leader = Leader(places[0])
    first, second = Follower(places[1]), Follower(places[1])
    threading.Thread(target=refused, args=(first, hello_of(None))).start()
    while leader._store.check(["hello/1"]) is False:
        time.sleep(0.02)
    with pytest.raises(Refused, match="node_rank=1: expected one launcher for each"):
        second.join(hello_of(None), 20, lambda line: None)
    leader.refuse("enough")


ECHO = Failure(
    kind=FailureKind.PEER, message="RuntimeError: Connection closed by peer [10.0.0.2]:1234"
)


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (ECHO, Failure(kind=FailureKind.KILLED, message="signal 9"), "signal 9"),
        (Failure(kind=FailureKind.KILLED, message="signal 9"), ECHO, "signal 9"),
        (ECHO, Failure(kind=FailureKind.MACHINE_LOST, message="node 1"), "node 1"),
        (
            Failure(kind=FailureKind.NOT_FINITE, message="NaN"),
            Failure(kind=FailureKind.ERROR, message="KeyError: 'x'"),
            "NaN",
        ),
        (ECHO, replace(ECHO, message="Socket Timeout"), ECHO.message),
    ],
)
def test_what_failed_first_is_the_cause_unless_it_only_lost_the_others(first, second, wanted):
    reports = [Report(failure=second, age_s=1.0), Report(failure=first, age_s=2.0)]
    found = cause([*reports, Report(failure=None)])
    assert found is not None
    assert found.message == wanted
    assert cause([]) is None


def test_the_interface_is_the_one_of_the_route():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") == ""


SLURM = {"JOB_ID": "123456", "JOB_NODELIST": "x[1-2]", "NNODES": "2"}
NO_DP = ("full", "--mode", "no_dp,flash_fsdp", "--regime", "accuracy", "--nproc-per-node", "2")


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    made = [tmp_path / "node0", tmp_path / "node1"]
    for folder in made:
        folder.mkdir()
    return made


def launched(
    folders: list[Path], *argv: str, plans: tuple[dict, dict] = ({}, {}), second: tuple = ()
) -> list[subprocess.Popen[str]]:
    """The same command on both machines."""
    endpoint = ("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{closed_port()}")
    common = (*argv, *endpoint, "--rdzv-timeout", "60")
    return [
        start(folder, *common, "--node-rank", str(rank), *(second if rank else ()), plan=plan)
        for rank, (folder, plan) in enumerate(zip(folders, plans, strict=True))
    ]


def until_steps(num_steps: int, folder: Path, process: subprocess.Popen[str]) -> None:
    """Until so many steps of no_dp were told of."""
    told = folder / "results" / "g" / "logs" / "no_dp" / "progress.jsonl"
    deadline = time.monotonic() + 60
    while not told.exists() or told.read_text().count('"step", ') < num_steps:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)


def ended(processes: list[subprocess.Popen[str]], timeout_s: float = 90) -> list[tuple[int, str]]:
    found = []
    for process in processes:
        out, err = process.communicate(timeout=timeout_s)
        found.append((process.returncode, out + err))
    return found


@pytest.fixture(scope="module")
def server() -> MlflowServer:
    return shared_server()


def statuses(uri: str, group: str) -> dict[str, str]:
    """Status of each run, by `mode/rank`."""
    client, experiment_id = open_store(Settings(tracking_uri=uri))
    found = client.search_runs([experiment_id], f"tags.`{names.GROUP}` = '{group}'")
    return {
        f"{run.data.tags.get(names.MODE, '')}/{run.data.tags.get(names.RANK, '')}/"
        f"{run.data.tags.get(names.REPLAY, '')}": run.info.status
        for run in found
    }


def test_two_machines_make_one_group(folders, server):
    """The second machine's records reach the server by themselves, and crash blame is named."""
    plans = ({}, {"flash_fsdp": {"do": "crash", "rank": 3, "step": 2}})
    argv = (*NO_DP, "--group", "two", "--num-iter", "4", "--tracking-uri", server.uri)
    (code, said), (other_code, other_said) = ended(launched(folders, *argv, plans=plans))
    host = socket.gethostname()
    assert (code, other_code) == (1, 1), said + other_said
    crash = (
        f"the worker raised an exception at rank 3: node 1 ({host}): RuntimeError: the fake worker"
    )
    assert crash in said
    assert f"node 1 ({host}) failed. Ending flash_fsdp" in said
    assert "group two: 1 of 2 modes finished" in said
    assert "node 1: group two: 1 of 2 modes finished" in other_said
    assert "ship: " not in said + other_said
    for folder in folders:
        assert spooled_groups(folder / "spool") == []
    found = statuses(server.uri, "two")
    assert {found.pop(key) for key in list(found) if key.startswith("flash_fsdp")} == {"FAILED"}
    assert found.pop("//") == "FAILED"
    assert set(found.values()) == {"FINISHED"}
    assert len([key for key in found if key.startswith("no_dp/") and key.endswith("/")]) == 5

    client, experiment_id = open_store(Settings(tracking_uri=server.uri))
    found = {
        rank: folder
        for folder in folders
        for logs in (folder / "results" / "two" / "logs").glob("no_dp*")
        for file in logs.glob("process-rank*.json")
        for rank in [int(file.stem.removeprefix("process-rank"))]
    }
    assert found == {0: folders[0], 1: folders[0], 2: folders[1], 3: folders[1]}
    ranks = client.search_runs(
        [experiment_id], f"tags.`{names.GROUP}` = 'two' and tags.`{names.KIND}` = 'rank'"
    )
    for run in ranks:
        mode, rank = run.data.tags[names.MODE], int(run.data.tags[names.RANK])
        points = client.get_metric_history(run.info.run_id, "loss")
        steps = [point.step for point in sorted(points, key=lambda point: point.step)]
        if mode == "no_dp":
            assert steps == [0, 1, 2, 3]
            assert [point.value for point in points] == [step + rank / 3 for step in steps]

    # `resume` runs what is missing, on both.
    argv = ("resume", "two", "--tracking-uri", server.uri)
    (code, said), (other_code, other_said) = ended(launched(folders, *argv))
    assert (code, other_code) == (0, 0), said + other_said
    assert "flash_fsdp: started (accuracy)" in said
    assert "no_dp: started" not in said
    group = read_group_anywhere(Settings(tracking_uri=server.uri), "two", print).group
    assert {run.status for run in group.runs} == {"FINISHED"}
    done = ended(launched(folders, *argv))
    assert [code for code, _ in done] == [0, 0], done
    for _, said in done:
        assert "group two: nothing is missing" in said
    assert [spooled_groups(folder / "spool") for folder in folders] == [[], []]


def test_what_a_machine_left_in_a_group_is_closed_when_it_takes_part_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = open_part(Settings(), "g", 1, is_offline=True)
    first.join(["run"])
    with pytest.raises(ValueError, match="nobody at work on"):
        open_part(Settings(), "g", 1, is_offline=True)
    first.close()
    assert SpooledGroup(first.spool).runs()["run"].status is Status.RUNNING
    open_part(Settings(), "g", 1, is_offline=True).close()
    assert SpooledGroup(first.spool).runs()["run"].status is Status.ELSEWHERE


def test_a_machine_without_room_is_named_on_all_of_them(folders):
    (folders[1] / "spool").touch()
    argv = (*NO_DP, "--group", "none", "--offline")
    done = ended(launched(folders, *argv))
    assert [code for code, _ in done] == [2, 2], done
    for _, said in done:
        assert f"node 1 ({socket.gethostname()}): spool_dir='spool': expected a folder" in said


class Told:
    """A leader that only listens to what it is to say."""

    def __init__(self) -> None:
        self.said: list[tuple] = []

    def __getattr__(self, name: str):
        return lambda *values: self.said.append((name, *values))


@pytest.mark.parametrize("error", [StoreError("it is full"), None])
def test_others_are_welcome_once_the_store_took_the_group(tmp_path, monkeypatch, error):
    leader, tree = Told(), SimpleNamespace(group_run="g", finish=lambda *_: None)
    recording = SimpleNamespace(tree=tree, folder=tmp_path, group="g", close=lambda *_: None)

    def start(_: object) -> None:
        if error:
            raise error

    recording.start = start
    display = SimpleNamespace(say=lambda line: None, start_group=lambda steps: None)
    display.conclude = lambda line, is_last: None
    run = GroupRun(plan_of(), recording, Launch(), display, leader)
    if error:
        with pytest.raises(StoreError):
            run.run()
        assert leader.said == [("refuse", "it is full")]
    else:
        assert run.run() == 0
        assert leader.said == [("welcome", "g"), ("close", 0, "0 of 0 modes finished")]


def test_offline_both_keep_their_part_and_sync_wants_node_0s_first(
    folders, server, monkeypatch, capsys
):
    done = ended(launched(folders, *NO_DP, "--group", "later", "--offline"))
    assert [code for code, _ in done] == [0, 0], done
    assert "python launch.py sync later" in done[1][1]
    spools = [folder / "spool" for folder in folders]
    assert [each.label for each in spooled_groups(spools[1])] == [part_of("later", 1)]
    where = ("--tracking-uri", server.uri)
    monkeypatch.chdir(folders[1])
    assert fake_launch.run(["sync", *where]) == 1
    assert "sync later` on node 0 first" in capsys.readouterr().out
    monkeypatch.chdir(folders[0])
    assert fake_launch.run(["sync", *where]) == 0
    monkeypatch.chdir(folders[1])
    assert fake_launch.run(["sync", "later", *where]) == 0
    assert "each value checked" in capsys.readouterr().out
    assert [spooled_groups(spool) for spool in spools] == [[], []]
    assert set(statuses(server.uri, "later").values()) == {"FINISHED"}


def test_what_the_second_machine_cannot_do_starts_nothing_on_the_first(folders):
    argv = (*NO_DP, "--group", "g", "--offline")
    done = ended(launched(folders, *argv, second=("--random-seed", "7")))
    assert [code for code, _ in done] == [2, 2]
    for _, said in done:
        assert "seed='7' on node 1" in said
    assert not (folders[0] / "results").exists()
    assert not (folders[0] / "spool").exists()


@pytest.mark.parametrize("who", [0, 1])
def test_a_machine_that_dies_takes_the_mode_with_it(folders, who):
    slow = {"no_dp": {"do": "slow"}}
    argv = (*NO_DP, "--group", "g", "--offline", "--num-iter", "400")
    processes = launched(folders, *argv, plans=(slow, slow))
    until_steps(5, folders[0], processes[0])
    processes[who].send_signal(signal.SIGKILL)
    began = time.monotonic()
    processes[who].communicate()
    ((code, said),) = ended([processes[1 - who]], 30)
    assert time.monotonic() - began < 20
    assert code == 1
    if who == 0:
        assert "node 0 (127.0.0.1) is gone" in said or "was not heard of for 3 s" in said
    else:
        assert "a machine was lost: node 1" in said
        assert "flash_fsdp: started" not in said
        assert "was not heard of for 3 s" in said
        assert (
            "failed: no_dp, flash_fsdp"
            in (SpooledGroup(folders[0] / "spool" / "g").group_run().tags[names.REASON])
        )
        assert "launch.py resume g --nnodes 2 --node-rank 0 --rdzv-endpoint" in said
    deadline = time.monotonic() + 10
    while any(living(folder) for folder in folders):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # What the dead one left is closed by whoever comes next.
    group = SpooledGroup(folders[who] / "spool" / ("g" if who == 0 else part_of("g", 1)))
    with group.hold():
        assert group.close_left_open() > 0
        assert group.close_left_open() == 0
    # Of node 0's runs, another machine says no more than that it has nothing to add.
    closed = {run.status for run in group.runs(with_rows=False).values()}
    assert closed == {Status.KILLED if who == 0 else Status.ELSEWHERE}


def test_ctrl_c_on_one_machine_ends_the_group_on_all_that_share_a_disk(tmp_path):
    folders = [tmp_path, tmp_path]
    slow = {"no_dp": {"do": "slow"}}
    argv = (*NO_DP, "--group", "g", "--offline", "--num-iter", "400")
    processes = launched(folders, *argv, plans=(slow, slow))
    until_steps(3, folders[0], processes[0])
    processes[0].send_signal(signal.SIGINT)
    (code, said), (other_code, other_said) = ended(processes, 30)
    assert (code, other_code) == (130, 130), said + other_said
    assert "group g: interrupted by SIGINT." in other_said
    logs = tmp_path / "results" / "g" / "logs"
    for place, spool in (("no_dp", "g"), ("no_dp-node1", part_of("g", 1))):
        job = json.loads((logs / place / "job.json").read_text())
        assert job["spool"] == str(tmp_path / "spool" / spool)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--nnodes", "0"), "nnodes=0: expected an integer >= 1"),
        (("--node-rank", "1"), "node_rank=1: expected 0, where --nnodes is 1"),
        (("--nnodes", "2", "--rdzv-endpoint", "a:1"), "node_rank=None: expected 0 to 1"),
        (
            ("--nnodes", "2", "--node-rank", "2", "--rdzv-endpoint", "a:1"),
            "node_rank=2: expected 0 to 1, where --nnodes is 2",
        ),
        (("--nnodes", "2", "--node-rank", "0"), "rdzv_endpoint=None: expected HOST:PORT of node 0"),
        (
            ("--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", "host"),
            "rdzv_endpoint='host': expected HOST:PORT",
        ),
        (
            ("--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", "host:70000"),
            "rdzv_endpoint='host:70000': expected HOST:PORT",
        ),
        (
            ("--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", "a:1"),
            "tracking_uri='sqlite:///mlflow.db': expected a server, as --nnodes is not 1",
        ),
    ],
)
def test_machines_that_do_not_fit_are_an_error(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    assert fake_launch.run(["quick", "--device", "cpu", *options]) == 2
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


STUBS = {
    "scontrol": "echo first; echo second",
    "srun": """
test "$1" = --kill-on-bad-exit=0
shift
for SLURM_NODEID in 0 1; do SLURM_NODEID=$SLURM_NODEID "$@" || code=$?; done
exit ${code:-0}
""",
    "python": 'printf "%s\\n" "$*" >> calls; test "$1" != launch.py',
}


def test_the_slurm_script_starts_the_same_on_every_machine_and_compares(tmp_path):
    for name, script in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "USER": "me",
        "SPOOL_DIR": str(tmp_path / "spool"),
        "TRACKING_URI": "http://tracking:5000",
        **{f"SLURM_{name}": value for name, value in SLURM.items()},
    }
    script = Path(__file__).parent.parent / "examples" / "several_machines.sbatch"
    done = subprocess.run(["bash", str(script)], cwd=tmp_path, env=environment, timeout=30)
    # That of the modes that failed, though there was a comparison.
    assert done.returncode == 1
    *launches, comparison = (tmp_path / "calls").read_text().splitlines()
    assert comparison == "compare.py slurm-123456 --tracking-uri http://tracking:5000"
    first, second = (asked(*call.split()[1:]) for call in launches)
    assert (first.nodes.node_rank, second.nodes.node_rank) == (0, 1)
    assert (first.nodes.nnodes, first.nodes.rdzv_endpoint) == (2, "first:23456")
    assert replace(second, nodes=replace(second.nodes, node_rank=0)) == first
