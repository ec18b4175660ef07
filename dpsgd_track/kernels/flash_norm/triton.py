"""The flash norm on a GPU: 16-bit factors on tensor cores, float32 sums, one result per tile.

Shapes: B samples, T positions, D inputs, P outputs. Every kernel writes one partial sum for each
tile, and the partial sums are added in a fixed order: results do not change from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpsgd_track.kernels.tensor_table import address_table, ceil_div, programs_of

# Positions that a tile of a weight gradient takes at a time.
BLOCK_T = 64
# Tiles of a Gram matrix, [BLOCK_S, BLOCK_S], a step of BLOCK_K features at a time. Small tiles are
# for batches that have fewer large ones than the GPU has multiprocessors.
BLOCK_S, SMALL_S, BLOCK_K = 128, 64, 64
# Rows of tiles that are computed together, so that their operands stay in the L2 cache.
GROUP = 8


@triton.jit
def grouped(program, tiles_p, tiles_d, GROUP: tl.constexpr):
    """(row, column) of the tile that `program` computes."""
    in_group = GROUP * tiles_d
    first = program // in_group * GROUP
    size = tl.minimum(tiles_p - first, GROUP)
    within = program % in_group
    return first + within % size, within // size


@triton.jit
def _outer_kernel(
    x_ptr, dy_ptr, grad_ptr, partial_ptr,
    T, D, P,
    x_stride_b, x_stride_t, dy_stride_b, dy_stride_t,
    tiles_p, tiles_d,
    STORES: tl.constexpr, IS_EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of sum_t dy_t x_t^T of one sample, and its squared norm."""
    sample = tl.program_id(1).to(tl.int64)
    row, column = grouped(tl.program_id(0), tiles_p, tiles_d, GROUP)
    p = row * BLOCK_P + tl.arange(0, BLOCK_P)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    dy_tile = dy_ptr + sample * dy_stride_b + t[:, None] * dy_stride_t + p[None, :]
    x_tile = x_ptr + sample * x_stride_b + t[:, None] * x_stride_t + d[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for start in range(0, T, BLOCK_T):
        if IS_EVEN:
            dy = tl.load(dy_tile)
            x = tl.load(x_tile)
        else:
            is_there = (start + t)[:, None] < T
            dy = tl.load(dy_tile, mask=is_there & (p[None, :] < P), other=0.0)
            x = tl.load(x_tile, mask=is_there & (d[None, :] < D), other=0.0)
        total = tl.dot(tl.trans(dy), x, total)
        dy_tile += BLOCK_T * dy_stride_t
        x_tile += BLOCK_T * x_stride_t
    if STORES:
        # The norm is that of the gradients as they are stored.
        stored = total.to(grad_ptr.dtype.element_ty)
        total = stored.to(tl.float32)
        grad_tile = grad_ptr + sample * P * D + p.to(tl.int64)[:, None] * D + d[None, :]
        if IS_EVEN:
            tl.store(grad_tile, stored)
        else:
            tl.store(grad_tile, stored, mask=(p[:, None] < P) & (d[None, :] < D))
    partial = sample * tiles_p * tiles_d + tl.program_id(0)
    tl.store(partial_ptr + partial, tl.sum(total * total))


@triton.jit
def _gram_tile(
    tile_ptr, stride_t, row, column, T, K,
    IS_EVEN: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products of the rows of two blocks of positions, over K features."""
    s = row * BLOCK_S + tl.arange(0, BLOCK_S)
    t = column * BLOCK_S + tl.arange(0, BLOCK_S)
    k = tl.arange(0, BLOCK_K)
    a_tile = tile_ptr + s.to(tl.int64)[:, None] * stride_t + k[None, :]
    b_tile = tile_ptr + t.to(tl.int64)[:, None] * stride_t + k[None, :]
    total = tl.zeros((BLOCK_S, BLOCK_S), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        if IS_EVEN:
            a = tl.load(a_tile)
            b = tl.load(b_tile)
        else:
            is_there = (start + k)[None, :] < K
            a = tl.load(a_tile, mask=is_there & (s[:, None] < T), other=0.0)
            b = tl.load(b_tile, mask=is_there & (t[:, None] < T), other=0.0)
        total = tl.dot(a, tl.trans(b), total)
        a_tile += BLOCK_K
        b_tile += BLOCK_K
    return total


@triton.jit
def factors_of(row_ptr, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """(x, dy, T, D, P, strides of x and dy by sample and position) from a row of the table."""
    x_ptr = tl.load(row_ptr).to(tl.pointer_type(DTYPE))
    dy_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(DTYPE))
    T = tl.load(row_ptr + 2).to(tl.int32)
    D = tl.load(row_ptr + 3).to(tl.int32)
    P = tl.load(row_ptr + 4).to(tl.int32)
    x_stride_b = tl.load(row_ptr + 5)
    x_stride_t = tl.load(row_ptr + 6).to(tl.int32)
    dy_stride_b = tl.load(row_ptr + 7)
    dy_stride_t = tl.load(row_ptr + 8).to(tl.int32)
    if IS_ALIGNED:
        x_ptr, dy_ptr = tl.multiple_of(x_ptr, 16), tl.multiple_of(dy_ptr, 16)
        D, P = tl.multiple_of(D, 16), tl.multiple_of(P, 16)
        x_stride_b, x_stride_t = tl.multiple_of(x_stride_b, 16), tl.multiple_of(x_stride_t, 16)
        dy_stride_b, dy_stride_t = tl.multiple_of(dy_stride_b, 16), tl.multiple_of(dy_stride_t, 16)
    return x_ptr, dy_ptr, T, D, P, x_stride_b, x_stride_t, dy_stride_b, dy_stride_t


@triton.jit
def _gram_kernel(
    table_ptr, owner_ptr, first_ptr, partial_ptr, max_tiles,
    DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr, IS_EVEN: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile on or below the diagonal of (X X^T) * (dY dY^T) of a layer, summed."""
    layer = tl.load(owner_ptr + tl.program_id(0))
    tile = tl.program_id(0) - tl.load(first_ptr + layer)
    sample = tl.program_id(1).to(tl.int64)
    x_ptr, dy_ptr, T, D, P, x_stride_b, x_stride_t, dy_stride_b, dy_stride_t = factors_of(
        table_ptr + layer * COLUMNS, DTYPE, IS_ALIGNED
    )
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded.
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    column = tile - row * (row + 1) // 2
    x_tile, dy_tile = x_ptr + sample * x_stride_b, dy_ptr + sample * dy_stride_b
    gram_x = _gram_tile(x_tile, x_stride_t, row, column, T, D, IS_EVEN, BLOCK_S, BLOCK_K)
    gram_dy = _gram_tile(dy_tile, dy_stride_t, row, column, T, P, IS_EVEN, BLOCK_S, BLOCK_K)
    # The Gram matrices are symmetric: a tile off the diagonal counts twice.
    weight = tl.where(row == column, 1.0, 2.0)
    place = (layer * tl.num_programs(1) + tl.program_id(1)) * max_tiles + tile
    tl.store(partial_ptr + place, weight * tl.sum(gram_x * gram_dy))


def outer_tiles(x: Tensor, num_samples: int, P: int, D: int) -> tuple[int, int, int]:
    """(BLOCK_P, BLOCK_D, pipeline stages) for gradients [P, D] on the device of `x`."""
    if not has_large_shared_memory(x.device):
        return 128, 128, 2
    # Large tiles read less; with small tiles there are enough for every multiprocessor.
    num_large = num_samples * ceil_div(P, 128) * ceil_div(D, 256)
    return 128, 256 if num_large >= num_multiprocessors(x.device) * 3 // 4 else 128, 4


@cache
def has_large_shared_memory(device: torch.device) -> bool:
    """True if a program may use 200 KB of shared memory, as on Hopper and later."""
    if device.type != "cuda":
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) >= 200 * 1024


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def outer_form(x_BTD: Tensor, dy_BTP: Tensor) -> Tensor:
    """Squared norms [B], float32, without materialising any gradient."""
    return _outer(x_BTD, dy_BTP, None)


def gradients_and_norms(x_BTD: Tensor, dy_BTP: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample gradients [B, P, D] in the factors' type, and their squared norms [B]."""
    grad_BPD = dy_BTP.new_empty(len(x_BTD), dy_BTP.shape[2], x_BTD.shape[2])
    return grad_BPD, _outer(x_BTD, dy_BTP, grad_BPD)


def _outer(x_BTD: Tensor, dy_BTP: Tensor, grad_BPD: Tensor | None) -> Tensor:
    x_BTD, dy_BTP = with_unit_stride(x_BTD), with_unit_stride(dy_BTP)
    (B, T, D), P = x_BTD.shape, dy_BTP.shape[2]
    block_p, block_d, num_stages = outer_tiles(x_BTD, B, P, D)
    tiles_p, tiles_d = ceil_div(P, block_p), ceil_div(D, block_d)
    partial = x_BTD.new_empty(B, tiles_p * tiles_d, dtype=torch.float32)
    _outer_kernel[(tiles_p * tiles_d, B)](
        x_BTD, dy_BTP, x_BTD if grad_BPD is None else grad_BPD, partial,
        T, D, P, x_BTD.stride(0), x_BTD.stride(1), dy_BTP.stride(0), dy_BTP.stride(1),
        tiles_p, tiles_d,
        STORES=grad_BPD is not None,
        IS_EVEN=not (T % BLOCK_T or P % block_p or D % block_d),
        BLOCK_P=block_p, BLOCK_D=block_d, BLOCK_T=BLOCK_T, GROUP=GROUP,
        num_warps=8, num_stages=num_stages,
    )  # fmt: skip
    return partial.sum(dim=1)


def gram_form(x_BTD: Tensor, dy_BTP: Tensor) -> Tensor:
    """Squared norms [B], float32, without materialising either Gram matrix."""
    (norms_B,) = gram_forms([(x_BTD, dy_BTP)])
    return norms_B


def gram_forms(factors: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """`gram_form` of the factors of several layers, with one launch for all that are alike."""
    pairs = [(with_unit_stride(x_BTD), with_unit_stride(dy_BTP)) for x_BTD, dy_BTP in factors]
    B, device = len(pairs[0][0]), pairs[0][0].device
    num_large = sum(_num_gram_tiles(x_BTD.shape[1], BLOCK_S) for x_BTD, _ in pairs)
    is_large = B * num_large >= num_multiprocessors(device)
    block_s, num_warps = (BLOCK_S, 8) if is_large else (SMALL_S, 4)

    def is_even(T: int, D: int, P: int) -> bool:
        return not (T % block_s or D % BLOCK_K or P % BLOCK_K)

    norms: list[Tensor] = [pairs[0][0]] * len(pairs)
    for kind, rows in alike(dict(enumerate(pairs)), is_even).items():
        num_tiles = tuple(_num_gram_tiles(pairs[place][0].shape[1], block_s) for place in rows)
        owner, first = programs_of(num_tiles, device)
        partial = torch.zeros(len(rows), B, max(num_tiles), dtype=torch.float32, device=device)
        _gram_kernel[(len(owner), B)](
            address_table(list(rows.values()), device), owner, first,
            partial, max(num_tiles),
            **kind.options(), COLUMNS=NUM_COLUMNS, BLOCK_S=block_s, BLOCK_K=BLOCK_K,
            num_warps=num_warps, num_stages=4 if has_large_shared_memory(device) else 2,
        )  # fmt: skip
        # A sum of products of either sign can round to just below zero.
        found = partial.sum(dim=2).clamp_min_(0.0).unbind()
        for place, norms_B in zip(rows, found, strict=True):
            norms[place] = norms_B
    return norms


NUM_COLUMNS = 9
"""Numbers in a row of the table that `factors_of` reads."""


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Kind(NamedTuple):
    """Layers whose factors one compiled kernel takes."""

    dtype: Any
    is_aligned: bool
    """All addresses and sizes are multiples of 16."""
    is_even: bool

    def options(self) -> dict[str, Any]:
        """Compile-time arguments of a kernel."""
        return {"DTYPE": self.dtype, "IS_ALIGNED": self.is_aligned, "IS_EVEN": self.is_even}


def alike(
    pairs: Mapping[int, tuple[Tensor, Tensor]], is_even: Callable[[int, int, int], bool]
) -> dict[Kind, dict[int, tuple[int, ...]]]:
    """Rows of the table by place, of the layers whose factors one compiled kernel takes.

    Args:
        pairs: (x, dy) of the layer at each place.
        is_even: (T, D, P) -> True if tiles end where the factors do.
    """
    rows: dict[Kind, dict[int, tuple[int, ...]]] = {}
    for place, (x_BTD, dy_BTP) in pairs.items():
        (_, T, D), P = x_BTD.shape, dy_BTP.shape[2]
        x_b, x_t, _ = x_BTD.stride()
        dy_b, dy_t, _ = dy_BTP.stride()
        x, dy = x_BTD.data_ptr(), dy_BTP.data_ptr()
        # Of any number that is no multiple of 16, a low bit is left.
        is_aligned = (x | dy | D | P | x_b | x_t | dy_b | dy_t) % 16 == 0
        kind = Kind(_DTYPES[x_BTD.dtype], is_aligned, is_aligned and is_even(T, D, P))
        rows.setdefault(kind, {})[place] = x, dy, T, D, P, x_b, x_t, dy_b, dy_t
    return rows


def _num_gram_tiles(T: int, block: int) -> int:
    """Tiles on or below the diagonal of a Gram matrix [T, T]."""
    rows = ceil_div(T, block)
    return rows * (rows + 1) // 2


def with_unit_stride(tensor: Tensor) -> Tensor:
    """`tensor` with contiguous features; a copy if need be."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()
