"""Tiny models around one layer type each, for tests of what bfloat16 does to its gradients.

Nothing in them cancels, so that rounding stays rounding: losses are squared errors, inputs of
normalisation layers have another size at every position, and their means are no larger than their
spread. Weights are numbers of bfloat16, which all samples would else be rounded alike by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from dpsgd_track.privacy.engine import Batch
from tests.support.wrapped_layers import FirstOutput, SelfAttention

# Positions, features, outputs, tokens, channels, side of a picture. Of few elements the norm
# would scatter more.
T, D, P, V, C, SIDE = 12, 24, 20, 19, 16, 6


class _Then(nn.Module):
    """Layers in a row, and a head over every position."""

    def __init__(self, *layers: nn.Module, width: int = D) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(width, P)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(x))
        return y


class _Call(nn.Module):
    """A function without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Tied(nn.Module):
    """Input and output embeddings share a table; a linear layer and a norm are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(V, D)
        self.positions = nn.Embedding(T, D)
        self.norm = LlamaRMSNorm(D)
        self.mix = nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        h = self.tokens(tokens) + self.positions(positions)
        h = h + torch.tanh(self.mix(self.norm(h)))
        h = h + torch.tanh(self.mix(self.norm(h)))
        y: Tensor = self.head(h)
        return y


class _Bare(nn.Module):
    """Bare parameters; a normalisation of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(D))
        self.shift = nn.Parameter(torch.zeros(1, T, D))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (D,)) * self.gain * self.scale + self.shift


class _Scaled(nn.Module):
    """Takes a linear layer along that has a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) * self.scale


class _Autocast(nn.Module):
    """Computes in bfloat16 from float32 parameters, by torch's own rules."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            y: Tensor = self.inner(x)
        return y


def _rows(num_samples: int, generator: torch.Generator, size: float = 1.0) -> Tensor:
    """[B, T, D], of another size and mean at every position."""
    x = torch.randn(num_samples, T, D, generator=generator)
    x += 0.5 * torch.randn(num_samples, T, 1, generator=generator)
    sizes = 2 ** (2 * torch.rand(num_samples, T, 1, generator=generator) - 1)
    return size * sizes * x


def _pictures(num_samples: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(num_samples, 3, SIDE, SIDE, generator=generator)
    return x * 2 ** (2 * torch.rand(num_samples, 3, 1, 1, generator=generator) - 1)


def _tokens(num_samples: int, generator: torch.Generator) -> Tensor:
    """Every sample repeats tokens."""
    return torch.randint(0, V, (num_samples, T), generator=generator)


def _small_rows(num_samples: int, generator: torch.Generator) -> Tensor:
    """Mean squares about as large as the epsilons of normalisation layers, 1e-5."""
    return _rows(num_samples, generator, 3e-3)


def _tiny_rows(num_samples: int, generator: torch.Generator) -> Tensor:
    """The same for 1.2e-7, which is float32's resolution."""
    return _rows(num_samples, generator, 3e-4)


Inputs = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Kind:
    """A model around a layer type, and what it is fed."""

    build: Callable[[], nn.Module]
    make_inputs: Inputs = _rows
    has_plans: bool = False
    """It has linear factors, whose norms may be found in several ways."""
    param_dtype: torch.dtype = torch.bfloat16


def _norm(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A normalisation of inputs, and one after a layer whose gradients flow on through it."""
    return lambda: _Then(make(), nn.Linear(D, D), nn.Tanh(), make())


def _across(make: Callable[[], nn.Module], *, bias: bool = True) -> Callable[[], nn.Module]:
    """A layer over channels [B, D, T], after a linear layer."""
    turn = _Call(lambda x: x.mT)
    return lambda: _Then(nn.Linear(D, D, bias=bias), turn, make(), turn)


def _of_pictures(*layers: nn.Module, width: int) -> nn.Module:
    return _Then(*layers, nn.Flatten(2), _Call(lambda x: x.mT), width=width)


KINDS: dict[str, Kind] = {
    "linear": Kind(
        lambda: _Then(nn.Linear(D, P), nn.Tanh(), nn.Linear(P, D), nn.Tanh()), has_plans=True
    ),
    "linear-no-bias": Kind(
        lambda: _Then(nn.Linear(D, P, bias=False), nn.Tanh(), nn.Linear(P, D, bias=False)),
        has_plans=True,
    ),
    "linear-2d": Kind(
        lambda: _Then(_Call(lambda x: x[:, 0]), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)),
        has_plans=True,
    ),
    "linear-4d": Kind(
        lambda: _Then(_Call(lambda x: x.unflatten(1, (3, 4))), nn.Linear(D, D), nn.Tanh()),
        has_plans=True,
    ),
    "transposed-linear": Kind(
        lambda: _Then(Conv1D(P, D), nn.Tanh(), Conv1D(D, P), nn.Tanh()), has_plans=True
    ),
    "embedding": Kind(lambda: _Then(nn.Embedding(V, D), nn.Tanh()), _tokens),
    "embedding-padding": Kind(lambda: _Then(nn.Embedding(V, D, padding_idx=2)), _tokens),
    "embedding-scaled": Kind(
        lambda: _Then(
            Gemma3TextScaledWordEmbedding(V, D, padding_idx=2, embed_scale=D**0.5), nn.Tanh()
        ),
        _tokens,
    ),
    "embedding-of-types": Kind(
        lambda: _Then(nn.Embedding(2, D), nn.Tanh()), lambda n, g: _tokens(n, g) // 16
    ),
    "tied": Kind(_Tied, _tokens, has_plans=True),
    "layer-norm": Kind(_norm(lambda: nn.LayerNorm(D))),
    "layer-norm-no-bias": Kind(_norm(lambda: nn.LayerNorm(D, bias=False))),
    "layer-norm-no-weights": Kind(_norm(lambda: nn.LayerNorm(D, elementwise_affine=False))),
    "layer-norm-2d": Kind(_norm(lambda: nn.LayerNorm((T, D)))),
    "layer-norm-of-small": Kind(_norm(lambda: nn.LayerNorm(D)), _small_rows),
    "rms-norm": Kind(_norm(lambda: nn.RMSNorm(D))),
    "rms-norm-of-tiny": Kind(_norm(lambda: nn.RMSNorm(D)), _tiny_rows),
    "rms-norm-eps": Kind(_norm(lambda: nn.RMSNorm(D, eps=1e-5)), _small_rows),
    "rms-norm-llama": Kind(_norm(lambda: LlamaRMSNorm(D, eps=1e-5)), _small_rows),
    "rms-norm-qwen2": Kind(_norm(lambda: Qwen2RMSNorm(D))),
    "rms-norm-gemma": Kind(_norm(lambda: GemmaRMSNorm(D, eps=1e-5)), _small_rows),
    "group-norm": Kind(_across(lambda: nn.GroupNorm(4, D))),
    "group-norm-of-small": Kind(
        lambda: _Then(
            _Call(lambda x: x.mT), nn.GroupNorm(4, D), _Call(lambda x: x.mT), nn.Linear(D, D)
        ),
        _small_rows,
    ),
    "group-norm-pictures": Kind(
        lambda: _of_pictures(nn.Conv2d(3, C, 3, padding=1), nn.GroupNorm(2, C), nn.Tanh(), width=C),
        _pictures,
    ),
    "convolution-1d": Kind(
        _across(lambda: nn.Conv1d(D, D, 3, stride=2, padding=1)), has_plans=True
    ),
    "convolution-2d": Kind(
        lambda: _of_pictures(
            nn.Conv2d(3, C, 3, padding=1), nn.Tanh(), nn.Conv2d(C, C, 2, dilation=2), width=C
        ),
        _pictures,
        has_plans=True,
    ),
    "convolution-patches": Kind(
        lambda: _of_pictures(nn.Conv2d(3, C, 3, stride=3), nn.Tanh(), width=C), _pictures
    ),
    "unknown-bare": Kind(lambda: _Then(nn.Linear(D, D), _Bare())),
    "unknown-linear": Kind(lambda: _Then(nn.Linear(D, D), _Scaled())),
    "unknown-rms-norm": Kind(_norm(lambda: T5LayerNorm(D, eps=1e-5)), _small_rows),
    "unknown-recurrent": Kind(
        lambda: _Then(
            _Call(lambda x: x[:, :3]), FirstOutput(nn.GRU(D, C, batch_first=True)), width=C
        )
    ),
    "unknown-attention": Kind(lambda: _Then(nn.Linear(D, D), SelfAttention(D, num_heads=2))),
    "unknown-convolution": Kind(
        lambda: _of_pictures(
            nn.Conv2d(3, C, 3, bias=False), nn.Tanh(), nn.Conv2d(C, C, 3, groups=4), width=C
        ),
        _pictures,
    ),
    "unknown-transposed-convolution": Kind(
        lambda: _of_pictures(nn.ConvTranspose2d(3, C, 2), nn.Tanh(), width=C), _pictures
    ),
    # It would cancel a bias before it.
    "unknown-instance-norm": Kind(_across(lambda: nn.InstanceNorm1d(D, affine=True), bias=False)),
    "unknown-parametrised": Kind(
        lambda: _Then(weight_norm(nn.Linear(D, P, bias=False)), nn.Tanh(), width=P)
    ),
    "autocast-linear": Kind(
        lambda: _Autocast(_Then(nn.Linear(D, P), nn.Tanh(), nn.Linear(P, D), nn.Tanh())),
        has_plans=True,
        param_dtype=torch.float32,
    ),
    "autocast-layer-norm": Kind(
        lambda: _Autocast(_norm(lambda: nn.LayerNorm(D))()), param_dtype=torch.float32
    ),
    "autocast-rms-norm-llama": Kind(
        lambda: _Autocast(_norm(lambda: LlamaRMSNorm(D))()), param_dtype=torch.float32
    ),
    "autocast-embedding": Kind(
        lambda: _Autocast(_Then(nn.Embedding(V, D), nn.Linear(D, D))),
        _tokens,
        param_dtype=torch.float32,
    ),
}
"""Every model by name."""


def build(kind: str, device: torch.device) -> nn.Module:
    """The model, the same at every call, with weights off their special starting values."""
    torch.manual_seed(0)
    model = KINDS[kind].build().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
            parameter.copy_(parameter.bfloat16())
    return model.to(device)


def make_batch(kind: str, num_samples: int, device: torch.device, seed: int = 0) -> Batch:
    """Samples, whose inputs are numbers of bfloat16, and targets for every output."""
    generator = torch.Generator().manual_seed(seed)
    inputs: Any = KINDS[kind].make_inputs(num_samples, generator)
    if inputs.is_floating_point():
        inputs = inputs.bfloat16().float()
    with torch.no_grad():
        num_outputs = build(kind, torch.device("cpu"))(inputs[:1]).numel()
    targets = torch.randn(num_samples, num_outputs, generator=generator)
    return Batch({}, targets.to(device), args=(inputs.to(device),))
