"""Modules that `torch.func.vmap` alone would not map: exact, for all samples at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from dpsgd_track import make_private
from dpsgd_track.privacy.mapped_calls import MappedCalls, mapped_functions

D, T = 4, 3


class _Product(Function):
    """Written before torch.func: one function saves and computes. Its gradient is its own."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.scale = scale
        return a @ b * scale

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        return (dy @ b.T * ctx.scale).clamp(-1, 1), a.T @ dy * ctx.scale, None


class _NewProduct(Function):
    """Keeps its context in torch.func's way, and has no rule for vmap."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, scale: float) -> Tensor:
        return a @ b * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.scale = inputs[2]

    backward = _Product.backward


class _Weights(nn.Module):
    """A weight of two factors, as LoHa's."""

    def __init__(self, product: type[Function] = _Product) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.randn(D, D)) for _ in range(2))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.product.apply(self.a, self.b, 0.5)


class _WrongRule(_NewProduct):
    """Has a rule that uses the first sample's weights for all."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, b: Tensor, scale: float) -> Any:
        return _NewProduct.apply(a[0], b[0], scale), None


class _Branching(_Weights):
    """Is left out at random, at a rate of 0, and looks at what it reads."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or (torch.rand(1) > 0 and (x.amax() < 100 or x.amin().item() > 100)):
            return x @ self.a * self.b.sum()
        return x


class _Parting(_Weights):
    """Takes a branch that depends on all samples of a batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a @ self.b if x.sum() > 0 else x @ self.b + x @ self.a


class _Renormed(_Weights):
    """Calls a function of torch that vmap has no rule for."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.renorm(self.a, 2, 0, 1.0) @ self.b


class _Recurrence(nn.Module):
    """Goes on from its last state, unless that has been reset."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(D))
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[:, 0]) if self.state is None else self.state
        steps = []
        for step in x.unbind(1):
            state = torch.tanh(state * self.gate + step)
            steps.append(state)
        self.state = state
        return torch.stack(steps, dim=1)


class _Stateful(nn.Module):
    """Reads the state that a recurrence has kept, and has it go on from there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Recurrence()

    def forward(self, x: Tensor) -> Tensor:
        self.inner.state = None
        first, state = self.inner(x), self.inner.state
        assert state is not None
        return first * state[:, None] + self.inner(x.flip(1))


class _Positions(nn.Embedding):
    """Makes a row for each sample of a batch whose shape it is told, and also reads a constant
    shape that may have their number."""

    def forward(self, shape: tuple[int, ...], window: tuple[int, int]) -> Tensor:  # type: ignore[override]
        steps = torch.ones(shape, dtype=torch.long).cumsum(1) - 1
        return super().forward(steps) * window[0]


class _Positioned(nn.Module):
    """Adds embeddings of positions as ProphetNet does."""

    def __init__(self, window: tuple[int, int] = (2, 3)) -> None:
        super().__init__()
        self.positions, self.window = _Positions(T, D), window

    def forward(self, x: Tensor) -> Tensor:
        table = self.positions(x.shape[:2], window=self.window)
        return x * table + self.positions((len(x), T), window=self.window)


MAPPED: dict[str, Callable[[], nn.Module]] = {
    "function": _Weights,
    "function-of-two-parts": lambda: _Weights(_NewProduct),
    "branches": _Branching,
    "renorm": _Renormed,
    "state": _Stateful,
    "shape": _Positioned,
}


class _Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.enter, self.layer, self.head = nn.Linear(D, D), layer, nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.enter(x)).tanh().mean(dim=1))


def _error(layer: nn.Module) -> tuple[float, set[str]]:
    """Largest error of the clipped sums of several batches, and the ways of the layers."""
    model = _Model(layer).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    private = make_private(
        model,
        optimizer,
        noise_multiplier=0.0,
        max_grad_norm=0.3,
        expected_batch_size=1,
        loss="sequence-classification",
        spot_check=False,
    )
    errors = []
    # As many samples as features, positions, or one.
    for num_samples in (5, D, T, 1):
        x, y = torch.randn(num_samples, T, D, dtype=torch.double), torch.arange(num_samples) % 3
        expected = _clipped_sum(model, x, y)
        before = [p.detach().clone() for p in model.parameters()]
        private.backward({"x": x}, y)
        optimizer.step()
        moved = torch.cat(
            [(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)]
        )
        errors.append(float((moved - expected).detach().norm() / expected.norm()))
    return max(errors), {told.way for told in private.why()}


def _clipped_sum(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros(())
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        gradient = torch.cat([g.flatten() for g in gradients])
        total = total + gradient * (0.3 / gradient.norm()).clamp(max=1)
    return total


def _is_apart(way: str) -> bool:
    return "one sample after the other" in way or "one backward" in way


@pytest.mark.parametrize("name", MAPPED)
def test_all_samples_run_at_once_and_each_has_its_own_gradient(name: str) -> None:
    torch.manual_seed(0)
    error, ways = _error(MAPPED[name]())
    assert error < 1e-9
    assert not any(map(_is_apart, ways))


@pytest.mark.parametrize("size", range(6, 9))
def test_a_tuple_that_has_the_number_of_samples_by_chance_is_no_shape(size: int) -> None:
    # One of these is that of the trial.
    assert _error(_Positioned((size, size)))[0] < 1e-9


def test_a_branch_that_a_batch_takes_as_one_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="expected a module that treats each sample by itself"):
        _error(_Parting())


def test_a_value_is_read_where_all_samples_have_the_same() -> None:
    def turned(x: Tensor) -> Tensor:
        return -x * x.numel() if x.amax() > 0 else x.amin().item() * x

    for same in (torch.ones(3, 2), -torch.ones(3, 2)):
        with MappedCalls():
            assert torch.equal(torch.vmap(turned)(same), torch.stack(list(map(turned, same))))
    with pytest.raises(RuntimeError, match="control flow"), MappedCalls():
        torch.vmap(turned)(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))


def test_a_rule_that_mixes_samples_is_seen() -> None:
    torch.manual_seed(0)
    assert _error(_Weights(_WrongRule))[0] > 0.01


def test_a_function_of_objects_is_not_mapped() -> None:
    def run(x: Tensor) -> Any:
        return _Holding.apply(lambda: x, x)

    with pytest.raises(RuntimeError, match="other arguments"), mapped_functions():
        torch.vmap(run)(torch.randn(2, D))


class _Holding(Function):
    """Is given an object that may hold tensors of all samples, as a reentrant checkpoint is."""

    @staticmethod
    def forward(ctx: Any, read: Callable[[], Tensor], x: Tensor) -> Tensor:
        return read() + x


def test_torch_has_its_own_functions_back() -> None:
    before = Function.__dict__["apply"]
    with mapped_functions():
        assert Function.__dict__["apply"] is not before
    assert Function.__dict__["apply"] is before


def test_a_function_without_a_rule_takes_rows_whose_gradients_are_stacked_once() -> None:
    weights = torch.randn(3, D, D, requires_grad=True)
    calls = MappedCalls()
    for is_first in (True, False):
        with calls:
            y = torch.vmap(lambda w: torch.renorm(w, 2, 0, 1.0))(weights)
        assert calls.is_needed
        nodes, names = [y.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None:
                names.add(node.name())
                nodes += [below for below, _ in node.next_functions]
        # torch's own loop, by which the function shows that it has no rule.
        assert ("SelectBackward0" in names) == is_first
