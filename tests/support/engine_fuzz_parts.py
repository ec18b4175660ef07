"""What the fuzz of the engines composes models of, and what each part may expect of an engine.

The state between parts is h [B, T, D], so that any part can follow any other. Every part is built
from `Sizes` alone. Its contract says whether there is a truth for a model that holds it:

- `LEGAL`: one sample at a time through autograd is the truth, and an engine should find it.
- `EITHER`: the same truth, but an engine may refuse.
- `NONE`: no truth, as samples see each other or data is written into the model.
- `RANDOM`: draws masks of its own, so that only bounds can be checked.

Shapes: B samples, T positions, D features, C classes, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

LEGAL, EITHER, NONE, RANDOM = "legal", "either", "none", "random"
V = 6
NUM_POSITIONS = 12
"""Rows of every table of positions: the longest input and what class tokens add to it."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes that weights depend on."""

    num_features: int
    num_classes: int


@dataclass(frozen=True)
class Part:
    """A module's constructor, and its contract."""

    make: Callable[[Sizes], nn.Module]
    contract: str


PIECES: dict[str, Part] = {}
"""[B, T, D] -> [B, T, D], where T may change."""
SOURCES: dict[str, Part] = {}
"""The model's input -> [B, T, D]; those whose names begin with `tokens` take tokens [B, T]."""
HEADS: dict[str, Part] = {}
"""[B, T, D] -> what the loss takes."""

Make = Callable[[Sizes], nn.Module]


def _part(table: dict[str, Part], name: str, contract: str = LEGAL) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        table[name] = Part(make, contract)
        return make

    return register


class _Apply(nn.Module):
    """A function of some modules and h."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _piece(
    name: str, contract: str, function: Callable[[Any, Tensor], Tensor], **make: Make
) -> None:
    """Register a piece that applies `function` to modules made by `make`, by their names."""
    PIECES[name] = Part(
        lambda s: _Apply(function, **{key: one(s) for key, one in make.items()}), contract
    )


def _linear(s: Sizes) -> nn.Module:
    return nn.Linear(s.num_features, s.num_features)


def _embedding(s: Sizes) -> nn.Module:
    return nn.Embedding(V, s.num_features)


def _positions(s: Sizes) -> nn.Module:
    return nn.Embedding(NUM_POSITIONS, s.num_features)


def _labels(s: Sizes) -> nn.Module:
    return nn.Embedding(s.num_classes, s.num_features)


def tokens_of(h: Tensor) -> Tensor:
    """Tokens [B, T] that depend on h [B, T, D], so that lookups can follow any piece."""
    return (h.detach().sum(dim=-1) * 7).abs().long() % V


def _range(h: Tensor) -> Tensor:
    return torch.arange(h.shape[1])


# Linear layers, with samples where they belong.

_piece("linear", LEGAL, lambda m, h: torch.tanh(m.a(h)), a=_linear)
_piece("linear-2d", LEGAL, lambda m, h: h + m.a(h.mean(1))[:, None], a=_linear)
_piece(
    "linear-4d",
    LEGAL,
    lambda m, h: h + torch.tanh(m.a(torch.stack([h, h * h], dim=1))).sum(1),
    a=_linear,
)
_piece(
    "linear-no-bias",
    LEGAL,
    lambda m, h: torch.tanh(m.a(h)),
    a=lambda s: nn.Linear(s.num_features, s.num_features, bias=False),
)
_piece(
    "bottleneck",
    LEGAL,
    lambda m, h: h + m.b(torch.tanh(m.a(h))),
    a=lambda s: nn.Linear(s.num_features, s.num_classes),
    b=lambda s: nn.Linear(s.num_classes, s.num_features),
)
_piece("linear-by-keyword", LEGAL, lambda m, h: torch.tanh(m.a(input=h)), a=_linear)
_piece("reused", LEGAL, lambda m, h: torch.tanh(m.a(torch.tanh(m.a(h)))), a=_linear)
_piece("called-in-vain", LEGAL, lambda m, h: (m.a(h), m.b(h))[1], a=_linear, b=_linear)
_piece("unused-layer", LEGAL, lambda m, h: torch.tanh(m.b(h)), a=_linear, b=_linear)
_piece("in-place-activation", LEGAL, lambda m, h: torch.relu_(m.a(h)), a=_linear)
_piece("in-place-residual", LEGAL, lambda m, h: m.a(h).add_(h), a=_linear)
_piece(
    "checkpoint",
    LEGAL,
    lambda m, h: checkpoint(lambda x: torch.tanh(m.a(x)), h, use_reentrant=False),
    a=_linear,
)
_piece("detached", LEGAL, lambda m, h: m.b(m.a(h).detach() + h), a=_linear, b=_linear)
_piece(
    "partly-without-gradients", LEGAL, lambda m, h: h + _without_gradients(m.a, h) * h, a=_linear
)
_piece("dropout-of-zero", LEGAL, lambda m, h: m.d(m.a(h)), a=_linear, d=lambda s: nn.Dropout(0.0))
_piece("dropout", RANDOM, lambda m, h: m.d(m.a(h)), a=_linear, d=lambda s: nn.Dropout(0.4))


@torch.no_grad()
def _without_gradients(layer: nn.Module, h: Tensor) -> Tensor:
    return torch.tanh(layer(h))


# The same layers, with samples elsewhere.

_piece(
    "linear-time-first",
    EITHER,
    lambda m, h: torch.tanh(m.a(h.transpose(0, 1))).transpose(0, 1),
    a=_linear,
)
_piece("linear-flattened", EITHER, lambda m, h: m.a(h.flatten(0, 1)).view_as(h), a=_linear)
_piece("batch-flipped", EITHER, lambda m, h: torch.tanh(m.a(h.flip(0))).flip(0), a=_linear)
_piece(
    "batch-flipped-lookup",
    EITHER,
    lambda m, h: h + m.a(tokens_of(h).flip(0)).flip(0),
    a=_embedding,
)
_piece(
    "one-by-one",
    EITHER,
    lambda m, h: torch.cat([m.a(h[i : i + 1]) for i in range(len(h))]),
    a=_linear,
)
_piece(
    "lookup-one-by-one",
    EITHER,
    lambda m, h: h + torch.cat([m.a(i[None]) for i in tokens_of(h)]),
    a=_embedding,
)
_piece("in-halves", EITHER, lambda m, h: torch.cat([m.a(part) for part in h.chunk(2)]), a=_linear)
_piece("both-ways", EITHER, lambda m, h: m.a(torch.cat([h, -h]))[: len(h)] + h, a=_linear)


def _sorted(m: Any, h: Tensor) -> Tensor:
    order = h.detach().sum((1, 2)).argsort()
    return torch.tanh(m.a(h[order]))[order.argsort()]


def _sorted_gru(m: Any, h: Tensor) -> Tensor:
    order = h.detach().sum((1, 2)).argsort()
    y: Tensor = m.a(h[order])[0][order.argsort()]
    return y


_piece("sorted-and-back", EITHER, _sorted, a=_linear)
_piece(
    "sorted-gru-and-back",
    EITHER,
    _sorted_gru,
    a=lambda s: nn.GRU(s.num_features, s.num_features, batch_first=True),
)


# What all samples share.


def _attend(h: Tensor, table: Tensor) -> Tensor:
    return h + (h @ table.mT).softmax(dim=-1) @ table


_piece("positions-of-all", EITHER, lambda m, h: h + m.p(_range(h)), p=_positions)
_piece(
    "positions-of-all-tanh",
    EITHER,
    lambda m, h: h * torch.tanh(m.a(m.p(_range(h)))),
    p=_positions,
    a=_linear,
)
_piece("positions-1T", LEGAL, lambda m, h: h + m.p(_range(h)[None]), p=_positions)
_piece("positions-1T-first", EITHER, lambda m, h: h + m.p(_range(h)[None])[0], p=_positions)
_piece("positions-1T-sum", EITHER, lambda m, h: h + m.p(_range(h)[None]).sum(0), p=_positions)
_piece(
    "positions-1T-repeated",
    EITHER,
    lambda m, h: (
        torch.cat([m.p(_range(h)[None]).repeat(len(h), 1, 1), h], dim=1)[:, -h.shape[1] :]
        + m.p(_range(h)[None]).repeat(len(h), 1, 1)
    ),
    p=_positions,
)
_piece("positions-BT", LEGAL, lambda m, h: h + m.p(_range(h).expand(len(h), -1)), p=_positions)
_piece(
    "positions-T1", EITHER, lambda m, h: h + m.p(_range(h)[:, None]).transpose(0, 1), p=_positions
)
_piece(
    "one-vector",
    EITHER,
    lambda m, h: h * torch.tanh(m.a(m.p.weight[0].detach())),
    a=_linear,
    p=_labels,
)
_piece(
    "labels-through-layer",
    EITHER,
    lambda m, h: _attend(h, torch.tanh(m.a(m.p.weight.detach()))),
    a=_linear,
    p=_labels,
)
_piece(
    "labels-looked-up",
    EITHER,
    lambda m, h: _attend(h, m.p(torch.arange(m.p.num_embeddings))),
    p=_labels,
)
_piece(
    "labels-looked-up-1C",
    LEGAL,
    lambda m, h: _attend(h, m.p(torch.arange(m.p.num_embeddings)[None])),
    p=_labels,
)
_piece(
    "labels-normed",
    EITHER,
    lambda m, h: _attend(h, m.n(m.p.weight.detach())),
    n=lambda s: nn.LayerNorm(s.num_features),
    p=_labels,
)


def _distances(h: Tensor, num_features: int) -> Tensor:
    """[T, T, D]: features of how far apart two positions are."""
    t = _range(h).to(h)
    apart = t[:, None] - t
    return torch.stack([torch.sin(apart * (k + 1)) for k in range(num_features)], dim=-1)


def _biased_attention(m: Any, h: Tensor) -> Tensor:
    bias = m.a(_distances(h, h.shape[-1])).sum(-1)
    return h + (h @ h.mT + bias).softmax(dim=-1) @ h


_piece("distance-bias", EITHER, _biased_attention, a=_linear)
_piece(
    "distance-lookup",
    EITHER,
    lambda m, h: (
        h + (h @ h.mT + m.p((_range(h)[:, None] - _range(h)).abs()).sum(-1)).softmax(dim=-1) @ h
    ),
    p=_positions,
)


class _Mixer(nn.Module):
    """Weighs h [B, T, D] by a table [T, T] that it is given, and scales it."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_features))

    def forward(self, h: Tensor, table: Tensor) -> Tensor:
        return torch.tanh(table @ h) * self.gain


class _Adder(nn.Module):
    """Adds rows [T, D] that it is given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_features))

    def forward(self, h: Tensor, *, rows: Tensor) -> Tensor:
        return torch.tanh(h + rows) * self.gain


def _table(h: Tensor) -> Tensor:
    return _distances(h, 2).sum(-1).tril()


_piece(
    "table-TT-to-module",
    EITHER,
    lambda m, h: m.a(h, _table(h)),
    a=lambda s: _Mixer(s.num_features),
)
_piece(
    "table-TD-to-module",
    EITHER,
    lambda m, h: m.a(h, rows=_distances(h, h.shape[-1])[0]),
    a=lambda s: _Adder(s.num_features),
)
_piece(
    "table-1TD-to-module",
    LEGAL,
    lambda m, h: m.a(h, rows=_distances(h, h.shape[-1])[:1]),
    a=lambda s: _Adder(s.num_features),
)
_piece(
    "trained-rows-to-module",
    EITHER,
    lambda m, h: m.a(h, rows=m.p(_range(h))),
    a=lambda s: _Adder(s.num_features),
    p=_positions,
)


# Lookups.


_piece("lookup", LEGAL, lambda m, h: h + m.e(tokens_of(h)), e=_embedding)
_piece(
    "lookup-with-padding",
    LEGAL,
    lambda m, h: h + m.e(tokens_of(h)),
    e=lambda s: nn.Embedding(V, s.num_features, padding_idx=1),
)
_piece("lookup-by-keyword", LEGAL, lambda m, h: h + m.e(input=tokens_of(h)), e=_embedding)
_piece("lookup-of-one", LEGAL, lambda m, h: h + m.e(tokens_of(h)[:, 0])[:, None], e=_embedding)
_piece("lookup-in-place", LEGAL, lambda m, h: m.e(tokens_of(h)).mul_(2).add_(h), e=_embedding)
_piece(
    "embedding-bag",
    LEGAL,
    lambda m, h: h + m.e(tokens_of(h))[:, None],
    e=lambda s: nn.EmbeddingBag(V, s.num_features, mode="sum"),
)
_piece(
    "embedding-bag-offsets",
    EITHER,
    lambda m, h: (
        h
        + m.e(tokens_of(h).flatten(), torch.arange(0, h.shape[0] * h.shape[1], h.shape[1]))[:, None]
    ),
    e=lambda s: nn.EmbeddingBag(V, s.num_features, mode="sum"),
)
_piece(
    "lookup-max-norm",
    NONE,
    lambda m, h: h + m.e(tokens_of(h)),
    e=lambda s: nn.Embedding(V, s.num_features, max_norm=0.3),
)
_piece(
    "lookup-by-frequency",
    NONE,
    lambda m, h: h + m.e(tokens_of(h)),
    e=lambda s: nn.Embedding(V, s.num_features, scale_grad_by_freq=True),
)


class _Offset(nn.Embedding):
    """As BART's: positions begin at 2."""

    def __init__(self, num_features: int) -> None:
        super().__init__(V + 2, num_features)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 2)


_piece(
    "lookup-offset", LEGAL, lambda m, h: h + m.e(tokens_of(h)), e=lambda s: _Offset(s.num_features)
)


# Norms and convolutions.


class _GatedRMSNorm(nn.Module):
    """As in Mamba2: the input may be gated."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        x = x if gate is None else x * F.silu(gate)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, True) + self.variance_epsilon)


def _gated(s: Sizes) -> nn.Module:
    return _GatedRMSNorm(s.num_features)


def _rms(s: Sizes) -> nn.Module:
    return nn.RMSNorm(s.num_features, eps=1e-5)


_piece("layer-norm", LEGAL, lambda m, h: m.n(h), n=lambda s: nn.LayerNorm(s.num_features))
_piece("rms-norm", LEGAL, lambda m, h: m.n(h), n=_rms)
_piece(
    "rms-norm-without-eps", LEGAL, lambda m, h: m.n(h + 1.5), n=lambda s: nn.RMSNorm(s.num_features)
)
_piece("rms-norm-by-keyword", LEGAL, lambda m, h: m.n(x=h), n=_rms)
_piece("rms-norm-custom", LEGAL, lambda m, h: m.n(h), n=_gated)
_piece("rms-norm-gated", LEGAL, lambda m, h: m.n(h, h * h), n=_gated)
_piece("rms-norm-gated-by-keyword", LEGAL, lambda m, h: m.n(h, gate=h * h), n=_gated)
_piece(
    "group-norm",
    LEGAL,
    lambda m, h: m.n(h.mT).mT,
    n=lambda s: nn.GroupNorm(1, s.num_features),
)
_piece(
    "conv1d",
    LEGAL,
    lambda m, h: torch.tanh(m.c(h.mT).mT),
    c=lambda s: nn.Conv1d(s.num_features, s.num_features, 3, padding=1),
)
_piece(
    "conv1d-groups",
    LEGAL,
    lambda m, h: m.c(h.mT).mT,
    c=lambda s: nn.Conv1d(s.num_features, s.num_features, 3, padding=1, groups=s.num_features),
)
_piece(
    "conv1d-stride",
    LEGAL,
    lambda m, h: m.c(h.mT).mT,
    c=lambda s: nn.Conv1d(s.num_features, s.num_features, 3, padding=1, stride=2),
)
_piece(
    "conv1d-over-batch",
    NONE,
    lambda m, h: m.c(h.permute(1, 2, 0)).permute(2, 0, 1),
    c=lambda s: nn.Conv1d(s.num_features, s.num_features, 3, padding=1),
)
_piece(
    "conv2d",
    LEGAL,
    lambda m, h: h + m.c(h[:, None]).mean(1),
    c=lambda s: nn.Conv2d(1, 2, (3, 1), padding=(1, 0)),
)
_piece(
    "instance-norm",
    LEGAL,
    lambda m, h: m.n(h.mT).mT,
    n=lambda s: nn.InstanceNorm1d(s.num_features, affine=True),
)
_piece(
    "instance-norm-with-stats",
    NONE,
    lambda m, h: m.n(h.mT).mT,
    n=lambda s: nn.InstanceNorm1d(s.num_features, affine=True, track_running_stats=True),
)
_piece("batch-norm", NONE, lambda m, h: m.n(h.mT).mT, n=lambda s: nn.BatchNorm1d(s.num_features))


class _Frozen(nn.BatchNorm1d):
    """Batch norm that stays in eval mode, as detectors have it."""

    def train(self, mode: bool = True) -> _Frozen:
        super().train(False)
        return self


@_part(PIECES, "batch-norm-in-eval")
def _batch_norm_in_eval(s: Sizes) -> nn.Module:
    return _Apply(lambda m, h: m.n(h.mT).mT, n=_Frozen(s.num_features).eval())


# Attention and recurrent layers.


def _attention(s: Sizes) -> nn.Module:
    return nn.MultiheadAttention(s.num_features, 1, batch_first=True)


def _attention_time_first(m: Any, h: Tensor) -> Tensor:
    h_TBD = h.transpose(0, 1)
    y: Tensor = m.a(h_TBD, h_TBD, h_TBD, need_weights=False)[0]
    return h + y.transpose(0, 1)


_piece("attention", LEGAL, lambda m, h: h + m.a(h, h, h, need_weights=False)[0], a=_attention)
_piece("attention-weights", LEGAL, lambda m, h: m.a(h, h, h)[1] @ h, a=_attention)
_piece(
    "attention-causal",
    LEGAL,
    lambda m, h: (
        h
        + m.a(
            h,
            h,
            h,
            attn_mask=torch.ones(2 * h.shape[1:2], dtype=torch.bool).triu(1),
            need_weights=False,
        )[0]
    ),
    a=_attention,
)
_piece(
    "attention-padded",
    LEGAL,
    lambda m, h: h + m.a(h, h, h, key_padding_mask=_padding(h), need_weights=False)[0],
    a=_attention,
)
_piece(
    "attention-time-first",
    EITHER,
    _attention_time_first,
    a=lambda s: nn.MultiheadAttention(s.num_features, 1),
)
_piece(
    "attention-to-labels",
    EITHER,
    lambda m, h: h + m.a(h, *2 * (m.p.weight.detach()[None].expand(len(h), -1, -1),))[0],
    a=_attention,
    p=_labels,
)


def _padding(h: Tensor) -> Tensor:
    """[B, T]: every second token but the first is padding."""
    mask = tokens_of(h) % 2 == 0
    mask[:, 0] = False
    return mask


def _gru(s: Sizes) -> nn.Module:
    return nn.GRU(s.num_features, s.num_features, batch_first=True)


_piece("gru", LEGAL, lambda m, h: m.r(h)[0], r=_gru)
_piece("gru-state", LEGAL, lambda m, h: h + m.r(h)[1].transpose(0, 1), r=_gru)
_piece(
    "gru-from-state", EITHER, lambda m, h: m.r(h, h[:, :1].transpose(0, 1).contiguous())[0], r=_gru
)
_piece(
    "gru-time-first",
    EITHER,
    lambda m, h: m.r(h.transpose(0, 1))[0].transpose(0, 1),
    r=lambda s: nn.GRU(s.num_features, s.num_features),
)
_piece(
    "lstm",
    LEGAL,
    lambda m, h: m.r(h)[0],
    r=lambda s: nn.LSTM(s.num_features, s.num_features, batch_first=True),
)
_piece(
    "lstm-time-first",
    EITHER,
    lambda m, h: m.r(h.transpose(0, 1))[0].transpose(0, 1),
    r=lambda s: nn.LSTM(s.num_features, s.num_features),
)


# Parameters of one's own.


class _Scale(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(num_features))
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(h * self.scale) / self.temperature


class _ClassToken(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, num_features))

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([self.token.expand(len(h), -1, -1), h], dim=1)


class _Positions(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.ones(1, NUM_POSITIONS, num_features))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.rows[:, : h.shape[1]]


class _Several(nn.Module):
    """Several layers and parameters, called with a keyword, returning a structure."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.inner = nn.Linear(num_features, num_features)
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, h: Tensor, *, gate: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = torch.tanh(self.inner(h) + self.bias)
        return y * gate, {"pooled": y.mean(1)}


class _Remembering(nn.Module):
    """Keeps a by-product for a penalty that is added later."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_features))

    def forward(self, h: Tensor) -> Tensor:
        y = torch.tanh(h * self.gain)
        self.penalty = y.square().mean(dim=(1, 2))
        return y


class _CentredInTraining(nn.Module):
    """Centred over the batch, but in training only."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_features))

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh((h - h.mean(0) if self.training else h) * self.gain)


def _several(m: Any, h: Tensor) -> Tensor:
    y, more = m.a(h, gate=torch.sigmoid(h))
    return y + more["pooled"][:, None]


_piece("bare-scale", LEGAL, lambda m, h: m.a(h), a=lambda s: _Scale(s.num_features))
_piece("bare-class-token", LEGAL, lambda m, h: m.a(h), a=lambda s: _ClassToken(s.num_features))
_piece("bare-positions", LEGAL, lambda m, h: m.a(h), a=lambda s: _Positions(s.num_features))
_piece("several-parameters", LEGAL, _several, a=lambda s: _Several(s.num_features))
_piece(
    "two-arguments",
    LEGAL,
    lambda m, h: h + m.a(h, torch.tanh(h)),
    a=lambda s: nn.Bilinear(*3 * (s.num_features,)),
)
_piece(
    "remembered-penalty",
    EITHER,
    lambda m, h: m.a(h) + m.a.penalty[:, None, None],
    a=lambda s: _Remembering(s.num_features),
)
_piece(
    "centred-in-training", NONE, lambda m, h: m.a(h), a=lambda s: _CentredInTraining(s.num_features)
)


@_part(PIECES, "tied")
def _tied(s: Sizes) -> nn.Module:
    first, second, norm = (
        _linear(s),
        nn.Linear(*2 * (s.num_features,)),
        nn.LayerNorm(s.num_features),
    )
    second.weight, second.bias = first.weight, norm.bias
    return _Apply(lambda m, h: m.norm(torch.tanh(m.a(h)) + m.b(h)), a=first, b=second, norm=norm)


@_part(PIECES, "tied-to-table")
def _tied_to_table(s: Sizes) -> nn.Module:
    table, out = nn.Embedding(V, s.num_features), nn.Linear(s.num_features, V, bias=False)
    out.weight = table.weight
    return _Apply(lambda m, h: h + m.e(tokens_of(h)) * m.o(h).sum(-1, True), e=table, o=out)


@_part(PIECES, "weight-by-function", EITHER)
def _weight_by_function(s: Sizes) -> nn.Module:
    return _Apply(lambda m, h: torch.tanh(F.linear(h + m.a(h), m.a.weight)), a=_linear(s))


@_part(PIECES, "adapters")
def _adapters(s: Sizes) -> nn.Module:
    d = s.num_features
    base = nn.Linear(d, d).requires_grad_(False)
    down, up = nn.Linear(d, 1, bias=False), nn.Linear(1, d, bias=False)
    return _Apply(lambda m, h: torch.tanh(m.base(h) + m.up(m.down(h))), base=base, down=down, up=up)


@_part(PIECES, "frozen-then-in-place")
def _frozen_then_in_place(s: Sizes) -> nn.Module:
    def function(m: Any, h: Tensor) -> Tensor:
        x = torch.tanh(m.a(h))
        y = m.b(x * 1)
        return m.c(y).add_(x)

    return _Apply(function, a=_linear(s), b=_linear(s).requires_grad_(False), c=_linear(s))


# Weights that something else computes, and hooks.


@_part(PIECES, "weight-norm")
def _weight_norm(s: Sizes) -> nn.Module:
    layer = parametrizations.weight_norm(nn.Linear(s.num_features, s.num_features))
    return _Apply(lambda m, h: torch.tanh(m.a(h)), a=layer)


@_part(PIECES, "weight-norm-cached", EITHER)
def _weight_norm_cached(s: Sizes) -> nn.Module:
    def function(m: Any, h: Tensor) -> Tensor:
        with parametrize.cached():
            return torch.tanh(m.a(torch.tanh(m.a(h))))

    layer = parametrizations.weight_norm(nn.Linear(s.num_features, s.num_features))
    return _Apply(function, a=layer)


@_part(PIECES, "weight-norm-by-hook", EITHER)
def _weight_norm_by_hook(s: Sizes) -> nn.Module:
    layer = torch.nn.utils.weight_norm(nn.Linear(s.num_features, s.num_features))
    return _Apply(lambda m, h: torch.tanh(m.a(h)), a=layer)


@_part(PIECES, "pruned", EITHER)
def _pruned(s: Sizes) -> nn.Module:
    layer = nn.Linear(s.num_features, s.num_features)
    prune.random_unstructured(layer, "weight", amount=0.3)
    return _Apply(lambda m, h: torch.tanh(m.a(h)), a=layer)


def _hooked(name: str, contract: str, register: Callable[[nn.Module], object]) -> None:
    def make(s: Sizes) -> nn.Module:
        layer = nn.Linear(s.num_features, s.num_features)
        register(layer)
        return _Apply(lambda m, h: torch.tanh(m.a(h)), a=layer)

    PIECES[name] = Part(make, contract)


def _scale_of_its_own(layer: Any) -> None:
    layer.scale = nn.Parameter(torch.ones(layer.out_features))
    layer.register_forward_hook(lambda m, args, y: y * m.scale)


def _mask(g: Tensor) -> Tensor:
    """Freezes the first row, as hooks on parameters do."""
    mask = torch.ones_like(g)
    mask[0] = 0
    return g * mask


def _halved(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else 0.5 * g for g in gradients)


_hooked("output-hook", EITHER, lambda a: a.register_forward_hook(lambda m, x, y: 2 * torch.tanh(y)))
_hooked("output-hook-with-parameter", EITHER, _scale_of_its_own)
_hooked("output-hook-that-adds", LEGAL, lambda a: a.register_forward_hook(lambda m, x, y: y + 1))
_hooked("input-hook", LEGAL, lambda a: a.register_forward_pre_hook(lambda m, x: (torch.sin(x[0]),)))
_hooked(
    "backward-hook",
    EITHER,
    lambda a: a.register_full_backward_hook(lambda m, dx, dy: _halved(dx)),
)
_hooked(
    "backward-pre-hook",
    EITHER,
    lambda a: a.register_full_backward_pre_hook(lambda m, dy: _halved(dy)),
)
_hooked("parameter-hook", EITHER, lambda a: a.weight.register_hook(_mask))


def _with_gradient_hook(m: Any, h: Tensor) -> Tensor:
    y: Tensor = m.a(h)
    if y.requires_grad:
        y.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return torch.tanh(y)


_piece("gradient-hook", EITHER, _with_gradient_hook, a=_linear)


# Samples that see each other, and data that stays.

_piece("centred", NONE, lambda m, h: m.a(h - h.mean(0)), a=_linear)
_piece("centred-detached", NONE, lambda m, h: m.a(h - h.mean(0).detach()), a=_linear)
_piece("centred-without-parameters", NONE, lambda m, h: h - h.mean(0))
_piece("batch-cumsum", NONE, lambda m, h: m.a(h.cumsum(0)), a=_linear)
_piece("batch-softmax", NONE, lambda m, h: m.a(h.softmax(0)), a=_linear)
_piece("batch-sorted", NONE, lambda m, h: m.a(h.sort(dim=0).values), a=_linear)
_piece("batch-rolled", NONE, lambda m, h: h + m.a(h.roll(1, 0)), a=_linear)
_piece("batch-maximum", NONE, lambda m, h: m.a(h / h.detach().abs().amax()), a=_linear)
_piece("batch-attention", NONE, lambda m, h: _over_batch(m.a(h)), a=_linear)
_piece("divided-by-batch", NONE, lambda m, h: m.a(h) / len(h), a=_linear)
_piece("first-for-all", NONE, lambda m, h: h + m.e(tokens_of(h)[:1]), e=_embedding)
_piece("gradients-mixed", NONE, lambda m, h: m.a(h + (h.mean(0) - h.mean(0).detach())), a=_linear)


def _over_batch(h: Tensor) -> Tensor:
    h_TBD = h.transpose(0, 1)
    return (h_TBD @ h_TBD.mT).softmax(-1).matmul(h_TBD).transpose(0, 1)


class _MovingMean(nn.Module):
    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))

    def forward(self, h: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * h.detach().mean((0, 1))
        return h - self.mean


@_part(PIECES, "moving-mean", NONE)
def _moving_mean(s: Sizes) -> nn.Module:
    return _MovingMean(s.num_features)


# Sources.


def _source(
    name: str, contract: str, function: Callable[[Any, Tensor], Tensor], **make: Make
) -> None:
    SOURCES[name] = Part(
        lambda s: _Apply(function, **{key: one(s) for key, one in make.items()}), contract
    )


_source("floats", LEGAL, lambda m, x: x)
_source("floats-linear", LEGAL, lambda m, x: m.a(x), a=_linear)
_source("tokens", LEGAL, lambda m, i: m.e(i), e=_embedding)
_source(
    "tokens-padded",
    LEGAL,
    lambda m, i: m.e(i),
    e=lambda s: nn.Embedding(V, s.num_features, padding_idx=0),
)
_source(
    "tokens-frozen",
    LEGAL,
    lambda m, i: m.e(i),
    e=lambda s: nn.Embedding(V, s.num_features).requires_grad_(False),
)
_source(
    "tokens-positions-1T",
    LEGAL,
    lambda m, i: m.e(i) + m.p(_range(i)[None]),
    e=_embedding,
    p=_positions,
)
_source(
    "tokens-positions-T", EITHER, lambda m, i: m.e(i) + m.p(_range(i)), e=_embedding, p=_positions
)
_source(
    "tokens-as-numbers",
    LEGAL,
    lambda m, i: m.a(F.one_hot(i, V).to(m.a.weight)),
    a=lambda s: nn.Linear(V, s.num_features),
)


# Heads.


def _head(
    name: str, contract: str, function: Callable[[Any, Tensor], Tensor], **make: Make
) -> None:
    HEADS[name] = Part(
        lambda s: _Apply(function, **{key: one(s) for key, one in make.items()}), contract
    )


def _to_classes(s: Sizes) -> nn.Module:
    return nn.Linear(s.num_features, s.num_classes)


_head("pooled", LEGAL, lambda m, h: m.o(h.mean(1)), o=_to_classes)
_head("by-token", LEGAL, lambda m, h: m.o(h), o=_to_classes)
_head("first-token", LEGAL, lambda m, h: m.o(h[:, 0]), o=_to_classes)
_head("none", LEGAL, lambda m, h: h.sum(-1))
_head(
    "labels",
    EITHER,
    lambda m, h: h.mean(1) @ m.e(torch.arange(m.e.num_embeddings)).T,
    e=_labels,
)
_head(
    "labels-1C",
    EITHER,
    lambda m, h: h.mean(1) @ m.e(torch.arange(m.e.num_embeddings)[None])[0].T,
    e=_labels,
)


# Losses: (output, targets [B]) -> [B], where they are what is asked for.

Loss = Callable[[Tensor, Tensor], Tensor]


def _weighted(y: Tensor, target_B: Tensor) -> Tensor:
    y = y.flatten(1)
    return (torch.sin(y) + 0.3 * y.square()).sum(1) * target_B


def _class_loss(y: Tensor, target_B: Tensor) -> Tensor:
    return -y.flatten(1).log_softmax(-1)[:, 0] * target_B


def _contrastive(y: Tensor, target_B: Tensor) -> Tensor:
    y = y.flatten(1)
    return -(y @ y.T).log_softmax(-1).diagonal() * target_B


def _hard_examples(y: Tensor, target_B: Tensor) -> Tensor:
    losses = _weighted(y, target_B)
    return losses * (losses >= losses.detach().median())


LOSSES: dict[str, tuple[Loss, str]] = {
    "weighted": (_weighted, LEGAL),
    "class": (_class_loss, LEGAL),
    "mean": (lambda y, t: _weighted(y, t).mean(), NONE),
    "sum": (lambda y, t: _weighted(y, t).sum(), NONE),
    "divided-by-len": (lambda y, t: _weighted(y, t) / len(t), NONE),
    "B1": (lambda y, t: _weighted(y, t)[:, None], EITHER),
    "BT": (lambda y, t: torch.sin(y.flatten(1)) * t[:, None], EITHER),
    "contrastive": (_contrastive, NONE),
    "batch-softmax": (lambda y, t: _weighted(y, t).softmax(0), NONE),
    "centred": (lambda y, t: (lambda v: v - v.mean())(_weighted(y, t)), NONE),
    "hard-examples": (_hard_examples, NONE),
    "focal-over-batch": (
        lambda y, t: (lambda v: v * (v / v.sum()).detach())(_weighted(y, t)),
        NONE,
    ),
    "sorted": (lambda y, t: _weighted(y, t).sort().values, NONE),
}


# The whole model.


class Failing(nn.Module):
    """Lets h pass; a backward fails when the countdown, if one was started, comes to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.countdown = 0

    def forward(self, h: Tensor) -> Tensor:
        return _FailsOnce.apply(h, self)


class _FailsOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, owner: Failing) -> Tensor:
        ctx.owner = owner
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
        if ctx.owner.countdown:
            ctx.owner.countdown -= 1
            if ctx.owner.countdown == 0:
                raise torch.OutOfMemoryError("injected")
        return dh, None


class Model(nn.Module):
    """A source, some pieces, something that can fail, a head."""

    def __init__(
        self, sizes: Sizes, source: str, pieces: tuple[str, ...], head: str, *, can_fail: bool
    ) -> None:
        super().__init__()
        self.source = SOURCES[source].make(sizes)
        made = [PIECES[name].make(sizes) for name in pieces]
        if can_fail:
            made.insert((len(made) + 1) // 2, Failing())
        self.pieces = nn.ModuleList(made)
        self.head = HEADS[head].make(sizes)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """gate [B], where there is one, scales what the source makes."""
        h = self.source(x)
        if gate is not None:
            h = h * gate[:, None, None]
        for piece in self.pieces:
            h = piece(h)
        y: Tensor = self.head(h)
        return y


def build(
    sizes: Sizes, source: str, pieces: tuple[str, ...], head: str, *, can_fail: bool, seed: int
) -> Model:
    """A model in float64, with weights that tell samples and features apart."""
    torch.manual_seed(seed)
    model = Model(sizes, source, pieces, head, can_fail=can_fail).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model
