"""The path a user walks: launch, track, compare. Real workers, a real store, real reports."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from dpsgd_track.comparison import Verdict, compare_group
from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.config import Thresholds
from dpsgd_track.modes.table import FULL, MODES
from dpsgd_track.record import names
from dpsgd_track.record.failure import FailureKind
from dpsgd_track.record.trajectory import Trajectory, sketch_distance
from tests.support.workspace import Workspace

PRIVATE = [mode for mode in FULL if MODES[mode].is_private]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("full"))
    argv = ("full", "--group", "g", "--num-iter", "4", "--system-metrics")
    done = workspace.run("launch.py", *argv)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "compare: python compare.py g" in done.stdout
    return workspace


@pytest.fixture(scope="module")
def records(full: Workspace) -> dict[tuple[str, str, str], Trajectory]:
    return {
        (run.mode, run.regime, run.replay): run.trajectory
        for run in full.group("g").runs
        if run.trajectory
    }


def _relative(a: Any, b: Any) -> float:
    return float(np.max(np.abs(a - b) / np.abs(b)))


@pytest.mark.parametrize("mode", FULL)
def test_every_mode_follows_the_baseline_to_a_millionth(records: Any, mode: str) -> None:
    baseline, mine = records["no_dp", "accuracy", ""], records[mode, "accuracy", ""]
    assert np.max(np.abs(mine.loss - baseline.loss)) < 1e-6
    assert _relative(mine.grad_norm, baseline.grad_norm) < 1e-6
    assert _relative(mine.grad_norm_noised, baseline.grad_norm_noised) < 1e-6


@pytest.mark.parametrize("mode", PRIVATE)
def test_clipping_equals_the_float64_reference(records: Any, mode: str) -> None:
    reference, mine = records["reference", "clip", ""], records[mode, "clip", ""]
    assert _relative(mine.sample_norm, reference.sample_norm) < 1e-5
    assert np.max(np.abs(mine.clip_factor - reference.clip_factor)) < 1e-5
    shape = (mine.num_steps, -1)
    a, b = mine.gradient_sketch.reshape(shape), reference.gradient_sketch.reshape(shape)
    assert np.max(sketch_distance(a, b) / sketch_distance(b, np.zeros_like(b))) < 1e-5


def test_a_replay_lists_the_same_samples_in_the_same_order(records: Any) -> None:
    baseline, replay = records["no_dp", "accuracy", ""], records["no_dp", "accuracy", "permuted"]
    assert np.array_equal(replay.sample_index, baseline.sample_index)
    assert np.array_equal(replay.data_hash, baseline.data_hash)
    np.testing.assert_allclose(replay.sample_loss, baseline.sample_loss, atol=1e-6)


def test_the_clip_regime_clips_some_then_all(records: Any) -> None:
    fraction = records["reference", "clip", ""].clip_fraction
    half = len(fraction) // 2
    assert 0.2 <= fraction[:half].mean() <= 0.8
    assert fraction[half:].tolist() == [1.0] * half


def test_the_noise_is_sigma_c_and_the_same_in_every_mode(records: Any) -> None:
    baseline = records["no_dp", "accuracy", ""]
    noise = baseline.noised_sketch - baseline.gradient_sketch
    # A projection of n elements of noise has a standard deviation of sigma C sqrt(n): the total
    # over parameters and steps is known to a few percent.
    total = math.sqrt(np.square(noise).sum(axis=1).mean())
    elements = 214_720  # trainable elements of llama-tiny with two classes
    assert total == pytest.approx(0.01 * 10_000 * math.sqrt(elements), rel=0.1)
    for mode in PRIVATE:
        other = records[mode, "accuracy", ""]
        np.testing.assert_allclose(
            other.noised_sketch - other.gradient_sketch, noise, atol=1e-6 * np.abs(noise).max()
        )


@pytest.fixture(scope="module")
def compared(full: Workspace) -> subprocess.CompletedProcess[str]:
    return full.run("compare.py", "g", "--no-png", "-v")


def test_compare_passes_and_leaves_its_files(
    full: Workspace, compared: subprocess.CompletedProcess[str]
) -> None:
    done = compared
    assert done.returncode == 0, done.stdout + done.stderr
    folder = full.folder / "results" / "g"
    for name in ("report.html", "report.md", "summary.txt", "drift.json", "loss_trajectory.html"):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "drift.json").read_text())["verdict"] == "PASS"
    client = MlflowClient(full.uri)
    run_id = full.group("g").run_id
    tags = client.get_run(run_id).data.tags
    assert tags[names.VERDICT] == "PASS"
    assert "PASS" in tags[names.NOTE]
    assert "comparison/report.html" in {a.path for a in client.list_artifacts(run_id, "comparison")}


def test_every_rank_logs_the_use_of_its_machine(full: Workspace) -> None:
    client = MlflowClient(full.uri)
    group = full.group("g")
    found = client.search_runs(
        [client.get_run(group.run_id).info.experiment_id],
        f"tags.`{names.GROUP}` = 'g' AND tags.`{names.KIND}` = '{names.KIND_RANK}'",
    )
    assert found
    for run in found:
        used = {k: v for k, v in run.data.metrics.items() if k.startswith("system/")}
        assert used.keys() == {
            "system/cpu_utilization_percentage",
            "system/system_memory_usage_megabytes",
            "system/system_memory_usage_percentage",
        }
        assert 0 < used["system/system_memory_usage_percentage"] < 100
        by_step = [
            [point.step for point in client.get_metric_history(run.info.run_id, name)]
            for name in ("system/cpu_utilization_percentage", "step_time_ms")
        ]
        assert by_step[0] == by_step[1]


def test_the_group_run_charts_every_mode_and_names_its_data(full: Workspace, records: Any) -> None:
    client = MlflowClient(full.uri)
    group = full.group("g")
    charted = {
        name.removeprefix("loss/")
        for name in client.get_run(group.run_id).data.metrics
        if name.startswith("loss/")
    }
    assert charted == {f"{run.regime}/{run.label}" for run in group.runs if not run.replay}
    for metric in names.CHARTED:
        name = names.group_metric(metric, "accuracy", "flash_fsdp")
        points = client.get_metric_history(group.run_id, name)
        mine = records["flash_fsdp", "accuracy", ""]
        assert [point.value for point in points] == getattr(mine, metric).tolist()
    inputs = {
        (run.regime, each.dataset.name, each.dataset.digest)
        for run in group.runs
        for each in client.get_run(run.run_id).inputs.dataset_inputs
    }
    # One for each regime, as all modes see the same.
    assert {(regime, name) for regime, name, _ in inputs} == {
        ("accuracy", "synthetic"),
        ("clip", "synthetic"),
    }
    assert len(inputs) == 2


def test_the_noise_of_the_accuracy_test_is_said_to_promise_nothing(
    full: Workspace, compared: subprocess.CompletedProcess[str]
) -> None:
    history = MlflowClient(full.uri).get_metric_history
    for run in full.group("g").runs:
        epsilons = [metric.value for metric in history(run.run_id, names.EPSILON_RDP)]
        if run.mode == "no_dp" or run.regime == "clip":
            assert not [name for name in run.metrics if "epsilon" in name or "account" in name]
            continue
        # Synthetic samples never come again, so that each is used once. At the lowest order, 1.1,
        # that is 1.1 / (2 sigma^2) = 5500, and log(1 / delta) / 0.1 and less for delta.
        assert epsilons == pytest.approx([5611.8] * 4, abs=0.1)
        assert run.metrics[names.ACCOUNTED_SIGMA] == 0.01
        assert run.metrics[names.ACCOUNTED_SAMPLING_RATE] == 1.0
        assert run.metrics[names.ACCOUNTED_STEPS] == 1.0
    said = "The noise of accuracy gives epsilon = 5612 at delta = 1e-05: no privacy."
    assert said in " ".join(compared.stdout.split())
    for name in ("summary.txt", "report.html"):
        assert said in (full.folder / "results" / "g" / name).read_text(encoding="utf-8")


def test_every_run_is_finished_and_holds_its_metrics(full: Workspace) -> None:
    client = MlflowClient(full.uri)
    experiment = client.get_experiment_by_name("dpsgd-track")
    assert experiment is not None
    wanted = f"tags.`{names.GROUP}` = 'g'"
    runs = client.search_runs([experiment.experiment_id], wanted, max_results=500)
    assert {run.info.status for run in runs} == {"FINISHED"}
    by_id = {run.info.run_id: run for run in runs}
    for run in runs:
        kind = run.data.tags[names.KIND]
        parent = run.data.tags.get(names.PARENT_RUN)
        assert (parent is None) == (kind == names.KIND_GROUP)
        if kind == names.KIND_MODE:
            assert by_id[parent].data.tags[names.KIND] == names.KIND_GROUP
            steps = 4
            for name in ("loss", "grad_norm", "grad_norm_noised", "step_time_ms"):
                assert len(client.get_metric_history(run.info.run_id, name)) == steps
            assert any(name.startswith(names.LAYER_GRAD_NORM) for name in run.data.metrics)
            assert run.data.params["environment.torch"]
        if kind == names.KIND_RANK:
            assert by_id[parent].data.tags[names.KIND] == names.KIND_MODE
            assert "step_time_ms" in run.data.metrics
            is_private = run.data.tags[names.MODE] != "no_dp"
            assert any(n.startswith(names.SAMPLE_NORM) for n in run.data.metrics) == is_private


def test_the_same_mode_twice_is_bitwise_equal(full: Workspace, records: Any) -> None:
    mode = "flash_fsdp_fuse_bk"
    done = full.run(
        "launch.py", "single", "--mode", mode, "--accuracy-test", "--num-iter", "4",
        "--group", "again", "--output", "results.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    again = full.group("again").runs[0].trajectory
    first = records[mode, "accuracy", ""]
    assert again is not None
    measured = {"step_time_ms", "peak_memory_gib", "tokens_per_second"}
    for field in fields(Trajectory):
        if field.name not in measured:
            np.testing.assert_array_equal(getattr(again, field.name), getattr(first, field.name))
    output = json.loads((full.folder / "results.json").read_text())
    assert output["loss_values"] == first.loss.tolist()
    assert output["final_loss"] == first.loss[-1]
    # One run has nothing to be compared with, and says so.
    assert full.run("compare.py", "again", "--no-png", "--no-log").returncode == 3


DEFECTS = {
    "NoiseByLocalShard": ("noise", "accuracy"),
    "MeanClipFactor": ("clipped sum", "clip"),
    "Rank0Loss": ("loss", "accuracy"),
}


UNLIKE_THE_PROTOCOL = {
    "Leaves": (FailureKind.MODE, "SystemExit: 0"),
    "Recordless": (FailureKind.PROTOCOL, "expected a SampleRecord, got NoneType"),
    "MeanLoss": (FailureKind.PROTOCOL, "a SampleRecord of 2 samples, got losses of shape []"),
}
"""Modes that fail, each with the kind and the words of its failure."""


@pytest.fixture(scope="module")
def defective(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Any]:
    workspace = Workspace(tmp_path_factory.mktemp("defective"))
    planted = ["Healthy", *DEFECTS, "GoesNan", "OutOfMemory", *UNLIKE_THE_PROTOCOL]
    modes = ",".join(["no_dp", *(f"tests.support.defective_modes:{name}" for name in planted)])
    arguments = ("full", "--mode", modes, "--num-iter", "2", "--group", "g")
    return workspace, workspace.run("launch.py", *arguments)


def _judged(workspace: Workspace, *planted: str) -> GroupComparison:
    group = workspace.group("g")
    kept = {"no_dp", "reference", *(f"tests.support.defective_modes:{name}" for name in planted)}
    runs = tuple(run for run in group.runs if run.mode in kept)
    return compare_group(replace(group, runs=runs), Thresholds())


def test_a_healthy_user_mode_passes(defective: tuple[Workspace, Any]) -> None:
    assert _judged(defective[0], "Healthy").verdict is Verdict.PASS


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_turns_pass_into_bug(defective: tuple[Workspace, Any], name: str) -> None:
    comparison = _judged(defective[0], "Healthy", name)
    assert comparison.verdict is Verdict.BUG
    verdicts = {mode.label: mode for mode in comparison.modes}
    assert verdicts["tests.support.defective_modes:Healthy"].verdict is Verdict.PASS
    guilty = verdicts[f"tests.support.defective_modes:{name}"]
    stage, regime = DEFECTS[name]
    assert guilty.verdict is Verdict.BUG
    assert stage in guilty.sentence
    assert regime in guilty.sentence


@pytest.mark.parametrize("name", UNLIKE_THE_PROTOCOL)
def test_a_mode_that_leaves_the_protocol_is_told_what_it_did(
    defective: tuple[Workspace, Any], name: str
) -> None:
    runs = {(run.mode, run.regime): run for run in defective[0].group("g").runs}
    failure = runs[f"tests.support.defective_modes:{name}", "accuracy"].failure
    assert failure is not None
    kind, said = UNLIKE_THE_PROTOCOL[name]
    assert failure.kind is kind
    assert said in failure.reason


def test_compare_exits_with_1_on_a_bug(defective: tuple[Workspace, Any]) -> None:
    done = defective[0].run("compare.py", "g", "--no-png")
    assert done.returncode == 1, done.stdout + done.stderr


def test_failed_modes_say_why_and_the_others_go_on(defective: tuple[Workspace, Any]) -> None:
    workspace, done = defective
    assert done.returncode == 1
    assert "6 of 11 modes finished" in done.stdout
    runs = {(run.mode, run.regime): run for run in workspace.group("g").runs}
    nan = runs["tests.support.defective_modes:GoesNan", "accuracy"]
    assert nan.status == "FAILED"
    assert "grad_norm became nan at step 0" in nan.reason
    assert nan.trajectory is not None, "what was computed is kept"
    memory = runs["tests.support.defective_modes:OutOfMemory", "accuracy"]
    assert memory.status == "FAILED"
    assert "out of memory" in memory.reason
    assert "--batch-size" in done.stdout
    assert runs["tests.support.defective_modes:Healthy", "clip"].status == "FINISHED"
    comparison = _judged(workspace, "GoesNan", "OutOfMemory")
    verdicts = {mode.label.split(":")[-1]: mode.verdict for mode in comparison.modes}
    assert verdicts["GoesNan"] is Verdict.BUG
    assert verdicts["OutOfMemory"] is Verdict.INCONCLUSIVE
