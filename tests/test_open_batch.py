"""A loop's own forward and losses within `private.batch`, against `private.backward(x, y)`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpsgd_track
from dpsgd_track.library import PrivateTraining
from dpsgd_track.modes.table import MODES
from dpsgd_track.privacy.spot_check import SpotCheckError
from dpsgd_track.privacy.tape import TapeError
from tests.support.model_zoo import small_bert

B, D, CLASSES, C = 5, 6, 3, 0.1
OURS = [
    name for name, spec in MODES.items() if spec.runs_on_one_device and spec.strategy != "opacus"
]
OURS = [name for name in OURS if name != "reference"]
Loop = Callable[[PrivateTraining, Tensor, Tensor], object]


class Small(nn.Module):
    """Two layers and a norm; returns a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(D, 8), nn.LayerNorm(8)
        self.dropout, self.last = nn.Dropout(0.0), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h: Tensor = self.dropout(torch.tanh(self.norm(self.first(x))))
        y: Tensor = self.last(h * scale)
        return y


class Named(Small):
    """Takes a mapping, and returns one."""

    def forward(self, inputs: Mapping[str, Any], scale: float = 1.0) -> Any:  # type: ignore[override]
        return {"scores": (super().forward(inputs["x"], scale),), "scale": scale}


def private_of(model: nn.Module, **changes: Any) -> PrivateTraining:
    settings: dict[str, Any] = {
        "noise_multiplier": 0.7,
        "max_grad_norm": C,
        "expected_batch_size": B,
        "seed": 3,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return dpsgd_track.make_private(model, optimizer, **(settings | changes))


def fresh(kind: type[nn.Module] = Small, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = kind()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    return model


def data(size: int = B, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, D, generator=generator)
    return x, torch.randint(0, CLASSES, (size,), generator=generator)


def losses(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), y, reduction="none")


def optimizer_of(private: PrivateTraining) -> torch.optim.Optimizer:
    return private.mode.optimizer


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(private: PrivateTraining, loop: Loop, sizes: tuple[int, ...] = (B, 3, 0, B)) -> Tensor:
    """Weights after one step for each batch size."""
    for step, size in enumerate(sizes):
        torch.manual_seed(step)
        loop(private, *data(size, step))
        optimizer_of(private).step()
    return weights(private.model)


def ordinary(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
    private.backward(x, y)


def own(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
    with private.batch(len(x)):
        loss_B = private.backward(losses(private.model(x), y))
    assert loss_B.shape == (len(x),)
    assert not loss_B.requires_grad


@pytest.mark.parametrize("mode", OURS)
def test_every_mode_takes_the_steps_of_backward_with_inputs(mode: str) -> None:
    sigma = 0.7 if MODES[mode].is_private else 0.0
    made = [private_of(fresh(), mode=mode, noise_multiplier=sigma) for _ in range(2)]
    wanted = trained(made[0], ordinary)
    assert torch.equal(trained(made[1], own), wanted)
    if MODES[mode].is_private:
        assert made[1].spot_checks.num_checks > 1
        assert made[1].last is not None
        assert made[1].last.norm_B is not None


def of_mapping(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
    with private.batch(len(x)):
        (logits,) = private.model({"x": x}, scale=1.0)["scores"]
        private.backward(losses(logits, y))


def with_metrics(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
    with private.batch(len(x)):
        with torch.no_grad():
            private.model.eval()
            before = private.model(x)
            private.model.train()
        logits = private.model(x)
        private.backward(losses(logits, y))
        accuracy = (logits.argmax(dim=1) == y).float().mean().item()
    assert torch.equal(logits.detach(), before)
    assert 0 <= accuracy <= 1 or len(x) == 0


def in_pieces(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
    """The same loss from views, indices, changes in place of what the code made itself."""
    with private.batch(len(x)):
        logits = private.model(x) * 1
        logits -= logits.detach().amax(dim=1, keepdim=True)
        chosen = logits.gather(1, y.view(-1, 1)).squeeze(1)
        loss_B = torch.zeros(len(x))
        loss_B[:] = logits.exp().sum(dim=1).log()
        private.backward(loss_B - chosen)


def in_two_micro_batches(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
    for half in (slice(0, 2), slice(2, None)):
        own(private, x[half], y[half])


@pytest.mark.parametrize(
    ("kind", "loop"),
    [(Named, of_mapping), (Small, with_metrics), (Small, in_pieces), (Small, in_two_micro_batches)],
)
def test_the_code_may_be_anything(kind: type[nn.Module], loop: Loop) -> None:
    wanted = trained(private_of(fresh()), ordinary)
    torch.testing.assert_close(trained(private_of(fresh(kind)), loop), wanted, rtol=1e-5, atol=1e-6)


def test_dropout_draws_what_it_would_have_drawn() -> None:
    # Checks repeat the forward: neither the masks nor the generator may move.
    made = [private_of(fresh(dropout=0.3), spot_check=check) for check in (False, True)]
    wanted = trained(made[0], own)
    assert torch.equal(trained(made[1], own), wanted)
    assert made[1].spot_checks.num_checks > 0


def test_a_model_may_be_called_twice() -> None:
    def twice(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
        with private.batch(len(x)):
            logits = private.model(x) + private.model(-x)
            private.backward(losses(logits, y))

    model = fresh()
    private = private_of(copy.deepcopy(model), noise_multiplier=0.0)
    trained(private, twice, (B,))
    x, y = data(B, 0)
    total = torch.zeros_like(weights(model))
    for i in range(B):
        logits = model(x[i : i + 1]) + model(-x[i : i + 1])
        found = torch.autograd.grad(losses(logits, y[i : i + 1])[0], list(model.parameters()))
        flat = torch.cat([g.flatten() for g in found])
        total += flat * min(1.0, C / flat.norm().item())
    torch.testing.assert_close(weights(private.model), weights(model) - 0.5 * total / B)


def _autocast() -> AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("is_within", [False, True], ids=["around", "within"])
def test_autocast_is_repeated_in_checks(is_within: bool) -> None:
    def loop(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
        with nullcontext() if is_within else _autocast(), private.batch(len(x)):
            with _autocast() if is_within else nullcontext():
                logits = private.model(x)
            private.backward(losses(logits, y))

    def wanted(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
        with _autocast():
            private.backward(x, y)

    made = [private_of(fresh()) for _ in range(2)]
    expected = trained(made[0], wanted)
    assert torch.equal(trained(made[1], loop), expected)
    assert made[1].spot_checks.num_checks > 0


def test_transformers_outputs_and_bfloat16_parameters() -> None:
    ids = torch.randint(1, 30, (B, 7), generator=torch.Generator().manual_seed(0))
    y = data()[1]

    def loop(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
        with private.batch(len(x)):
            output = private.model(input_ids=x, attention_mask=torch.ones_like(x), labels=None)
            private.backward(losses(output.logits, y))

    found = []
    for is_own in (False, True):
        torch.manual_seed(0)
        model = small_bert(30, 0.1)
        private = private_of(model, param_dtype=torch.bfloat16)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for _ in range(2):
            torch.manual_seed(1)
            if is_own:
                loop(private, ids, y)
            else:
                private.backward(inputs, y)
            optimizer_of(private).step()
        found.append(weights(model))
        assert private.spot_checks.num_checks > 0
    assert torch.equal(*found)


def mixed(logits: Tensor, y: Tensor) -> Tensor:
    return losses(logits - logits.mean(dim=0), y)


def mixed_by_values(logits: Tensor, y: Tensor) -> Tensor:
    return losses(logits - logits.detach().mean(dim=0), y)


def balanced(logits: Tensor, y: Tensor) -> Tensor:
    return losses(logits, y) / torch.bincount(y, minlength=CLASSES)[y]


def read(logits: Tensor, y: Tensor) -> Tensor:
    return losses(logits, y) / y.float().mean().item()


def sorted_losses(logits: Tensor, y: Tensor) -> Tensor:
    return losses(logits, y).sort().values


def of_targets_changed(logits: Tensor, y: Tensor) -> Tensor:
    y %= CLASSES
    return losses(logits, y)


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (mixed, SpotCheckError, "as plain autograd has them"),
        (mixed_by_values, SpotCheckError, "as plain autograd has them"),
        (balanced, SpotCheckError, "as plain autograd has them"),
        (sorted_losses, SpotCheckError, "as plain autograd has them"),
        (read, TapeError, r"item\(\) reads a number from several samples"),
        (of_targets_changed, TapeError, "change a tensor in place that was made before"),
        (lambda logits, y: losses(logits, y).mean(), ValueError, "one number a sample"),
        (lambda logits, y: None, ValueError, "got NoneType"),
    ],
)
def test_losses_that_are_not_each_samples_own_are_refused(
    loss: Callable[[Tensor, Tensor], Any], error: type[Exception], words: str
) -> None:
    private = private_of(fresh())
    before = weights(private.model)
    x, y = data(B, 0)
    assert len(y.unique()) < B, "some classes are in the batch twice"
    with pytest.raises(error, match=words), private.batch(B):
        private.backward(loss(private.model(x), y))
    with pytest.raises(RuntimeError, match=r"A batch of this step has failed|without a clipped"):
        optimizer_of(private).step()
    assert torch.equal(weights(private.model), before)
    optimizer_of(private).zero_grad()
    wanted = trained(private_of(fresh()), ordinary)
    assert torch.equal(trained(private, own), wanted), "nothing is left of the batch"


def by_argument(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, weight=weight, reduction="none")


def by_module(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    loss_B: Tensor = nn.CrossEntropyLoss(weight, reduction="none", label_smoothing=0.1)(logits, y)
    return loss_B


def by_likelihood(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return F.nll_loss(logits.log_softmax(dim=1), y, weight, reduction="none")


def by_index(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return losses(logits, y) * weight[y]


def by_parameter(logits: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return losses(logits, y) * nn.Parameter(weight, requires_grad=False)[y]


@pytest.mark.parametrize(
    ("loss", "sizes"),
    [
        (by_argument, (CLASSES, B)),
        (by_module, (CLASSES, B)),
        (by_likelihood, (CLASSES, B)),
        (by_index, (B, CLASSES)),
        (by_parameter, (CLASSES, B)),
    ],
)
def test_a_batch_may_have_as_many_samples_as_there_are_class_weights(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], sizes: tuple[int, ...]
) -> None:
    private, weight = private_of(fresh()), torch.tensor([1.0, 5.0, 0.2])
    for size in sizes:
        x, y = data(size)
        assert not torch.equal(y, torch.arange(size)), "the weights' order is not the samples'"
        with private.batch(size):
            private.backward(loss(private.model(x), y, weight))
    assert private.spot_checks.num_checks == len(sizes)


def test_a_loss_over_the_number_of_samples_is_warned_of_once() -> None:
    private = private_of(fresh())

    def loop(size: int) -> None:
        x, y = data(size)
        with private.batch(size):
            private.backward(losses(private.model(x), y) / size)

    for size in (B, 4):
        with pytest.warns(UserWarning, match="is not private: leave the division"):
            loop(size)
        loop(size)


def with_slices(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
    """Slices of more data, taken within; places of samples that are made of nothing."""
    others = torch.cat([x, x, x]), torch.cat([y, y, y])
    with private.batch(len(x)):
        inputs, targets = (each[: len(x)] for each in others)
        logits = private.model(inputs)
        chosen = logits.log_softmax(dim=1)[torch.arange(len(x)), targets.long()]
        private.backward(-chosen)


def test_rows_may_be_taken_within() -> None:
    private = private_of(fresh())
    wanted = trained(private_of(fresh()), ordinary)
    torch.testing.assert_close(trained(private, with_slices), wanted, rtol=1e-5, atol=1e-6)
    assert private.spot_checks.num_checks > 1


def test_a_mix_of_rows_taken_within_is_found() -> None:
    private = private_of(fresh())
    x, y = data(2 * B)
    with pytest.raises(SpotCheckError, match="as plain autograd has them"), private.batch(B):
        private.backward(balanced(private.model(x[:B]), y[:B]))


def test_other_code_is_checked_when_it_comes() -> None:
    private = private_of(fresh())
    x, y = data()
    for _ in range(3):
        own(private, x, y)
        optimizer_of(private).step()
    num_checks = private.spot_checks.num_checks
    with pytest.raises(SpotCheckError, match="as plain autograd has them"), private.batch(B):
        private.backward(mixed(private.model(x), y))
    assert private.spot_checks.num_checks == num_checks


class OfSize(Small):
    """Its outputs depend on the number of samples."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x, scale) / len(x)


def test_a_model_that_depends_on_the_batch_size_is_refused() -> None:
    private = private_of(fresh(OfSize))
    with pytest.raises(SpotCheckError, match="others in a half of its batch"):
        own(private, *data())


def of_submodules(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
    model = private.model
    assert isinstance(model, Small)
    private.backward(losses(model.last(torch.tanh(model.norm(model.first(x)))), y))


def plain(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
    losses(private.model(x), y).sum().backward()


def both(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
    plain(private, x, y)
    private.backward(losses(private.model(x), y))


def twice(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
    loss_B = losses(private.model(x), y)
    private.backward(loss_B)
    private.backward(loss_B)


def cleared_before(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
    optimizer_of(private).zero_grad()
    private.backward(losses(private.model(x), y))


def cleared_after(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
    private.backward(losses(private.model(x), y))
    optimizer_of(private).zero_grad()


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (cleared_before, r"zero_grad\(\) inside of batch\(\): expected it outside"),
        (cleared_after, r"zero_grad\(\) inside of batch\(\): expected it outside"),
        (lambda private, x, y: private.model(x), r"expected backward\(losses\) to be called"),
        (plain, "got a backward beside it"),
        (both, "got a backward beside it"),
        (of_submodules, "expected a call of the model inside of it"),
        (lambda private, x, y: private.model.forward(x), r"got a call of its forward\(\)"),
        (twice, "expected one in each"),
        (lambda private, x, y: private.backward(x, y), "takes the losses alone"),
        (lambda private, x, y: private.batch(2).__enter__(), "one at a time"),
        (lambda private, x, y: private.model(x[:2]), "the 5 samples of the batch in dimension 0"),
    ],
)
def test_wrong_code_is_told_and_leaves_nothing(code: Loop, words: str) -> None:
    private = private_of(fresh())
    with pytest.raises((ValueError, RuntimeError), match=words), private.batch(B):
        code(private, *data())
    optimizer_of(private).zero_grad()
    assert torch.equal(trained(private, own), trained(private_of(fresh()), ordinary))


def test_losses_outside_of_a_batch_are_refused() -> None:
    private = private_of(fresh())
    x, y = data()
    with pytest.raises(ValueError, match=r"inside of batch\(\)"):
        private.backward(losses(private.model(x), y))


@pytest.mark.parametrize("mode", ["ghost", "reference"])
@pytest.mark.filterwarnings("ignore:Secure RNG turned off")
def test_modes_without_a_capture_are_named(mode: str) -> None:
    private = private_of(fresh(), mode=mode)
    with pytest.raises(ValueError, match=r"Call backward\(inputs, targets\)"), private.batch(B):
        pass


@pytest.mark.filterwarnings("ignore:The loss or the gradient of a sample")
@pytest.mark.parametrize("mode", ["flash", "flash_bk"])
def test_a_sample_that_is_not_finite_adds_nothing(mode: str) -> None:
    x, y = data()
    x[2] = torch.nan
    left_out = [private_of(fresh(), mode=mode) for _ in range(2)]
    own(left_out[0], x, y)
    kept = torch.arange(B) != 2
    own(left_out[1], x[kept], y[kept])
    for private in left_out:
        optimizer_of(private).step()
    torch.testing.assert_close(weights(left_out[0].model), weights(left_out[1].model))
    assert [private.num_left_out for private in left_out] == [1, 0]
    assert left_out[0].spot_checks.num_checks == 1


def test_a_model_that_fails_can_be_called_again() -> None:
    def again(private: PrivateTraining, x: Tensor, y: Tensor) -> None:
        with private.batch(len(x)):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                private.model(x[:, 1:])
            private.backward(losses(private.model(x), y))

    private = private_of(fresh())
    assert torch.equal(trained(private, again), trained(private_of(fresh()), ordinary))
    assert private.spot_checks.num_checks > 0


def test_batches_of_two_models_are_one_after_the_other() -> None:
    first, second = private_of(fresh()), private_of(fresh())
    with pytest.raises(ValueError, match="one at a time"), first.batch(B), second.batch(B):
        pass
    own(first, *data(B, 0))
    own(second, *data(B, 0))
    for private in (first, second):
        optimizer_of(private).step()
        assert torch.equal(weights(private.model), trained(private_of(fresh()), ordinary, (B,)))


def _weighted(y: Tensor) -> tuple[PrivateTraining, Tensor]:
    torch.manual_seed(0)
    private, x = private_of(Small(), noise_multiplier=0.0), torch.randn(CLASSES, D)
    weights = torch.tensor([1.0, 2.0, 3.0])
    with private.batch(CLASSES):
        loss_B = F.cross_entropy(private.model(x), y, reduction="none")
        private.backward(loss_B * weights[y])
    return private, x


def test_class_weights_looked_up_by_as_many_samples_are_no_rows() -> None:
    private, x = _weighted(torch.tensor([2, 2, 0]))
    assert private.spot_checks.num_checks > 0
    assert private.last is not None
    model, weight = private.model, torch.tensor([3.0, 3.0, 1.0])
    loss_B = F.cross_entropy(model(x), torch.tensor([2, 2, 0]), reduction="none") * weight
    torch.testing.assert_close(private.last.loss_B, loss_B.detach())


def test_labels_of_other_samples_are_still_refused() -> None:
    private, x = private_of(Small()), torch.randn(CLASSES, D)
    y, order = torch.tensor([2, 1, 0]), torch.tensor([2, 0, 1])
    with pytest.raises(SpotCheckError), private.batch(CLASSES):
        private.backward(F.cross_entropy(private.model(x), y[order], reduction="none"))


@dataclass
class Scores:
    """What a model may return, unknown to torch."""

    logits: Tensor
    kind: str = "scores"


class Returning(Small):
    """Returns a plain dataclass."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:  # type: ignore[override]
        return Scores(super().forward(x, scale))


@pytest.mark.parametrize("num_samples", [B, 0])
def test_a_model_may_return_a_dataclass(num_samples: int) -> None:
    private = private_of(Returning())
    for count in (B, num_samples):
        x, y = torch.randn(count, D), torch.arange(count) % CLASSES
        with private.batch(count):
            logits = private.model(x).logits
            private.backward(F.cross_entropy(logits, y, reduction="none"))
    assert private.spot_checks.num_checks > 0


def test_a_step_or_a_copy_inside_of_a_batch_says_where_it_belongs() -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    private = dpsgd_track.make_private(
        model, optimizer, noise_multiplier=0.7, max_grad_norm=C, expected_batch_size=B
    )
    with pytest.raises(RuntimeError, match=r"step\(\) inside of batch\(\)"), private.batch(B):
        optimizer.step()
    with pytest.raises(RuntimeError, match="expected no copy of the model"), private.batch(B):
        copy.deepcopy(private.model)


class Switching(Small):
    """Uses a parameter of its own in another way once told so."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        self.scale, self.is_outer = nn.Parameter(torch.ones(D)), False

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        own = torch.outer(self.scale, self.scale)[0] if self.is_outer else self.scale
        return super().forward(self.blocks[1](self.blocks[0](x * own)), scale)


def test_another_use_of_a_parameter_later_names_it() -> None:
    model = Switching()
    private, x, y = private_of(model), torch.randn(B, D), torch.arange(B) % CLASSES
    private.backward(x, y)
    model.is_outer = True
    with pytest.raises(ValueError, match=r"^scale: expected the operations of the first batch"):
        private.backward(x, y)
