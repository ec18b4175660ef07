"""Layers whose call or whose outputs have another form, as layers of one input and one output."""

from __future__ import annotations

from torch import Tensor, nn


class FirstOutput(nn.Module):
    """The first output of a layer that returns several, such as a recurrent one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)[0]
        return y


class SelfAttention(nn.Module):
    """Attention of [B, T, width] inputs to themselves."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y
