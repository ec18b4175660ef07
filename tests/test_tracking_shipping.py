"""What is spooled arrives in the store: all of it, once, whatever happens on the way."""

import math
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from requests import HTTPError, Response

from dpsgd_track.config import Settings
from dpsgd_track.record import names
from dpsgd_track.record.run import Marks, Status
from dpsgd_track.store.find_group import read_group_anywhere
from dpsgd_track.store.history import all_points, as_stored
from dpsgd_track.store.opening import open_store
from dpsgd_track.store.reader import read_group
from dpsgd_track.store.run_tree import RunTree
from dpsgd_track.store.shipper import Shipper, settle
from dpsgd_track.store.shipping import Shipping
from dpsgd_track.store.spool import CONTROL, RECORDS, SpoolWriter
from dpsgd_track.store.spooled import Busy, SpooledGroup, claim, spooled_groups
from tests.support.spooled_group import check_whole, spool_a_group, start_runs
from tests.support.synthetic_group import mode_run, plan_of
from tests.support.tracking_servers import postgres


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    folder = tmp_path_factory.mktemp("store")
    settings = Settings(
        tracking_uri=f"sqlite:///{folder}/mlflow.db", artifact_location=str(folder / "artifacts")
    )
    open_store(settings)
    return settings


def shipper_of(group: SpooledGroup, settings: Settings, client: Any = None) -> Shipper:
    real, experiment_id = open_store(settings)
    return Shipper(group, client or real, settings.tracking_uri, experiment_id)


def test_a_group_arrives_whole_and_its_spool_goes(tmp_path, settings):
    spool_a_group(tmp_path, "whole")
    (group,) = spooled_groups(tmp_path)
    shipper = shipper_of(group, settings)
    assert settle(shipper, count=True) == []
    assert spooled_groups(tmp_path) == []
    check_whole(*open_store(settings), "whole")


class Flaky:
    """A client whose calls fail at chance, before or after the store has done what was asked."""

    def __init__(self, client: MlflowClient, rng: random.Random, chance: float) -> None:
        self._client, self._rng, self._chance = client, rng, chance
        self.tracking_uri = client.tracking_uri
        self.num_failures = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            fails = self._rng.random() < self._chance
            self.num_failures += fails
            if fails and self._rng.random() < 0.5:
                raise MlflowException("the server was killed before it did anything")
            answer = getattr(self._client, name)(*arguments, **options)
            if fails:
                raise MlflowException("the server was killed before it could answer")
            return answer

        return call


def ship_through_failures(settings: Settings, spool: Path, name: str, seed: int) -> int:
    """Ship a group with a store that fails at every fourth call, by ever new processes."""
    spool_a_group(spool, name)
    group = next(each for each in spooled_groups(spool) if each.name == name)
    client, _ = open_store(settings)
    flaky = Flaky(client, random.Random(seed), 0.25)
    shipper = shipper_of(group, settings, flaky)
    for attempt in range(500):
        try:
            if settle(shipper, count=True) == []:
                break
        except MlflowException:
            if attempt % 3 == 0:
                # The process that shipped is killed, too.
                shipper = shipper_of(group, settings, flaky)
    check_whole(*open_store(settings), name)
    return flaky.num_failures


def test_no_failure_of_the_store_loses_or_doubles_anything(tmp_path, settings):
    assert ship_through_failures(settings, tmp_path, "flaky", 4) > 20


@pytest.mark.soak
def test_twenty_times_no_failure_of_the_store_loses_or_doubles_anything(tmp_path, settings):
    for seed in range(20):
        ship_through_failures(settings, tmp_path, f"flaky-{seed}", seed + 1)


def test_what_was_shipped_is_found_again_without_its_state(tmp_path, settings):
    spool_a_group(tmp_path, "forgetful")
    (group,) = spooled_groups(tmp_path)
    shipper_of(group, settings).ship()
    (group.folder / "state").write_text("{")
    assert settle(shipper_of(group, settings), count=True) == []
    check_whole(*open_store(settings), "forgetful")


def test_a_store_that_was_emptied_is_filled_again(shipped, settings):
    with closing(sqlite3.connect(settings.tracking_uri.removeprefix("sqlite:///"))) as database:
        for run_id in shipped.run_ids.values():
            for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
                database.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (run_id,))
        database.commit()
    assert settle(shipper_of(shipped.group, settings), count=True) == []
    check_whole(*open_store(settings), shipped.group.name)


@pytest.fixture
def shipped(tmp_path, settings, request) -> Shipper:
    """A group that was shipped, and whose spool is still there."""
    spool_a_group(tmp_path, f"shipped-{abs(hash(request.node.name))}")
    (group,) = spooled_groups(tmp_path)
    shipper = shipper_of(group, settings)
    assert shipper.ship()
    assert shipper.differences() == []
    return shipper


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DELETE FROM metrics WHERE run_uuid = ? AND key = 'loss' AND step = 4", "loss: 29 values"),
        ("UPDATE metrics SET value = 5 WHERE run_uuid = ? AND key = 'loss' AND step = 4", "loss:"),
        ("UPDATE runs SET status = 'RUNNING' WHERE run_uuid = ?", "its status is RUNNING"),
        ("DELETE FROM params WHERE run_uuid = ?", "1 of 1 params"),
        ("DELETE FROM latest_metrics WHERE run_uuid = ? AND key = 'loss'", "1 of 7 metrics"),
        ("UPDATE params SET value = 'gpu' WHERE run_uuid = ?", "device.name is 'gpu', not 'cpu'"),
        ("DELETE FROM tags WHERE run_uuid = ? AND key = 'dpsgd.kind'", "1 of 12 tags are missing"),
    ],
)
def test_what_the_store_lost_is_said_and_keeps_the_spool(shipped, settings, statement, said):
    run_id = next(
        shipped.run_ids[run.key] for run in shipped.group.runs().values() if run.title == "rank 1"
    )
    with closing(sqlite3.connect(settings.tracking_uri.removeprefix("sqlite:///"))) as database:
        assert database.execute(statement, (run_id,)).rowcount == 1
        database.commit()
    problems = settle(shipped, count=True)
    assert len(problems) == 1
    assert said in problems[0]
    assert problems[0].startswith("rank 1: ")
    assert shipped.group.folder.is_dir()


def test_a_file_that_the_store_has_only_a_part_of_is_said(shipped, settings):
    client, _ = open_store(settings)
    run = client.get_run(list(shipped.run_ids.values())[-1])
    stored = Path(run.info.artifact_uri.removeprefix("file://")) / "trajectory.npz"
    whole = stored.stat().st_size
    stored.write_bytes(stored.read_bytes()[:-1])
    (problem,) = settle(shipped, count=True)
    assert f"trajectory.npz has {whole - 1} bytes instead of {whole}" in problem


def test_what_did_not_end_keeps_its_spool(tmp_path, settings):
    tree = spool_a_group(tmp_path, "endless", steps=1)
    (group,) = spooled_groups(tmp_path)
    control = SpoolWriter(group.folder, f"more{CONTROL}")
    tree = RunTree(control, "dpsgd-track", "endless")
    start_runs(tree, num_ranks=0)
    control.close()
    assert "endless: it did not end" in settle(shipper_of(group, settings), count=True)
    assert group.folder.is_dir()


def test_a_name_the_store_refuses_takes_nothing_else_with_it(tmp_path, settings):
    tree = spool_a_group(tmp_path, "refused")
    (group,) = spooled_groups(tmp_path)
    worker = SpoolWriter(group.folder, f"odd{RECORDS}")
    worker.log_metrics(tree.group_run, 0, {"fine": 1.0, "layer[0]": 2.0, "also fine": 3.0})
    worker.close()
    shipper = shipper_of(group, settings)
    problems = settle(shipper, count=True)
    assert ["layer[0]" in problem for problem in problems] == [True, False]
    assert "1 of 3 metrics are missing" in problems[1]
    assert group.folder.is_dir()
    client, _ = open_store(settings)
    run = client.get_run(shipper.run_ids[tree.group_run])
    assert run.data.metrics == {"fine": 1.0, "also fine": 3.0}
    assert run.info.status == "FINISHED"


class Refusing:
    """A client of a store that takes everything but files."""

    def __init__(self, client: MlflowClient, status: int) -> None:
        self._client, self._status = client, status
        self.tracking_uri = client.tracking_uri

    def __getattr__(self, name: str) -> Any:
        if name not in ("log_artifact", "log_text"):
            return getattr(self._client, name)

        def refuse(*_: object) -> None:
            response = Response()
            response.status_code = self._status
            raise HTTPError("too large for url: http://me:a-secret@host/x", response=response)

        return refuse


def test_a_file_that_is_refused_takes_nothing_else_with_it(tmp_path, settings):
    spool_a_group(tmp_path, "large")
    (group,) = spooled_groups(tmp_path)
    client, experiment_id = open_store(settings)
    shipper = shipper_of(group, settings, Refusing(client, 413))
    problems = settle(shipper, count=True)
    assert "too large for url: http://***@host/x" in problems
    found = client.search_runs([experiment_id], f"tags.`{names.GROUP}` = 'large'")
    assert [run.info.status for run in found] == ["FINISHED"] * 4
    assert all("loss" in run.data.metrics for run in found if run.info.run_name != "large")
    # Where it is but the gateway that is not there, all of it waits.
    with pytest.raises(HTTPError):
        settle(shipper_of(group, settings, Refusing(client, 502)), count=True)
    assert settle(shipper_of(group, settings), count=True) == []
    check_whole(client, experiment_id, "large")


class Swallowing:
    """A client of a store behind a proxy that says yes to everything, and hands nothing on."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self.tracking_uri = client.tracking_uri

    def __getattr__(self, name: str) -> Any:
        if name not in ("log_artifact", "log_batch"):
            return getattr(self._client, name)
        return lambda *_, **__: None


def test_what_a_store_took_and_does_not_have_is_sent_again_by_the_next_sync(tmp_path, settings):
    spool_a_group(tmp_path, "swallowed")
    (group,) = spooled_groups(tmp_path)
    client, experiment_id = open_store(settings)
    problems = settle(shipper_of(group, settings, Swallowing(client)), count=True)
    assert "rank 0: trajectory.npz is missing" in problems
    assert group.folder.is_dir()
    assert settle(shipper_of(group, settings), count=True) == []
    check_whole(client, experiment_id, "swallowed")


def test_what_no_database_keeps_is_replaced(tmp_path, settings):
    tree = spool_a_group(tmp_path, "odd-text")
    (group,) = spooled_groups(tmp_path)
    control = SpoolWriter(group.folder, f"more{CONTROL}")
    control.set_tags(tree.group_run, {names.REASON: "a\0b \udcff c"})
    control.log_params(tree.group_run, {"argument": "\udcff"})
    control.close()
    shipper = shipper_of(group, settings)
    assert settle(shipper, count=True) == []
    data = open_store(settings)[0].get_run(shipper.run_ids[tree.group_run]).data
    assert data.tags[names.REASON] == "a\ufffdb ? c"
    assert data.params["argument"] == "?"


def test_a_run_that_the_store_creates_too_late_is_not_there_twice(tmp_path, settings):
    spool_a_group(tmp_path, "twice")
    (group,) = spooled_groups(tmp_path)
    client, experiment_id = open_store(settings)
    late: list[Callable[[], Any]] = []

    class Late:
        """Gives up on the second run just before the server gets to it."""

        tracking_uri = client.tracking_uri
        num_created = 0

        def create_run(self, *arguments: Any, **options: Any) -> Any:
            self.num_created += 1
            if self.num_created == 2:
                late.append(lambda: client.create_run(*arguments, **options))
                raise MlflowException("timed out")
            return client.create_run(*arguments, **options)

        def log_batch(self, *arguments: Any, **options: Any) -> None:
            client.log_batch(*arguments, **options)
            if self.num_created > 2 and late:
                late.pop()()

        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

    shipper = shipper_of(group, settings, Late())
    with pytest.raises(MlflowException, match="timed out"):
        shipper.ship()
    while shipper.ship():
        pass
    found = client.search_runs([experiment_id], f"tags.`{names.GROUP}` = 'twice'")
    assert len(found) == 5
    # It is another process that looks.
    assert settle(shipper_of(group, settings), count=True) == []
    check_whole(client, experiment_id, "twice")


def test_a_worker_that_comes_and_goes_while_runs_are_created_keeps_its_values(tmp_path, settings):
    group = claim(tmp_path, "quick-worker")
    assert group is not None
    control = SpoolWriter(group.folder, f"launcher{CONTROL}")
    tree = RunTree(control, "dpsgd-track", "quick-worker")
    mode, (rank,) = start_runs(tree, num_ranks=1)
    client, _ = open_store(settings)

    class Slow:
        """While the last run is created, its worker logs all it has, and the launcher ends it."""

        tracking_uri = client.tracking_uri

        def create_run(self, *arguments: Any, **options: Any) -> Any:
            if options["run_name"] == "rank 0":
                worker = SpoolWriter(group.folder, f"no_dp-rank0{RECORDS}")
                worker.log_metrics(rank, 0, {"loss": math.inf})
                worker.close()
                for run in (rank, mode, tree.group_run):
                    tree.finish(run, Status.FINISHED)
                control.close()
            return client.create_run(*arguments, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

    shipper = shipper_of(group, settings, Slow())
    shipper.ship()
    assert settle(shipper, count=True) == []
    ((_, points),) = all_points(client, shipper.run_ids[rank], ["loss"])
    assert [value for *_, value in points] == [as_stored(math.inf)]


def test_a_run_ends_only_when_its_values_are_there(tmp_path, settings):
    spool_a_group(tmp_path, "order")
    (group,) = spooled_groups(tmp_path)
    client, _ = open_store(settings)
    seen: list[str] = []

    class Watched:
        tracking_uri = client.tracking_uri

        def __getattr__(self, name: str) -> Any:
            seen.append(name)
            return getattr(client, name)

    shipper_of(group, settings, Watched()).ship()
    assert set(seen[-seen[::-1].index("log_batch") :]) <= {"set_terminated"}
    assert seen.count("set_terminated") == 4


def test_a_group_that_is_taken_up_again_is_shown_as_running(tmp_path, settings):
    tree = spool_a_group(tmp_path, "again", steps=1, status=Status.FAILED)
    (group,) = spooled_groups(tmp_path)
    control = SpoolWriter(group.folder, f"launcher{CONTROL}")
    resumed = RunTree(control, "dpsgd-track", "again")
    tags = {names.GROUP: "again", names.KIND: names.KIND_GROUP}
    plan = plan_of([mode_run("no_dp", "clip")])
    resumed.resume_group(tree.group_run, 1, tags, plan, is_elsewhere=False)
    shipper = shipper_of(group, settings)
    shipper.ship()
    client, _ = open_store(settings)
    run_id = shipper.run_ids[tree.group_run]
    assert client.get_run(run_id).info.status == "RUNNING"
    resumed.finish(tree.group_run, Status.FINISHED)
    control.close()
    assert settle(shipper_of(group, settings), count=True) == []
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_report_that_is_being_added_is_not_removed_with_the_spool(
    tmp_path, settings, monkeypatch
):
    tree = spool_a_group(tmp_path, "compared", steps=1)
    (group,) = spooled_groups(tmp_path)
    shipper = shipper_of(group, settings)
    report = tmp_path / "report.html"
    report.write_text("all is well")
    comparison = SpoolWriter(group.folder, f"attached{CONTROL}")
    is_removed = threading.Event()
    remove = SpooledGroup.remove
    monkeypatch.setattr(SpooledGroup, "remove", lambda group: (remove(group), is_removed.set()))

    def add() -> None:
        # It is not by luck that it comes in time.
        is_removed.wait(1)
        comparison.upload(tree.group_run, report, "comparison")
        comparison.close()

    thread = threading.Thread(target=add)
    thread.start()
    assert settle(shipper, count=True) == []
    thread.join()
    client, _ = open_store(settings)
    (file,) = client.list_artifacts(shipper.run_ids[tree.group_run], "comparison")
    assert file.path == "comparison/report.html"


def test_a_report_goes_to_the_store_where_the_spool_was_removed_meanwhile(
    tmp_path, settings, monkeypatch
):
    spool_a_group(tmp_path, "removed", steps=1)
    settings = replace(settings, spool_dir=str(tmp_path))
    found = read_group_anywhere(settings, "removed", lambda line: None)
    report = tmp_path / "report.html"
    report.write_text("all is well")
    assert found.spooled is not None
    shipper = shipper_of(found.spooled, settings)
    upload = SpoolWriter.upload

    def removed_first(self: SpoolWriter, *arguments: Any) -> None:
        monkeypatch.setattr(SpoolWriter, "upload", upload)
        monkeypatch.setattr(SpooledGroup, "is_being_written", lambda group: False)
        assert settle(shipper, count=True) == []
        upload(self, *arguments)

    monkeypatch.setattr(SpoolWriter, "upload", removed_first)
    marks = {found.group.run_id: Marks(tags={names.VERDICT: "PASS"})}
    for name in ("report.html", "summary.txt"):
        # The second time the folder is not there to begin with.
        (tmp_path / name).write_text("all is well")
        found.attach([(tmp_path / name, "comparison")], marks)
    client, _ = open_store(settings)
    run = client.get_run(next(iter(shipper.run_ids.values())))
    assert not found.spooled.folder.exists()
    assert run.data.tags[names.VERDICT] == "PASS"
    listed = {file.path for file in client.list_artifacts(run.info.run_id, "comparison")}
    assert listed == {"comparison/report.html", "comparison/summary.txt"}


def test_a_bug_that_is_found_in_the_spool_is_shipped_as_a_failed_group(tmp_path, settings):
    spool_a_group(tmp_path, "faulty", steps=1)
    settings = replace(settings, spool_dir=str(tmp_path))
    found = read_group_anywhere(settings, "faulty", lambda line: None)
    assert found.spooled is not None
    mode = found.group.runs[0].run_id
    marks = {
        found.group.run_id: Marks(tags={names.VERDICT: "BUG"}, is_faulty=True),
        mode: Marks(tags={names.VERDICT: "BUG"}, metrics={names.DRIFT_OF_LIMIT: 7.0}),
    }
    found.attach([], marks)
    shipper = shipper_of(found.spooled, settings)
    assert settle(shipper, count=True) == []
    client, _ = open_store(settings)
    group, run = (client.get_run(shipper.run_ids[key]) for key in marks)
    assert group.info.status == "FAILED"
    assert group.info.end_time
    assert (run.info.status, run.data.metrics[names.DRIFT_OF_LIMIT]) == ("FINISHED", 7.0)


def test_a_dataset_that_the_store_lost_is_said(shipped, settings):
    run_id = next(shipped.run_ids[run.key] for run in shipped.group.runs().values() if run.inputs)
    with closing(sqlite3.connect(settings.tracking_uri.removeprefix("sqlite:///"))) as database:
        statement = "DELETE FROM inputs WHERE destination_id = ?"
        assert database.execute(statement, (run_id,)).rowcount == 1
        database.commit()
    assert settle(shipped, count=True) == ["no_dp/clip: 1 of 1 datasets are missing"]


def test_who_ships_a_group_is_alone_with_it(tmp_path):
    spool_a_group(tmp_path, "alone", steps=1)
    (group,) = spooled_groups(tmp_path)
    with group.hold(), pytest.raises(Busy):
        group.hold()
    worker = SpoolWriter(group.folder, f"alive{RECORDS}")
    with pytest.raises(Busy):
        group.hold()
    worker.close()
    group.hold().close()


def test_runs_of_a_dead_launcher_are_closed(tmp_path, settings):
    group = claim(tmp_path, "dead")
    assert group is not None
    control = SpoolWriter(group.folder, f"launcher{CONTROL}")
    tree = RunTree(control, "dpsgd-track", "dead")
    mode, ranks = start_runs(tree, num_ranks=1)
    tree.finish(ranks[0], Status.FINISHED)
    control.close()
    assert group.close_left_open() == 2
    assert group.close_left_open() == 0
    shipper = shipper_of(group, settings)
    assert settle(shipper, count=True) == []
    client, _ = open_store(settings)
    found = {key: client.get_run(run_id) for key, run_id in shipper.run_ids.items()}
    assert found[ranks[0]].info.status == "FINISHED"
    for run in (mode, tree.group_run):
        assert found[run].info.status == "KILLED"
        assert "launcher died" in found[run].data.tags[names.REASON]


class Switched:
    """A client of a store that can be switched off."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self.tracking_uri = client.tracking_uri
        self.is_on = True

    def __getattr__(self, name: str) -> Any:
        if not self.is_on:
            raise MlflowException("connection refused")
        return getattr(self._client, name)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_store_that_comes_back_is_shipped_to_by_itself(tmp_path, settings):
    spool_a_group(tmp_path, "back")
    (group,) = spooled_groups(tmp_path)
    said: list[str] = []
    client = Switched(open_store(settings)[0])
    shipper = shipper_of(group, settings, client)
    client.is_on = False
    shipping = Shipping(shipper, settings.tracking_uri, said.append, interval_s=0.01)
    shipping.start()
    until(lambda: len(said) == 1)
    time.sleep(0.5)
    client.is_on = True
    until(lambda: len(said) == 2)
    assert shipping.close() == ""
    assert "takes nothing at the moment: connection refused" in said[0]
    assert str(group.folder) in said[0]
    assert "is back" in said[1]
    check_whole(*open_store(settings), "back")


def test_nothing_is_shipped_while_it_is_to_be_quiet(tmp_path, settings):
    spool_a_group(tmp_path, "quiet", steps=1)
    (group,) = spooled_groups(tmp_path)
    shipper = shipper_of(group, settings)
    shipping = Shipping(shipper, settings.tracking_uri, print, interval_s=0.01)
    with shipping.quiet():
        shipping.start()
        time.sleep(0.3)
        assert shipper.run_ids == {}
    assert shipping.close() == ""
    assert len(shipper.run_ids) == 4


def test_the_end_waits_a_limited_time_for_a_store_that_is_away(tmp_path, settings):
    spool_a_group(tmp_path, "away", steps=1)
    (group,) = spooled_groups(tmp_path)
    client = Switched(open_store(settings)[0])
    client.is_on = False
    shipper = shipper_of(group, settings, client)
    shipping = Shipping(shipper, settings.tracking_uri, print, interval_s=0.01)
    shipping.start()
    start = time.monotonic()
    assert shipping.close(timeout_s=30, away_timeout_s=0.5) == "connection refused"
    assert 0.4 < time.monotonic() - start < 20


def test_a_store_that_hangs_holds_the_end_up_for_a_limited_time(tmp_path, settings):
    spool_a_group(tmp_path, "hangs", steps=1)
    (group,) = spooled_groups(tmp_path)
    client, _ = open_store(settings)

    class Slow(Switched):
        def __getattr__(self, name: str) -> Any:
            time.sleep(3)
            return getattr(client, name)

    shipper = shipper_of(group, settings, Slow(client))
    shipping = Shipping(shipper, settings.tracking_uri, print, interval_s=0.01)
    shipping.start()
    start = time.monotonic()
    assert "took longer than 0.2 s" in shipping.close(timeout_s=0.2)
    assert time.monotonic() - start < 20


def test_a_check_that_hangs_holds_the_end_up_for_a_limited_time(tmp_path, settings):
    spool_a_group(tmp_path, "unchecked", steps=1)
    (group,) = spooled_groups(tmp_path)
    is_over = threading.Event()

    def hang() -> tuple[str, ...]:
        is_over.wait(60)
        return ()

    shipping = Shipping(
        shipper_of(group, settings), settings.tracking_uri, print, check=hang, interval_s=0.01
    )
    shipping.start()
    start = time.monotonic()
    assert "took longer than 0.5 s" in shipping.close(timeout_s=0.5)
    assert time.monotonic() - start < 20
    assert shipping.should_stop()
    is_over.set()


def test_what_a_check_finds_is_said_at_the_end(tmp_path, settings):
    spool_a_group(tmp_path, "checked", steps=1)
    (group,) = spooled_groups(tmp_path)
    shipping = Shipping(
        shipper_of(group, settings), settings.tracking_uri, print, check=lambda: ["one is missing"]
    )
    shipping.start()
    assert shipping.close() == "one is missing"


@pytest.mark.postgres
def test_postgresql_holds_the_same(tmp_path):
    with postgres(tmp_path) as uri:
        settings = Settings(tracking_uri=uri, artifact_location=str(tmp_path / "artifacts"))
        assert ship_through_failures(settings, tmp_path / "spool", "postgres", 3) > 5
        # A plan is longer than a tag of PostgreSQL's.
        expected = [mode_run(f"mode-{i}") for i in range(500)]
        group = claim(tmp_path / "spool", "long")
        assert group is not None
        control = SpoolWriter(group.folder, f"launcher{CONTROL}")
        tree = RunTree(control, "dpsgd-track", "long")
        tree.start_group(plan_of(expected))
        tree.finish(tree.group_run, Status.FINISHED)
        control.close()
        assert settle(shipper_of(group, settings), count=True) == []
        runs = read_group(open_store(settings)[0], settings, "long").runs
        assert [run.mode for run in runs] == [run.mode for run in expected]
