"""Each layer rule equals per-sample autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from dpsgd_track.privacy.layers import find_rule
from dpsgd_track.privacy.norms import NORM_RULES
from dpsgd_track.privacy.terms import Outer

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
    "embedding-sparse": (lambda: nn.Embedding(9, D, sparse=True), _tokens()),
    "embedding-scaled": (
        lambda: Gemma3TextScaledWordEmbedding(9, D, padding_idx=2, embed_scale=D**0.5),
        _tokens(),
    ),
    "embedding-4d": (lambda: nn.Embedding(9, D), _tokens().view(B, 1, T)),
    "transposed-linear": (lambda: Conv1D(P, D), _floats(B, T, D)),
    "layer-norm": (lambda: nn.LayerNorm(D), _floats(B, T, D)),
    "layer-norm-no-bias": (lambda: nn.LayerNorm(D, bias=False), _floats(B, T, D)),
    "layer-norm-2d": (lambda: nn.LayerNorm([T, D]), _floats(B, 2, T, D)),
    "layer-norm-of-all": (lambda: nn.LayerNorm([T, D]), _floats(B, T, D)),
    "group-norm": (lambda: nn.GroupNorm(2, 4), _floats(B, 4, T)),
    "group-norm-flat": (lambda: nn.GroupNorm(2, 4), _floats(B, 4)),
    "group-norm-pictures": (lambda: nn.GroupNorm(2, 4), _floats(B, 4, 3, T)),
    "conv1d": (lambda: nn.Conv1d(D, P, 3), _floats(B, D, T)),
    "conv1d-strided": (
        lambda: nn.Conv1d(D, P, 3, stride=2, padding=1, dilation=2, bias=False),
        _floats(B, D, 11),
    ),
    "conv2d-patches": (lambda: nn.Conv2d(2, P, 3, stride=3), _floats(B, 2, 6, 9)),
    "conv2d": (
        lambda: nn.Conv2d(2, P, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        _floats(B, 2, 6, 9),
    ),
    "conv1d-depthwise": (lambda: nn.Conv1d(D, 2 * D, 3, groups=D, padding=2), _floats(B, D, T)),
    "conv1d-circular": (
        lambda: nn.Conv1d(D, P, 3, padding=1, padding_mode="circular"),
        _floats(B, D, T),
    ),
    "conv2d-grouped": (
        lambda: nn.Conv2d(4, 6, (3, 2), groups=2, stride=2, dilation=(1, 2), bias=False),
        _floats(B, 4, 7, 8),
    ),
    "conv2d-same": (
        lambda: nn.Conv2d(2, P, 3, dilation=(1, 2), padding="same"),
        _floats(B, 2, 5, 6),
    ),
    "conv2d-reflecting": (
        lambda: nn.Conv2d(2, P, 3, padding=(1, 2), padding_mode="reflect"),
        _floats(B, 2, 5, 6),
    ),
    "conv3d": (lambda: nn.Conv3d(2, P, (2, 3, 1), stride=(1, 2, 1)), _floats(B, 2, 3, 5, 2)),
    "conv-transposed-1d": (
        lambda: nn.ConvTranspose1d(D, P, 3, stride=2, padding=1, output_padding=1),
        _floats(B, D, T),
    ),
    "conv-transposed-2d-grouped": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=2, stride=(1, 2), dilation=2),
        _floats(B, 4, 3, 4),
    ),
    "conv-transposed-3d": (lambda: nn.ConvTranspose3d(2, 3, 2), _floats(B, 2, 2, 3, 2)),
    "embedding-bag-mean": (lambda: nn.EmbeddingBag(9, D, mode="mean"), _tokens()),
    "embedding-bag-padding": (
        lambda: nn.EmbeddingBag(9, D, mode="mean", padding_idx=2),
        _tokens(),
    ),
    "embedding-bag-sum": (lambda: nn.EmbeddingBag(9, D, mode="sum", padding_idx=2), _tokens()),
    "linear-falcon": (lambda: FalconLinear(D, P), _floats(B, T, D)),
    "layer-norm-own": (lambda: _OwnLayerNorm(D), _floats(B, T, D)),
    "layer-norm-cohere": (lambda: CohereLayerNorm(D), _floats(B, T, D)),
    "layer-norm-channels": (
        lambda: ConvNextLayerNorm(D, data_format="channels_first"),
        _floats(B, D, 3, 2),
    ),
    "group-norm-own": (lambda: _OwnGroupNorm(2, 4), _floats(B, 4, 3, 2)),
    "rms-norm": (lambda: nn.RMSNorm(D), _floats(B, T, D)),
    "rms-norm-llama": (lambda: LlamaRMSNorm(D), _floats(B, T, D)),
    "rms-norm-qwen2": (lambda: Qwen2RMSNorm(D), _floats(B, T, D)),
    "rms-norm-t5": (lambda: T5LayerNorm(D), _floats(B, T, D)),
    "rms-norm-gemma": (lambda: GemmaRMSNorm(D), _floats(B, T, D)),
}


class _OwnLayerNorm(nn.LayerNorm):
    """As libraries have that add settings of their own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class _OwnGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


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
        found.append({n: p.grad.to_dense().clone() for n, p in module.named_parameters()})
    return found


@pytest.mark.parametrize("norm_rule", NORM_RULES)
@pytest.mark.parametrize("name", LAYERS)
def test_norms_and_clipped_sums_equal_autograd(name: str, norm_rule: str) -> None:
    module, x, dy = _build(name)
    rule = find_rule(module)
    assert rule is not None
    expected = _per_sample(module, x, dy)
    factors = torch.tensor([0.3, 1.0, 0.7], dtype=torch.float64)
    terms = rule.terms(module, x, dy)
    # transformers' norms round to float32 inside, so their gradients carry 1e-7.
    rounds = "rms-norm-" in name or name == "layer-norm-cohere"
    tolerance = 1e-6 if rounds else 1e-11
    for parameter, value in module.named_parameters():
        term = terms[parameter]
        grads = torch.stack([g[parameter] for g in expected])
        norms = term.norm_sq(NORM_RULES[norm_rule].outer_norm)
        want = grads.flatten(1).square().sum(dim=1)
        torch.testing.assert_close(norms.double(), want, rtol=tolerance, atol=0)
        total = torch.tensordot(factors, grads, dims=1)
        for form in (term, term.materialised()) if isinstance(term, Outer) else (term,):
            found = form.clipped_sum(factors).double().view(value.shape)
            torch.testing.assert_close(found, total, rtol=tolerance, atol=1e-9)
    assert set(terms) == set(dict(module.named_parameters()))


@pytest.mark.parametrize(
    "name", [n for n in LAYERS if "bias" in dict(_build(n)[0].named_parameters())]
)
def test_a_frozen_parameter_has_no_term(name: str) -> None:
    module, x, dy = _build(name)
    rule = find_rule(module)
    assert rule is not None
    module.weight.requires_grad_(False)
    assert set(rule.terms(module, x, dy)) == {"bias"}


class _DoubledLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _UnbiasedLayerNorm(nn.LayerNorm):
    """The variance has the divisor D - 1."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
        return self.weight * (x - mean) * torch.rsqrt(variance + self.eps) + self.bias


class _NoEpsilonLayerNorm(nn.LayerNorm):
    """Shows where inputs are small alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, 0.0)


class _DoubledGroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _DoubledRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _InputsEpsilonRMSNorm(nn.RMSNorm):
    """Another epsilon in a low precision: that of the inputs' type."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, torch.finfo(x.dtype).eps)


class _OuterEpsilonRMSNorm(nn.RMSNorm):
    """Epsilon is added to the root, which shows where inputs are small."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.square().mean(dim=-1, keepdim=True).sqrt() + self.eps)


class _DoubledT5LayerNorm(T5LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _DoubledConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Positive(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs(), self.bias)


class _Shifted(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + 1


@pytest.mark.parametrize(
    "module",
    [
        _DoubledRMSNorm(D),
        _InputsEpsilonRMSNorm(D),
        _OuterEpsilonRMSNorm(D, eps=1e-6),
        _DoubledT5LayerNorm(D),
        _DoubledLayerNorm(D),
        _UnbiasedLayerNorm(D),
        _NoEpsilonLayerNorm(D, eps=1e-12),
        _DoubledGroupNorm(2, 4),
        _Scaled(D, P),
        _Positive(D, P),
        nn.Embedding(9, D, scale_grad_by_freq=True),
        nn.Embedding(9, D, max_norm=1.0),
        nn.EmbeddingBag(9, D, mode="max"),
        nn.EmbeddingBag(9, D, scale_grad_by_freq=True),
        _DoubledConvolution(2, 4, 1, groups=2),
        _Shifted(9, D),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_layer_that_only_looks_like_a_known_one_has_no_rule(module: nn.Module) -> None:
    assert find_rule(module) is None
