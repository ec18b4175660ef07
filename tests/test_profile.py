"""Steps that are timed: what is in one, what is not, and a profile from launch to report."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mlflow import MlflowClient

from dpsgd_track.comparison import Verdict, compare_group
from dpsgd_track.comparison.profile import CostStatus, Profile, profile_of
from dpsgd_track.config import (
    ACCURACY,
    PROFILE,
    DataConfig,
    JobConfig,
    ModelConfig,
    PerformanceConfig,
    RegimeConfig,
    Settings,
    Thresholds,
)
from dpsgd_track.record import names
from dpsgd_track.record.failure import FailureKind
from dpsgd_track.record.run import Group
from dpsgd_track.store.history import metric_history
from dpsgd_track.store.reader import open_client, read_group
from dpsgd_track.training import profile
from dpsgd_track.training.diagnosis import diagnose
from dpsgd_track.training.profile import ProfileRun
from tests.support import warm
from tests.support.synthetic_group import job, setup

ROOT = Path(__file__).resolve().parent.parent
SEQ_LENGTH, NUM_ITER, WARMUP_ITER = 8, 4, 3
LOST = "tests.support.defective_modes:OutOfMemory"


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _run(mode: str) -> ProfileRun:
    regime = RegimeConfig(
        name=PROFILE,
        num_iter=NUM_ITER,
        warmup_iter=WARMUP_ITER,
        micro_batches=2,
        noise_multiplier=0.5,
        max_grad_norms=(1.0,) * NUM_ITER,
        learning_rate=0.1,
        order=1,
    )
    job = JobConfig(
        mode=mode,
        model=ModelConfig(name="llama-tiny", vocab_size=32),
        data=DataConfig(seq_length=SEQ_LENGTH),
        performance=PerformanceConfig(reference_dtype="float32"),
        regimes=(regime,),
    )
    return ProfileRun(job, regime, torch.device("cpu"))


def _diagnosed(error: Exception) -> FailureKind:
    return diagnose(error, job("flash", setup(PROFILE)), regime=0, step=None, rank=0).kind


STEP = ("accumulate", "accumulate", "clipped_sum", "privatize", "step", "zero_grad")


@pytest.mark.parametrize("mode", ["flash_bk", "no_dp_single", "reference"])
def test_a_timed_step_is_a_training_step_and_warm_up_is_not_timed(
    alone: None, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _run(mode)
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        original = getattr(run.mode, name)

        def call(*args: Any) -> Any:
            calls.append(name)
            return original(*args)

        return call

    for name in dict.fromkeys(STEP):
        monkeypatch.setattr(run.mode, name, counted(name))

    def now() -> float:
        """A warm-up step takes 100 s, others a second each."""
        steps = calls.count("step")
        return 100.0 * min(steps, WARMUP_ITER) + max(steps - WARMUP_ITER, 0)

    monkeypatch.setattr(profile, "time", SimpleNamespace(perf_counter=now))
    seen: dict[int, Any] = {}
    timings, own = run.run(seen.__setitem__)
    assert calls == list(STEP) * (WARMUP_ITER + NUM_ITER)
    assert timings.step_time_ms == (1000.0,) * NUM_ITER == own.step_time_ms
    assert timings.is_tracked == (False, True, False, True)
    assert timings.num_tokens == (2 * 2 * SEQ_LENGTH,) * NUM_ITER
    assert sorted(seen) == [1, 3]
    assert all(metrics.loss > 0 and metrics.grad_norm > 0 for metrics in seen.values())
    assert timings.peak_memory_gib > 0.05


def test_on_a_gpu_the_host_waits_before_the_first_step_and_after_the_last_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            calls.append("event")
            self.at = 10.0 * calls.count("event") ** 2

        def elapsed_time(self, later: Event) -> float:
            return later.at - self.at

    cuda = SimpleNamespace(
        Event=Event,
        synchronize=lambda _: calls.append("wait"),
        reset_peak_memory_stats=lambda _: calls.append("forget memory"),
        max_memory_allocated=lambda _: 3 * 2**30,
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    clock = profile._Clock(torch.device("cuda"))
    clock.start()
    for _ in range(3):
        clock.tick()
    assert clock.stop() == ([30.0, 50.0, 70.0], 3.0)
    assert calls == ["wait", "forget memory", *["event"] * 4, "wait"]


def test_a_private_mode_adds_its_own_noise_and_the_baseline_none(alone: None) -> None:
    assert _run("flash_bk").mode.context.privacy.noise_multiplier == 0.5
    assert _run("no_dp_single").mode.context.privacy.noise_multiplier == 0.0


@pytest.mark.parametrize(
    ("error", "is_lack"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_lack_of_memory_is_told_from_other_errors(error: Exception, is_lack: bool) -> None:
    assert (_diagnosed(error) is FailureKind.OUT_OF_MEMORY) == is_lack


def test_a_lack_of_memory_on_a_cpu_is_known_by_what_torch_says_of_it() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert _diagnosed(raised.value) is FailureKind.OUT_OF_MEMORY


class Launched:
    """A profile with an accuracy test, in which a mode had too little memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        modes = f"flash_fsdp,{LOST}"
        model = ("--model-name", "llama-tiny", "--vocab-size", "32")
        shape = ("--seq-length", str(SEQ_LENGTH), "--batch-size", "1", "--learning-rate", "0")
        steps = ("--num-iter", str(NUM_ITER), "--warmup-iter", "1", "--accuracy-test")
        where = ("--group", "g", "--output", "figures.csv", "--device", "cpu")
        self.done = self.run(
            "launch.py", "profile", "--mode", modes, *model, *shape, *steps, *where
        )

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        settings = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
        environment = {**os.environ, **settings}
        return warm.run(str(ROOT / script), *arguments, cwd=self.folder, environment=environment)

    @property
    def client(self) -> MlflowClient:
        return open_client(f"sqlite:///{self.folder / 'mlflow.db'}")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return Launched(tmp_path_factory.mktemp("profile"))


@pytest.fixture(scope="module")
def group(launched: Launched) -> Group:
    return read_group(launched.client, Settings(), "g")


@pytest.fixture(scope="module")
def found(group: Group) -> Profile:
    made = profile_of(group)
    assert made is not None
    return made


def test_a_mode_out_of_memory_is_a_result_and_the_others_go_on(
    launched: Launched, group: Group, found: Profile
) -> None:
    said = launched.done.stdout
    assert launched.done.returncode == 0, said + launched.done.stderr
    assert "group g: 4 of 5 runs finished, 1 out of memory" in said
    assert "2 measured, 1 out of memory." in said
    assert [run.mode for run in group.timed_runs] == ["no_dp", "flash_fsdp", "no_dp", LOST, "no_dp"]
    assert found.incomplete == ()
    status = {cost.label: cost.status for cost in found.costs}
    assert status == {
        "no_dp": CostStatus.MEASURED,
        "flash_fsdp": CostStatus.MEASURED,
        LOST: CostStatus.OUT_OF_MEMORY,
    }
    lost = next(run for run in group.timed_runs if run.mode == LOST)
    assert lost.failure is not None
    assert lost.failure.kind is FailureKind.OUT_OF_MEMORY
    assert "tried to allocate 1 TiB" in lost.reason


def test_times_memory_and_ratios_are_those_of_the_steps(found: Profile) -> None:
    base, flash = found.costs[:2]
    for cost, num_runs in ((base, 3), (flash, 1)):
        assert cost.step_time_ms is not None
        assert cost.tracked_time_ms is not None
        assert cost.step_time_ms.num_steps == cost.tracked_time_ms.num_steps == 2 * num_runs
        assert cost.num_ranks == 2
        # A process that has imported torch, and a model of 200,000 parameters.
        assert cost.peak_memory_gib == pytest.approx(0.4, abs=0.35)
    assert flash.baseline is not None
    assert flash.baseline.num_runs == 2
    assert flash.time_ratio is not None


def test_a_step_takes_as_long_as_on_the_slowest_rank(launched: Launched, group: Group) -> None:
    run = next(run for run in group.timed_runs if run.mode == "flash_fsdp")
    client = launched.client
    experiment = client.get_experiment_by_name("dpsgd-track").experiment_id
    query = f"tags.`{names.PARENT_RUN}` = '{run.run_id}'"
    ranks = [found.info.run_id for found in client.search_runs([experiment], query)]
    own = [metric_history(client, rank, ["step_time_ms", "peak_memory_gib"]) for rank in ranks]
    assert len(own) == 2
    assert run.timings is not None
    for step, time_ms in enumerate(run.timings.step_time_ms):
        assert time_ms == max(each["step_time_ms"][step] or 0 for each in own)
    assert run.timings.peak_memory_gib == max(each["peak_memory_gib"][0] or 0 for each in own)


def test_each_process_group_is_fresh(launched: Launched) -> None:
    folders = {path.name for path in (launched.folder / "results/g/logs").iterdir()}
    lost = LOST.replace(":", "-")
    runs = ("no_dp", 1), ("flash_fsdp", 2), ("no_dp", 3), (lost, 4), ("no_dp", 5)
    assert folders == {f"{mode}-T{SEQ_LENGTH}-B1-{order}" for mode, order in runs}


def test_tracked_steps_are_logged_with_the_norms_that_an_accuracy_run_has(
    launched: Launched, group: Group
) -> None:
    # Weights stand still, so that step by step both see the same.
    for mode in ("no_dp", "flash_fsdp"):
        exact = next(r.trajectory for r in group.runs if r.mode == mode and not r.replay)
        assert exact is not None
        run = next(run for run in group.timed_runs if run.mode == mode)
        layers = exact.layer_names.tolist()
        prefixes = (names.LAYER_GRAD_NORM, names.LAYER_WEIGHT_NORM)
        wanted = ["loss", "grad_norm", *(f"{p}{layer}" for p in prefixes for layer in layers)]
        history = metric_history(launched.client, run.run_id, [*wanted, "step_time_ms"])
        assert len(layers) == 29
        assert sorted(history["step_time_ms"]) == [0, 1, 2, 3]
        for metric in wanted:
            prefix, _, layer = metric.partition("/")
            column = getattr(exact, prefix)
            values = column[:, layers.index(layer)] if layer else column
            assert sorted(history[metric]) == [1, 3]
            for step, value in history[metric].items():
                # float32 sums of squares on one side.
                assert value == pytest.approx(values[step], rel=1e-5), (metric, step)


def test_the_accuracy_test_is_judged_as_ever(group: Group) -> None:
    compared = compare_group(group, Thresholds())
    assert [regime.name for regime in compared.regimes] == [ACCURACY]
    verdict = {mode.label: mode.verdict for mode in compared.modes}
    assert verdict.pop(LOST) is Verdict.INCONCLUSIVE
    assert set(verdict.values()) == {Verdict.PASS}
    replays = {f"no_dp ({kind})" for kind in ("again", "permuted", "ulp")}
    assert set(verdict) == {"flash_fsdp", "no_dp", *replays}


def test_launch_writes_the_figures_that_compare_writes(launched: Launched) -> None:
    done = launched.run("compare.py", "g", "--no-png")
    assert done.returncode == 3, done.stdout + done.stderr  # no accuracy test without memory
    written = launched.folder / "figures.csv"
    assert written.read_text() == (launched.folder / "results/g/profile.csv").read_text()
    with written.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["mode"] for row in rows} == {"no_dp", "flash_fsdp", LOST}
    assert {row["world_size"] for row in rows} == {"2"}
    assert all(row["torch"] and row["device"] and row["transformers"] for row in rows)
