"""Uneven and empty batches, through the step loop on gloo ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpsgd_track.comparison.measure.finite import not_finite
from dpsgd_track.config import (
    ACCURACY,
    CAUSAL_LM,
    POISSON,
    DataConfig,
    JobConfig,
    ModelConfig,
    PerformanceConfig,
    RegimeConfig,
)
from dpsgd_track.record.trajectory import UNUSED, Trajectory, sketch_distance
from tests.support.forked_ranks import ForkedRanks
from tests.support.torchrun_regimes import run_jobs

STEPS = 12


def _poisson_job(world_size: int, batch_size: int, micro_batches: int) -> JobConfig:
    data = DataConfig(
        seq_length=8, batch_size=batch_size, ragged=True, sampling=POISSON, dataset_size=20
    )
    regime = RegimeConfig(
        name=ACCURACY,
        num_iter=STEPS,
        warmup_iter=1,
        micro_batches=micro_batches,
        noise_multiplier=0.01,
        max_grad_norms=(5.0,) * STEPS,
        learning_rate=1e-3,
        noise_matched=True,
    )
    assert world_size * batch_size * micro_batches == 2
    return JobConfig(
        mode="reference",
        model=ModelConfig(name="llama-tiny", task=CAUSAL_LM),
        data=data,
        performance=PerformanceConfig(),
        regimes=(regime,),
    )


@pytest.fixture(scope="module")
def poisson(tmp_path_factory: pytest.TempPathFactory, rank_host: ForkedRanks) -> dict[str, Path]:
    """The same run of two expected samples a step, on one rank and on two."""
    folder = tmp_path_factory.mktemp("poisson")
    alone = {"one": _poisson_job(1, 2, 1), "two": _poisson_job(1, 1, 2)}
    return {
        "W1": run_jobs(rank_host, folder / "W1", 1, alone),
        "W2": run_jobs(rank_host, folder / "W2", 2, {"one": _poisson_job(2, 1, 1)}),
    }


def _record(poisson: dict[str, Path], ranks: str, name: str = "one-0") -> Trajectory:
    return Trajectory.load(poisson[ranks] / f"{name}.npz")


def test_poisson_steps_are_uneven_and_some_are_empty(poisson: dict[str, Path]) -> None:
    counts = _record(poisson, "W1").num_samples
    assert counts.min() == 0
    assert counts.max() > 2, "more than one batch"
    # 12 draws of 20 samples at 1/10: 24 are expected, with a standard deviation of 4.6.
    assert 10 <= counts.sum() <= 38


@pytest.mark.parametrize(("ranks", "name"), [("W1", "two-0"), ("W2", "one-0")])
def test_the_poisson_batch_and_its_gradient_do_not_depend_on_how_it_is_cut(
    poisson: dict[str, Path], ranks: str, name: str
) -> None:
    whole, cut = _record(poisson, "W1"), _record(poisson, ranks, name)
    for field in ("sample_index", "data_hash", "clip_fraction"):
        np.testing.assert_array_equal(getattr(cut, field), getattr(whole, field))
    # float64 throughout; norms of some thousandths to some units.
    for field in ("loss", "grad_norm", "sample_loss", "sample_norm", "sample_norm_by_parameter"):
        np.testing.assert_allclose(getattr(cut, field), getattr(whole, field), 1e-10, 1e-12)
    norm = sketch_distance(whole.gradient_sketch, np.zeros_like(whole.gradient_sketch))
    distance = sketch_distance(whole.gradient_sketch, cut.gradient_sketch)
    assert distance.max() < 1e-10 * norm.max()
    assert cut.expected_batch_size == whole.expected_batch_size == 2


def test_an_empty_step_has_no_loss_no_gradient_and_noise_all_the_same(
    poisson: dict[str, Path],
) -> None:
    record = _record(poisson, "W2")
    is_empty = record.num_samples == 0
    assert set(record.loss[is_empty]) == set(record.grad_norm[is_empty]) == {0.0}
    assert np.isnan(record.clip_fraction[is_empty]).all()
    assert (record.tokens_per_second[is_empty] == 0).all()
    assert (record.grad_norm_noised[is_empty] > 0).all()
    assert (record.loss[~is_empty] > 1).all()


def test_only_real_samples_count(poisson: dict[str, Path]) -> None:
    record = _record(poisson, "W2")
    for row, count in enumerate(record.num_samples):
        real = record.sample_index[row] != UNUSED
        assert np.isfinite(record.sample_loss[row, real]).all()
        assert np.isnan(record.sample_loss[row, ~real]).all()
        if count:
            assert record.loss[row] == pytest.approx(record.sample_loss[row, real].mean())
            clipped = record.clip_factor[row, real] < 1
            assert record.clip_fraction[row] == pytest.approx(clipped.mean())
    assert not not_finite(record)


def test_ranks_share_the_samples_as_equally_as_they_can(poisson: dict[str, Path]) -> None:
    whole = _record(poisson, "W2")
    own = [_record(poisson, "W2", f"one-0-rank{rank}") for rank in range(2)]
    for row in range(STEPS):
        parts = [t.sample_index[row][t.sample_index[row] != UNUSED].tolist() for t in own]
        real = whole.sample_index[row][whole.sample_index[row] != UNUSED].tolist()
        assert parts[0] + parts[1] == real
        assert 0 <= len(parts[0]) - len(parts[1]) <= 1


def test_a_rank_without_samples_reports_no_loss(poisson: dict[str, Path]) -> None:
    steps: list[dict[str, Any]] = json.loads((poisson["W2"] / "one-0-rank1.json").read_text())
    counts = _record(poisson, "W2", "one-0-rank1").num_samples
    assert 0 in counts
    for metrics, count in zip(steps, counts, strict=True):
        assert ("loss" in metrics) == (count > 0)
        assert sum(name.startswith("sample_norm/") for name in metrics) == count


DROPPING = ("reference", "no_dp", "flash_fsdp", "flash_fsdp_bk", "ghost_fsdp")


def _dropout_job(mode: str, micro_batches: int, *, recompute: bool = False) -> JobConfig:
    regime = RegimeConfig(
        name=ACCURACY,
        num_iter=3,
        micro_batches=micro_batches,
        max_grad_norms=(1e4,) * 3,
        learning_rate=1e-2,
    )
    return JobConfig(
        mode=mode,
        model=ModelConfig(name="bert-tiny", dropout=True, gradient_checkpointing=recompute),
        data=DataConfig(seq_length=8, batch_size=2, ragged=True),
        performance=PerformanceConfig(reference_dtype="float32"),
        regimes=(regime,),
    )


@pytest.fixture(scope="module")
def dropping(
    tmp_path_factory: pytest.TempPathFactory, rank_host: ForkedRanks
) -> dict[str, Trajectory]:
    """Records of three steps with dropout, by ranks and mode; `again` recomputes activations."""
    folder = tmp_path_factory.mktemp("dropout")
    found = {}
    for ranks in (1, 2):
        jobs = {mode: _dropout_job(mode, 2 // ranks) for mode in DROPPING}
        jobs["again"] = _dropout_job("no_dp", 2 // ranks, recompute=True)
        out = run_jobs(rank_host, folder / str(ranks), ranks, jobs)
        found |= {f"W{ranks} {name}": Trajectory.load(out / f"{name}-0.npz") for name in jobs}
    return found


@pytest.mark.parametrize("mode", [*DROPPING, "again"])
@pytest.mark.parametrize("ranks", ["W1", "W2"])
def test_every_mode_drops_the_same_however_samples_are_shared_out(
    dropping: dict[str, Trajectory], ranks: str, mode: str
) -> None:
    wanted, found = dropping["W1 reference"], dropping[f"{ranks} {mode}"]
    # float32: losses near 0.7 after two updates; another mask moves them by hundredths.
    np.testing.assert_allclose(found.loss, wanted.loss, atol=1e-6)
    np.testing.assert_allclose(found.sample_loss, wanted.sample_loss, atol=1e-6)
    np.testing.assert_allclose(found.grad_norm, wanted.grad_norm, rtol=1e-5)
    norm = sketch_distance(wanted.gradient_sketch, np.zeros_like(wanted.gradient_sketch))
    distance = sketch_distance(wanted.gradient_sketch, found.gradient_sketch)
    assert distance.max() < 1e-5 * norm.max()
