"""Each layer rule equals per-sample autograd; what can't be exact is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dpsgd_track.kernels.flash_norm import flash_norm_sq
from dpsgd_track.privacy.capture import Capture, find_layers
from dpsgd_track.privacy.fused_linear import FusedLinear, connect, fuse_linears
from dpsgd_track.privacy.layers import find_rule
from dpsgd_track.privacy.norms import FLASH, FUSED

B, T, D, P = 3, 5, 7, 4


def _floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).double()


def _tokens() -> Tensor:
    """Each row repeats a token, and has the padding index 2 once, twice and not at all."""
    return torch.tensor([[0, 1, 2, 1, 3], [2, 3, 2, 3, 3], [1, 1, 0, 0, 1]])


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(D, P), _floats(B, T, D)),
    "linear-no-bias": (lambda: nn.Linear(D, P, bias=False), _floats(B, T, D)),
    "linear-2d": (lambda: nn.Linear(D, P), _floats(B, D)),
    "linear-4d": (lambda: nn.Linear(D, P), _floats(B, 2, T, D)),
    "embedding": (lambda: nn.Embedding(9, D), _tokens()),
    "embedding-padding": (lambda: nn.Embedding(9, D, padding_idx=2), _tokens()),
    "layer-norm": (lambda: nn.LayerNorm(D), _floats(B, T, D)),
    "layer-norm-no-bias": (lambda: nn.LayerNorm(D, bias=False), _floats(B, T, D)),
    "rms-norm": (lambda: nn.RMSNorm(D), _floats(B, T, D)),
    "rms-norm-llama": (lambda: LlamaRMSNorm(D), _floats(B, T, D)),
    "rms-norm-gemma": (lambda: GemmaRMSNorm(D), _floats(B, T, D)),
}


def _build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    make, x = LAYERS[name]
    torch.manual_seed(0)
    module = make().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module, x, _floats(*module(x).shape)


def _per_sample(module: nn.Module, x: Tensor, dy: Tensor) -> list[dict[str, Tensor]]:
    found = []
    for i in range(len(x)):
        module.zero_grad()
        (module(x[i : i + 1]) * dy[i : i + 1]).sum().backward()
        found.append({n: p.grad.clone() for n, p in module.named_parameters()})
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_norms_and_clipped_sums_equal_autograd(name: str) -> None:
    module, x, dy = _build(name)
    rule = find_rule(module)
    assert rule is not None
    expected = _per_sample(module, x, dy)
    factors = torch.tensor([0.3, 1.0, 0.7], dtype=torch.float64)
    norms = rule.norm_sq(module, x, dy, flash_norm_sq)
    sums = rule.clipped_sum(module, x, dy, factors)
    # transformers' RMSNorm rounds to float32 inside, so its gradients carry 1e-7.
    tolerance = 1e-6 if "rms-norm-" in name else 1e-11
    for parameter in dict(module.named_parameters()):
        grads = torch.stack([g[parameter] for g in expected])
        want = grads.flatten(1).square().sum(dim=1)
        torch.testing.assert_close(norms[parameter].double(), want, rtol=tolerance, atol=0)
        total = torch.tensordot(factors, grads, dims=1)
        torch.testing.assert_close(sums[parameter].double(), total, rtol=tolerance, atol=1e-9)


class _Doubled(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "module",
    [
        _Doubled(D),
        _Scaled(D, P),
        nn.Embedding(9, D, scale_grad_by_freq=True),
        nn.Embedding(9, D, max_norm=1.0),
        nn.Conv1d(2, 3, 1),
        nn.LayerNorm([T, D]),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_layer_that_only_looks_like_a_known_one_has_no_rule(module: nn.Module) -> None:
    assert find_rule(module) is None


def test_every_parameter_without_a_rule_is_named() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Conv1d(2, 3, 1), nn.Conv2d(1, 1, 1, bias=False))
    with pytest.raises(ValueError, match=r"can't be clipped: 1\.weight .*1\.bias .*2\.weight"):
        find_layers(model)
    model[1].requires_grad_(False)
    model[2].requires_grad_(False)
    assert [layer.fqn for layer in find_layers(model)] == ["0"]


def test_a_shared_parameter_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Embedding(9, D), nn.Linear(D, 9, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"1\.weight \(shared with 0\.weight\)"):
        find_layers(model)


class _Twice(nn.Module):
    """One linear layer used twice, a shared position index, and a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, D)
        self.positions = nn.Embedding(T, D)
        self.mix = nn.Linear(D, D)
        self.unused = nn.Linear(D, D)
        self.head = nn.Linear(D, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).unsqueeze(0)
        h = self.tokens(tokens) + self.positions(positions)
        h = torch.tanh(self.mix(torch.tanh(self.mix(h))))
        return self.head(h).sum(dim=(1, 2))


def _capture(model: nn.Module, rule, *, keep: bool) -> Capture:
    if rule.fuses_linear:
        fuse_linears(model)
    capture = Capture(model, rule, keep=keep)
    connect(model, capture)
    return capture


@pytest.mark.parametrize("rule", [FLASH, FUSED], ids=lambda r: r.name)
def test_reused_shared_and_unused_layers_are_exact(rule) -> None:
    torch.manual_seed(0)
    model, tokens = _Twice().double(), _tokens()
    expected = []
    for i in range(B):
        model.zero_grad()
        model(tokens[i : i + 1]).sum().backward()
        expected.append(
            {
                n: torch.zeros_like(p) if p.grad is None else p.grad
                for n, p in model.named_parameters()
            }
        )
        for p in model.parameters():
            p.grad = None
    capture = _capture(model, rule, keep=True)
    with capture.sample_batch(B):
        torch.autograd.grad(model(tokens).sum(), capture.roots, allow_unused=True)
        capture.finish_norms()
    factors = torch.tensor([0.3, 1.0, 0.7], dtype=torch.float64)
    sums = dict(capture.clipped_sums(factors))
    norms = capture.norm_by_parameter()
    assert set(sums) == set(expected[0])
    for name in sums:
        grads = torch.stack([e[name] for e in expected])
        torch.testing.assert_close(sums[name], torch.tensordot(factors, grads, dims=1))
        if name in norms:
            torch.testing.assert_close(norms[name], grads.flatten(1).norm(dim=1))
    assert not any(name.startswith("unused") for name in norms)
    assert all(p.grad is None for p in model.parameters()), "a norm pass forms no weight gradient"


def test_fused_layers_keep_parameters_and_names() -> None:
    model = _Twice()
    before = dict(model.named_parameters())
    fuse_linears(model)
    assert isinstance(model.mix, FusedLinear)
    assert list(dict(model.named_parameters())) == list(before)
    assert all(p is before[n] for n, p in model.named_parameters())


def test_mixed_up_batch_dimensions_are_refused_by_name() -> None:
    class Transposing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1)).sum(dim=(0, 2))

    model = Transposing()
    capture = _capture(model, FLASH, keep=False)
    with (
        capture.sample_batch(B),
        pytest.raises(ValueError, match="inner: expected inputs of 3 samples"),
    ):
        model(torch.randn(B, T, D))
