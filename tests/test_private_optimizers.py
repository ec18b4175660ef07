"""Several optimizers, parameter groups and gradient scalers of a private loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer

import dpsgd_track
from dpsgd_track.privacy.adaptive import AdaptiveClipping

B, D = 5, 7
SETTINGS: dict[str, Any] = {
    "noise_multiplier": 0.7,
    "max_grad_norm": 0.4,
    "expected_batch_size": B,
    "sample_rate": 0.1,
    "seed": 3,
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3))


def data(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, D, generator=generator)
    return x, torch.randint(0, 3, (B,), generator=generator)


def two_of(model: nn.Module) -> list[Optimizer]:
    body, norm, head = model[0], model[2], model[3]  # type: ignore[index]
    return [
        Adam([*body.parameters(), *head.parameters()], lr=0.01),
        SGD(norm.parameters(), lr=0.5, momentum=0.9),
    ]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("adaptive", [None, AdaptiveClipping()])
@pytest.mark.parametrize("mode", ["flash_bk", "flash", "reference"])
def test_two_optimizers_step_by_the_gradients_of_one(model, mode, adaptive) -> None:
    twin, pair = copy.deepcopy(model), two_of(model)
    private = dpsgd_track.make_private(model, pair, mode=mode, adaptive=adaptive, **SETTINGS)
    # One that moves nothing, and has plain ones step by the noisy gradients that it is given.
    only, plain = SGD(twin.parameters(), lr=0.0), two_of(twin)
    one = dpsgd_track.make_private(twin, only, mode=mode, adaptive=adaptive, **SETTINGS)
    for optimizer in plain:
        only.register_step_pre_hook(lambda *_, step=optimizer.step: step())
    for step in range(3):
        private.backward(*data(step))
        # Which of them steps first is the loop's own matter.
        for optimizer in pair if step % 2 else pair[::-1]:
            optimizer.step()
        one.backward(*data(step))
        only.step()
        torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=0)
    assert private.num_steps == 3
    assert private.max_grad_norm == one.max_grad_norm
    assert private.epsilon(1e-5) == one.epsilon(1e-5)


def test_an_optimizer_that_skips_a_step_does_not_hold_the_next_one_up(model: nn.Module) -> None:
    adam, sgd = two_of(model)
    private = dpsgd_track.make_private(model, [adam, sgd], **SETTINGS)
    before = copy.deepcopy(model)
    private.backward(*data())
    adam.step()
    with pytest.raises(RuntimeError, match="expected one of each optimizer, got none of SGD"):
        private.backward(*data())
    with pytest.raises(RuntimeError, match="expected one of each optimizer, got none of SGD"):
        adam.step()
    sgd.zero_grad()
    assert torch.equal(model[2].weight, before[2].weight)  # type: ignore[index]
    assert not torch.equal(model[0].weight, before[0].weight)  # type: ignore[index]
    private.backward(*data())
    sgd.step()
    adam.step()
    assert private.num_steps == 2
    assert all(p.grad is None for p in model.parameters())


def test_each_zero_grad_drops_a_step_that_has_not_begun(model: nn.Module) -> None:
    pair = two_of(model)
    private = dpsgd_track.make_private(model, pair, **SETTINGS)
    for optimizer in pair:
        private.backward(*data())
        optimizer.zero_grad()
        with pytest.raises(RuntimeError, match=r"step\(\) without a clipped gradient"):
            pair[0].step()
    assert private.num_steps == 0


def test_what_is_added_between_two_steps_is_refused(model: nn.Module) -> None:
    adam, sgd = two_of(model)
    private = dpsgd_track.make_private(model, [adam, sgd], **SETTINGS)
    private.backward(*data())
    adam.step()
    x, y = data()
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="expected the noisy gradient that the step of another"):
        sgd.step()


def test_an_optimizer_that_fails_leaves_the_step_to_be_dropped(model: nn.Module) -> None:
    adam, sgd = two_of(model)
    private = dpsgd_track.make_private(model, [adam, sgd], **SETTINGS)
    private.backward(*data())
    adam.param_groups[0]["betas"] = ()
    with pytest.raises(ValueError, match="unpack"):
        adam.step()
    with pytest.raises(RuntimeError, match="expected one of each optimizer"):
        private.backward(*data())
    adam.param_groups[0]["betas"] = (0.9, 0.99)
    for optimizer in (adam, sgd):
        optimizer.zero_grad()
    private.backward(*data())
    for optimizer in (adam, sgd):
        optimizer.step()
    # The noise of the step that failed was drawn: it counts.
    assert private.num_steps == 2


def test_an_optimizer_that_needs_a_closure_is_refused_before_any_noise(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="'LBFGS': expected one that steps without a closure"):
        dpsgd_track.make_private(model, LBFGS(model.parameters()), **SETTINGS)


def test_a_model_without_a_trainable_parameter_is_refused(model: nn.Module) -> None:
    optimizer = SGD(model.requires_grad_(False).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="'Sequential': expected a trainable parameter, got all"):
        dpsgd_track.make_private(model, optimizer, **SETTINGS)


def test_parameters_added_between_two_steps_are_refused(model: nn.Module) -> None:
    adam, sgd = two_of(model)
    private = dpsgd_track.make_private(model, [adam, sgd], **SETTINGS)
    private.backward(*data())
    adam.step()
    added = nn.Parameter(torch.zeros(2))
    added.grad = torch.ones(2)
    sgd.add_param_group({"params": [added]})
    with pytest.raises(ValueError, match="expected the parameters that it had"):
        sgd.step()
    assert not added.any()


def test_a_refused_make_private_leaves_the_earlier_training_in_use(model: nn.Module) -> None:
    pair = two_of(model)
    private = dpsgd_track.make_private(model, pair, **SETTINGS)
    for _ in range(2):
        private.backward(*data())
        for optimizer in pair:
            optimizer.step()
        with pytest.raises(ValueError, match="expected one optimizer"):
            dpsgd_track.make_private(model, pair, mode="opacus:hooks", **SETTINGS)
    assert private.num_steps == 2


@pytest.mark.filterwarnings("ignore:.*private steps were taken")
def test_made_private_again_within_a_step_the_rest_of_it_is_left_out(model: nn.Module) -> None:
    pair = two_of(model)
    private = dpsgd_track.make_private(model, pair, **SETTINGS)
    private.backward(*data())
    pair[0].step()
    again = dpsgd_track.make_private(model, pair, **SETTINGS)
    again.backward(*data())
    for optimizer in pair:
        optimizer.step()
    assert again.num_steps == 2


def test_parameters_in_two_optimizers_or_in_none_are_refused(model: nn.Module) -> None:
    adam, sgd = two_of(model)
    with pytest.raises(ValueError, match=r"'Adam': expected all .* lacks 2\.bias, 2\.wei"):
        dpsgd_track.make_private(model, [adam], **SETTINGS)
    both = [SGD(model.parameters(), lr=0.1), sgd]
    with pytest.raises(ValueError, match=r"SGD and SGD': expected each parameter once; it has 2"):
        dpsgd_track.make_private(model, both, **SETTINGS)
    with pytest.raises(ValueError, match=r"optimizer=\[\]: expected an optimizer, or several"):
        dpsgd_track.make_private(model, [], **SETTINGS)


@pytest.mark.filterwarnings("ignore:Secure RNG turned off")
def test_another_engine_takes_one_optimizer(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="Adam and SGD': expected one optimizer, as opacus"):
        dpsgd_track.make_private(model, two_of(model), mode="opacus:hooks", **SETTINGS)


def test_closing_gives_every_optimizer_back(model: nn.Module) -> None:
    pair = two_of(model)
    before = [dict(vars(optimizer)) for optimizer in pair]
    private = dpsgd_track.make_private(model, pair, **SETTINGS)
    private.close()
    for optimizer, own in zip(pair, before, strict=True):
        assert vars(optimizer).keys() == own.keys()
        assert not optimizer._optimizer_step_pre_hooks
    again = dpsgd_track.make_private(model, pair, **SETTINGS)
    other = dpsgd_track.make_private(model, pair[::-1], **SETTINGS)
    with pytest.raises(RuntimeError, match="made private again"):
        again.backward(*data())
    other.backward(*data())
    for optimizer in pair:
        optimizer.step()


def test_accelerate_prepares_two(model: nn.Module) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model, *pair = accelerator.prepare(model, *two_of(model))
    private = dpsgd_track.make_private(model, pair, **SETTINGS)
    private.backward(*data())
    for optimizer in pair:
        optimizer.step()
        optimizer.zero_grad()
    assert private.num_steps == 1


def test_groups_have_their_own_settings(model: nn.Module) -> None:
    groups = [
        {"params": [*model[0].parameters()], "lr": 0.0},  # type: ignore[index]
        {"params": [*model[2].parameters(), *model[3].parameters()], "lr": 0.5},  # type: ignore[index]
    ]
    optimizer, before = SGD(groups, lr=1.0), copy.deepcopy(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda n: 0.1**n])
    private = dpsgd_track.make_private(model, optimizer, **SETTINGS)
    private.backward(*data())
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.05)
    assert torch.equal(model[0].weight, before[0].weight)  # type: ignore[index]
    assert not torch.equal(model[3].weight, before[3].weight)  # type: ignore[index]


@pytest.mark.parametrize("is_unscaled", [False, True])
@pytest.mark.parametrize("kind", [SGD, Adam])
def test_a_scale_that_follows_the_samples_is_refused(model, kind, is_unscaled) -> None:
    optimizer = kind(model.parameters(), lr=0.1)
    private = dpsgd_track.make_private(model, optimizer, **SETTINGS)
    before, scaler = weights(model), torch.amp.GradScaler("cpu")
    x, y = data()
    with torch.autocast("cpu", dtype=torch.bfloat16), private.batch(B):
        loss_B = nn.functional.cross_entropy(model(x), y, reduction="none")
        private.backward(scaler.scale(loss_B))
    if is_unscaled:
        scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match=r"expected none, or GradScaler\(enabled=False\)"):
        scaler.step(optimizer)
    assert torch.equal(weights(model), before)
    assert private.num_steps == 0
    optimizer.zero_grad()
    private.backward(x, y)
    optimizer.step()
    assert private.num_steps == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scaler_that_is_not_enabled_changes_nothing(model: nn.Module, dtype) -> None:
    twin = copy.deepcopy(model)
    optimizer, plain = SGD(model.parameters(), lr=0.5), SGD(twin.parameters(), lr=0.5)
    settings = SETTINGS | {"noise_multiplier": 0.0}
    private = dpsgd_track.make_private(model, optimizer, **settings)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    x, y = data()
    with torch.autocast("cpu", dtype=dtype):
        with private.batch(B):
            loss_B = nn.functional.cross_entropy(model(x), y, reduction="none")
            private.backward(scaler.scale(loss_B))
        wanted = [torch.zeros_like(p) for p in twin.parameters()]
        for i in range(B):
            loss = nn.functional.cross_entropy(twin(x[i : i + 1]), y[i : i + 1])
            gradients = torch.autograd.grad(loss, [*twin.parameters()])
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            for total, g in zip(wanted, gradients, strict=True):
                total += g * (0.4 / norm).clamp(max=1.0)
    for parameter, total in zip(twin.parameters(), wanted, strict=True):
        parameter.grad = total / B
    scaler.step(optimizer)
    scaler.update()
    plain.step()
    # Both round at each operation, one sample at a time and all at once.
    torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=2e-3)
