"""The oracle leaves out what is not finite, and adds a micro-batch as a whole or not at all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dpsgd_track.config import PrivacyConfig
from dpsgd_track.modes.protocol import ModeContext, SampleRun
from dpsgd_track.modes.reference import ReferenceMode
from dpsgd_track.privacy.dropout import KeyedDropout
from dpsgd_track.privacy.engine import Batch

B, FEATURES, CLASSES, C = 4, 5, 3, 0.5
NAN, INF = float("nan"), float("inf")


class _ScaledLoss:
    """Squared outputs, times a factor that each sample's target names."""

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        return logits.square().sum(dim=1) * target


def _mode(dtype: torch.dtype = torch.float64, loss: object = None) -> ReferenceMode:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, CLASSES))
    context = ModeContext(
        privacy=PrivacyConfig(noise_multiplier=0, max_grad_norm=C, expected_batch_size=B),
        device=torch.device("cpu"),
        param_dtype=torch.float32,
        reference_dtype=dtype,
        make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        loss=loss or _ScaledLoss(),  # type: ignore[arg-type]
    )
    return ReferenceMode(model, context)


def _batch(seed: int = 0) -> Batch:
    x = torch.randn(B, FEATURES, generator=torch.Generator().manual_seed(seed))
    return Batch({}, torch.ones(B, dtype=torch.float64), args=(x,))


def _without(batch: Batch, index: int) -> Batch:
    kept = [i for i in range(len(batch)) if i != index]
    return Batch({}, batch.targets[kept], args=(batch.args[0][kept],))


def _grads(mode: ReferenceMode) -> list[Tensor]:
    found = []
    for parameter in mode.parameters:
        assert parameter.grad is not None
        found.append(parameter.grad.clone())
    return found


def _spoil(batch: Batch, index: int, how: str) -> None:
    match how:
        case "nan input":
            batch.args[0][index, 2] = NAN
        case "infinite input":
            batch.args[0][index, 0] = INF
        case "nan loss":
            batch.targets[index] = NAN
        case "infinite loss":
            batch.targets[index] = INF
        case "norm that overflows":
            # Loss and gradient stay finite; the gradient's square does not.
            batch.targets[index] = 1e200


WAYS = ["nan input", "infinite input", "nan loss", "infinite loss", "norm that overflows"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("index", range(B))
def test_a_sample_that_is_not_finite_is_left_out(how: str, index: int) -> None:
    batch = _batch()
    alone, mode = _mode(), _mode()
    expected = alone.accumulate(_without(batch, index))
    _spoil(batch, index, how)
    record = mode.accumulate(batch)
    assert all(map(torch.equal, _grads(mode), _grads(alone)))
    assert record.clip_factor_B is not None
    assert expected.clip_factor_B is not None
    assert record.clip_factor_B[index] == 0
    kept = [i for i in range(B) if i != index]
    assert torch.equal(record.clip_factor_B[kept], expected.clip_factor_B)
    # What is recorded shows why.
    assert record.norm_B is not None
    assert not record.norm_B[index].isfinite()


def test_a_loss_that_is_not_finite_leaves_a_finite_gradient_out() -> None:
    class Shifted(_ScaledLoss):
        def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
            return logits.square().sum(dim=1) + target

    batch = _batch()
    alone, mode = _mode(loss=Shifted()), _mode(loss=Shifted())
    alone.accumulate(_without(batch, 1))
    batch.targets[1] = INF
    record = mode.accumulate(batch)
    assert record.norm_B is not None
    assert record.clip_factor_B is not None
    assert record.norm_B.isfinite().all()
    assert record.clip_factor_B[1] == 0
    assert all(map(torch.equal, _grads(mode), _grads(alone)))


def test_in_float32_a_norm_whose_square_overflows_is_infinite() -> None:
    batch = _batch()
    alone, mode = _mode(torch.float32), _mode(torch.float32)
    alone.accumulate(_without(batch, 2))
    batch.targets[2] = 1e25
    record = mode.accumulate(batch)
    assert record.loss_B.isfinite().all()
    assert record.norm_B is not None
    assert record.norm_B[2].isinf()
    assert all(map(torch.equal, _grads(mode), _grads(alone)))


def test_where_no_sample_is_finite_the_sum_is_0() -> None:
    batch = _batch()
    batch.args[0][:] = NAN
    mode = _mode()
    mode.accumulate(batch)
    assert not any(grad.any() for grad in _grads(mode))


def test_micro_batches_add_up_around_one_that_is_left_out() -> None:
    mode, alone = _mode(), _mode()
    spoilt = _batch(1)
    spoilt.args[0][:] = INF
    for batch in (_batch(0), spoilt, _batch(2)):
        mode.accumulate(batch)
    for batch in (_batch(0), _batch(2)):
        alone.accumulate(batch)
    assert all(map(torch.equal, _grads(mode), _grads(alone)))


class _Failing(_ScaledLoss):
    """Raises at a sample whose target is negative."""

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        if bool((target < 0).any()):
            raise RuntimeError("out of memory")
        return super().__call__(logits, target)


@pytest.mark.parametrize("index", range(B))
def test_a_batch_that_fails_in_the_middle_adds_nothing(index: int) -> None:
    mode = _mode(loss=_Failing())
    failing = _batch(1)
    failing.targets[index] = -1
    with pytest.raises(RuntimeError, match="out of memory"):
        mode.accumulate(failing)
    assert all(parameter.grad is None for parameter in mode.parameters)
    mode.accumulate(_batch(0))
    before = _grads(mode)
    with pytest.raises(RuntimeError, match="out of memory"):
        mode.accumulate(failing)
    assert all(map(torch.equal, _grads(mode), before))


def test_an_empty_batch_adds_nothing() -> None:
    mode = _mode()
    mode.accumulate(_batch())
    before = _grads(mode)
    empty = Batch({}, torch.zeros(0), args=(torch.zeros(0, FEATURES),))
    assert len(mode.accumulate(empty).loss_B) == 0
    assert all(map(torch.equal, _grads(mode), before))


class _Recorder:
    """Runs forwards of its own before each sample's, as one that records wrong losses does."""

    def __init__(self) -> None:
        self.outputs_of: list[list[Tensor]] = []

    def watch(self, model: nn.Module) -> None:
        pass

    def see_losses(self, loss: object, batch: Batch, index: int, run: SampleRun) -> None:
        self.outputs_of.append([run(batch.sample(index)).detach() for _ in range(3)])

    def outputs(self) -> list[Tensor]:
        return []

    def see(self, gradients: object, outputs: object) -> None:
        pass

    def weigh(self, factors: object) -> None:
        pass

    def end_batch(self) -> None:
        pass


def test_what_is_recorded_leaves_dropout_masks_as_they_are() -> None:
    found = []
    for recorder in (None, _Recorder()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(FEATURES, 40), nn.Dropout(0.5), nn.Linear(40, CLASSES))
        context = replace(_mode().context, observer=recorder)  # type: ignore[arg-type]
        mode = ReferenceMode(model, context)
        with KeyedDropout(seed=1, step=2, samples=range(B)):
            record = mode.accumulate(_batch())
        found.append([record.loss_B, *_grads(mode)])
    assert all(map(torch.equal, *found))
    assert recorder is not None
    # Each of its forwards has the masks of the sample.
    for first, *others in recorder.outputs_of:
        assert all(torch.equal(first, other) for other in others)
