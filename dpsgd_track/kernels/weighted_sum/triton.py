"""Norms and clipped sums of kept gradients on a GPU, at the speed of memory.

One launch for all parameters, whose addresses stand in a table. A gradient may lie transposed in
memory, [B, D, P] for a weight [P, D], as a batched product's backward leaves it.

Shapes: B samples, N elements of a parameter, P and D its rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpsgd_track.kernels.tensor_table import KINDS, address_table, programs_of

# Elements that a program holds at a time, and how many times it does so.
BLOCK, REPEATS = 4096, 8
# Side of the tiles in which a transposed gradient is turned.
TILE = 64


@triton.jit
def _load(address, kind, offset, mask):
    """Values at an address that 16 divides, as float32."""
    if kind == 0:
        float32 = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
        found = tl.load(float32 + offset, mask=mask, other=0.0)
    elif kind == 1:
        bfloat16 = tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 16)
        found = tl.load(bfloat16 + offset, mask=mask, other=0.0).to(tl.float32)
    else:
        float16 = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 16)
        found = tl.load(float16 + offset, mask=mask, other=0.0).to(tl.float32)
    return found


@triton.jit
def _size(table_ptr, IS_EVEN: tl.constexpr):
    """A size from the table, known to the compiler as a multiple of 16 where it is one."""
    size = tl.load(table_ptr)
    if IS_EVEN:
        size = tl.multiple_of(size, 16)
    return size


@triton.jit
def _norms_kernel(
    table_ptr, owner_ptr, first_ptr, partial_ptr, max_chunks,
    IS_EVEN: tl.constexpr, BLOCK: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(owner_ptr + tl.program_id(0))
    chunk = tl.program_id(0) - tl.load(first_ptr + tensor)
    sample = tl.program_id(1)
    address = tl.load(table_ptr + tensor * 3)
    N = _size(table_ptr + tensor * 3 + 1, IS_EVEN)
    kind = tl.load(table_ptr + tensor * 3 + 2)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    start = chunk.to(tl.int64) * (REPEATS * BLOCK)
    for repeat in range(REPEATS):
        place = start + repeat * BLOCK + tl.arange(0, BLOCK)
        grad = _load(address, kind, sample * N + place, place < N)
        total += grad * grad
    place = (tensor * tl.num_programs(1) + sample) * max_chunks + chunk
    tl.store(partial_ptr + place, tl.sum(total))


@triton.jit
def _sums_kernel(
    table_ptr, owner_ptr, first_ptr, factor_ptr, B,
    IS_EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(owner_ptr + tl.program_id(0))
    chunk = tl.program_id(0) - tl.load(first_ptr + tensor)
    address = tl.load(table_ptr + tensor * 4)
    sum_ptr = tl.load(table_ptr + tensor * 4 + 1).to(tl.pointer_type(tl.float32))
    sum_ptr = tl.multiple_of(sum_ptr, 16)
    N = _size(table_ptr + tensor * 4 + 2, IS_EVEN)
    kind = tl.load(table_ptr + tensor * 4 + 3)
    place = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for sample in range(B):
        total += tl.load(factor_ptr + sample) * _load(address, kind, sample * N + place, place < N)
    tl.store(sum_ptr + place, total, mask=place < N)


@triton.jit
def _turned_sums_kernel(
    table_ptr, owner_ptr, first_ptr, factor_ptr, B,
    IS_EVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(owner_ptr + tl.program_id(0))
    tile = tl.program_id(0) - tl.load(first_ptr + tensor)
    address = tl.load(table_ptr + tensor * 5)
    sum_ptr = tl.load(table_ptr + tensor * 5 + 1).to(tl.pointer_type(tl.float32))
    sum_ptr = tl.multiple_of(sum_ptr, 16)
    P = _size(table_ptr + tensor * 5 + 2, IS_EVEN)
    D = _size(table_ptr + tensor * 5 + 3, IS_EVEN)
    kind = tl.load(table_ptr + tensor * 5 + 4)
    tiles_d = (D + TILE - 1) // TILE
    p = (tile // tiles_d) * TILE + tl.arange(0, TILE)
    d = (tile % tiles_d) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    is_there = (d[:, None] < D) & (p[None, :] < P)
    for sample in range(B):
        offset = (sample * D + d[:, None]) * P + p[None, :]
        total += tl.load(factor_ptr + sample) * _load(address, kind, offset, is_there)
    place = p[:, None] * D + d[None, :]
    tl.store(sum_ptr + place, tl.trans(total), mask=(p[:, None] < P) & (d[None, :] < D))


def norms_sq(grads: Sequence[Tensor]) -> Tensor:
    """As the package's; [parameters, B] float32."""
    # The order of the elements does not matter.
    grads = [_aligned(grad if _is_turned(grad) else grad.contiguous()) for grad in grads]
    B, device = len(grads[0]), grads[0].device
    sizes = [grad.numel() // max(B, 1) for grad in grads]
    num_chunks = tuple(triton.cdiv(size, BLOCK * REPEATS) for size in sizes)
    table = address_table(
        [(g.data_ptr(), n, KINDS[g.dtype]) for g, n in zip(grads, sizes, strict=True)], device
    )
    owner, first = programs_of(num_chunks, device)
    partial = torch.zeros(len(grads), B, max(num_chunks), dtype=torch.float32, device=device)
    _norms_kernel[(len(owner), B)](
        table, owner, first, partial, max(num_chunks),
        IS_EVEN=_are_even(sizes), BLOCK=BLOCK, REPEATS=REPEATS, num_warps=8,
    )  # fmt: skip
    return partial.sum(dim=2)


def weighted_sums(grads: Sequence[Tensor], factor_B: Tensor) -> list[Tensor]:
    """As the package's; float32."""
    sums = _empty([grad.shape[1:] for grad in grads], factor_B)
    turned, flat = [], []
    for grad, total in zip(grads, sums, strict=True):
        if _is_turned(grad):
            turned.append((_aligned(grad), total))
        else:
            flat.append((_aligned(grad.contiguous()), total))
    _sum_turned(turned, factor_B)
    _sum_flat(flat, factor_B)
    return sums


def _empty(shapes: Sequence[torch.Size], like: Tensor) -> list[Tensor]:
    """Tensors of these shapes in one piece of memory, each at an address that 16 divides."""
    sizes = [shape.numel() + -shape.numel() % 4 for shape in shapes]
    pieces = like.new_empty(sum(sizes)).split(sizes)
    pairs = zip(pieces, shapes, strict=True)
    return [piece[: shape.numel()].view(shape) for piece, shape in pairs]


def _aligned(grad: Tensor) -> Tensor:
    """Where 16 divides the address; of a copy if need be, as of a part of something larger."""
    return grad if grad.data_ptr() % 16 == 0 else grad.clone()


def _are_even(sizes: Sequence[int]) -> bool:
    return all(size % 16 == 0 for size in sizes)


def _is_turned(grad: Tensor) -> bool:
    return grad.dim() == 3 and not grad.is_contiguous() and grad.mT.is_contiguous()


def _sum_flat(pairs: Sequence[tuple[Tensor, Tensor]], factor_B: Tensor) -> None:
    if not pairs:
        return
    rows = [(g.data_ptr(), s.data_ptr(), s.numel(), KINDS[g.dtype]) for g, s in pairs]
    num_chunks = tuple(triton.cdiv(s.numel(), BLOCK) for _, s in pairs)
    owner, first = programs_of(num_chunks, factor_B.device)
    table = address_table(rows, factor_B.device)
    _sums_kernel[(len(owner),)](
        table, owner, first, factor_B, len(factor_B),
        IS_EVEN=_are_even([s.numel() for _, s in pairs]), BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


def _sum_turned(pairs: Sequence[tuple[Tensor, Tensor]], factor_B: Tensor) -> None:
    if not pairs:
        return
    rows = [(g.data_ptr(), s.data_ptr(), *s.shape, KINDS[g.dtype]) for g, s in pairs]
    num_tiles = tuple(
        triton.cdiv(s.shape[0], TILE) * triton.cdiv(s.shape[1], TILE) for _, s in pairs
    )
    owner, first = programs_of(num_tiles, factor_B.device)
    table = address_table(rows, factor_B.device)
    _turned_sums_kernel[(len(owner),)](
        table, owner, first, factor_B, len(factor_B),
        IS_EVEN=_are_even([n for _, s in pairs for n in s.shape]), TILE=TILE, num_warps=4,
    )  # fmt: skip
