"""What a regime's run draws its noise from, hands to its mode, and accounts for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dpsgd_track.config import (
    ACCURACY,
    CLIP,
    TRAIN,
    DataConfig,
    JobConfig,
    ModelConfig,
    PerformanceConfig,
    RegimeConfig,
)
from dpsgd_track.privacy.accounting import epsilon_rdp, poisson_history, sequential_history
from dpsgd_track.training.loop import RegimeRun

SEQUENTIAL = DataConfig(seq_length=4)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _run(
    mode: str = "reference",
    regime: str = TRAIN,
    num_iter: int = 6,
    data: DataConfig = SEQUENTIAL,
    **job: Any,
) -> RegimeRun:
    sigma = 0.0 if regime == CLIP else 2.0
    settings = RegimeConfig(
        name=regime,
        num_iter=num_iter,
        noise_multiplier=sigma,
        max_grad_norms=(1.0,) * num_iter,
        noise_matched=regime == ACCURACY,
    )
    config = JobConfig(
        mode=mode,
        model=ModelConfig(name="llama-tiny"),
        data=data,
        performance=PerformanceConfig(num_replicas=job.get("num_ranks", 1)),
        regimes=(settings,),
        **job,
    )
    return RegimeRun(config, settings, torch.device("cpu"))


@pytest.mark.usefixtures("alone")
def test_poisson_sampling_amplifies() -> None:
    run = _run(data=DataConfig(seq_length=4, sampling="poisson", dataset_size=50))
    for _ in run.steps():
        pass
    for step, metrics in run.accounting():
        assert metrics["accounting/sampling_rate"] == 2 / 50
        assert metrics["accounting/steps"] == step + 1
        assert metrics["epsilon_rdp"] == epsilon_rdp(poisson_history(2.0, step + 1, 2, 50), 1e-5)


@pytest.mark.usefixtures("alone")
def test_each_recorded_step_is_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(delta=1e-6)
    # Of 7 samples, the fourth batch of 2 takes one again, maybe one that it has already.
    monkeypatch.setattr(type(run.sampler.dataset.texts), "num_samples", 7)
    steps = list(run.steps())
    accounted = dict(run.accounting())
    assert list(accounted) == list(range(len(steps)))
    for step, metrics in accounted.items():
        history = sequential_history(2.0, step + 1, 2, 7)
        assert metrics["epsilon_rdp"] == epsilon_rdp(history, 1e-6)
        assert metrics["accounting/sigma"] == 2.0
        assert metrics["accounting/sampling_rate"] == 1.0
        assert metrics["accounting/steps"] == history[0][2]
    assert [m["accounting/steps"] for m in accounted.values()] == [1, 1, 1, 4, 4, 4]
    assert [s for s, m in accounted.items() if "epsilon_prv" in m] == [0, 1, 3, 5]


@pytest.mark.usefixtures("alone")
def test_what_does_not_protect_is_not_accounted_for() -> None:
    for mode, regime in (("reference", CLIP), ("no_dp", TRAIN), ("no_dp", ACCURACY)):
        run = _run(mode, regime, num_iter=1)
        list(run.steps())
        assert not list(run.accounting()), (mode, regime)


@pytest.mark.usefixtures("alone")
def test_own_noise_can_come_from_the_operating_system_and_matched_noise_cannot() -> None:
    keys = [_run(noise_from=source).noise_key for source in ("os", "os", "seed", "seed")]
    assert len(set(keys[:3])) == 3
    assert keys[2] == keys[3] == "42/reference"
    assert _run(regime=ACCURACY, noise_from="os").noise_key == "42/common"


@pytest.mark.usefixtures("alone")
def test_the_number_of_replicas_reaches_the_mode() -> None:
    assert _run(num_ranks=3).mode.context.num_replicas == 3


@pytest.mark.usefixtures("alone")
def test_padding_on_the_left_is_attended_to_without_cudnn() -> None:
    # Its gradients are NaN where a query may attend to nothing.
    is_used = []
    for padding in ("left", "right"):
        _run(num_iter=1, data=replace(SEQUENTIAL, padding=padding))
        is_used.append(torch.backends.cuda.cudnn_sdp_enabled())
    assert is_used == [False, True]
