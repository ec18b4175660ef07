"""Tracking from many ranks: which of them are logged, how often layers' norms are, and in how much
memory all of it is shipped and checked."""

from __future__ import annotations

import io
import sqlite3
import tracemalloc
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.entities import Param, RunTag

from benchmarks import tracking_scale
from benchmarks.tracking_scale import NODES, QUICK, circumstances, lost_and_doubled, measure
from dpsgd_track.config import (
    TRAIN,
    DataConfig,
    JobConfig,
    ModelConfig,
    PerformanceConfig,
    RegimeConfig,
    layer_norm_steps,
    load_settings,
    logged_ranks,
)
from dpsgd_track.launcher import choices, group
from dpsgd_track.launcher.group import GroupRun
from dpsgd_track.launcher.process_group import Launch, Outcome
from dpsgd_track.launcher.progress import PlainDisplay
from dpsgd_track.launcher.recording import open_group
from dpsgd_track.record import names
from dpsgd_track.record.plan import GroupPlan, StartedJob, Suite
from dpsgd_track.record.run import Status
from dpsgd_track.record.trajectory import Trajectory
from dpsgd_track.store import contents, shipper, spool
from dpsgd_track.store.client import TrackingError
from dpsgd_track.store.contents import Contents
from dpsgd_track.store.find_group import read_spooled
from dpsgd_track.store.run_tree import RunTree
from dpsgd_track.store.shipper import Shipper
from dpsgd_track.store.spool import CONTROL, RECORDS, SpoolWriter, spool_files
from dpsgd_track.store.spooled import SpooledGroup, claim
from tests.support.forked_ranks import ForkedRanks
from tests.support.planned import place, plan
from tests.support.spooled_group import STOPPED, start_runs
from tests.support.synthetic_group import ENVIRONMENT, started

MIB = 1 << 20


@pytest.mark.parametrize(
    ("asked", "num_ranks", "wanted"),
    [
        ("all", 3, (0, 1, 2)),
        ("0", 8, (0,)),
        ("1", 8, (0,)),
        ("2", 8, (0, 4)),
        ("3", 8, (0, 2, 5)),
        ("8", 64, (0, 8, 16, 24, 32, 40, 48, 56)),
        ("8", 8, tuple(range(8))),
        ("9", 8, tuple(range(8))),
        ("7", 1, (0,)),
    ],
)
def test_logged_ranks_are_evenly_spaced_with_rank_0_among_them(asked, num_ranks, wanted):
    assert logged_ranks(asked, num_ranks) == wanted


@pytest.mark.parametrize(
    ("asked", "num_iter", "wanted"),
    [
        ("all", 4, {0, 1, 2, 3}),
        ("ends", 9, {0, 8}),
        ("1", 4, {0, 1, 2, 3}),
        ("3", 8, {0, 3, 6, 7}),
        ("3", 7, {0, 3, 6}),
        ("100", 8, {0, 7}),
        ("ends", 1, {0}),
        ("3", 1, {0}),
    ],
)
def test_layer_norms_are_thinned_to_every_nth_step_the_first_and_the_last(asked, num_iter, wanted):
    assert layer_norm_steps(asked, num_iter) == wanted


@pytest.mark.parametrize(("written", "meant"), [("0", "0"), ("12", "12"), ("all", "all")])
def test_logged_ranks_can_be_set_for_good(written, meant, tmp_path):
    config = tmp_path / "mlflow.yaml"
    config.write_text(f"log_ranks: {written}\n")
    assert load_settings(config).log_ranks == meant


@pytest.mark.parametrize("written", ["first", "-1", "1.5", "true", "null", "[0, 1]", "''"])
def test_ranks_that_cannot_be_are_refused(written, tmp_path):
    config = tmp_path / "mlflow.yaml"
    config.write_text(f"log_ranks: {written}\n")
    with pytest.raises(ValueError, match=r"^log_ranks=.*: expected all, 0 for rank 0 alone"):
        load_settings(config)


# A launch, whose workers are not started.


@pytest.mark.parametrize("asked", ["0", "3", "all"])
def test_a_rank_that_is_not_logged_has_no_run(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choices, "count_gpus", lambda: 0)
    jobs: list[StartedJob] = []

    def run_mode(started, *_):
        jobs.append(started)
        return tuple(Outcome(Status.FINISHED) for _ in started.job.regimes)

    monkeypatch.setattr(group, "run_mode", run_mode)
    argv = ["quick", "--mode", "no_dp", "--regime", "accuracy", "--group", "g", "--offline"]
    argv += ["--nproc-per-node", "6", "--log-ranks", asked]
    made = plan(*argv)
    recording = open_group(made.suite, place(*argv))
    launched = GroupRun(made, recording, Launch(), PlainDisplay(io.StringIO()))
    assert launched.run() == 0
    logged = logged_ranks(asked, 6)
    for ranks in jobs[0].rank_runs:
        assert len(ranks) == 6
        assert [rank for rank, run in enumerate(ranks) if run] == list(logged)
    runs = SpooledGroup(Path("spool/g")).runs().values()
    assert {run.status for run in runs} == {Status.FINISHED}
    num_modes = len(list(made.runs()))
    of_ranks = [run.tags[names.RANK] for run in runs if run.kind == names.KIND_RANK]
    assert sorted(of_ranks) == sorted(map(str, logged * num_modes))
    assert len(runs) == 1 + num_modes + num_modes * len(logged)
    for run in runs:
        if run.kind != names.KIND_RANK:
            assert run.params["log_ranks"] == asked
    found = read_spooled(SpooledGroup(Path("spool/g")))
    assert found.rank_statuses == {Status.FINISHED: num_modes * len(logged)}


# Real workers, four of them, of which ranks 0 and 2 are logged.

STEPS = 5


@pytest.fixture(scope="module")
def worked(tmp_path_factory, rank_host: ForkedRanks) -> tuple[SpooledGroup, Path]:
    """A group in the spool, and the folder that its workers left their own records in."""
    folder = tmp_path_factory.mktemp("worked")
    spooled = claim(folder / "spool", "g")
    assert spooled is not None
    control = SpoolWriter(spooled.folder, f"launcher{CONTROL}")
    tree = RunTree(control, "dpsgd-track", "g")
    regime = RegimeConfig(name=TRAIN, num_iter=STEPS, max_grad_norms=(1.0,) * STEPS)
    work_dir = folder / "work"
    work_dir.mkdir()
    job = JobConfig(
        mode="no_dp",
        model=ModelConfig(name="llama-tiny", vocab_size=16),
        data=DataConfig(seq_length=4, batch_size=1),
        performance=PerformanceConfig(),
        regimes=(regime,),
        num_ranks=4,
        layer_norms="3",
        log_ranks="2",
    )
    plan = GroupPlan(suite=Suite.SINGLE, jobs=(job,), num_ranks=4, environment=ENVIRONMENT)
    tree.start_group(plan)
    mode, ranks = tree.start_mode(job, regime, logged_ranks("2", 4))
    places = {"spool": str(spooled.folder), "work_dir": str(work_dir)}
    text = started(job, mode_runs=(mode,), rank_runs=(ranks,), **places)
    (folder / "job.json").write_text(text)
    done = rank_host.run("dpsgd_track.training.worker", str(folder / "job.json"), num_ranks=4)
    assert done.code == 0, done.log
    assert not list(work_dir.glob("failure*")), done.log
    tree.finish_open(Status.FINISHED, STOPPED)
    control.close()
    return spooled, work_dir


def test_a_rank_that_is_not_logged_leaves_no_spool_file(worked):
    spooled, _ = worked
    written = [file.name[7:] for file in spool_files(spooled.folder) if file.suffix == RECORDS]
    assert sorted(written) == ["work-rank0.records", "work-rank2.records"]


def test_a_logged_rank_holds_its_own_values_and_nobody_elses(worked):
    spooled, work_dir = worked
    runs = [run for run in spooled.runs().values() if run.kind == names.KIND_RANK]
    assert [run.tags[names.RANK] for run in runs] == ["0", "2"]
    for run in runs:
        own = Trajectory.load(work_dir / "0" / f"rank{run.tags[names.RANK]}" / "trajectory.npz")
        losses = [dict(zip(row.keys, row.values, strict=True))["loss"] for row in run.rows]
        assert [row.step for row in run.rows] == list(range(STEPS))
        assert losses == own.loss.tolist()
        assert [file.path.name for file in run.files] == ["trajectory.npz"]


def test_what_is_global_is_whole_whichever_ranks_are_logged(worked):
    spooled, work_dir = worked
    (mode,) = read_spooled(spooled).runs
    assert not mode.trajectory_missing
    record = mode.trajectory
    assert record is not None
    assert record.sample_rank.tolist() == [[0, 1, 2, 3]] * STEPS
    own = [Trajectory.load(work_dir / "0" / f"rank{r}" / "trajectory.npz") for r in range(4)]
    assert np.array_equal(record.sample_loss, np.hstack([each.sample_loss for each in own]))


def test_layer_norms_are_logged_in_the_steps_that_were_asked_for(worked):
    spooled, _ = worked
    (mode,) = (run for run in spooled.runs().values() if run.kind == names.KIND_MODE)
    with_layers = {
        row.step
        for row in mode.rows
        if any(key.startswith(names.LAYER_GRAD_NORM) for key in row.keys)
    }
    assert with_layers == {0, 3, 4}
    (found,) = read_spooled(spooled).runs
    assert found.trajectory is not None
    is_known = ~np.isnan(found.trajectory.layer_grad_norm)
    assert is_known.all(axis=1).tolist() == [True, False, False, True, True]
    assert is_known.any(axis=1).tolist() == [True, False, False, True, True]


# A backlog much larger than the memory that may be used for it.


class FakeStore:
    """Answers as a server would that holds what `backlog` wrote, and keeps no metrics."""

    tracking_uri = "http://nowhere"

    def __init__(self, num_metrics: int, times_ms: Sequence[int]) -> None:
        self.num_metrics, self.times_ms = num_metrics, times_ms
        self.num_shipped = self.num_runs = 0
        self.tags: dict[str, dict[str, str]] = {}
        self.params: dict[str, dict[str, str]] = defaultdict(dict)
        self.lost: tuple[str, int] | None = None
        """Metric and step of a value that it does not hold."""

    def search_runs(self, *_: object, **__: object) -> Any:
        class Page(list[Any]):
            token = None

        return Page()

    def create_run(self, *_: object, tags: dict[str, str], **__: object) -> Any:
        self.num_runs += 1
        self.tags[f"run{self.num_runs}"] = tags
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run{self.num_runs}"))

    def log_batch(
        self,
        run_id: str,
        metrics: Sequence[Any] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
    ) -> None:
        self.num_shipped += len(metrics)
        self.params[run_id] |= {param.key: param.value for param in params}
        self.tags[run_id] |= {tag.key: tag.value for tag in tags}

    def set_terminated(self, *_: object) -> None:
        """Nothing is kept."""

    def log_artifact(self, _: str, path: str, *__: object) -> None:
        self.artifact = SimpleNamespace(path=Path(path).name, file_size=Path(path).stat().st_size)

    def list_artifacts(self, *_: object) -> list[Any]:
        return [self.artifact]

    def get_run(self, run_id: str) -> Any:
        metrics = {metric_name(i): 0.0 for i in range(self.num_metrics)}
        data = SimpleNamespace(params=self.params[run_id], metrics=metrics, tags=self.tags[run_id])
        info = SimpleNamespace(status=Status.FINISHED)
        return SimpleNamespace(info=info, data=data, inputs=None)

    def get_metric_history(self, _: str, metric: str) -> list[Any]:
        number = int(metric.removeprefix("layer/"))
        return [
            Point(step, time_ms, value_of(step, number))
            for step, time_ms in enumerate(self.times_ms)
            if (metric, step) != self.lost
        ]


class Point(NamedTuple):
    """A value as the client hands it out."""

    step: int
    timestamp: int
    value: float


def metric_name(number: int) -> str:
    return f"layer/{number}"


def value_of(step: int, number: int) -> float:
    return step + number / 7


def backlog(
    folder: Path, num_steps: int, num_metrics: int
) -> tuple[SpooledGroup, FakeStore, Shipper]:
    """A finished group whose only mode run has so many values, none of which were shipped."""
    spooled = claim(folder, "g")
    assert spooled is not None
    control = SpoolWriter(spooled.folder, f"launcher{CONTROL}")
    tree = RunTree(control, "dpsgd-track", "g")
    mode, _ = start_runs(tree, num_ranks=0)
    worker = SpoolWriter(spooled.folder, f"worker{RECORDS}")
    keys = [metric_name(i) for i in range(num_metrics)]
    times_ms = []
    with pytest.MonkeyPatch.context() as clock:
        clock.setattr(spool, "now_ms", lambda: times_ms[-1])
        for step in range(num_steps):
            times_ms.append(1_000_000 + step)
            values = {key: value_of(step, number) for number, key in enumerate(keys)}
            worker.log_metrics(mode, step, values)
        worker.close()
        tree.finish_open(Status.FINISHED, STOPPED)
    control.close()
    client: Any = FakeStore(num_metrics, times_ms)
    return spooled, client, Shipper(spooled, client, client.tracking_uri, "0")


def peak_bytes(call: Any) -> tuple[int, Any]:
    """The most memory that was held at once above what was held before, and what came back."""
    tracemalloc.start()
    try:
        answer = call()
        return tracemalloc.get_traced_memory()[1], answer
    finally:
        tracemalloc.stop()


@pytest.fixture
def light_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client is handed is smaller than MLflow's own, and made faster."""
    import mlflow.entities

    monkeypatch.setattr(mlflow.entities, "Metric", lambda *parts: parts)


@pytest.mark.usefixtures("light_metrics")
@pytest.mark.parametrize(("steps", "metrics"), [(5000, 200), (50, 4000)], ids=["long", "wide"])
def test_a_backlog_is_shipped_in_memory_that_does_not_grow_with_it(steps, metrics, tmp_path):
    spooled, client, shipping = backlog(tmp_path, steps, metrics)
    peak, _ = peak_bytes(shipping.ship)
    assert client.num_shipped == steps * metrics
    # A value takes 11 bytes on the disk and 100 as it is read and sent: 3 and 2 MiB are a chunk.
    assert sum(spooled.sizes().values()) >= 10 * steps * metrics
    assert peak < 6 * MIB


@pytest.mark.usefixtures("light_metrics")
def test_a_shipper_that_reads_all_at_once_is_seen(tmp_path, monkeypatch):
    _, _, shipping = backlog(tmp_path, 500, 200)
    monkeypatch.setattr(shipper, "ROWS_AT_ONCE", 10**9)
    monkeypatch.setattr(shipper, "VALUES_AT_ONCE", 10**9)
    peak, _ = peak_bytes(shipping.ship)
    assert peak > 6 * MIB


def test_a_long_run_is_checked_in_memory_that_does_not_grow_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "MAX_POINTS", 5_000)
    _, client, shipping = backlog(tmp_path, 500, 60)
    shipping.ship()
    peak, problems = peak_bytes(shipping.differences)
    assert problems == []
    # All 30,000 values at once took 10 MiB.
    assert peak < 4 * MIB
    client.lost = (metric_name(59), 499)
    assert shipping.differences() == ["no_dp/clip: layer/59: 499 values instead of 500"]
    client.lost = None
    monkeypatch.setattr(contents, "MAX_POINTS", 10**9)
    peak, _ = peak_bytes(shipping.differences)
    assert peak > 4 * MIB


def test_a_group_is_handed_out_in_parts_that_hold_each_value_once(tmp_path, monkeypatch):
    spooled, _, _ = backlog(tmp_path, 30, 10)
    (mode,) = (r.key for r in spooled.runs().values() if r.kind == names.KIND_MODE)
    worker = SpoolWriter(spooled.folder, f"more{RECORDS}")
    worker.log_metrics(mode, 30, {metric_name(3): 1.0, "other": float("nan")})
    worker.log_metrics("unheard of", 0, {"loss": -0.0})
    worker.close()
    monkeypatch.setattr(contents, "MAX_POINTS", 70)
    counted = Contents(spooled)
    assert counted.metrics[mode] == {*(metric_name(i) for i in range(10)), "other"}
    parts = list(counted.parts(lambda run: True))
    assert max(sum(map(len, part.values())) for part in parts) <= 70
    whole = {name: points for part in parts for name, points in part.items()}
    assert sum(map(len, parts)) == len(whole) == 12
    assert {len(whole[mode, metric_name(i)]) for i in range(10) if i != 3} == {30}
    assert len(whole[mode, metric_name(3)]) == 31
    assert [value for _, _, value in whole[mode, "other"]] == [None]
    ((_, _, of_zero),) = whole["unheard of", "loss"]
    assert of_zero == 0.0
    assert {name for part in counted.parts(lambda run: run == mode) for name in part} == {
        name for name in whole if name[0] == mode
    }


def test_a_writer_never_holds_more_than_its_share_of_memory(tmp_path, monkeypatch):
    """However long it is told to go on, and what it was told first is what it keeps."""
    assert spool.MAX_HELD_BYTES == 64 * MIB
    monkeypatch.setattr(spool, "MAX_HELD_BYTES", MIB)
    writer = SpoolWriter(tmp_path, f"a{RECORDS}", tell=lambda line: None)
    real_write = spool.os.write

    def is_full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spool.os, "write", is_full)
    values = {f"m{i}": 1.0 for i in range(200)}

    def log() -> int:
        refused = 0
        for step in range(2000):
            try:
                writer.log_metrics("run", step, values)
            except TrackingError:
                refused += 1
        return refused

    peak, refused = peak_bytes(log)
    assert 1000 < refused < 2000
    assert peak < 1.5 * MIB
    with pytest.raises(TrackingError):
        writer.log_metrics("a run that comes too late", 0, values)
    monkeypatch.setattr(spool.os, "write", real_write)
    writer.log_metrics("a run that comes too late", 1, values)
    writer.close()
    rows = [record for _, record in spool.SpoolReader(spool_files(tmp_path)[0]).records()]
    steps = [row.step for row in rows if row.run == "run"]
    assert steps == list(range(2000 - refused))
    assert [row.step for row in rows if row.run != "run"] == [1]


# The measurement, of 16 ranks and without a server.


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[dict[str, Any], Path]:
    """A row of two hosts with every second rank logged, and the folder of its spools and store."""
    folder = tmp_path_factory.mktemp("measured")
    shape = replace(QUICK, layout=NODES, log_ranks="8", layer_norms="3")
    tracking_scale.CONTEXT.set_forkserver_preload(["benchmarks.tracking_scale", "mlflow.tracking"])
    return measure(shape, folder), folder


def test_the_measurement_says_what_was_logged_and_that_it_arrived(measured):
    row, _ = measured
    # Layers' norms in steps 0, 3, 6 and 7 of 8: 4 x 30 + 4 x 10, and 8 x 8 x 10 of ranks.
    assert row["metrics"] == row["arrived"] == 160 + 640
    assert (row["lost"], row["doubled"], row["trouble"]) == (0, 0, "")
    assert (row["ranks"], row["logged_ranks"], row["shippers"]) == (16, 8, 2)
    assert 80 < row["spool_bytes_per_rank_step"] < 250
    assert row["request_ms_p20"] <= row["request_ms_median"] <= row["request_ms_max"]
    assert circumstances()["mlflow"]


def test_the_measurement_sees_what_was_lost_and_what_was_doubled(measured):
    _, folder = measured
    groups = [SpooledGroup(tracking_scale.spool_of(folder, node)) for node in (0, 1)]
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("dpsgd-track").experiment_id])
    run_ids = {run.data.tags[names.KEY]: run.info.run_id for run in runs}
    assert lost_and_doubled(groups, uri, run_ids) == (0, 0)
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        # A value that was sent again with another time is another row.
        database.execute(
            "INSERT INTO metrics SELECT key, value, timestamp + 1, run_uuid, step, is_nan "
            "FROM metrics WHERE key = 'scalar_0' AND step = 2"
        )
        database.execute("DELETE FROM metrics WHERE key = 'scalar_1' AND step = 3")
        database.commit()
    assert lost_and_doubled(groups, uri, run_ids) == (1, 1)


def test_the_page_shows_the_figures_that_were_measured():
    measured = tracking_scale.ROOT / "benchmarks" / "tracking_scale.csv"
    page = (tracking_scale.ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert tracking_scale.table(measured) in page
