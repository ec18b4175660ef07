"""The modes under a loop of one's own."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import ForkedRanks
from torch import Tensor, nn

import dpsgd_track
from dpsgd_track.modes.table import MODES
from dpsgd_track.privacy.accounting import epsilon_rdp

# Of Opacus, and of torch about Opacus's hooks.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]

ROOT = Path(__file__).resolve().parent.parent
OURS = [
    name for name, spec in MODES.items() if spec.runs_on_one_device and spec.strategy != "opacus"
]
PRIVATE = [
    *(name for name in OURS if MODES[name].is_private),
    "ghost",
    "grad_materialize",
    "reference",
]
SIGMA, C, B, D = 0.7, 0.37, 5, 7


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))


def _data(size: int = B, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, D, generator=generator)
    return x, torch.randint(0, 3, (size,), generator=generator)


def _made(model: nn.Module, mode: str, **changes: Any) -> tuple[Any, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    settings: dict[str, Any] = {
        "mode": mode,
        "noise_multiplier": SIGMA,
        "max_grad_norm": C,
        "expected_batch_size": B,
        "seed": 3,
    }
    return dpsgd_track.make_private(model, optimizer, **(settings | changes)), optimizer


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def _by_hand(model: nn.Module, sigma: float) -> Tensor:
    """Weights after one step of DP-SGD without noise."""
    assert sigma == 0
    x, y = _data()
    total = torch.zeros_like(_weights(model))
    for i in range(B):
        loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        total += (flat * min(1.0, C / flat.norm().item())).double()
    return _weights(model) - 0.5 * total / B


@pytest.mark.parametrize("mode", PRIVATE)
def test_one_step_is_dp_sgd_as_defined(model: nn.Module, mode: str) -> None:
    wanted = _by_hand(copy.deepcopy(model), 0.0)
    private, optimizer = _made(model, mode, noise_multiplier=0.0)
    private.backward(*_data())
    optimizer.step()
    torch.testing.assert_close(_weights(private.model), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", PRIVATE)
def test_every_mode_takes_the_same_noisy_steps(model: nn.Module, mode: str) -> None:
    first = copy.deepcopy(model)
    for trained, name in ((first, "flash_bk"), (model, mode)):
        private, optimizer = _made(trained, name)
        for step in range(3):
            private.backward(*_data(seed=step))
            optimizer.step()
            optimizer.zero_grad()
    assert private.num_steps == 3
    torch.testing.assert_close(_weights(model), _weights(first), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", PRIVATE)
def test_step_after_a_plain_backward_raises(model: nn.Module, mode: str) -> None:
    private, optimizer = _made(model, mode)
    before = _weights(model)
    x, y = (t.double() if t.is_floating_point() and mode == "reference" else t for t in _data())
    nn.functional.cross_entropy(private.model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"step\(\) without a clipped gradient"):
        optimizer.step()
    assert torch.equal(_weights(model), before)


@pytest.mark.parametrize("mode", [name for name in OURS if MODES[name].is_private])
def test_a_plain_backward_beside_the_private_one_raises(model: nn.Module, mode: str) -> None:
    private, optimizer = _made(model, mode)
    x, y = _data()
    private.backward(x, y)
    nn.functional.cross_entropy(model(x), y).backward()
    before = _weights(model)
    with pytest.raises(RuntimeError, match="it is not clipped"):
        optimizer.step()
    assert torch.equal(_weights(model), before)


@pytest.mark.parametrize("mode", [name for name in OURS if MODES[name].is_private])
def test_micro_batches_add_up_to_one_batch(model: nn.Module, mode: str) -> None:
    whole = copy.deepcopy(model)
    x, y = _data()
    for trained, cuts in ((whole, [5]), (model, [2, 0, 1, 2])):
        private, optimizer = _made(trained, mode)
        for part_x, part_y in zip(x.split(cuts), y.split(cuts), strict=True):
            private.backward(part_x, part_y)
        optimizer.step()
    torch.testing.assert_close(_weights(model), _weights(whole), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", [*(name for name in OURS if MODES[name].is_private), "reference"])
def test_a_step_without_samples_still_adds_noise(model: nn.Module, mode: str) -> None:
    before = _weights(model)
    private, optimizer = _made(model, mode)
    losses = private.backward(*_data(0))
    optimizer.step()
    assert losses.shape == (0,)
    noise = (before - _weights(model)) / 0.5 * B
    z = (noise.std() / (SIGMA * C) - 1) * (2 * len(noise)) ** 0.5
    assert abs(z) < 5


def test_inputs_may_be_several_or_named(model: nn.Module) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            y: Tensor = self.inner(x + shift)
            return y

    x, y = _data()
    both = Both()
    private, _ = _made(both, "flash")
    by_place = private.backward((x, x), y)
    by_name = private.backward({"x": x, "shift": x}, y)
    assert torch.equal(by_place, by_name)


def test_noise_comes_from_the_operating_system_unless_a_seed_is_given(model: nn.Module) -> None:
    def noise_of(seed: int | None) -> Tensor:
        trained = copy.deepcopy(model)
        private, optimizer = _made(trained, "flash", seed=seed)
        torch.manual_seed(0)
        private.backward(*_data(0))
        optimizer.step()
        return _weights(trained)

    assert torch.equal(noise_of(1), noise_of(1))
    assert not torch.equal(noise_of(1), noise_of(2))
    assert not torch.equal(noise_of(None), noise_of(None))


def test_a_resumed_run_draws_no_noise_twice(model: nn.Module) -> None:
    private, optimizer = _made(model, "flash")
    private.backward(*_data(0))
    optimizer.step()
    fresh = nn.Linear(1000, 1)

    def noise_of(num_steps: int) -> Tensor:
        trained = copy.deepcopy(fresh)
        resumed, optimizer = _made(trained, "flash")
        resumed.load_state_dict({"num_steps": num_steps})
        resumed.backward(torch.zeros(0, 1000), torch.zeros(0, dtype=torch.long))
        optimizer.step()
        return _weights(trained) - _weights(fresh)

    assert private.state_dict() == {"num_steps": 1}
    assert not torch.equal(noise_of(0), noise_of(1))


def test_epsilon_counts_the_steps_taken(model: nn.Module) -> None:
    private, optimizer = _made(model, "flash", sample_rate=0.01)
    assert private.epsilon(1e-5) == 0
    for _ in range(3):
        private.backward(*_data())
        private.backward(*_data())
        optimizer.step()
    rdp, prv = private.epsilon(1e-5), private.epsilon(1e-5, accountant="prv")
    assert rdp == epsilon_rdp(((SIGMA, 0.01, 3),), 1e-5)
    assert 0 < prv < rdp


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "mode": ({"mode": "flush"}, "mode='flush': expected one of"),
    "loss": ({"loss": "hinge"}, "loss='hinge': expected one of sequence-classification"),
    "sample-rate": ({"sample_rate": 1.5}, "sample_rate=1.5"),
    "sigma": ({"noise_multiplier": -1.0}, "sigma=-1.0"),
    "bound": ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
    "baseline": ({"mode": "no_dp_single"}, "expected 0 for no_dp_single, which does not clip"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_are_named(model: nn.Module, name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        _made(model, "flash", **changes) if "mode" not in changes else _made(model, **changes)


def test_the_optimizer_must_fit_the_model(model: nn.Module) -> None:
    settings = {"noise_multiplier": SIGMA, "max_grad_norm": C, "expected_batch_size": B}
    partly = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"it lacks 2\.bias, 2\.weight, 3\.bias, 3\.weight"):
        dpsgd_track.make_private(model, partly, **settings)
    used = torch.optim.Adam(model.parameters())
    nn.functional.cross_entropy(model(_data()[0]), _data()[1]).backward()
    used.step()
    with pytest.raises(ValueError, match="one without a past step"):
        dpsgd_track.make_private(model, used, **settings)


def test_epsilon_needs_noise_and_a_sample_rate(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="sample_rate=None"):
        _made(copy.deepcopy(model), "flash")[0].epsilon(1e-5)
    with pytest.raises(ValueError, match="Without noise epsilon is infinite"):
        _made(model, "flash", noise_multiplier=0.0, sample_rate=0.1)[0].epsilon(1e-5)


def test_evaluation_is_untouched(model: nn.Module) -> None:
    x, _ = _data()
    before = model(x)
    private, _ = _made(model, "flash_fuse_bk")
    assert torch.equal(private.model(x), before)


def test_the_example_runs() -> None:
    command = [sys.executable, str(ROOT / "examples" / "private_loop.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    *steps, accuracy = done.stdout.splitlines()
    assert len(steps) == 5
    assert "epsilon" in steps[-1]
    assert int(accuracy.split()[1].rstrip("%")) > 80


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, rank_host: ForkedRanks) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("library") / "out.json"
    done = rank_host.run("torchrun_library", str(output), num_ranks=2)
    assert done.code == 0, done.log[-3000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_how_a_model_is_wrapped_changes_nothing(sharded: dict[str, Any]) -> None:
    for wrapping, distance in sharded["distance"].items():
        assert distance < 1e-6, wrapping
    assert len(sharded["distance"]) == 8


def test_step_after_a_plain_backward_raises_under_fsdp2(sharded: dict[str, Any]) -> None:
    assert "without a clipped gradient" in sharded["unprepared"]
    assert "it is not clipped" in sharded["mixed"]
