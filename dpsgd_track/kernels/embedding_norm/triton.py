"""The embedding norm on a GPU: one program adds the rows of one run of equal tokens.

Shapes: B samples, T positions, D values a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpsgd_track.kernels.tensor_table import ceil_div, next_power_of_2

# Values of a row that a program holds, and rows that it adds at a time. Runs may be long, as those
# of padding are.
MAX_BLOCK_D, BLOCK_T = 512, 16


@triton.jit
def _runs_kernel(
    sorted_ptr, order_ptr, dy_ptr, partial_ptr,
    T, D, dy_stride_b, dy_stride_t,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Squared norm of the sum of a run's rows; programs that do not start a run store 0."""
    sample = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sorted_ptr += sample * T
    order_ptr += sample * T
    dy_ptr += sample * dy_stride_b
    token = tl.load(sorted_ptr + first)
    before = tl.load(sorted_ptr + first - 1, mask=first > 0, other=-1)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    t = first
    is_in_run = token != before
    while is_in_run:
        ahead = t + tl.arange(0, BLOCK_T)
        is_same = tl.load(sorted_ptr + ahead, mask=ahead < T, other=-1) == token
        row = tl.load(order_ptr + ahead, mask=is_same, other=0)
        dy = tl.load(
            dy_ptr + row[:, None] * dy_stride_t + d[None, :],
            mask=is_same[:, None] & (d < D)[None, :],
            other=0.0,
        )
        total += tl.sum(dy.to(tl.float32), axis=0)
        t += BLOCK_T
        is_in_run = tl.load(sorted_ptr + t, mask=t < T, other=-1) == token
    place = (sample * T + first) * tl.num_programs(1) + tl.program_id(1)
    tl.store(partial_ptr + place, tl.sum(total * total))


def embedding_norm_sq(tokens_BT: Tensor, dy_BTD: Tensor) -> Tensor:
    """[B] float32, of gradients of at most 32 bits. Tokens must not be negative."""
    (B, T), D = tokens_BT.shape, dy_BTD.shape[2]
    assert dy_BTD.stride(2) == 1
    sorted_BT, order_BT = tokens_BT.sort(dim=1, stable=True)
    block_d = min(next_power_of_2(D), MAX_BLOCK_D)
    num_blocks = ceil_div(D, block_d)
    partial = dy_BTD.new_empty(B, T * num_blocks, dtype=torch.float32)
    _runs_kernel[(T, num_blocks, B)](
        sorted_BT, order_BT, dy_BTD, partial,
        T, D, dy_BTD.stride(0), dy_BTD.stride(1), BLOCK_D=block_d, BLOCK_T=BLOCK_T, num_warps=4,
    )  # fmt: skip
    return partial.sum(dim=1)
