"""The clipped sum of outer products on a GPU: one launch, float32 sums on tensor cores.

A tile holds one running sum. It is multiplied by c_{i-1} / c_i before sample i is added, and by
the last factor at the end, so that each product is scaled by its own factor. A sample that is left
out is not read, and leaves the running sum as it is.

A small parameter has too few tiles for all multiprocessors: its samples are divided among several
programs a tile, whose sums are added in a fixed order.

Shapes: B samples, T positions, D inputs, P outputs, S parts of the samples.
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
    num_multiprocessors,
    outer_tiles,
    with_unit_stride,
)

# Smallest factor with full precision: the start of float32's normal range.
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
# Positions at a time, warps and pipeline stages of a small tile, two of which run on a
# multiprocessor at once.
SMALL_T, SMALL_WARPS, SMALL_STAGES, SMALL_AT_ONCE = 32, 4, 4, 2
MAX_PARTS = 8


@triton.jit
def _clipped_product_kernel(
    x_ptr, dy_ptr, factor_ptr, sum_ptr,
    B, T, D, P,
    x_stride_b, x_stride_t, dy_stride_b, dy_stride_t,
    tiles_p, tiles_d, part_size,
    IS_EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = grouped(tl.program_id(0), tiles_p, tiles_d, GROUP)
    part = tl.program_id(1)
    first = part * part_size
    stop_sample = tl.minimum(first + part_size, B)
    p = row * BLOCK_P + tl.arange(0, BLOCK_P)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    dy_ptr += first.to(tl.int64) * dy_stride_b + t[:, None] * dy_stride_t + p[None, :]
    x_ptr += first.to(tl.int64) * x_stride_b + t[:, None] * x_stride_t + d[None, :]
    coming = tl.load(factor_ptr + first, mask=first < B, other=0.0)
    is_kept = tl.abs(coming) >= SMALLEST
    ratio = 1.0
    before = tl.where(is_kept, coming, 1.0)
    for sample in range(first, stop_sample):
        # Loaded early, as the next sample's loads depend on it.
        coming = tl.load(factor_ptr + sample + 1, mask=sample + 1 < stop_sample, other=0.0)
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
    sum_ptr += part.to(tl.int64) * P * D
    place = sum_ptr + p.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(place, total, mask=(p[:, None] < P) & (d[None, :] < D))


def clipped_product(x_BTD: Tensor, dy_BTP: Tensor, factor_B: Tensor) -> Tensor:
    """[P, D] float32; see `kernels.clipped_product`."""
    x_BTD, dy_BTP = with_unit_stride(x_BTD), with_unit_stride(dy_BTP)
    (B, T, D), P = x_BTD.shape, dy_BTP.shape[2]
    block_p, block_d, block_t, num_warps, num_stages = _tiles(x_BTD, P)
    tiles_p, tiles_d = triton.cdiv(P, block_p), triton.cdiv(D, block_d)
    num_parts = _num_parts(x_BTD, P, tiles_p * tiles_d) if block_t == SMALL_T else 1
    part_size = triton.cdiv(B, num_parts)
    sum_SPD = x_BTD.new_empty(num_parts, P, D, dtype=torch.float32)
    _clipped_product_kernel[(tiles_p * tiles_d, num_parts)](
        x_BTD, dy_BTP, factor_B, sum_SPD,
        B, T, D, P, x_BTD.stride(0), x_BTD.stride(1), dy_BTP.stride(0), dy_BTP.stride(1),
        tiles_p, tiles_d, part_size,
        IS_EVEN=not (T % block_t or P % block_p or D % block_d),
        BLOCK_P=block_p, BLOCK_D=block_d, BLOCK_T=block_t, GROUP=GROUP,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return sum_SPD[0] if num_parts == 1 else sum_SPD.sum(dim=0)


def _tiles(x_BTD: Tensor, P: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_P, BLOCK_D, BLOCK_T, warps, pipeline stages), as measured on an H100."""
    _, T, D = x_BTD.shape
    block_p, block_d, num_stages = outer_tiles(x_BTD, 1, P, D)
    # Between samples the pipeline runs empty: with few positions a sample, or fewer large tiles
    # than multiprocessors, small tiles lose less by it.
    if block_d == 256 and T >= 4 * BLOCK_T:
        return block_p, block_d, BLOCK_T, 8, num_stages
    return 128, 128, SMALL_T, SMALL_WARPS, SMALL_STAGES


def _num_parts(x_BTD: Tensor, P: int, num_tiles: int) -> int:
    """Parts that the samples are divided into, S: the fewest that keep all multiprocessors busy."""
    B, T, D = x_BTD.shape
    at_once = SMALL_AT_ONCE * num_multiprocessors(x_BTD.device)
    best, least = 1, float("inf")
    num_parts = 1
    while num_parts <= min(B, MAX_PARTS):
        time = triton.cdiv(num_tiles * num_parts, at_once) / num_parts
        # Sums that are written and read again cost more than they save beyond the factors' bytes.
        is_worth_it = num_parts == 1 or 4 * num_parts * P * D <= B * T * (D + P)
        if is_worth_it and time < least:
            best, least = num_parts, time
        num_parts *= 2
    return best
