"""Reading groups back from a store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpsgd_track.comparison import compare_group
from dpsgd_track.config import Settings, Thresholds
from dpsgd_track.record import names
from dpsgd_track.record.facts import FACTS_FILE
from dpsgd_track.record.run import Group
from dpsgd_track.store import reader
from dpsgd_track.store.history import metric_history
from dpsgd_track.store.reader import GroupNotFound, open_client, read_group
from tests.support.synthetic_group import (
    Store,
    compared,
    failed,
    healthy_runs,
    mode_run,
    scaled,
    trajectory,
    verdicts,
)

RUN = mode_run("flash_fsdp", "clip")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def read(store: Store, wanted: str = "synthetic") -> Group:
    return read_group(store.client, Settings(tracking_uri=store.uri), wanted)


def test_what_was_written_is_read_exactly(store: Store) -> None:
    written = healthy_runs()
    store.add_group(written)
    group = read(store)
    assert [(r.title, r.regime) for r in group.runs] == [(r.title, r.regime) for r in written]
    for ours, theirs in zip(group.runs, written, strict=True):
        assert ours.trajectory is not None
        assert theirs.trajectory is not None
        for field in theirs.trajectory.__dataclass_fields__:
            assert np.array_equal(
                np.asarray(getattr(ours.trajectory, field)),
                np.asarray(getattr(theirs.trajectory, field)),
                equal_nan=np.asarray(getattr(ours.trajectory, field)).dtype.kind == "f",
            )
    assert group.rank_statuses == {"FINISHED": len(written)}
    assert compare_group(group, Thresholds()).verdict == compared(written).verdict == "PASS"


def test_group_is_found_by_name_by_id_by_a_childs_id_and_as_latest(store: Store) -> None:
    first = store.add_group([RUN], "first")
    second = store.add_group([RUN], 'it\'s "second"')
    assert read(store, "first").run_id == read(store, first).run_id == first
    assert read(store, 'it\'s "second"').run_id == second
    assert read(store, "latest").run_id == second
    child = read(store, "first").runs[0].run_id
    assert read(store, child).run_id == first


def test_of_two_groups_with_one_name_the_newest_is_read_without_the_others_runs(
    store: Store,
) -> None:
    store.add_group(healthy_runs(), "twice")
    newest = store.add_group([RUN], "twice")
    group = read(store, "twice")
    assert (group.run_id, len(group.runs)) == (newest, 1)


def test_unknown_group_lists_the_newest(store: Store) -> None:
    for i in range(7):
        store.add_group([], f"group-{i}")
    with pytest.raises(GroupNotFound, match=r"The newest groups: group-6, .*group-2\.$"):
        read(store, "absent")
    with pytest.raises(GroupNotFound):
        read(store, "0" * 32)


def test_empty_store_is_told_apart(store: Store) -> None:
    with pytest.raises(GroupNotFound, match="holds no group"):
        read(store, "latest")
    with pytest.raises(GroupNotFound, match="experiment='other'"):
        read_group(store.client, Settings(experiment="other"), "latest")


@pytest.mark.parametrize("slashes", ["///", "////"])
def test_reading_creates_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slashes: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = "absent.db" if slashes == "///" else str(tmp_path / "absent.db")[1:]
    with pytest.raises(GroupNotFound, match="expected an existing SQLite file"):
        open_client(f"sqlite:{slashes}{path}")
    assert not list(tmp_path.iterdir())


def test_more_runs_than_a_page_are_all_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "PAGE_SIZE", 2)
    store.add_group(healthy_runs(), "paged")
    for i in range(3):
        store.add_group([], f"later-{i}")
    assert len(read(store, "paged").runs) == len(healthy_runs())


def test_expected_run_that_is_absent_is_missing_and_never_passes(store: Store) -> None:
    store.add_group([r for r in healthy_runs() if r.mode != "flash_fsdp"], expected=healthy_runs())
    group = read(store)
    assert [r.status for r in group.runs].count("MISSING") == 2
    assert verdicts(compare_group(group, Thresholds()))["flash_fsdp"] == "INCONCLUSIVE"


def test_run_that_nobody_expected_is_read_too(store: Store) -> None:
    store.add_group(healthy_runs(), expected=[])
    assert len(read(store).runs) == len(healthy_runs())


def test_newest_attempt_of_a_mode_counts(store: Store) -> None:
    dead = mode_run("flash_fsdp", "clip", status="FAILED", failure=failed("oom"))
    group_id = store.add_group([dead])
    store.add_run(RUN, "synthetic", group_id)
    group = read(store)
    assert [r.status for r in group.runs] == ["FINISHED"]
    assert group.superseded == 1


def test_torn_file_is_a_reason_and_no_crash(store: Store) -> None:
    group_id = store.add_group([])
    run_id = store.add_run(replace(RUN, trajectory=None), "synthetic", group_id)
    path = store.folder / names.TRAJECTORY_FILE
    trajectory().save(path)
    path.write_bytes(path.read_bytes()[:2000])
    store.client.log_artifact(run_id, str(path))
    run = read(store).runs[0]
    assert run.trajectory is None
    assert "expected a trajectory file" in run.trajectory_missing


def test_file_of_another_schema_is_a_reason_and_no_crash(store: Store) -> None:
    group_id = store.add_group([])
    run_id = store.add_run(replace(RUN, trajectory=None), "synthetic", group_id)
    path = store.folder / names.TRAJECTORY_FILE
    np.savez(path, schema=np.int64(99))
    store.client.log_artifact(run_id, str(path))
    assert "schema 5, got 99" in read(store).runs[0].trajectory_missing


def test_facts_that_cannot_be_read_leave_the_record_incomplete(store: Store) -> None:
    run_id = store.add_run(RUN, "synthetic", store.add_group([]))
    path = store.folder / FACTS_FILE
    path.write_text("[1]")
    store.client.log_artifact(run_id, str(path))
    run = read(store).runs[0]
    assert run.trajectory is not None
    assert run.trajectory_missing.startswith("facts.json: expected a document of schema")


def test_a_finished_run_without_facts_never_passes(store: Store) -> None:
    group_id = store.add_group([RUN, mode_run("flash_fsdp_bk")])
    for run in (store.folder / "artifacts").glob(f"*/artifacts/{FACTS_FILE}"):
        run.unlink()
    group = read(store)
    assert [run.trajectory_missing for run in group.runs] == [
        "facts.json was not uploaded, or has been removed"
    ] * 2
    assert compare_group(group, Thresholds()).verdict == "INCONCLUSIVE"
    lost = mode_run("ghost_fsdp", status="FAILED")
    store.add_run(lost, "synthetic", group_id)
    assert "facts" not in read(store).runs[-1].trajectory_missing


def test_a_failure_that_cannot_be_read_is_one_of_its_run_alone(store: Store) -> None:
    failed = mode_run("flash_fsdp_bk", "clip", status="FAILED")
    group_id = store.add_group([RUN], expected=[RUN, failed])
    run_id = store.add_run(failed, "synthetic", group_id)
    store.client.set_tag(run_id, names.FAILURE, "[1]")
    sound, broken = read(store).runs
    assert sound.trajectory is not None
    assert broken.failure is not None
    assert "dpsgd.failure: expected a document of schema" in broken.reason


def test_run_that_died_before_upload_is_read_from_its_metrics(store: Store) -> None:
    killed = mode_run("flash_fsdp", "clip", status="KILLED")
    runs = [r for r in healthy_runs() if (r.mode, r.regime) != ("flash_fsdp", "clip")]
    group_id = store.add_group(runs)
    run_id = store.add_run(killed, "synthetic", group_id)
    record = trajectory(noise_std=0.0)
    store.log_metrics(run_id, scaled(record, "loss", np.inf, 2))
    store.client.log_metric(run_id, "loss", 1.0, step=9)  # cut off: step 9 has no more
    group = read(store)
    run = group.runs[-1]
    assert run.trajectory is not None
    assert run.trajectory.step.tolist() == [0, 1, 2, 3]
    assert run.trajectory.loss.tolist() == [*record.loss[:2], np.inf, record.loss[3]]
    assert np.array_equal(run.trajectory.layer_grad_norm, record.layer_grad_norm)
    missing = "trajectory.npz was not uploaded; 4 steps read from metric history"
    assert run.trajectory_missing == missing
    found = compare_group(group, Thresholds())
    assert verdicts(found)["flash_fsdp"] == "BUG"  # the infinity
    pair = found.regimes[1].pair("flash_fsdp")
    assert pair is not None
    assert pair.drifts["grad_norm"].max == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "It has none: it was launched by 0.1"),
        ("[1, 2]", "Its plan.json cannot be read: expected a document of schema dpsgd-track/plan"),
        ('{"schema": "dpsgd-track/plan", "schema_version": 1}', "dpsgd-track/plan: suite="),
        ('{"schema": "dpsgd-track/plan", "schema_version": 9}', "schema_version=9: expected 1"),
    ],
    ids=["0.1", "other", "torn", "newer"],
)
def test_a_group_without_a_readable_plan_is_refused(store: Store, text: str, said: str) -> None:
    store.add_group([RUN], plan=text)
    with pytest.raises(GroupNotFound, match="group='synthetic': expected a group with a plan") as e:
        read(store)
    assert said in str(e.value)


class Watched:
    """A client that says what it answered, and may pretend to be one of a server."""

    def __init__(self, client: Any, tracking_uri: str = "") -> None:
        self._client = client
        self.tracking_uri = tracking_uri or client.tracking_uri
        self.num_runs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def search_runs(self, *args: Any, **options: Any) -> Any:
        page = self._client.search_runs(*args, **options)
        self.num_runs += len(page)
        return page


def test_history_by_sql_is_what_the_client_reads(store: Store) -> None:
    from mlflow.entities import Metric

    run_id = store.add_run(RUN, "synthetic", store.add_group([]))
    other = store.add_run(RUN, "synthetic", store.add_group([]))
    values = [1.5, float("nan"), np.inf, -np.inf, 1 / 3, -1e300]
    points = [Metric("loss", value, 10 + i, i) for i, value in enumerate(values)]
    # Of several values of one step the newest counts, in whatever order they arrived.
    points += [
        Metric("loss", 7.0, 99, 4),
        Metric("loss", 8.0, 50, 4),
        Metric("loss", 0.1, 99, 2**40),
    ]
    points += [Metric("a name: of-its.own", 3.0, 1, -2)]
    wanted = ["loss", "a name: of-its.own", "never logged"]
    store.client.log_batch(run_id, metrics=points)
    store.client.log_batch(other, metrics=[Metric("loss", 5.0, 1000, 0)])
    by_sql = metric_history(store.client, run_id, wanted)
    by_client = metric_history(Watched(store.client, "http://server"), run_id, wanted)  # type: ignore[arg-type]
    assert list(by_sql) == list(by_client) == wanted
    for metric in wanted:
        assert list(by_sql[metric]) == sorted(by_client[metric])
        ours, theirs = by_sql[metric], by_client[metric]
        assert np.array_equal(
            reader.restored(list(ours.values())),
            reader.restored([theirs[step] for step in ours]),
            equal_nan=True,
        )
    restored = reader.restored(list(by_sql["loss"].values()))
    assert np.array_equal(restored, [*values[:4], 7.0, values[5], 0.1], equal_nan=True)


def test_no_more_runs_are_read_when_the_experiment_is_older(store: Store) -> None:
    def runs_read(wanted: str) -> int:
        client = Watched(store.client)
        group = read_group(client, Settings(tracking_uri=store.uri), wanted)  # type: ignore[arg-type]
        assert group.rank_statuses == {"FINISHED": len(healthy_runs())}
        return client.num_runs

    store.add_group(healthy_runs(), "first")
    alone = runs_read("first")
    for i in range(3):
        store.add_group(healthy_runs(), f"later-{i}")
    assert runs_read("latest") <= alone + 3  # the groups' own runs are listed
    assert runs_read("first") <= alone + 3


def test_artifacts_in_a_folder_with_an_awkward_name_are_read(store: Store) -> None:
    folder = store.folder / "a b%20c#d"
    store.experiment_id = store.client.create_experiment("awkward", folder.as_uri())
    store.add_group([RUN])
    group = read_group(store.client, Settings(experiment="awkward"), "latest")
    assert list(folder.rglob(names.TRAJECTORY_FILE))
    assert group.runs[0].trajectory_missing == ""
