"""The modes under a loop of one's own."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import dpsgd_track
from dpsgd_track.modes.reference import ReferenceMode
from dpsgd_track.modes.table import MODES
from dpsgd_track.privacy.accounting import epsilon_rdp
from tests.support.forked_ranks import ForkedRanks
from tests.support.torchrun_library import FailsOnce

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


def _made(model: nn.Module, mode: str | None, **changes: Any) -> tuple[Any, torch.optim.Optimizer]:
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


def test_the_number_of_passes_chooses_the_mode(model: nn.Module) -> None:
    chosen = {}
    for passes in (None, 1, 2):
        private, _ = _made(copy.deepcopy(model), None, passes=passes)
        capture = private.mode.engine.capture
        chosen[passes] = capture.keep, capture.norm_rule.name
    assert chosen == {None: (True, "flash"), 1: (True, "flash"), 2: (False, "flash")}
    with pytest.raises(ValueError, match="passes=3: expected 1 or 2"):
        _made(model, None, passes=3)
    with pytest.raises(ValueError, match="passes=2: expected none beside mode='flash'"):
        _made(model, "flash", passes=2)


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


@pytest.mark.parametrize("mode", [*(name for name in OURS if MODES[name].is_private), "reference"])
def test_a_plain_backward_beside_the_private_one_raises(model: nn.Module, mode: str) -> None:
    private, optimizer = _made(model, mode)
    x, y = _data()
    private.backward(x, y)
    x = x.double() if mode == "reference" else x
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

    def noise_after(state: dict[str, Any] | None) -> Tensor:
        trained = copy.deepcopy(fresh)
        resumed, optimizer = _made(trained, "flash")
        if state is not None:
            resumed.load_state_dict(state)
        resumed.backward(torch.zeros(0, 1000), torch.zeros(0, dtype=torch.long))
        optimizer.step()
        return _weights(trained) - _weights(fresh)

    assert private.num_steps == 1
    assert not torch.equal(noise_after(None), noise_after(private.state_dict()))


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


@pytest.mark.parametrize("mode", PRIVATE)
@pytest.mark.parametrize(
    "reduce", [torch.mean, torch.sum, lambda x: x[:, None], lambda x: x.expand(3, -1).T]
)
def test_a_loss_that_is_not_one_number_a_sample_is_refused(
    model: nn.Module, mode: str, reduce: Any
) -> None:
    def loss(logits: Tensor, y: Tensor) -> Tensor:
        reduced: Tensor = reduce(nn.functional.cross_entropy(logits, y, reduction="none"))
        return reduced

    private, optimizer = _made(model, mode, loss=loss)
    with pytest.raises(ValueError, match=r"loss='loss': expected one number a sample"):
        private.backward(*_data())
    with pytest.raises(RuntimeError):
        optimizer.step()


NOT_FINITE = {"nan": float("nan"), "inf": float("inf"), "overflow": 1e30}


@pytest.mark.parametrize("mode", [*(name for name in OURS if MODES[name].is_private), "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_sample_that_is_not_finite_adds_nothing(
    mode: str, dtype: torch.dtype, value: float
) -> None:
    torch.manual_seed(0)
    # LayerNorm would make a large sample as good as any.
    model = nn.Sequential(nn.Linear(D, 6), nn.Linear(6, 3))
    without = copy.deepcopy(model)
    x, y = _data()
    x[2] = value
    if mode == "reference" and value == NOT_FINITE["overflow"]:
        x[2] = float("inf")  # float64 holds the square of 1e30
    keep = torch.tensor([0, 1, 3, 4])
    private, optimizer = _made(model, mode, param_dtype=dtype)
    with pytest.warns(UserWarning, match="is not finite: such samples add nothing"):
        private.backward(x, y)
    assert private.last.num_left_out == private.num_left_out == 1
    assert private.last.clip_factor_B[2] == 0
    optimizer.step()
    other, optimizer = _made(without, mode, param_dtype=dtype)
    other.backward(x[keep], y[keep])
    optimizer.step()
    assert _weights(model).isfinite().all()
    torch.testing.assert_close(_weights(model), _weights(without), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["ghost", "grad_materialize"])
def test_a_sample_that_is_not_finite_is_refused_by_opacus(model: nn.Module, mode: str) -> None:
    private, optimizer = _made(model, mode)
    before = _weights(model)
    x, y = _data()
    x[2] = float("nan")
    with pytest.raises(ValueError, match="expected finite losses and gradients, got 1"):
        private.backward(x, y)
    with pytest.raises(RuntimeError, match="may be in the sum in part"):
        optimizer.step()
    assert torch.equal(_weights(model), before)


class _Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(D, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.leave(FailsOnce.apply(torch.tanh(self.enter(x))))
        return y


@pytest.mark.parametrize("mode", [*(name for name in OURS if MODES[name].is_private), "reference"])
@pytest.mark.parametrize("failing_at", [1, 2])
def test_a_batch_that_failed_can_be_added_in_halves(mode: str, failing_at: int) -> None:
    torch.manual_seed(0)
    model = _Failing()
    whole = copy.deepcopy(model)
    x, y = _data()
    settings = {"spot_check": False, "noise_multiplier": 0.0}
    private, optimizer = _made(model, mode, **settings)
    private.backward(*_data(seed=2))
    FailsOnce.failing_at = failing_at
    is_one_pass = mode.endswith("_bk")
    if failing_at == 1 or not is_one_pass:
        with pytest.raises(torch.OutOfMemoryError):
            private.backward(x, y)
        private.backward(x[:2], y[:2])
        private.backward(x[2:], y[2:])
    else:
        private.backward(x, y)
    FailsOnce.failing_at = 0
    optimizer.step()
    other, optimizer = _made(whole, mode, **settings)
    other.backward(*_data(seed=2))
    other.backward(x, y)
    optimizer.step()
    torch.testing.assert_close(_weights(model), _weights(whole), rtol=1e-6, atol=1e-7)


def test_after_a_failure_in_opacus_the_step_has_to_begin_anew() -> None:
    torch.manual_seed(0)
    private, optimizer = _made(_Failing(), "ghost")
    FailsOnce.failing_at = 2
    with pytest.raises(torch.OutOfMemoryError):
        private.backward(*_data())
    FailsOnce.failing_at = 0
    with pytest.raises(RuntimeError, match=r"Call optimizer\.zero_grad\(\)"):
        private.backward(*_data())
    optimizer.zero_grad()
    private.backward(*_data())
    optimizer.step()


@pytest.mark.parametrize("mode", PRIVATE)
def test_zero_grad_forgets_the_batch(model: nn.Module, mode: str) -> None:
    once = copy.deepcopy(model)
    private, optimizer = _made(model, mode)
    private.backward(*_data(seed=5))
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="without a clipped gradient"):
        optimizer.step()
    private.backward(*_data())
    optimizer.step()
    other, optimizer = _made(once, mode)
    optimizer.zero_grad()
    other.backward(*_data())
    optimizer.step()
    torch.testing.assert_close(_weights(model), _weights(once), rtol=0, atol=0)


@pytest.mark.parametrize("mode", PRIVATE)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_cleared_behind_the_optimizers_back_are_noticed(
    model: nn.Module, mode: str, set_to_none: bool
) -> None:
    private, optimizer = _made(model, mode)
    private.backward(*_data())
    private.model.zero_grad(set_to_none=set_to_none)
    with pytest.raises(RuntimeError, match=r"as model\.zero_grad\(\) does"):
        optimizer.step()
    optimizer.zero_grad()
    private.backward(*_data())
    optimizer.step()


def test_noise_covers_the_largest_c_of_a_step() -> None:
    noises = []
    for bounds in ((1.0, 0.01), (0.01, 1.0)):
        torch.manual_seed(0)
        model = nn.Linear(D, 300)
        before = _weights(model)
        private, optimizer = _made(model, "flash_bk", max_grad_norm=bounds[0])
        private.backward(*_data(0))
        private.mode.set_max_grad_norm(bounds[1])
        private.backward(*_data(0))
        optimizer.step()
        noises.append((before - _weights(model)).std() / 0.5 * B)
    for noise in noises:
        assert abs(noise / SIGMA - 1) < 0.1
    private.backward(*_data(0))
    assert private.mode.clipped_sum().sensitivity == 1.0


def _in_training(model: nn.Module) -> None:
    model.train()


def _freeze(model: nn.Module) -> None:
    model[0].weight.requires_grad_(False)


def _unfreeze(model: nn.Module) -> None:
    model[4].requires_grad_(True)


def _replace(model: nn.Module) -> None:
    model[0] = nn.Linear(D, 6)


def _exchange_parameter(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.zeros(6, D))


def _hook_gradient(model: nn.Module) -> None:
    model[0].weight.register_hook(lambda gradient: 2 * gradient)


def _begin_to_write(model: nn.Module) -> None:
    model[3].is_writing = True


def _begin_to_fill(model: nn.Module) -> None:
    model[3].fills = "late"


def _begin_to_register(model: nn.Module) -> None:
    model[3].fills = "new"


def _begin_to_use(model: nn.Module) -> None:
    model[3].used = [model[0]]


def _replace_forward(model: nn.Module) -> None:
    model[0].forward = torch.tanh


def _weight_norm(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(model[0])


class _Changeable(nn.Module):
    """Begins to do what it should not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("late", None)
        self.is_writing = False
        self.fills = ""
        self.used: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.is_writing:
            self.average.mul_(0.9).add_(x.detach().mean(dim=0), alpha=0.1)
        if self.fills:
            self.register_buffer(self.fills, x.detach().mean(dim=0))
        for layer in self.used:
            x = x + x @ layer.weight[:, :6]
        return x


LATER = {
    "batch-norm": (_in_training, r"2: expected BatchNorm1d in its eval mode"),
    "frozen": (_freeze, r"0\.weight: expected requires_grad=True"),
    "unfrozen": (_unfreeze, r"4\.weight: expected requires_grad=False"),
    "layer": (_replace, r"model: expected modules and parameters as they were"),
    "parameter": (_exchange_parameter, r"0: expected modules and parameters as they were"),
    "gradient-hook": (_hook_gradient, r"0\.weight: expected no hook"),
    "buffer": (_begin_to_write, r"3\.average: expected a forward that leaves the model as it is"),
    "empty-buffer": (_begin_to_fill, r"3\.late: expected a forward that leaves the model as it is"),
    "new-buffer": (
        _begin_to_register,
        r"3\.new: expected a forward that leaves the model as it is",
    ),
    "functional": (_begin_to_use, r"Used in other ways too: 0\.weight"),
    "forward": (_replace_forward, r"0: expected the forward of Linear"),
    "parametrised": (_weight_norm, r"0: expected modules and parameters as they were"),
}


class _OwnRecurrence(nn.RNN):
    """May compute something else than torch's own class."""


class _Product(torch.autograd.Function):
    """Takes no row of a weight for each sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight @ weight.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return dy @ weight @ weight.T, (x.T @ dy + dy.T @ x) @ weight


class _OfEachWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, D))
        self.enter, self.line = nn.Linear(D, 6), nn.Conv1d(1, 2, 3)
        self.copied = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.gated = nn.GRU(6, 6, batch_first=True)
        self.recurrent = _OwnRecurrence(6, 6, batch_first=True)
        self.table, self.head = nn.Embedding(2, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.copied(self.enter(x + self.shift)))
        h = self.recurrent(self.gated(h.unsqueeze(1))[0])[0].squeeze(1)
        first, _ = self.table(torch.arange(2))
        h = h * first.view(1, -1)
        y: Tensor = self.head(_Product.apply(h, self.enter.weight))
        return y


def test_why_says_of_each_layer_how_its_gradients_are_formed() -> None:
    private, _ = _made(_OfEachWay(), "flash_bk")
    private.backward(*_data())
    said = {account.layer: account for account in private.why()}
    ways = {name: account.way for name, account in said.items()}
    assert said["enter"].rule == "linear"
    assert ways == {
        "(model)": "on its parameters expanded over samples",
        "enter": "its rule",
        "line": "its rule",
        "copied": "on one copy of its parameters for each sample",
        "gated": "by its formulas, for all samples at once",
        "recurrent": "run one sample after the other, as it can't be vectorised",
        "table": "its rule, with what all samples share given to each",
        "head": "its rule",
        "enter.weight": "one backward of the model for each sample",
    }
    # What is slow comes with what to do.
    assert [name for name, account in said.items() if account.advice] == [
        "copied",
        "recurrent",
        "enter.weight",
    ]
    assert _made(_OfEachWay(), "reference")[0].why() == []


class _GradientOfInputs(nn.Module):
    """Has its input require gradients in training mode only, as speech models do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x[:].requires_grad_(self.training))
        return y


@pytest.mark.parametrize("training", [(True, False, True), (False, False, True)])
def test_inputs_that_require_gradients_in_training_mode_only_are_exact(
    training: tuple[bool, ...],
) -> None:
    torch.manual_seed(0)
    model = _GradientOfInputs()
    private, optimizer = _made(model, "flash_bk", noise_multiplier=0.0)
    for is_training in training:
        model.train(is_training)
        expected = _by_hand(model, 0.0)
        private.backward(*_data())
        optimizer.step()
        torch.testing.assert_close(_weights(model), expected)


# A use that the first batch has is exact.
@pytest.mark.parametrize(
    ("change", "num_batches"),
    [(c, n) for c in LATER for n in (0, 4) if (c, n) != ("functional", 0)],
)
def test_what_changes_later_is_refused_at_once(change: str, num_batches: int) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6, affine=False).eval()
    model = nn.Sequential(
        nn.Linear(D, 6), nn.Tanh(), norm, _Changeable(), nn.Linear(6, 6), nn.Linear(6, 3)
    )
    model[4].requires_grad_(False)
    private, optimizer = _made(model, "flash_bk")
    for _ in range(num_batches):
        private.backward(*_data())
        optimizer.step()
    make, message = LATER[change]
    make(model)
    before = _weights(model)
    with pytest.raises(ValueError, match=message):
        private.backward(*_data())
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert torch.equal(_weights(model), before)


def test_a_buffer_taken_away_between_batches_is_no_error(model: nn.Module) -> None:
    model.register_buffer("unused", torch.zeros(1))
    private, optimizer = _made(model, "flash_bk")
    del model.unused
    private.backward(*_data())
    optimizer.step()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input": torch.zeros(B, D), "flag": False}, r"inputs\['flag'\]=False: expected a tensor"),
        ({"input": torch.zeros(B, D), "mask": None}, r"inputs\['mask'\]=None: expected a tensor"),
        ((torch.zeros(B, D), torch.zeros(())), r"inputs\[1\]=\(\): expected a tensor"),
        ((torch.zeros(B, D), torch.zeros(1, D)), rf"inputs\[1\]=\(1, {D}\): expected a tensor"),
        (torch.zeros(B - 1, D), rf"inputs\[0\]=.*the {B} samples of the targets"),
    ],
)
@pytest.mark.parametrize("mode", ["flash_bk", "reference"])
def test_an_input_that_is_not_one_row_a_sample_is_refused_by_name(
    model: nn.Module, mode: str, inputs: Any, message: str
) -> None:
    private, optimizer = _made(model, mode)
    with pytest.raises(ValueError, match=message):
        private.backward(inputs, torch.zeros(B, dtype=torch.long))
    private.backward(*_data())
    optimizer.step()


def test_a_model_without_parameters_is_refused_by_name(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="expected the model's parameters"):
        dpsgd_track.make_private(
            nn.Identity(),
            torch.optim.SGD(model.parameters(), lr=1.0),
            noise_multiplier=SIGMA,
            max_grad_norm=C,
            expected_batch_size=B,
        )


def test_parameters_added_to_the_optimizer_are_refused(model: nn.Module) -> None:
    private, optimizer = _made(model, "flash_bk")
    private.backward(*_data())
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError, match="expected the parameters that it had"):
        optimizer.step()


def test_weights_that_move_to_other_memory_are_still_the_ones_used(model: nn.Module) -> None:
    private, optimizer = _made(model, "flash_bk")
    private.backward(*_data())
    optimizer.step()
    model.load_state_dict({n: p * 2 for n, p in model.state_dict().items()}, assign=False)
    for parameter in model.parameters():
        parameter.data = parameter.data * 3
    private.backward(*_data())
    x, y = _data()
    loss = nn.functional.cross_entropy(model(x[:1]), y[:1])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    wanted = torch.cat([g.flatten() for g in gradients]).norm()
    torch.testing.assert_close(private.last.norm_B[0], wanted, rtol=1e-5, atol=0)


class _Copying(ReferenceMode):
    """Hands out copies of its gradients: noise on them alone would reach no weight."""

    def clipped_sum(self) -> Any:
        clipped = super().clipped_sum()
        return replace(clipped, gradients={n: g.clone() for n, g in clipped.gradients.items()})


class _NoiseInStep(ReferenceMode):
    def step(self) -> None:
        super().step()


class _OwnPrivatize(ReferenceMode):
    def privatize(self, clipped: Any, source: Any) -> Any:
        return clipped.gradients


class _LessSensitive(ReferenceMode):
    def clipped_sum(self) -> Any:
        return replace(super().clipped_sum(), sensitivity=0.0)


class _OtherModel(ReferenceMode):
    def __init__(self, model: nn.Module, context: Any) -> None:
        super().__init__(copy.deepcopy(model), context)


def test_a_mode_that_copies_its_gradients_trains_with_noise(model: nn.Module) -> None:
    before = _weights(model)
    private, optimizer = _made(model, f"{__name__}:_Copying")
    private.backward(*_data(0))
    optimizer.step()
    noise = (before - _weights(model)) / 0.5 * B
    assert abs(noise.std() / (SIGMA * C) - 1) < 5 / (2 * len(noise)) ** 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("_NoiseInStep", r"a mode without a step\(\) of its own"),
        ("_OwnPrivatize", r"a mode without a privatize\(\) of its own"),
        ("_OtherModel", r"a mode that trains the optimizer's parameters; it lacks 0\.weight"),
    ],
)
def test_a_mode_that_could_skip_the_noise_is_refused(
    model: nn.Module, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _made(model, f"{__name__}:{name}")


def test_a_sum_that_claims_less_than_c_is_refused(model: nn.Module) -> None:
    private, optimizer = _made(model, f"{__name__}:_LessSensitive")
    private.backward(*_data())
    with pytest.raises(ValueError, match=r"sensitivity=0\.0: expected 0\.37"):
        optimizer.step()


def test_a_step_of_opacus_without_noise_is_refused(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, optimizer = _made(model, "ghost")
    private.backward(*_data())
    monkeypatch.setattr(private.mode.dp_optimizer, "noise_multiplier", 0.0)
    before = _weights(model)
    with pytest.raises(RuntimeError, match="expected a standard deviation"):
        optimizer.step()
    assert torch.equal(_weights(model), before)


def test_epsilon_tells_the_whole_life(model: nn.Module) -> None:
    first, optimizer = _made(model, "flash", noise_multiplier=0.6, sample_rate=0.1)
    for _ in range(50):
        first.backward(*_data(0))
        optimizer.step()
    spent = first.epsilon(1e-5)
    fresh = copy.deepcopy(nn.Linear(D, 3))
    resumed, optimizer = _made(fresh, "flash", noise_multiplier=4.0, sample_rate=0.1)
    resumed.load_state_dict(first.state_dict())
    assert resumed.epsilon(1e-5) == spent
    resumed.backward(*_data())
    optimizer.step()
    assert resumed.epsilon(1e-5) == epsilon_rdp(((0.6, 0.1, 50), (4.0, 0.1, 1)), 1e-5)
    with pytest.warns(UserWarning, match="50 private steps were taken on this model"):
        again, _ = _made(copy.deepcopy(model), "flash", noise_multiplier=4.0, sample_rate=0.1)
    assert again.epsilon(1e-5) == spent
    with pytest.raises(ValueError, match="steps"):
        again.load_state_dict(_made(nn.Linear(D, 3), "flash")[0].state_dict())
    with pytest.raises(ValueError, match="before the first step"):
        resumed.load_state_dict(first.state_dict())


def test_epsilon_tells_the_life_of_every_part(model: nn.Module) -> None:
    settings: dict[str, Any] = {"noise_multiplier": 1.0, "sample_rate": 0.1}

    def train(private: Any, optimizer: torch.optim.Optimizer) -> int:
        private.backward(*_data())
        optimizer.step()
        steps: int = private.num_steps
        return steps

    def made(trained: nn.Module) -> tuple[Any, torch.optim.Optimizer]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return _made(trained, "flash", **settings)

    first, second = made(model), made(model)
    assert [train(*first), train(*second), train(*first)] == [1, 2, 3]
    assert second[0].epsilon(1e-5) == epsilon_rdp(((1.0, 0.1, 3),), 1e-5)
    assert train(*made(nn.Sequential(model))) == 4
    # Parts that were trained before, with a new head.
    assert train(*made(nn.Sequential(*model[:3], nn.Linear(6, 3)))) == 5
    assert train(*first) == 6
    copied = copy.deepcopy(model)
    assert train(*made(nn.Sequential(copied[0], copied[1], nn.Linear(6, 3)))) == 7
    # Parts that were trained separately; what trains one of them alone is refused afterwards.
    other = made(nn.Linear(D, 3))
    assert train(*other) == 1
    both = nn.Sequential(nn.ModuleList([other[0].model, model]), nn.Linear(D, 3))
    both.forward = lambda x: both[0][0](x) + both[0][1](x)  # type: ignore[method-assign]
    whole = made(both)
    assert train(*whole) == 8
    for part in (other, first):
        with pytest.raises(RuntimeError, match="made private again as a part of another"):
            train(*part)
    # A frozen backbone carries no history into another model.
    frozen = nn.Linear(D, D).requires_grad_(False)
    assert train(*made(nn.Sequential(frozen, nn.Linear(D, 3)))) == 1
    assert train(*made(nn.Sequential(frozen, nn.Linear(D, 3)))) == 1


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", PRIVATE)
def test_a_backward_without_gradients_is_refused(
    model: nn.Module, mode: str, switch: Callable[[], Any]
) -> None:
    private, optimizer = _made(model, mode)
    with switch(), pytest.raises(RuntimeError, match="a step would be noise alone"):
        private.backward(*_data())
    with pytest.raises(RuntimeError, match="without a clipped gradient"):
        optimizer.step()


@pytest.mark.parametrize("mode", ["flash_bk", "reference"])
def test_targets_that_are_not_one_row_a_sample_are_refused(model: nn.Module, mode: str) -> None:
    private, _ = _made(model, mode)
    x, y = _data()
    with pytest.raises(ValueError, match=r"targets='list': expected a tensor"):
        private.backward(x, y.tolist())
    with pytest.raises(ValueError, match=r"targets=\(\): expected a tensor with the samples"):
        private.backward(x, y[0])
    private.backward({"input": x}, y)


def test_sparse_gradients_are_checked_too() -> None:
    model = nn.Sequential(nn.Embedding(D, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    private, optimizer = _made(model, "flash_bk")
    private.backward(torch.randint(0, D, (B, 2)), _data()[1])
    assert private.spot_checks.num_checks == 1
    optimizer.step()


def test_a_second_call_takes_the_optimizer_over(model: nn.Module) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    settings = {"noise_multiplier": SIGMA, "max_grad_norm": C, "expected_batch_size": B}
    first = dpsgd_track.make_private(model, optimizer, **settings)
    first.backward(*_data())
    optimizer.step()
    with pytest.warns(UserWarning, match="1 private steps"):
        second = dpsgd_track.make_private(model, optimizer, **settings)
    with pytest.raises(RuntimeError, match="made private again"):
        first.backward(*_data())
    second.backward(*_data())
    optimizer.step()
    assert second.num_steps == 2
    assert len(optimizer._optimizer_step_pre_hooks) == 1


def test_many_calls_on_one_model_leave_nothing_on_it(model: nn.Module) -> None:
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    for _ in range(20):
        private, _ = _made(model, "flash_fuse_bk")
        private.backward(*_data())
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    # The history of steps on the model stays, and is empty: there were none.
    assert all(not own.pop("_dpsgd_track_history", []) for own in after.values())
    assert before == after


@pytest.mark.parametrize("make", [torch.optim.Adagrad, torch.optim.Adam, torch.optim.RMSprop])
def test_every_fresh_optimizer_is_taken(model: nn.Module, make: Any) -> None:
    optimizer = make(model.parameters(), lr=0.1)
    private = dpsgd_track.make_private(
        model, optimizer, noise_multiplier=SIGMA, max_grad_norm=C, expected_batch_size=B
    )
    private.backward(*_data())
    optimizer.step()
    assert private.num_steps == 1


def test_an_optimizer_that_another_library_wraps_is_named(model: nn.Module) -> None:
    class Wrapped(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    with pytest.raises(ValueError, match="optimizer='Wrapped': expected an optimizer of torch's"):
        dpsgd_track.make_private(
            model,
            Wrapped(torch.optim.SGD(model.parameters())),
            noise_multiplier=SIGMA,
            max_grad_norm=C,
            expected_batch_size=B,
        )


@pytest.mark.parametrize("is_prepared_first", [False, True])
def test_accelerate_prepares_before_or_after(model: nn.Module, is_prepared_first: bool) -> None:
    # The state of a test before, such as its mixed precision, is the process's.
    AcceleratorState._reset_state(reset_partial_state=True)
    wanted = copy.deepcopy(model)
    private, plain = _made(wanted, "flash_bk")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.5)
    settings = {"noise_multiplier": SIGMA, "max_grad_norm": C, "expected_batch_size": B, "seed": 3}
    if is_prepared_first:
        model, optimizer = accelerator.prepare(model, optimizer)
    accelerated = dpsgd_track.make_private(model, optimizer, **settings)  # type: ignore[arg-type]
    if not is_prepared_first:
        model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(4):
        x, y = _data(seed=step)
        private.backward(x, y)
        if step % 2:
            plain.step()
        with accelerator.accumulate(model), accelerated.batch(len(x)):
            logits = model(x)
            accelerated.backward(nn.functional.cross_entropy(logits, y, reduction="none"))
        optimizer.step()
        optimizer.zero_grad()
    assert accelerated.num_steps == 2
    assert torch.equal(_weights(model), _weights(wanted))


def test_an_output_without_logits_is_named(model: nn.Module) -> None:
    class Tuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), x

    private, _ = _made(Tuple(), "flash")
    with pytest.raises(ValueError, match="an output with a tensor `logits`, got tuple"):
        private.backward(*_data())


def test_complex_parameters_are_named() -> None:
    model = nn.Sequential(nn.Linear(D, 3))
    model.register_parameter("phase", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    with pytest.raises(ValueError, match=r"phase \(complex\)"):
        _made(model, "flash")


@pytest.mark.parametrize("mode", [name for name in OURS if MODES[name].is_private])
def test_a_copy_is_an_ordinary_module(mode: str) -> None:
    torch.manual_seed(0)

    def make() -> nn.Module:
        attention = nn.TransformerEncoderLayer(8, 2, 9, batch_first=True, dropout=0.0)
        return nn.Sequential(nn.Embedding(D, 8), attention, nn.Flatten(), nn.Linear(40, 3))

    model, tokens = make(), torch.randint(0, D, (B, 5))
    private, optimizer = _made(model, mode)
    averaged = AveragedModel(model)
    for _ in range(2):
        private.backward(tokens, _data()[1])
        optimizer.step()
        averaged.update_parameters(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(model), averaged.module, torch.load(buffer, weights_only=False)):
        fresh = make()
        fresh.load_state_dict(copied.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(copied(tokens), fresh(tokens), rtol=0, atol=0)
            for parameter in copied.parameters():
                parameter.zero_()
            assert not copied(tokens).any()
    with pytest.raises(TypeError, match="copy the model"):
        copy.deepcopy(private)


def test_autocast_is_the_forwards_alone(model: nn.Module) -> None:
    x, y = _data()
    wanted = []
    for i in range(B):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x[i : i + 1]).float(), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        wanted.append(torch.cat([g.flatten() for g in gradients]).norm())
    private, optimizer = _made(model, "flash_bk")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        private.backward(x, y)
    optimizer.step()
    # Autograd rounds each sample's gradient of a weight to bfloat16, the engine none.
    torch.testing.assert_close(private.last.norm_B, torch.stack(wanted), rtol=5e-3, atol=0)


def test_evaluation_is_untouched(model: nn.Module) -> None:
    x, _ = _data()
    before = model(x)
    private, _ = _made(model, "flash_fuse_bk")
    assert torch.equal(private.model(x), before)


def test_the_example_runs() -> None:
    command = [sys.executable, str(ROOT / "examples" / "private_loop.py")]
    # More threads would wait for those of the tests beside it.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    *steps, accuracy = done.stdout.splitlines()
    assert len(steps) == 5
    assert "epsilon" in steps[-1]
    assert int(accuracy.split()[1].rstrip("%")) > 80


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.soak)])
def sharded(
    tmp_path_factory: pytest.TempPathFactory,
    rank_host: ForkedRanks,
    request: pytest.FixtureRequest,
) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("library") / "out.json"
    done = rank_host.run("tests.support.torchrun_library", str(output), num_ranks=request.param)
    assert done.code == 0, done.log[-3000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_how_a_model_is_wrapped_changes_nothing(sharded: dict[str, Any]) -> None:
    for wrapping, distance in sharded["distance"].items():
        assert distance < 1e-6, wrapping
    assert len(sharded["distance"]) == 10


def test_a_loops_own_losses_take_the_same_steps_under_fsdp2(sharded: dict[str, Any]) -> None:
    assert len(sharded["own"]) == 3
    for what, distance in sharded["own"].items():
        assert distance < 1e-5, what


def test_a_batch_that_failed_can_be_added_in_halves_under_fsdp2(sharded: dict[str, Any]) -> None:
    assert len(sharded["failed"]) == 8
    for what, distance in sharded["failed"].items():
        assert distance < 1e-6, what


def test_uneven_batches_with_samples_that_are_not_finite_are_checked_under_fsdp2(
    sharded: dict[str, Any],
) -> None:
    assert [left_out for _, left_out in sharded["uneven"]] == [3, 4, 4]
    checks = [num_checks for num_checks, _ in sharded["uneven"]]
    assert checks[0] > 0
    assert checks == sorted(set(checks)), "each batch is larger than those before"


def test_step_after_a_plain_backward_raises_under_fsdp2(sharded: dict[str, Any]) -> None:
    assert "without a clipped gradient" in sharded["unprepared"]
    assert "it is not clipped" in sharded["mixed"]
