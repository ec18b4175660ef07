"""Clipped sums of outer products on a GPU: many layers a launch, float32 sums on tensor cores.

A tile holds one running sum. It is multiplied by c_{i-1} / c_i before sample i is added, and by
the last factor at the end, so that each product is scaled by its own factor. A sample that is left
out is not read, and leaves the running sum as it is.

Layers with too few tiles for all multiprocessors have their samples divided among several programs
a tile, whose sums are added in a fixed order.

Shapes: B samples, T positions, D inputs, P outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpsgd_track.kernels.flash_norm.triton import (
    BLOCK_T,
    GROUP,
    NUM_COLUMNS,
    Kind,
    alike,
    factors_of,
    grouped,
    has_large_shared_memory,
    num_multiprocessors,
    with_unit_stride,
)
from dpsgd_track.kernels.tensor_table import (
    address_table,
    ceil_div,
    packed_size,
    programs_of,
    unpacked,
    write_rows,
)

# Smallest factor with full precision: the start of float32's normal range.
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _rows_of_sum(row_ptr, p, D, IS_ALIGNED: tl.constexpr):
    """Addresses of rows `p` of a sum, of which so many lie together, and then comes a gap."""
    sum_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.float32))
    num_together = tl.load(row_ptr + 1).to(tl.int32)
    stride = tl.load(row_ptr + 2)
    if IS_ALIGNED:
        sum_ptr, stride = tl.multiple_of(sum_ptr, 16), tl.multiple_of(stride, 16)
    run = p // num_together
    return sum_ptr + run.to(tl.int64) * stride + (p - run * num_together).to(tl.int64) * D


@triton.jit
def _clipped_product_kernel(
    table_ptr, owner_ptr, first_ptr, B, part_size, part_stride,
    DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr, IS_EVEN: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    layer = tl.load(owner_ptr + tl.program_id(0))
    tile = tl.program_id(0) - tl.load(first_ptr + layer)
    part = tl.program_id(1)
    row_ptr = table_ptr + layer * COLUMNS
    x_ptr, dy_ptr, T, D, P, x_stride_b, x_stride_t, dy_stride_b, dy_stride_t = factors_of(
        row_ptr, DTYPE, IS_ALIGNED
    )
    factor_ptr = tl.load(row_ptr + COLUMNS - 4).to(tl.pointer_type(tl.float32))
    row, column = grouped(tile, tl.cdiv(P, BLOCK_P), tl.cdiv(D, BLOCK_D), GROUP)
    first = part * part_size
    stop_sample = tl.minimum(first + part_size, B)
    p = row * BLOCK_P + tl.arange(0, BLOCK_P)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    dy_ptr += first * dy_stride_b
    x_ptr += first * x_stride_b
    dy_ptr += t[:, None] * dy_stride_t + p[None, :]
    x_ptr += t[:, None] * x_stride_t + d[None, :]
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
    place = _rows_of_sum(row_ptr + COLUMNS - 3, p, D, IS_ALIGNED) + part.to(tl.int64) * part_stride
    tl.store(place[:, None] + d[None, :], total, mask=(p[:, None] < P) & (d[None, :] < D))


def clipped_product(x_BTD: Tensor, dy_BTP: Tensor, factor_B: Tensor) -> Tensor:
    """[P, D] float32; see `kernels.clipped_product`."""
    (total,) = clipped_products([(x_BTD, dy_BTP)], [factor_B])
    return total


def clipped_products(
    layers: Sequence[tuple[Tensor, Tensor]], factors: Sequence[Tensor]
) -> list[Tensor]:
    """`clipped_product` of several layers, with one launch for all that are alike."""
    sums = list(factors)
    for group in _groups(layers, factors):
        for place, total in zip(group.places, _formed(group, factors[0]), strict=True):
            sums[place] = total
    return sums


def clipped_products_into(
    outs: Sequence[Tensor], layers: Sequence[tuple[Tensor, Tensor]], factors: Sequence[Tensor]
) -> None:
    """The same sums, written into the rows of `outs`."""
    for group in _groups(layers, factors):
        group_outs = [outs[place] for place in group.places]
        if group.num_parts == 1 and (
            not group.kind.is_aligned or all(map(_is_aligned, group_outs))
        ):
            _launch(group, group_outs, factors[0])
            continue
        for out, total in zip(group_outs, _formed(group, factors[0]), strict=True):
            write_rows(out, total)


def _groups(layers: Sequence[tuple[Tensor, Tensor]], factors: Sequence[Tensor]) -> Iterator[_Group]:
    pairs = [(with_unit_stride(x_BTD), with_unit_stride(dy_BTP)) for x_BTD, dy_BTP in layers]
    large = [place for place, pair in enumerate(pairs) if _gains_by_large_tiles(*pair)]
    # With fewer large tiles than multiprocessors, small ones lose less.
    num_large = sum(_num_tiles(*pairs[place], _LARGE) for place in large)
    if num_large < num_multiprocessors(factors[0].device) * 3 // 4:
        large = []
    small = [place for place in range(len(pairs)) if place not in large]
    for places, tiles in ((large, _LARGE), (small, _SMALL)):
        for kind, rows in alike({place: pairs[place] for place in places}, tiles.is_even).items():
            yield _Group(
                list(rows),
                [pairs[place] for place in rows],
                [(*row, factors[place].data_ptr()) for place, row in rows.items()],
                kind,
                tiles,
            )


class _Tiles(NamedTuple):
    """Tiles of a product, as measured on an H100."""

    block_p: int
    block_d: int
    block_t: int
    num_warps: int
    num_stages: int

    def is_even(self, T: int, D: int, P: int) -> bool:
        """True if tiles end where the factors do."""
        return not (T % self.block_t or D % self.block_d or P % self.block_p)


_LARGE = _Tiles(128, 256, BLOCK_T, 8, 4)
"""Read less."""
_SMALL = _Tiles(128, 128, 32, 4, 4)
"""Two of them run on a multiprocessor at once. Between samples a tile's pipeline runs empty, which
costs less where another one computes."""
_AT_ONCE = 2
MAX_PARTS = 8
"""Parts that the samples of a launch are divided into, at most."""


def _gains_by_large_tiles(x_BTD: Tensor, dy_BTP: Tensor) -> bool:
    return has_large_shared_memory(x_BTD.device) and x_BTD.shape[1] >= 4 * BLOCK_T


def _num_tiles(x_BTD: Tensor, dy_BTP: Tensor, tiles: _Tiles) -> int:
    rows, columns = dy_BTP.shape[2], x_BTD.shape[2]
    return ceil_div(rows, tiles.block_p) * ceil_div(columns, tiles.block_d)


@dataclass
class _Group:
    """Layers of one launch."""

    places: list[int]
    pairs: list[tuple[Tensor, Tensor]]
    rows: list[tuple[int, ...]]
    """Rows of the table, up to the clip factors' address."""
    kind: Kind
    tiles: _Tiles
    shapes: list[torch.Size] = field(init=False)
    """Shapes of the sums."""
    num_tiles: tuple[int, ...] = field(init=False)
    num_parts: int = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = [torch.Size((dy.shape[2], x.shape[2])) for x, dy in self.pairs]
        self.num_tiles = tuple(_num_tiles(*pair, self.tiles) for pair in self.pairs)
        self.num_parts = num_parts_of(self.pairs, sum(self.num_tiles))


def _formed(group: _Group, factor_B: Tensor) -> list[Tensor]:
    """The sums of a group, in memory of their own."""
    num_parts, size = group.num_parts, packed_size(group.shapes)
    parts = factor_B.new_empty(num_parts, size, dtype=torch.float32)
    sums = [total.view(1, -1) for total in unpacked(parts[0], group.shapes)]
    _launch(group, sums, factor_B, part_stride=size)
    return unpacked(parts[0] if num_parts == 1 else parts.sum(dim=0), group.shapes)


def _launch(group: _Group, outs: Sequence[Tensor], factor_B: Tensor, part_stride: int = 0) -> None:
    B, device, tiles = len(factor_B), factor_B.device, group.tiles
    owner, first = programs_of(group.num_tiles, device)
    rows = [
        (*row, out.data_ptr(), max(out.shape[1] // max(D, 1), 1), out.stride(0))
        for row, out, (_, D) in zip(group.rows, outs, group.shapes, strict=True)
    ]
    _clipped_product_kernel[(sum(group.num_tiles), group.num_parts)](
        address_table(rows, device), owner, first, B, ceil_div(B, group.num_parts), part_stride,
        **group.kind.options(), COLUMNS=NUM_COLUMNS + 4,
        BLOCK_P=tiles.block_p, BLOCK_D=tiles.block_d, BLOCK_T=tiles.block_t, GROUP=GROUP,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages if has_large_shared_memory(device) else 2,
    )  # fmt: skip


def _is_aligned(out: Tensor) -> bool:
    """True if rows of `out` begin at multiples of 64 bytes."""
    return out.data_ptr() % 64 == 0 and out.stride(0) % 16 == 0


def num_parts_of(pairs: Sequence[tuple[Tensor, Tensor]], num_tiles: int) -> int:
    """Parts that the samples are divided into: the fewest that keep all multiprocessors busy."""
    B = len(pairs[0][0])
    at_once = _AT_ONCE * num_multiprocessors(pairs[0][0].device)
    num_read = sum(x_BTD.numel() + dy_BTP.numel() for x_BTD, dy_BTP in pairs)
    num_summed = sum(x_BTD.shape[2] * dy_BTP.shape[2] for x_BTD, dy_BTP in pairs)
    best, least, num_parts = 1, float("inf"), 1
    while num_parts <= min(B, MAX_PARTS):
        time = ceil_div(num_tiles * num_parts, at_once) / num_parts
        # Sums that are written and read again cost more than they save beyond the factors' bytes.
        is_worth_it = num_parts == 1 or 4 * num_parts * num_summed <= num_read
        if is_worth_it and time < least:
            best, least = num_parts, time
        num_parts *= 2
    return best
