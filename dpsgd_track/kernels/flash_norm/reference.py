"""The flash norm in plain torch: the definition, and the tiled computation tested against it.

Shapes: B samples, T positions, D inputs, P outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpsgd_track.kernels.device import uses_tensor_cores

TILE_T = 256
TILE_P = 512


def outer_norm_sq(x_BTD: Tensor, dy_BTP: Tensor) -> Tensor:
    """The definition: form every sample's gradient and square its norm. [B], O(B D P) memory."""
    grad_BPD = torch.einsum("btp,btd->bpd", accumulation(dy_BTP), accumulation(x_BTD))
    return grad_BPD.square().sum(dim=(1, 2))


def gram_form(x_BTD: Tensor, dy_BTP: Tensor) -> Tensor:
    """The Gram form, without materialising either Gram matrix."""
    total_B = x_BTD.new_zeros(len(x_BTD), dtype=accumulation_dtype(x_BTD))
    x_tiles, dy_tiles = x_BTD.split(TILE_T, dim=1), dy_BTP.split(TILE_T, dim=1)
    for row, (x_r, dy_r) in enumerate(zip(x_tiles, dy_tiles, strict=True)):
        for column in range(row + 1):
            gram_x = product(x_r, x_tiles[column].mT)
            gram_dy = product(dy_r, dy_tiles[column].mT)
            # The Gram matrices are symmetric: a tile off the diagonal counts twice.
            weight = 1.0 if column == row else 2.0
            total_B.add_(gram_x.mul_(gram_dy).sum(dim=(1, 2)), alpha=weight)
    # A sum of products of either sign can round to just below zero.
    return total_B.clamp_min_(0.0)


def outer_form(x_BTD: Tensor, dy_BTP: Tensor) -> Tensor:
    """The outer form, without materialising any gradient."""
    total_B = x_BTD.new_zeros(len(x_BTD), dtype=accumulation_dtype(x_BTD))
    for dy_BTp in dy_BTP.split(TILE_P, dim=2):
        total_B += product(dy_BTp.mT, x_BTD).square_().sum(dim=(1, 2))
    return total_B


def product(a: Tensor, b: Tensor) -> Tensor:
    """Batched a @ b, accumulated and returned in float32 (float64 for float64 inputs)."""
    if uses_tensor_cores(a):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(accumulation(a), accumulation(b))


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Type in which norms of `tensor` are accumulated: float64 for float64, else float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def accumulation(tensor: Tensor) -> Tensor:
    """`tensor` in its accumulation type."""
    return tensor.to(accumulation_dtype(tensor))
