"""Sums over positions on a GPU, at memory bandwidth: one launch for all layers.

Shapes: B samples, T positions, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpsgd_track.kernels.flash_norm.triton import with_unit_stride
from dpsgd_track.kernels.tensor_table import KINDS, address_table, ceil_div, packed, programs_of
from dpsgd_track.kernels.weighted_sum.triton import aligned, load, size_of

# Features of a program, and positions that it loads at a time.
BLOCK_D, BLOCK_T = 128, 32
_COLUMNS = tl.constexpr(7)


@triton.jit
def _position_sums_kernel(
    table_ptr, owner_ptr, first_ptr,
    IS_EVEN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    layer = tl.load(owner_ptr + tl.program_id(0))
    block = tl.program_id(0) - tl.load(first_ptr + layer)
    sample = tl.program_id(1)
    row_ptr = table_ptr + layer * _COLUMNS
    address = tl.load(row_ptr)
    kind = tl.load(row_ptr + 1)
    T = tl.load(row_ptr + 2).to(tl.int32)
    D = size_of(row_ptr + 3, IS_EVEN)
    stride_b = size_of(row_ptr + 4, IS_EVEN)
    stride_t = size_of(row_ptr + 5, IS_EVEN)
    sum_ptr = tl.load(row_ptr + 6).to(tl.pointer_type(tl.float32))
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for start in range(0, T, BLOCK_T):
        is_there = ((start + t)[:, None] < T) & (d[None, :] < D)
        offset = sample * stride_b + (start + t)[:, None] * stride_t + d[None, :]
        total += load(address, kind, offset, is_there)
    tl.store(sum_ptr + sample * D + d, tl.sum(total, axis=0), mask=d < D)


def position_sums(gradients: Sequence[Tensor]) -> list[Tensor]:
    """[B, D] float32 each; see `kernels.position_sum`."""
    gradients = [aligned(with_unit_stride(gradient)) for gradient in gradients]
    B, device = len(gradients[0]), gradients[0].device
    sums = packed([torch.Size((B, gradient.shape[2])) for gradient in gradients], gradients[0])
    rows = [
        (g.data_ptr(), KINDS[g.dtype], *g.shape[1:], *g.stride()[:2], total.data_ptr())
        for g, total in zip(gradients, sums, strict=True)
    ]
    is_even = all(number % 16 == 0 for row in rows for number in row[3:6])
    owner, first = programs_of(tuple(ceil_div(row[3], BLOCK_D) for row in rows), device)
    _position_sums_kernel[(len(owner), B)](
        address_table(rows, device), owner, first,
        IS_EVEN=is_even, BLOCK_D=BLOCK_D, BLOCK_T=BLOCK_T, num_warps=4,
    )  # fmt: skip
    return sums
