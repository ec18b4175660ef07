"""The noise regime through the step loop on gloo ranks, and through launch and compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpsgd_track.comparison import compare_group
from dpsgd_track.comparison.audit.noise import audit, judge_noise
from dpsgd_track.comparison.result import GroupComparison
from dpsgd_track.config import (
    NOISE,
    SILENT,
    DataConfig,
    JobConfig,
    ModelConfig,
    PerformanceConfig,
    RegimeConfig,
    Thresholds,
)
from dpsgd_track.launcher.regimes import NOISE_BOUNDS, NOISE_MICRO_BATCHES, NOISE_SIGMA
from dpsgd_track.record.run import Group, ModeRun, Status
from dpsgd_track.record.trajectory import Trajectory
from dpsgd_track.training.noise_samples import (
    NUM_ELEMENTS,
    UnequalNoiseError,
    check_copies,
    positions,
)
from tests.support.forked_ranks import ForkedRanks
from tests.support.torchrun_regimes import run_jobs
from tests.support.workspace import Workspace


def _job(mode: str, num_ranks: int) -> JobConfig:
    twin = RegimeConfig(
        name=NOISE,
        num_iter=len(NOISE_BOUNDS),
        micro_batches=NOISE_MICRO_BATCHES,
        max_grad_norms=NOISE_BOUNDS,
        replay=SILENT,
    )
    return JobConfig(
        mode=mode,
        model=ModelConfig(name="llama-tiny"),
        data=DataConfig(seq_length=4),
        performance=PerformanceConfig(),
        regimes=(twin, replace(twin, noise_multiplier=NOISE_SIGMA, replay="")),
        num_ranks=num_ranks,
    )


def _sentences(path: Path) -> list[str]:
    run = ModeRun(
        mode=path.stem,
        regime=NOISE,
        status=Status.FINISHED,
        trajectory=Trajectory.load(path),
        job=_job("flash_fsdp", 2),
    )
    return [finding.sentence for finding in judge_noise(run, audit(run))]


# What only ranks, micro-batches, empty batches or the place in a shard bring out; faults of the
# numbers alone are in test_noise_audit.py.
FAULTS = {
    "IdenticalShards": "between rank 0 and rank 1 is 1.000",
    "EveryMicroBatch": "as if every micro-batch got the whole noise",
    "SkipsEmptyBatches": "noise of the empty step 2 is zero",
    "OncePerColumn": "stands 1",
}
SOUND = ("flash_fsdp", "flash_fsdp_fuse_bk", "ghost_fsdp")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, rank_host: ForkedRanks) -> Path:
    jobs = {mode: _job(mode, 2) for mode in SOUND}
    jobs |= {name: _job(f"tests.support.defective_noise:{name}", 2) for name in FAULTS}
    return run_jobs(rank_host, tmp_path_factory.mktemp("noise"), 2, jobs)


@pytest.mark.parametrize("mode", SOUND)
def test_a_sound_mode_passes_on_two_ranks(two_ranks: Path, mode: str) -> None:
    assert _sentences(two_ranks / f"{mode}-1.npz") == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named(two_ranks: Path, name: str) -> None:
    found = _sentences(two_ranks / f"{name}-1.npz")
    assert FAULTS[name] in found[0]


def test_steps_are_full_ragged_empty_and_single(two_ranks: Path) -> None:
    record = Trajectory.load(two_ranks / "flash_fsdp-1.npz")
    assert record.num_samples.tolist() == [12, 11, 0, 1]
    by_rank = [np.bincount(row[row >= 0], minlength=2).tolist() for row in record.sample_rank]
    assert by_rank == [[6, 6], [6, 5], [0, 0], [1, 0]]
    assert record.sample_index[3, 0] == 23, "no sample comes twice"
    assert record.parameter_sizes.sum() == 214_720  # trainable elements of llama-tiny


def test_opacus_is_given_no_empty_batch(two_ranks: Path) -> None:
    assert Trajectory.load(two_ranks / "ghost_fsdp-1.npz").step.tolist() == [0, 1]


def test_the_twin_adds_no_noise_and_keeps_no_record_of_it(two_ranks: Path) -> None:
    twin = Trajectory.load(two_ranks / "flash_fsdp-0.npz")
    np.testing.assert_allclose(twin.grad_norm_noised, twin.grad_norm, rtol=1e-6)
    assert twin.noise_samples.size == 0
    noisy = Trajectory.load(two_ranks / "flash_fsdp-1.npz")
    np.testing.assert_array_equal(noisy.data_hash, twin.data_hash)
    np.testing.assert_array_equal(noisy.sample_norm, twin.sample_norm)


def test_a_shard_is_sampled_at_its_start_and_all_over(two_ranks: Path) -> None:
    for size in (0, 1, 256, 257, 300, 16_384, 1_000_003):
        kept = positions(size)
        assert len(set(kept.tolist())) == len(kept) <= NUM_ELEMENTS
        assert kept.tolist()[:128] == list(range(min(size, 128)))
        assert len(kept) >= min(size, 192)
        if size:
            assert kept[-1] == size - 1
    # 256 rows of 64: the spread ones share their column.
    assert set((positions(256 * 64)[128:] % 64).tolist()) == {63}


def test_three_ranks_of_which_one_has_no_rows_of_the_head(
    tmp_path: Path, rank_host: ForkedRanks
) -> None:
    out = run_jobs(rank_host, tmp_path / "W3", 3, {"flash_fsdp": _job("flash_fsdp", 3)})
    record = Trajectory.load(out / "flash_fsdp-1.npz")
    held = ~np.isnan(record.noise_samples[0]).all(axis=2)
    assert record.noise_samples.shape[1] == 3
    assert held.all(axis=1).tolist() == [True, True, False]
    assert _sentences(out / "flash_fsdp-1.npz") == []


def test_copies_that_differ_are_refused_and_shards_are_no_copies() -> None:
    noise = np.arange(2.0 * 3 * 4).reshape(2, 3, 4)
    names = ["a", "b", "c"]
    starts = np.array([[0.0, 0, 0], [4, 4, 4]])
    check_copies(noise, starts, names)
    noise[1, :2] = noise[0, :2]
    noise[:, 2] = np.nan
    check_copies(noise, np.zeros((2, 3)), names)
    noise[1, 1, 3] *= 1.01
    with pytest.raises(UnequalNoiseError, match=r"ranks 0 and 1 .* b "):
        check_copies(noise, np.zeros((2, 3)), names)


# Launched, tracked and compared: replicas, one device, and what a worker keeps of the twin.


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("replicas"))
    modes = "no_dp,flash_fsdp,flash,grad_materialize,tests.support.defective_noise:UnequalReplicas"
    arguments = ("--regime", NOISE, "--replicas", "2", "--seq-length", "4", "--group", "g")
    done = workspace.run("launch.py", "full", "--mode", modes, *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 of 4 modes finished" in done.stdout, "no_dp takes no part"
    return workspace


def _judged(group: Group, *modes: str) -> GroupComparison:
    runs = tuple(run for run in group.runs if run.mode in modes)
    return compare_group(replace(group, runs=runs), Thresholds())


def test_replicas_and_modes_on_one_device_pass(replicas: Workspace) -> None:
    modes = "flash_fsdp", "flash", "grad_materialize"
    group = replicas.group("g")
    comparison = _judged(group, *modes)
    assert comparison.sentence.startswith("PASS")
    assert [mode.label for mode in comparison.modes] == list(modes)
    (regime,) = comparison.regimes
    assert set(regime.audits) == set(modes)
    assert {run.trajectory.noise_samples.shape[1] for run in regime.runs if run.trajectory} == {1}
    assert not [name for run in group.runs for name in run.metrics if "epsilon" in name]


def test_replicas_that_diverge_are_a_bug(replicas: Workspace) -> None:
    comparison = _judged(replicas.group("g"), "tests.support.defective_noise:UnequalReplicas")
    assert comparison.sentence.startswith("BUG")
    assert (
        "ranks 0 and 1 hold the same elements of model.embed_tokens.weight" in comparison.sentence
    )
