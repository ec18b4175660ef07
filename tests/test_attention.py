"""torch's multi-head attention by its formulas, against the module and plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpsgd_track
from dpsgd_track.modes.composed import ComposedMode
from dpsgd_track.privacy.attention import AttentionLayer
from dpsgd_track.privacy.expanded import ExpandedLayer

B, T, S, E = 3, 5, 4, 6

LAYERS: dict[str, dict[str, Any]] = {
    "batch-first": {"batch_first": True},
    "time-first": {},
    "without-bias": {"bias": False},
    "other-widths": {"kdim": 4, "vdim": 5},
    "frozen-projection": {},
    "frozen-output": {},
}
READS = ("self", "memory", "keys-and-values")
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"need_weights": True},
    "weights-by-head": {"need_weights": True, "average_attn_weights": False},
    "mask": {"attn_mask": True},
    "mask-and-padding": {"attn_mask": True, "key_padding_mask": True},
    "causal": {"attn_mask": True, "is_causal": True},
    "causal-with-padding": {"attn_mask": True, "is_causal": True, "key_padding_mask": True},
}


class _Attending(nn.Module):
    """Attention between linear layers, on [B, T, E]."""

    def __init__(self, layer: str, read: str, **call: Any) -> None:
        super().__init__()
        settings = LAYERS[layer]
        self.attention = nn.MultiheadAttention(E, 2, **settings)
        self.read, self.masks = read, {name: call.pop(name, False) for name in _MASKS}
        self.call = {"need_weights": False} | call
        self.enter, self.leave = nn.Linear(E, E), nn.Linear(E, 2)
        widths = (self.attention.kdim, self.attention.vdim)
        self.memories = nn.ModuleList(nn.Linear(E, width) for width in widths)
        if layer.startswith("frozen"):
            frozen = "out_proj" if layer == "frozen-output" else "in_proj"
            for name, parameter in self.attention.named_parameters():
                parameter.requires_grad_(not name.startswith(frozen))

    def forward(self, x: Tensor) -> Tensor:
        query, other = torch.tanh(self.enter(x)), x[:, :S]
        key = value = query if self.read == "self" else torch.tanh(self.memories[0](other))
        if self.read == "keys-and-values":
            value = torch.tanh(self.memories[1](other))
        read = [query, key, value] if self.read != "self" else [query] * 3
        masks = {name: _MASKS[name](read) for name, has in self.masks.items() if has}
        if not self.attention.batch_first:
            read = [read[0].transpose(0, 1)] * 3 if self.read == "self" else _time_first(read)
        y, weights = self.attention(*read, **masks, **self.call)
        y = y if self.attention.batch_first else y.transpose(0, 1)
        logits: Tensor = self.leave(torch.tanh(y)).mean(dim=1)
        return logits if weights is None else logits + weights.square().flatten(1).sum(1)[:, None]


def _time_first(read: list[Tensor]) -> list[Tensor]:
    query, key, value = read
    moved = key.transpose(0, 1)
    return [query.transpose(0, 1), moved, moved if value is key else value.transpose(0, 1)]


def _causal(read: list[Tensor]) -> Tensor:
    return torch.ones(read[0].shape[1], read[1].shape[1], dtype=torch.bool).triu(1)


def _padding(read: list[Tensor]) -> Tensor:
    is_padding = torch.zeros(read[1].shape[:2], dtype=torch.bool)
    is_padding[:, -1] = read[1][:, -1, 0] > 0
    return is_padding


_MASKS = {"attn_mask": _causal, "key_padding_mask": _padding}


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, y, reduction="none")


def _check(model: nn.Module, *, is_known: bool = True, mode: str = "flash_bk") -> None:
    model = model.double()
    x, y = torch.randn(B, T, E, dtype=torch.float64), torch.tensor([0, 1, 1])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = []
    for i in range(B):
        loss_B = _loss(model(x[i : i + 1]), y[i : i + 1])
        found = torch.autograd.grad(
            loss_B.sum(), list(trained.values()), allow_unused=True, materialize_grads=True
        )
        gradients.append(torch.cat([g.flatten() for g in found]))
    per_sample = torch.stack(gradients)
    norm_B = per_sample.norm(dim=1)
    C = float(norm_B.median())
    before = torch.cat([p.detach().flatten().clone() for p in trained.values()])
    optimizer = torch.optim.SGD(list(trained.values()), lr=1.0)
    private = dpsgd_track.make_private(
        model,
        optimizer,
        noise_multiplier=0.0,
        max_grad_norm=C,
        expected_batch_size=1,
        loss=_loss,
        mode=mode,
        spot_check=False,
    )
    private.backward(x, y)
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in trained.values()])
    assert private.last is not None
    assert private.last.norm_B is not None
    torch.testing.assert_close(private.last.norm_B.double(), norm_B, rtol=1e-10, atol=0)
    expected = (C / norm_B).clamp(max=1.0) @ per_sample
    torch.testing.assert_close(before - after, expected, rtol=1e-9, atol=1e-9)
    assert isinstance(private.mode, ComposedMode)
    capture = private.mode.engine.capture
    assert capture is not None
    kind = AttentionLayer if is_known else ExpandedLayer
    assert type(capture.captured["attention"]) is kind


@pytest.mark.parametrize(
    ("layer", "read"),
    # Keys and values of other widths are tensors of their own.
    [(a, b) for a in LAYERS for b in READS if a != "other-widths" or b == READS[-1]],
)
def test_projections_have_exact_gradients(layer: str, read: str) -> None:
    torch.manual_seed(0)
    _check(_Attending(layer, read))


@pytest.mark.parametrize("call", CALLS)
def test_calls_have_exact_gradients(call: str) -> None:
    torch.manual_seed(0)
    _check(_Attending("batch-first", "self", **CALLS[call]))


@pytest.mark.parametrize("mode", ["flash", "flash_fuse_bk", "ghost_bk"])
def test_modes_have_exact_gradients(mode: str) -> None:
    torch.manual_seed(0)
    _check(_Attending("time-first", "memory"), mode=mode)


@pytest.mark.parametrize("setting", ["add_bias_kv", "add_zero_attn"])
def test_other_formulas_run_on_copies(setting: str) -> None:
    torch.manual_seed(0)
    model = _Attending("batch-first", "self")
    model.attention = nn.MultiheadAttention(E, 2, batch_first=True, **{setting: True})
    _check(model, is_known=False)
