"""The embedding norm in plain torch.

Shapes: B samples, T positions, D values a row, V rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpsgd_track.kernels.flash_norm.reference import accumulation


def per_sample_table(tokens_BT: Tensor, dy_BTD: Tensor, num_rows: int) -> Tensor:
    """Each sample's dense gradient of the table, [B, V, D], in its accumulation type."""
    rows_BTD = accumulation(dy_BTD)
    table = rows_BTD.new_zeros(len(tokens_BT), num_rows, rows_BTD.shape[-1])
    return table.scatter_add_(1, tokens_BT.unsqueeze(-1).expand_as(rows_BTD), rows_BTD)


def per_sample_norm_sq(tokens_BT: Tensor, dy_BTD: Tensor, num_rows: int) -> Tensor:
    """The definition, from each sample's dense gradient. [B], O(B V D) memory."""
    return per_sample_table(tokens_BT, dy_BTD, num_rows).square().sum(dim=(1, 2))


def embedding_norm_sq(tokens_BT: Tensor, dy_BTD: Tensor) -> Tensor:
    """Sort the tokens, add the rows of equal ones, and square."""
    sorted_BT, order_BT = tokens_BT.sort(dim=1, stable=True)
    # Equal tokens are neighbours now; number the runs 0, 1, ... within each sample.
    starts = torch.zeros_like(sorted_BT)
    starts[:, 1:] = (sorted_BT[:, 1:] != sorted_BT[:, :-1]).to(starts.dtype)
    run_BT = starts.cumsum(dim=1)
    index = order_BT.unsqueeze(-1).expand_as(dy_BTD)
    dy_sorted = accumulation(dy_BTD).gather(1, index)
    rows = torch.zeros_like(dy_sorted)
    rows.scatter_add_(1, run_BT.unsqueeze(-1).expand_as(dy_sorted), dy_sorted)
    return rows.square_().sum(dim=(1, 2))
