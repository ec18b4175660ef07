"""torch.nn.Embedding: one gradient row per distinct token; the padding row has none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dpsgd_track.kernels.embedding_norm import embedding_norm_sq
from dpsgd_track.kernels.flash_norm.reference import accumulation


def matches(module: nn.Module) -> bool:
    """True for embeddings whose gradient is the plain sum of its rows' gradients."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )


def norm_sq(
    module: nn.Module, x: Tensor, dy: Tensor, outer_norm: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Squared norm [B] of each sample's gradient of the table."""
    assert isinstance(module, nn.Embedding)
    tokens_BT, dy_BTD = _positions(module, x, dy)
    return {"weight": embedding_norm_sq(tokens_BT, dy_BTD)}


def clipped_sum(
    module: nn.Module, x: Tensor, dy: Tensor, clip_factor_B: Tensor
) -> dict[str, Tensor]:
    """sum_i c_i g_i of the table, [V, D]."""
    assert isinstance(module, nn.Embedding)
    tokens_BT, dy_BTD = _positions(module, x, dy)
    rows = accumulation(dy_BTD) * clip_factor_B.view(-1, 1, 1)
    table = rows.new_zeros(module.num_embeddings, module.embedding_dim)
    return {"weight": table.index_add_(0, tokens_BT.flatten(), rows.flatten(0, 1))}


def _positions(module: nn.Embedding, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] and their gradients [B, T, D], zeroed at the padding index."""
    tokens_BT = x.reshape(len(x), -1)
    dy_BTD = dy.reshape(*tokens_BT.shape, dy.shape[-1])
    if module.padding_idx is not None:
        is_padding = tokens_BT.eq(module.padding_idx).unsqueeze(-1)
        dy_BTD = torch.where(is_padding, torch.zeros_like(dy_BTD), dy_BTD)
    return tokens_BT, dy_BTD
