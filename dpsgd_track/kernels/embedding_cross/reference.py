"""The inner product in plain torch: the definition, and the tiled computation tested against it.

Shapes: B samples, T looked-up positions, S positions of the head, D values a row, V rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpsgd_track.kernels.embedding_norm import per_sample_table
from dpsgd_track.kernels.flash_norm.reference import accumulation, accumulation_dtype, product

TILE_T = 256


def per_sample_inner_product(
    tokens_BT: Tensor, dy_BTD: Tensor, x_BSD: Tensor, dy_BSV: Tensor
) -> Tensor:
    """The definition, from both dense gradients, [B, V, D] each. Returns [B]."""
    table = per_sample_table(tokens_BT, dy_BTD, dy_BSV.shape[-1])
    head = torch.einsum("bsv,bsd->bvd", accumulation(dy_BSV), accumulation(x_BSD))
    return (table * head).sum(dim=(1, 2))


def embedding_cross(tokens_BT: Tensor, dy_BTD: Tensor, x_BSD: Tensor, dy_BSV: Tensor) -> Tensor:
    """<E_i, H_i> of each sample.

    Args:
        tokens_BT: row looked up at each position, integers.
        dy_BTD: gradients of the looked-up rows, zero at padding.
        x_BSD: the head's inputs.
        dy_BSV: gradients of the head's outputs.
    Returns:
        [B], float32 (float64 for float64 inputs), of either sign.
    """
    total_B = x_BSD.new_zeros(len(x_BSD), dtype=accumulation_dtype(x_BSD))
    S = x_BSD.shape[1]
    for tokens_Bt, dy_BtD in zip(
        tokens_BT.split(TILE_T, dim=1), dy_BTD.split(TILE_T, dim=1), strict=True
    ):
        picked_BSt = dy_BSV.gather(2, tokens_Bt.unsqueeze(1).expand(-1, S, -1))
        total_B += (product(x_BSD, dy_BtD.mT) * picked_BSt).sum(dim=(1, 2))
    return total_B
