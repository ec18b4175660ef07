"""The clipped sum of outer products on a GPU: one launch, float32 sums on tensor cores.

A tile holds one running sum. It is multiplied by c_{i-1} / c_i before sample i is added, and by
the last factor at the end, so that each product is scaled by its own factor. A sample that is left
out is not read, and leaves the running sum as it is.

Shapes: B samples, T positions, D inputs, P outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpsgd_track.kernels.flash_norm.triton import (
    BLOCK_T,
    GROUP,
    grouped,
    outer_tiles,
    with_unit_stride,
)

# Smallest factor with full precision: the start of float32's normal range.
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _clipped_product_kernel(
    x_ptr, dy_ptr, factor_ptr, sum_ptr,
    B, T, D, P,
    x_stride_b, x_stride_t, dy_stride_b, dy_stride_t,
    tiles_p, tiles_d,
    IS_EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = grouped(tl.program_id(0), tiles_p, tiles_d, GROUP)
    p = row * BLOCK_P + tl.arange(0, BLOCK_P)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    dy_ptr += t[:, None] * dy_stride_t + p[None, :]
    x_ptr += t[:, None] * x_stride_t + d[None, :]
    coming = tl.load(factor_ptr, mask=B > 0, other=0.0)
    is_kept = tl.abs(coming) >= SMALLEST
    ratio = 1.0
    before = tl.where(is_kept, coming, 1.0)
    for sample in range(B):
        # Loaded early, as the next sample's loads depend on it.
        coming = tl.load(factor_ptr + sample + 1, mask=sample + 1 < B, other=0.0)
        total *= ratio
        num_positions = tl.where(is_kept, T, 0)
        # Unmasked loads cannot skip a sample, so its loop has no iterations instead.
        stop = num_positions if IS_EVEN else T
        dy_tile = dy_ptr
        x_tile = x_ptr
        for start in range(0, stop, BLOCK_T):
            if IS_EVEN:
                dy = tl.load(dy_tile)
                x = tl.load(x_tile)
            else:
                is_there = (start + t)[:, None] < num_positions
                dy = tl.load(dy_tile, mask=is_there & (p[None, :] < P), other=0.0)
                x = tl.load(x_tile, mask=is_there & (d[None, :] < D), other=0.0)
            total = tl.dot(tl.trans(dy), x, total)
            dy_tile += BLOCK_T * dy_stride_t
            x_tile += BLOCK_T * x_stride_t
        is_kept = tl.abs(coming) >= SMALLEST
        # Not before / before: a GPU's quotient of equal numbers need not be 1.
        ratio = tl.where(is_kept, before / tl.where(is_kept, coming, 1.0), 1.0)
        before = tl.where(is_kept, coming, before)
        dy_ptr += dy_stride_b
        x_ptr += x_stride_b
    total *= before
    place = sum_ptr + p.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(place, total, mask=(p[:, None] < P) & (d[None, :] < D))


def clipped_product(x_BTD: Tensor, dy_BTP: Tensor, factor_B: Tensor) -> Tensor:
    """[P, D] float32; see `kernels.clipped_product`."""
    x_BTD, dy_BTP = with_unit_stride(x_BTD), with_unit_stride(dy_BTP)
    (B, T, D), P = x_BTD.shape, dy_BTP.shape[2]
    block_p, block_d, num_stages = outer_tiles(x_BTD, 1, P, D)
    tiles_p, tiles_d = triton.cdiv(P, block_p), triton.cdiv(D, block_d)
    total = x_BTD.new_empty(P, D, dtype=torch.float32)
    _clipped_product_kernel[(tiles_p * tiles_d,)](
        x_BTD, dy_BTP, factor_B, total,
        B, T, D, P, x_BTD.stride(0), x_BTD.stride(1), dy_BTP.stride(0), dy_BTP.stride(1),
        tiles_p, tiles_d,
        IS_EVEN=not (T % BLOCK_T or P % block_p or D % block_d),
        BLOCK_P=block_p, BLOCK_D=block_d, BLOCK_T=BLOCK_T, GROUP=GROUP,
        num_warps=8, num_stages=num_stages,
    )  # fmt: skip
    return total
