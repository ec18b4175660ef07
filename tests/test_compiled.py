"""Models that torch.compile has compiled, in whole or in part, train as they do without it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import dpsgd_track
from dpsgd_track.config import AUTO, GRADIENTS, GRAM, PrivacyConfig
from dpsgd_track.distributed.sharding import transformer_blocks
from dpsgd_track.library import PrivateTraining
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.protocol import ModeContext
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.loss import PerSampleLoss, classification_loss
from tests.support.model_zoo import ZOO, build
from tests.support.model_zoo import batch as of_zoo

# Of the compiler itself: where a graph begins at an activation, and where it traces a function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]

B, T, D, CLASSES, STEPS = 3, 4, 6, 3, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 9), nn.Linear(9, D)

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = h + self.down(F.silu(self.up(self.norm(h))))
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(7, D), Block(), nn.Linear(D, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.block(self.embedding(tokens)).mean(dim=1))
        return y


def compiled(module: nn.Module) -> Any:
    # Traces and checks as any backend does, and generates no code.
    return torch.compile(module, backend="eager")


def in_place(module: nn.Module) -> None:
    module.compile(backend="eager")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def private_of(model: nn.Module) -> PrivateTraining:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return dpsgd_track.make_private(
        model,
        optimizer,
        # Drawn by names, which a compiled wrapper changes.
        noise_multiplier=0.0,
        max_grad_norm=0.2,
        expected_batch_size=B,
        seed=3,
        spot_check=False,
    )


def trained(private: PrivateTraining, call: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
    """Norms of each step, and the weights after all; by a loop of one's own if `call` is given."""
    found = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 7, (B, T), generator=generator)
        targets = torch.randint(0, CLASSES, (B,), generator=generator)
        if call is None:
            private.backward(tokens, targets)
        else:
            with private.batch(B):
                loss_B = F.cross_entropy(call(tokens), targets, reduction="none")
                private.backward(loss_B)
        assert private.last is not None
        assert private.last.norm_B is not None
        found.append(private.last.norm_B.clone())
        private.mode.optimizer.step()
    return [*found, *(p.detach().clone() for p in private.model.parameters())]


def _before(model: Model) -> tuple[PrivateTraining, Callable[[Tensor], Tensor]]:
    outer = compiled(model)
    return private_of(outer), outer


def _after(model: Model) -> tuple[PrivateTraining, Callable[[Tensor], Tensor]]:
    private = private_of(model)
    return private, compiled(private.model)


def _whole(model: Model) -> tuple[PrivateTraining, Callable[[Tensor], Tensor]]:
    in_place(model)
    private = private_of(model)
    return private, private.model


def _block(model: Model) -> tuple[PrivateTraining, Callable[[Tensor], Tensor]]:
    private = private_of(model)
    in_place(model.block)
    return private, private.model


def _wrapped_block(model: Model) -> tuple[PrivateTraining, Callable[[Tensor], Tensor]]:
    model.block = compiled(model.block)
    private = private_of(model)
    return private, private.model


@pytest.mark.parametrize(
    ("make", "has_own_loop"),
    [
        (_wrapped_block, False),
        (_before, True),
        (_after, True),
        (_whole, True),
        (_whole, False),
        (_block, False),
    ],
)
def test_a_compiled_model_trains_as_without(make: Any, has_own_loop: bool) -> None:
    torch.manual_seed(0)
    model = Model()
    plain = private_of(copy.deepcopy(model))
    wanted = trained(plain, plain.model if has_own_loop else None)
    private, call = make(model)
    found = trained(private, call if has_own_loop else None)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


class Looped(nn.Module):
    """A block that may be told to call a layer several times, and on other positions."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls, self.num_positions = 1, 1
        self.embedding, self.layer, self.head = nn.Embedding(7, D), nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)[:, : self.num_positions]
        for _ in range(self.num_calls):
            h = h + self.layer(h).tanh()
        y: Tensor = self.head(h.mean(dim=1))
        return y


def looped_modes(plan: str) -> tuple[Any, Any, Batch]:
    """A mode of the model as it is, one of a compiled copy, and a batch."""
    torch.manual_seed(0)
    model = Looped()
    plain = mode_of(copy.deepcopy(model), plan)
    in_place(model)
    batch = Batch({"tokens": torch.randint(0, 7, (B, T))}, torch.tensor([0, 1, 2]))
    return plain, mode_of(model, plan), batch


@pytest.mark.parametrize("plan", [GRADIENTS, GRAM])
def test_a_layer_that_is_called_more_often_later_is_exact_or_refused(plan: str) -> None:
    plain, mode, batch = looped_modes(plan)
    for num_calls in (1, 1, 2):
        for each in (plain, mode):
            each.model.num_calls = num_calls
        wanted = plain.accumulate(batch).norm_B
        if plan == GRAM and num_calls > 1:
            # The factors of two calls would be added up.
            with pytest.raises(ValueError, match="called once in a batch"):
                mode.accumulate(batch)
        else:
            torch.testing.assert_close(mode.accumulate(batch).norm_B, wanted, rtol=1e-5, atol=0)


def test_other_positions_than_before_are_not_added_up() -> None:
    plain, mode, batch = looped_modes(GRAM)
    for num_positions in (1, 1, 2):
        for each in (plain, mode):
            each.model.num_positions = num_positions
        wanted = plain.accumulate(batch).norm_B
        torch.testing.assert_close(mode.accumulate(batch).norm_B, wanted, rtol=1e-5, atol=0)


class Shared(nn.Module):
    """A block whose layer reads what all samples share, as relative positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        y: Tensor = h * self.layer(positions).tanh()
        return y


class WithShared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(7, D), nn.Embedding(T, D)
        self.block, self.head = Shared(), nn.Linear(D, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = self.positions(torch.arange(T))
        y: Tensor = self.head(self.block(self.embedding(tokens), positions).mean(dim=1))
        return y


def test_what_samples_share_is_followed_through_a_compiled_block() -> None:
    torch.manual_seed(0)
    model = WithShared()
    plain = private_of(copy.deepcopy(model))
    in_place(model.block)
    for ours, theirs in zip(trained(private_of(model), None), trained(plain, None), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_layers_with_biases_and_transposed_weights_are_traced() -> None:
    model = build("tied-gpt2")
    batch, fewer = of_zoo("tied-gpt2", 4, seed=1), of_zoo("tied-gpt2", 3, seed=2)
    plain = mode_of(copy.deepcopy(model), AUTO, ZOO["tied-gpt2"].loss)
    counters.clear()
    for block in transformer_blocks(model):
        in_place(block)
    mode = mode_of(model, AUTO, ZOO["tied-gpt2"].loss)
    for each in (batch, batch, fewer):
        wanted = plain.accumulate(each).norm_B
        torch.testing.assert_close(mode.accumulate(each).norm_B, wanted, rtol=1e-5, atol=0)
    # One for all blocks, and one more for any number of samples.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def mode_of(model: nn.Module, plan: str, loss: PerSampleLoss = classification_loss) -> Any:
    return build_mode(
        "flash_bk",
        model,
        ModeContext(
            privacy=PrivacyConfig(noise_multiplier=0.0, max_grad_norm=0.2, expected_batch_size=B),
            device=torch.device("cpu"),
            param_dtype=torch.float32,
            make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            loss=loss,
            norm_plan=plan,
        ),
    )


def test_a_graph_that_is_run_twice_keeps_its_buffers() -> None:
    model = Model()
    model.block.compile(backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = dpsgd_track.make_private(
        model,
        optimizer,
        noise_multiplier=0.0,
        max_grad_norm=0.2,
        expected_batch_size=B,
        mode="flash",
    )
    for num_samples in (B, B, B + 1):
        private.backward(torch.randint(0, 7, (num_samples, T)), torch.randint(3, (num_samples,)))
        optimizer.step()
