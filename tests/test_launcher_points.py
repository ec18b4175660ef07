"""Which runs a profile sets out to do, and in which order. Nothing is launched."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from mlflow import MlflowClient

from dpsgd_track.config import ACCURACY, PLAIN, PROFILE, RegimeConfig, Settings
from dpsgd_track.launcher import choices, group
from dpsgd_track.launcher.group import GroupRun
from dpsgd_track.launcher.process_group import Launch, Outcome
from dpsgd_track.launcher.progress import PlainDisplay
from dpsgd_track.launcher.recording import Recording, open_group
from dpsgd_track.modes import table
from dpsgd_track.record import names
from dpsgd_track.record.facts import FACTS, FACTS_FILE, DeviceFacts, RunFacts
from dpsgd_track.record.failure import FAILURE, Failure, FailureKind
from dpsgd_track.record.plan import PLAN, GroupPlan, StartedJob
from dpsgd_track.record.run import Status
from dpsgd_track.record.timings import Timings
from dpsgd_track.store.find_group import read_group_anywhere
from dpsgd_track.store.spool import RECORDS, SpoolWriter
from tests.support import planned
from tests.support.fake_launch import run


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choices, "count_gpus", lambda: 0)
    return tmp_path


def suite(*argv: str) -> GroupPlan:
    return planned.plan(PROFILE, *argv)


def order(*argv: str) -> list[str]:
    return [job.label for job in suite(*argv).jobs]


ONE = ("--seq-length", "64")


def test_every_mode_stands_between_two_runs_of_its_baseline():
    assert order(*ONE, "--mode", "flash_fsdp,ghost_fsdp") == [
        *("no_dp", "flash_fsdp", "no_dp", "ghost_fsdp", "no_dp"),
    ]
    labels = order(*ONE)
    assert labels[::2] == ["no_dp"] * len(table.FULL)
    assert tuple(labels[1::2]) == table.FULL[1:]


def test_every_round_times_every_mode_between_two_baselines():
    assert order(*ONE, "--mode", "flash_fsdp,ghost_fsdp", "--rounds", "2") == [
        *("no_dp", "flash_fsdp", "no_dp", "ghost_fsdp") * 2,
        "no_dp",
    ]
    with pytest.raises(ValueError, match=r"rounds=0: expected an integer >= 1"):
        suite("--rounds", "0")


def test_modes_on_one_device_stand_between_runs_of_their_own_baseline():
    assert order(*ONE, "--mode", "flash,flash_fsdp,flash_bk") == [
        *("no_dp", "flash_fsdp", "no_dp"),
        *("no_dp_single", "flash", "no_dp_single", "flash_bk", "no_dp_single"),
    ]


def test_the_baseline_takes_part_whatever_is_asked_for():
    assert order(*ONE, "--mode", "no_dp") == ["no_dp"]
    assert order(*ONE, "--mode", "flash") == ["no_dp", "no_dp_single", "flash", "no_dp_single"]


def test_a_variant_stands_between_runs_of_the_installed_baseline(empty_folder):
    package = empty_folder / "checkout" / "transformers"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    assert order(*ONE, "--mode", "flash_fsdp", "--variant", "b=checkout") == [
        *("no_dp", "flash_fsdp", "no_dp", "no_dp@b", "no_dp", "flash_fsdp@b", "no_dp"),
    ]


def test_every_length_is_run_with_every_batch_size_and_runs_are_numbered():
    jobs = suite("--mode", "flash_fsdp", "--seq-length", "8,16", *("--batch-size", "1"),
                 "--batch-size", "4").jobs  # fmt: skip
    assert [job.regimes[0].order for job in jobs] == list(range(1, 13))
    shapes = [(job.data.seq_length, job.data.batch_size) for job in jobs]
    assert shapes == [shape for shape in ((8, 1), (8, 4), (16, 1), (16, 4)) for _ in range(3)]
    assert len({key for key, _, _ in suite("--mode", "flash_fsdp").runs()}) == 6


def test_a_run_of_a_profile_is_the_profile_and_nothing_else():
    made = suite("--mode", "flash_fsdp", *ONE, "--sigma", "0.3")
    job = made.jobs[1]
    (regime,) = job.regimes
    assert (regime.name, regime.num_iter, regime.warmup_iter) == (PROFILE, 10, 3)
    assert (regime.noise_multiplier, regime.noise_matched) == (0.3, False)
    assert not regime.replay
    assert regime.micro_batches == 1
    assert PLAN.loads(PLAN.dumps(made)) == made


def test_a_mode_on_one_device_takes_the_micro_batches_of_all_ranks():
    jobs = suite("--mode", "flash", *ONE, "--nproc-per-node", "4", "--micro-batches", "3").jobs
    assert [(job.num_ranks, job.regimes[0].micro_batches) for job in jobs] == [
        (4, 3),
        *[(1, 12)] * 3,
    ]


def test_the_accuracy_test_is_run_once_by_each_mode_at_the_first_shape():
    jobs = suite("--accuracy-test", "--seq-length", "64,128", "--warmup-iter", "5").jobs
    tested = [job for job in jobs if any(r.name == ACCURACY for r in job.regimes)]
    assert sorted(job.mode for job in tested) == sorted([table.REFERENCE, *table.FULL])
    assert {job.data.seq_length for job in tested} == {64}
    reference, baseline = jobs[:2]
    assert [(r.name, r.replay) for r in reference.regimes] == [(ACCURACY, ""), (ACCURACY, PLAIN)]
    kinds = ("", "again", "permuted", "ulp")
    assert [(r.name, r.replay) for r in baseline.regimes] == [
        (PROFILE, ""),
        *((ACCURACY, kind) for kind in kinds),
    ]
    # What is asked of the timed steps is not asked of the test.
    assert [r.warmup_iter for r in baseline.regimes] == [5, 0, 0, 0, 0]


def test_the_reference_is_timed_only_where_it_is_asked_for():
    assert "reference" not in order(*ONE, "--mode", "flash_fsdp", "--accuracy-test")
    assert order(*ONE, "--mode", "reference") == ["no_dp", "reference", "no_dp"]
    asked = suite(*ONE, "--mode", "reference", "--accuracy-test").jobs[1]
    assert [r.name for r in asked.regimes] == [PROFILE, ACCURACY, ACCURACY]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seq-length", "64,x"], "seq_length='64,x': expected integers >= 1, comma separated"),
        (["--seq-length", ""], "seq_length='': expected integers >= 1"),
        (["--batch-size", "0"], "batch_size='0': expected integers >= 1"),
        (["--num-iter", "1"], "num_iter=1: expected an integer >= 2"),
        (["--mode", "flosh"], "mode='flosh': expected one of"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(argv, said, capsys):
    assert run([PROFILE, *argv]) == 2
    assert said in capsys.readouterr().err
    assert not Path("results").exists()


def test_every_length_is_checked_against_the_model():
    def refuse_long(_model, data):
        if data.seq_length > 64:
            raise ValueError(f"seq_length={data.seq_length}")

    with pytest.raises(ValueError, match="seq_length=128"):
        planned.plan(PROFILE, "--seq-length", "64,128", check_inputs=refuse_long)


def test_a_place_in_the_order_belongs_to_a_profile():
    with pytest.raises(ValueError, match="order=1: expected 0"):
        RegimeConfig(name=ACCURACY, num_iter=1, order=1)
    with pytest.raises(ValueError, match="order=-1: expected 0"):
        RegimeConfig(name=PROFILE, num_iter=1, order=-1)


def leave_timings(started: StartedJob) -> None:
    folder = Path(started.work_dir)
    writer = SpoolWriter(Path(started.spool), f"{folder.name}-rank0{RECORDS}")
    timings = Timings(
        step_time_ms=(2.0, 2.5), is_tracked=(False, True), num_tokens=(128,) * 2, peak_memory_gib=1
    )
    device = DeviceFacts(torch_num_threads=1, allow_tf32=False, cudnn_allow_tf32=False)
    facts = RunFacts(
        environment=started.environment, device=device, norm_plan={"head": "in one piece"}
    )
    timings.save(folder / names.TIMINGS_FILE)
    (folder / FACTS_FILE).write_text(FACTS.dumps(facts))
    for name in (names.TIMINGS_FILE, FACTS_FILE):
        writer.upload(started.mode_runs[0], folder / name)
    writer.close()


def _run(monkeypatch, name: str, failures: dict[str, FailureKind], *argv: str) -> tuple[int, str]:
    """Exit code and output of a suite in which modes fail as told."""

    def run_mode(started, *_):
        kind = failures.get(started.job.mode)
        leave_timings(started)
        if kind is None:
            return tuple(Outcome(Status.FINISHED) for _ in started.job.regimes)
        first = Outcome(Status.FAILED, Failure(kind=kind, rank=1, regime=0))
        message = "regime profile failed first"
        later = Outcome(Status.FAILED, Failure(kind=FailureKind.NOT_STARTED, message=message))
        return (first, *(later for _ in started.job.regimes[1:]))

    monkeypatch.setattr(group, "run_mode", run_mode)
    options = (PROFILE, "--group", name, "--mode", "flash_fsdp,ghost_fsdp", *ONE, *argv)
    made = planned.plan(*options)
    recording = open_group(made.suite, planned.place(*options))
    stream = io.StringIO()
    code = GroupRun(made, recording, Launch(), PlainDisplay(stream)).run()
    return code, stream.getvalue()


def _runs(name: str) -> dict[str, tuple[str, FailureKind | None]]:
    client = MlflowClient(f"sqlite:///{Path.cwd()}/mlflow.db")
    experiment = client.get_experiment_by_name("dpsgd-track").experiment_id
    query = f"tags.`{names.GROUP}` = '{name}' AND tags.`{names.KIND}` != 'rank'"

    def kind(tags: dict[str, str]) -> FailureKind | None:
        return FAILURE.loads(tags[names.FAILURE]).kind if names.FAILURE in tags else None

    return {
        found.info.run_name: (found.info.status, kind(found.data.tags))
        for found in client.search_runs([experiment], query)
    }


LOST = {"ghost_fsdp": FailureKind.OUT_OF_MEMORY}


def test_out_of_memory_ends_with_0_and_any_other_failure_with_1(monkeypatch):
    for name, argv in (("lost", ()), ("tested", ("--accuracy-test",))):
        code, said = _run(monkeypatch, name, LOST, *argv)
        assert code == 0
        assert "ghost_fsdp (T=64, B=2): OUT OF MEMORY after" in said
        assert f"group {name}: 4 of 5 runs finished, 1 out of memory" in said
        found = _runs(name)
        assert found["ghost_fsdp/profile (T64-B2-4)"] == ("FAILED", FailureKind.OUT_OF_MEMORY)
        assert found["flash_fsdp/profile (T64-B2-2)"] == ("FINISHED", None)
        assert found[name][0] == "FINISHED"
    code, said = _run(monkeypatch, "broken", {"ghost_fsdp": FailureKind.ERROR})
    assert code == 1
    assert "4 of 5 runs finished\n" in said
    found = _runs("broken")
    assert found["ghost_fsdp/profile (T64-B2-4)"] == ("FAILED", FailureKind.ERROR)
    assert found["broken"][0] == "FAILED"


def test_a_profile_without_a_store_is_read_in_the_spool_and_shipped_later(monkeypatch, capsys):
    assert _run(monkeypatch, "g", LOST, "--offline")[0] == 0
    assert run(["compare", "g", "--no-png"]) == 0
    said = capsys.readouterr()
    assert "2 measured, 1 out of memory" in said.out
    assert "the store does not have all of g yet" in said.err
    spooled = read_group_anywhere(Settings(), "g", print)
    assert spooled.spooled is not None
    assert not spooled.group.runs

    assert run(["sync"]) == 0
    assert "each value checked" in capsys.readouterr().out
    stored = read_group_anywhere(Settings(), "g", print)
    assert stored.spooled is None
    assert "2 measured" in stored.group.tags[names.NOTE]
    assert not stored.group.runs
    assert [run.order for run in stored.group.timed_runs] == list(range(1, 6))
    for before, after in zip(spooled.group.timed_runs, stored.group.timed_runs, strict=True):
        assert (before.key, before.status) == (after.key, after.status)
        assert before.facts == after.facts
        assert before.facts is not None
        assert before.facts.norm_plan == {"head": "in one piece"}
        lost = before.failure is not None and before.failure.kind is FailureKind.OUT_OF_MEMORY
        assert lost == (after.mode == "ghost_fsdp")
        assert before.failure == after.failure
        assert before.timings == after.timings
        assert after.timings is not None
        assert before.timings_missing == after.timings_missing == ""


def test_a_profile_is_not_resumed_as_its_times_would_be_of_another_day(monkeypatch, capsys):
    failed = {"ghost_fsdp": FailureKind.ERROR}
    assert _run(monkeypatch, "g", failed, "--offline")[0] == 1
    assert run(["resume", "g", "--offline"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "group='g': expected a group of quick, full, single, faults. Times of a profile" in said


def test_nothing_is_shipped_beside_timed_steps(monkeypatch):
    entered: list[bool] = []
    seen: list[bool] = []

    @contextlib.contextmanager
    def quiet(_recording: Recording) -> Iterator[None]:
        entered.append(True)
        yield
        entered.pop()

    monkeypatch.setattr(Recording, "quiet", quiet)
    monkeypatch.setattr(sys.modules[__name__], "leave_timings", lambda _: seen.append(any(entered)))
    _run(monkeypatch, "g", {}, "--offline")
    assert seen == [True] * 5


def test_one_line_says_all_of_one_run():
    stream = io.StringIO()
    display = PlainDisplay(stream)
    display.start_mode("[2/3] no_dp (T=8, B=1)", [RegimeConfig(name=PROFILE, num_iter=4, order=2)])
    event = {"regime": 0, "num_iter": 4, "step": 0, "loss": None}
    display.event({**event, "event": "start"})
    display.event({**event, "event": "end", "step_time_ms": 12.345, "peak_memory_gib": 0.5})
    display.end_mode("FINISHED")
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("[2/3] no_dp (T=8, B=1): profile, 4 steps in ")
    assert line.endswith(" s, 12.35 ms a step, 0.5 GiB")


def test_no_two_runs_share_a_place():
    keys = [key for key, _, _ in suite("--mode", "flash_fsdp").runs()]
    assert len(set(keys)) == len(keys)
    assert all(a != b for a, b in pairwise(order("--mode", "flash_fsdp", *ONE)))
