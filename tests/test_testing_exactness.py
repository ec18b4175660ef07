"""A check of one module finds what is wrong, by parameter, and nothing in what is right."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from dpsgd_track.cli.main import main
from dpsgd_track.privacy.batch import Batch
from dpsgd_track.privacy.loss import classification_loss
from dpsgd_track.testing import Outcome, assert_exact, check

B, T, D, P = 3, 5, 6, 4


def x(*shape: int) -> Tensor:
    return torch.randn(B, *shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokens() -> Tensor:
    return torch.randint(9, (B, T), generator=torch.Generator().manual_seed(1))


class Scaled(nn.Module):
    """A layer of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.scale


class Centred(nn.Module):
    """Mixes samples: no gradient of its weight is one sample's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, P)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTP: Tensor = self.linear(x_BTD)
        return y_BTP - 0.5 * y_BTP.mean(dim=0)


Made = Callable[[], nn.Module]
FEW: dict[str, tuple[Made, tuple[Tensor, ...]]] = {
    "linear": (lambda: nn.Linear(D, P), (x(T, D),)),
    "embedding": (lambda: nn.Embedding(9, D), (tokens(),)),
    "layer-norm": (lambda: nn.LayerNorm(D), (x(T, D),)),
    "own": (Scaled, (x(T, D),)),
}
LAYERS: dict[str, tuple[Made, tuple[Tensor, ...]]] = {
    **FEW,
    "linear-2d": (lambda: nn.Linear(D, P), (x(D),)),
    "linear-4d": (lambda: nn.Linear(D, P), (x(2, T, D),)),
    "linear-no-bias": (lambda: nn.Linear(D, P, bias=False), (x(T, D),)),
    "bilinear": (lambda: nn.Bilinear(D, D, P), (x(T, D), x(T, D))),
    "embedding-padding": (lambda: nn.Embedding(9, D, padding_idx=2), (tokens(),)),
    "layer-norm-no-bias": (lambda: nn.LayerNorm(D, bias=False), (x(T, D),)),
    "layer-norm-2d": (lambda: nn.LayerNorm([T, D]), (x(2, T, D),)),
    "rms-norm": (lambda: nn.RMSNorm(D), (x(T, D),)),
    "rms-norm-llama": (lambda: LlamaRMSNorm(D), (x(T, D),)),
    "rms-norm-gemma": (lambda: GemmaRMSNorm(D), (x(T, D),)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), (x(4, T),)),
    "group-norm-pictures": (lambda: nn.GroupNorm(2, 4), (x(4, 3, T),)),
    "instance-norm": (lambda: nn.InstanceNorm1d(4, affine=True), (x(4, T),)),
    "transposed-linear": (lambda: Conv1D(P, D), (x(T, D),)),
    "conv1d": (lambda: nn.Conv1d(D, P, 3), (x(D, T),)),
    "conv1d-strided": (lambda: nn.Conv1d(D, P, 3, stride=2, padding=1), (x(D, 11),)),
    "conv1d-groups": (lambda: nn.Conv1d(D, D, 3, groups=3), (x(D, T),)),
    "conv2d": (lambda: nn.Conv2d(2, P, 3, padding=1), (x(2, 6, 7),)),
    "conv2d-patches": (lambda: nn.Conv2d(2, P, 3, stride=3), (x(2, 6, 9),)),
    "conv3d": (lambda: nn.Conv3d(2, P, 2), (x(2, 3, 4, 5),)),
    "conv-transpose1d": (lambda: nn.ConvTranspose1d(D, P, 3), (x(D, T),)),
    "prelu": (nn.PReLU, (x(T, D),)),
    "prelu-channels": (lambda: nn.PReLU(D), (x(D, T),)),
    "lstm": (lambda: nn.LSTM(D, P, batch_first=True), (x(T, D),)),
    "gru": (lambda: nn.GRU(D, P, batch_first=True), (x(T, D),)),
    "rnn": (lambda: nn.RNN(D, P, batch_first=True), (x(T, D),)),
    "attention": (lambda: nn.MultiheadAttention(D, 2, batch_first=True), (x(T, D),) * 3),
    "encoder-layer": (
        lambda: nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True),
        (x(T, D),),
    ),
    "decoder-layer": (
        lambda: nn.TransformerDecoderLayer(D, 2, 8, dropout=0.0, batch_first=True),
        (x(T, D), x(2, D)),
    ),
    "mlp": (lambda: nn.Sequential(nn.Linear(D, P), nn.GELU(), nn.Linear(P, 2)), (x(T, D),)),
    "frozen-bias": (lambda: _frozen(nn.Linear(D, P)), (x(T, D),)),
    "lstm-cell": (lambda: nn.LSTMCell(D, P), (x(D),)),
    "gru-cell": (lambda: nn.GRUCell(D, P), (x(D),)),
    "softmax-head": (lambda: nn.Sequential(nn.Linear(D, P), nn.Softmax(-1)), (x(T, D),)),
    "batch-norm": (lambda: nn.BatchNorm1d(4), (x(4, T),)),
    "mixing": (Centred, (x(T, D),)),
}


ATTENTION = {"attention", "encoder-layer", "decoder-layer"}


def _frozen(module: nn.Linear) -> nn.Module:
    module.bias.requires_grad_(False)
    return module


def _module(make: Made) -> nn.Module:
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("name", FEW)
def test_a_healthy_layer_is_exact_in_every_mode(name: str) -> None:
    make, inputs = FEW[name]
    module = _module(make)
    before = copy.deepcopy(module.state_dict())
    results = list(check(module, inputs))
    assert {each.outcome for each in results} == {Outcome.EXACT}
    assert [each.reduction for each in results if each.mode == "ghost"] == ["mean", "sum"]
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.soak
def test_forty_types_of_layers_are_exact_or_refused_within_a_minute() -> None:
    assert len(LAYERS) >= 40
    start, found = time.process_time(), {}
    for name, (make, inputs) in LAYERS.items():
        for each in check(_module(make), inputs):
            key = "opacus" if each.mode in ("ghost", "grad_materialize") else "ours"
            if each.outcome is not Outcome.EXACT:
                found.setdefault((key, each.outcome), set()).add(name)
    assert found == {
        ("ours", Outcome.REFUSED): {"batch-norm"},
        # On a batch: `make_private` looks for mixing with other batches, and refuses it.
        ("ours", Outcome.WRONG): {"mixing"},
        ("opacus", Outcome.REFUSED): {"batch-norm", "lstm", "gru"} | ATTENTION,
        # Opacus 1.6.0 gives the padding row its gradient, and has crashes of its own.
        ("opacus", Outcome.WRONG): {"mixing", "embedding-padding"},
        ("opacus", Outcome.FAILED): {
            *("linear-4d", "bilinear", "layer-norm-no-bias", "rnn", "lstm-cell", "gru-cell")
        },
    }
    assert time.process_time() - start < 60


def test_a_module_that_mixes_samples_is_refused_or_wrong_but_never_exact() -> None:
    for each in check(_module(Centred), x(T, D)):
        assert each.outcome is not Outcome.EXACT, each


Sampler = Callable[[Any, Any, Any], dict[Any, Tensor]]


def _of(kind: type[nn.Module], name: str, change: Callable[[Tensor], Tensor]) -> Sampler:
    """Opacus's sampler of `kind`, with `change` done to the gradients of parameter `name`."""
    right = GradSampleModule.GRAD_SAMPLERS[kind]

    def sampler(layer: Any, activations: Any, backprops: Any) -> dict[Any, Tensor]:
        found: dict[Any, Tensor] = right(layer, activations, backprops)
        parameter = getattr(layer, name)
        return {p: change(g) if p is parameter else g for p, g in found.items()}

    return sampler


def _without_a_row(g: Tensor) -> Tensor:
    return g.index_fill(1, tokens()[0, :1], 0)


FAULTS: dict[str, tuple[type[nn.Module], str, Callable[[Tensor], Tensor], Made, Tensor]] = {
    name: (kind, parameter, change, make, inputs)
    for name, kind, parameter, change, make, inputs in (
        ("scaled", nn.Linear, "weight", lambda g: 1.01 * g, lambda: nn.Linear(D, P), x(T, D)),
        ("left out", nn.Linear, "bias", lambda g: 0 * g, lambda: nn.Linear(D, P), x(T, D)),
        ("negated", nn.Linear, "weight", lambda g: -g, lambda: nn.Linear(D, P), x(T, D)),
        ("mean", nn.Linear, "bias", lambda g: g / T, lambda: nn.Linear(D, P), x(T, D)),
        ("of others", nn.Linear, "weight", lambda g: g.flip(0), lambda: nn.Linear(D, P), x(D)),
        ("one row", nn.Embedding, "weight", _without_a_row, lambda: nn.Embedding(9, D), tokens()),
        ("no xhat", nn.LayerNorm, "weight", lambda g: g.abs(), lambda: nn.LayerNorm(D), x(T, D)),
        ("rolled", nn.LayerNorm, "bias", lambda g: g.roll(1, 1), lambda: nn.LayerNorm(D), x(T, D)),
        ("a tap", nn.Conv1d, "weight", lambda g: g.flip(-1), lambda: nn.Conv1d(D, P, 3), x(D, T)),
        ("NaN", nn.GroupNorm, "bias", lambda g: g * torch.nan, lambda: nn.GroupNorm(2, 4), x(4, T)),
    )
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_by_its_parameter(name: str, monkeypatch: Any) -> None:
    kind, parameter, change, make, inputs = FAULTS[name]
    monkeypatch.setitem(GradSampleModule.GRAD_SAMPLERS, kind, _of(kind, parameter, change))
    module = _module(make)
    for each in check(module, inputs, modes=("grad_materialize",)):
        assert each.outcome is Outcome.WRONG
        assert each.parameters == (parameter,)
    with pytest.raises(
        AssertionError, match=rf"grad_materialize with .* wrong: .* of {parameter} "
    ):
        assert_exact(module, inputs, mode="grad_materialize")
    assert_exact(module, inputs, mode="flash")


def test_a_norm_that_no_sum_shows_is_found(monkeypatch: Any) -> None:
    def zero(layer: Any, activations: Any, backprops: Any) -> dict[Any, Tensor]:
        return {layer.weight: torch.zeros(len(backprops)), layer.bias: torch.zeros(len(backprops))}

    samplers = GradSampleModuleFastGradientClipping.NORM_SAMPLERS
    monkeypatch.setitem(samplers, nn.Linear, zero)
    found = next(check(_module(lambda: nn.Linear(D, P)), x(T, D), modes=("ghost",)))
    assert {(each.what, each.parameter) for each in found.wrong} == {
        *(("norms", name) for name in ("weight", "bias", "")),
    }


def test_an_exception_in_the_middle_is_no_refusal(monkeypatch: Any) -> None:
    def broken(layer: Any, activations: Any, backprops: Any) -> dict[Any, Tensor]:
        raise ValueError("not today")

    monkeypatch.setitem(GradSampleModule.GRAD_SAMPLERS, nn.Linear, broken)
    module = _module(lambda: nn.Linear(D, P))
    (found, *_) = check(module, x(T, D), modes=("grad_materialize",))
    assert (found.outcome, found.sentence) == (Outcome.FAILED, "ValueError: not today")


def test_a_loss_of_ones_own_comes_with_targets() -> None:
    batch = Batch({}, torch.tensor([0, 2, 1]), args=(x(D),))
    assert_exact(nn.Linear(D, P), batch, mode="flash_bk", loss=classification_loss)
    with pytest.raises(ValueError, match=r"loss=.*expected none without a Batch"):
        assert_exact(nn.Linear(D, P), x(D), loss=F.cross_entropy)


@pytest.mark.parametrize(
    ("module", "mode", "said"),
    [
        (nn.Linear(D, P), "no_dp_single", "mode='no_dp_single': expected a private mode on one"),
        (nn.Linear(D, P), "flash_fsdp", "mode='flash_fsdp': expected a private mode on one dev"),
        (nn.Linear(D, P), "reference", "mode='reference': expected a private mode on one devic"),
        (nn.ReLU(), "flash", "expected a trainable parameter"),
        (nn.Sequential(nn.Linear(D, P), nn.Dropout(0.5)), "flash", "dropout=0.5: expected 0"),
    ],
)
def test_what_cannot_be_checked_is_refused(module: nn.Module, mode: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        assert_exact(module, x(T, D), mode=mode)


@pytest.fixture
def own_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("own_layers.py").write_text(
        "from torch import nn\n"
        "def block():\n    return nn.Linear(6, 4)\n"
        "made = nn.Embedding(9, 4)\nnumber = 3\n"
    )
    return


def run(*argv: str) -> int:
    return main(["check", *argv])


def test_the_command_line_checks_a_users_module(own_layers: None, capsys: Any) -> None:
    assert run("own_layers:block", "--input", "3,5,6", "--mode", "flash,grad_materialize") == 0
    said = capsys.readouterr().out
    assert "own_layers:block: 3 exact." in said
    assert run("own_layers:block", "--input", "3,5,6", "--mode", "flash", "-q") == 0
    assert capsys.readouterr().out == "own_layers:block: 1 exact.\n"
    assert run("own_layers:made", "--input", "3,5:9", "--mode", "flash_bk") == 0
    assert run("torch.nn:Linear(6, 4, bias=False)", "--input", "3,6", "--mode", "flash") == 0


def test_the_command_line_ends_with_1_where_something_is_wrong(
    monkeypatch: Any, capsys: Any
) -> None:
    wrong = _of(nn.Linear, "bias", lambda g: 2 * g)
    monkeypatch.setitem(GradSampleModule.GRAD_SAMPLERS, nn.Linear, wrong)
    assert run("torch.nn:Linear(6, 4)", "--input", "3,5,6", "--mode", "grad_materialize") == 1
    assert "2 wrong; wrong in bias." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("torch.nn:Linear(6, 4)",), "input='': expected a shape"),
        (("torch.nn:Linear(6, 4)", "--input", "3,x"), "input='3,x': expected SHAPE"),
        (("torch.nn:Linear(6, 4)", "--input", "3,7"), "input='3,7': expected inputs that torch.nn"),
        (("torch.nn:Linear(6, 4)", "--input", "1,6"), "batch=1: expected two samples or more"),
        (("torch.nn:Linear", "--input", "3,6"), "missing 2 required positional arguments"),
        (("torch.nn:Linear(print(6))", "--input", "3,6"), "expected package.module:NAME"),
        (("torch.nn:Liner(6, 4)", "--input", "3,6"), "no attribute 'Liner'"),
        (("nowhere_at_all:Linear", "--input", "3,6"), "No module named 'nowhere_at_all'"),
        (("own_layers:number", "--input", "3,6"), "expected a module, or what returns one"),
        (("torch.nn:Linear(6, 4)", "--input", "3,6", "--mode", "flsh"), "Did you mean"),
    ],
)
def test_wrong_usage_is_answered_in_a_sentence(
    own_layers: None, argv: tuple[str, ...], said: str, capsys: Any
) -> None:
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
