"""Norms and clipped sums of materialised gradients on a GPU, at memory bandwidth.

One launch for all parameters, whose addresses are in a table. A gradient may be transposed in
memory, [B, D, P] for a weight [P, D], as a batched product's backward leaves it. Those of the
samples of a sum may lie apart.

Shapes: B samples, N elements of a parameter, P and D its rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpsgd_track.kernels.tensor_table import KINDS, address_table, ceil_div, packed, programs_of

# Elements that a program holds at a time, and how often it loads as many.
BLOCK, REPEATS = 4096, 8
# Side of the tiles in which a gradient is transposed.
TILE = 64


@triton.jit
def load(address, kind, offset, mask):
    """Values at an address that is a multiple of 16, as float32."""
    if kind == 0:
        float32 = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
        values = tl.load(float32 + offset, mask=mask, other=0.0)
    elif kind == 1:
        bfloat16 = tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 16)
        values = tl.load(bfloat16 + offset, mask=mask, other=0.0).to(tl.float32)
    else:
        float16 = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 16)
        values = tl.load(float16 + offset, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def size_of(table_ptr, IS_EVEN: tl.constexpr):
    """A size from the table, declared to the compiler as a multiple of 16 if IS_EVEN."""
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
    N = size_of(table_ptr + tensor * 3 + 1, IS_EVEN)
    kind = tl.load(table_ptr + tensor * 3 + 2)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    start = chunk.to(tl.int64) * (REPEATS * BLOCK)
    for repeat in range(REPEATS):
        place = start + repeat * BLOCK + tl.arange(0, BLOCK)
        grad = load(address, kind, sample * N + place, place < N)
        total += grad * grad
    place = (tensor * tl.num_programs(1) + sample) * max_chunks + chunk
    tl.store(partial_ptr + place, tl.sum(total))


@triton.jit
def _places(sum_ptr, width, stride, element):
    """Addresses of a parameter's elements in an output of one row for each rank."""
    row = element // width
    return sum_ptr + row * stride + (element - row * width)


@triton.jit
def _weighed(factor, grad):
    """c_i g_i, and 0 if the factor is 0, whatever the gradient is."""
    # Selected after both loads, so that the gradient's does not wait for the factor.
    return factor * tl.where(factor != 0.0, grad, 0.0)


@triton.jit
def _sums_kernel(
    table_ptr, owner_ptr, first_ptr, B,
    IS_EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(owner_ptr + tl.program_id(0))
    chunk = tl.program_id(0) - tl.load(first_ptr + tensor)
    row_ptr = table_ptr + tensor * 9
    address = tl.load(row_ptr)
    kind = tl.load(row_ptr + 1)
    sum_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32))
    width = size_of(row_ptr + 3, IS_EVEN)
    stride = size_of(row_ptr + 4, IS_EVEN)
    factor_ptr = tl.load(row_ptr + 7).to(tl.pointer_type(tl.float32))
    N = size_of(row_ptr + 5, IS_EVEN)
    sample_stride = size_of(row_ptr + 8, IS_EVEN)
    if IS_EVEN:
        sum_ptr = tl.multiple_of(sum_ptr, 16)
    element = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for sample in range(B):
        grad = load(address, kind, sample * sample_stride + element, element < N)
        total += _weighed(tl.load(factor_ptr + sample), grad)
    tl.store(_places(sum_ptr, width, stride, element), total, mask=element < N)


@triton.jit
def _transposed_sums_kernel(
    table_ptr, owner_ptr, first_ptr, B,
    IS_EVEN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(owner_ptr + tl.program_id(0))
    tile = tl.program_id(0) - tl.load(first_ptr + tensor)
    row_ptr = table_ptr + tensor * 9
    address = tl.load(row_ptr)
    kind = tl.load(row_ptr + 1)
    sum_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32))
    width = size_of(row_ptr + 3, IS_EVEN)
    stride = size_of(row_ptr + 4, IS_EVEN)
    factor_ptr = tl.load(row_ptr + 7).to(tl.pointer_type(tl.float32))
    P = size_of(row_ptr + 5, IS_EVEN)
    D = size_of(row_ptr + 6, IS_EVEN)
    sample_stride = size_of(row_ptr + 8, IS_EVEN)
    if IS_EVEN:
        sum_ptr = tl.multiple_of(sum_ptr, 16)
    tiles_d = (D + TILE - 1) // TILE
    p = (tile // tiles_d) * TILE + tl.arange(0, TILE)
    first_d = (tile % tiles_d) * TILE
    d = first_d + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    is_there = (d[:, None] < D) & (p[None, :] < P)
    for sample in range(B):
        offset = sample * sample_stride + d[:, None] * P + p[None, :]
        grad = load(address, kind, offset, is_there)
        total += _weighed(tl.load(factor_ptr + sample), grad)
    # Rows of a parameter are never divided among ranks.
    row = _places(sum_ptr, width, stride, p.to(tl.int64) * D)
    mask = (p[:, None] < P) & (d[None, :] < D)
    tl.store(row[:, None] + d[None, :], tl.trans(total), mask=mask)


def norms_sq(grads: Sequence[Tensor]) -> Tensor:
    """[parameters, B] float32; see `kernels.weighted_sum`."""
    # The order of the elements does not matter.
    grads = [aligned(grad if _is_transposed(grad) else grad.contiguous()) for grad in grads]
    B, device = len(grads[0]), grads[0].device
    sizes = [grad.numel() // max(B, 1) for grad in grads]
    num_chunks = tuple(ceil_div(size, BLOCK * REPEATS) for size in sizes)
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


def weighted_sums(grads: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """sum_i c_i g_i of each parameter, float32; see `kernels.weighted_sum`."""
    sums = packed([grad.shape[1:] for grad in grads], factors[0])
    _launch_all([(t, t.numel(), t.numel()) for t in sums], grads, factors)
    return sums


def weighted_sums_into(
    outs: Sequence[Tensor], grads: Sequence[Tensor], factors: Sequence[Tensor]
) -> None:
    """The same sums, written into the rows of `outs`."""
    _launch_all([(out, out.shape[1], out.stride(0)) for out in outs], grads, factors)


@dataclass
class _Programs:
    """Parameters whose sums one launch forms."""

    rows: list[tuple[int, ...]] = field(default_factory=list)
    """Rows of the table."""
    num_programs: list[int] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    """Gradients that the launch reads."""


_Place = tuple[Tensor, int, int]
"""Tensor that a sum is written into, width of its rows, and elements from one to the next."""


def _launch_all(
    places: Sequence[_Place], grads: Sequence[Tensor], factors: Sequence[Tensor]
) -> None:
    transposed, flat = _Programs(), _Programs()
    for (out, width, stride), grad, factor_B in zip(places, grads, factors, strict=True):
        # The gradients of samples may lie apart.
        is_transposed = _is_transposed(grad[:1])
        grad = aligned(grad if is_transposed or grad[:1].is_contiguous() else grad.contiguous())
        begin = grad.data_ptr(), KINDS[grad.dtype], out.data_ptr(), width, stride
        end = factor_B.data_ptr(), grad.stride(0)
        if is_transposed:
            _, P, D = grad.shape
            transposed.rows.append((*begin, P, D, *end))
            transposed.num_programs.append(ceil_div(P, TILE) * ceil_div(D, TILE))
        else:
            size = _num_elements(grad)
            flat.rows.append((*begin, size, 0, *end))
            flat.num_programs.append(ceil_div(size, BLOCK))
        (transposed if is_transposed else flat).held.append(grad)
    _launch(_transposed_sums_kernel, transposed, factors[0], TILE=TILE, num_warps=4)
    _launch(_sums_kernel, flat, factors[0], BLOCK=BLOCK, num_warps=8)


def _launch(kernel: Any, programs: _Programs, factor_B: Tensor, **options: int) -> None:
    if not programs.rows:
        return
    device = factor_B.device
    owner, first = programs_of(tuple(programs.num_programs), device)
    # The sum's address is in bytes, sizes in elements.
    is_even = all(n % 16 == 0 for row in programs.rows for n in (*row[2:7], row[8]))
    table = address_table(programs.rows, device)
    kernel[(len(owner),)](table, owner, first, len(factor_B), IS_EVEN=is_even, **options)


def _num_elements(grad: Tensor) -> int:
    """Elements of one sample's gradient."""
    return grad.shape[1:].numel()


def aligned(grad: Tensor) -> Tensor:
    """`grad` at a multiple of 16 bytes; a copy if need be, as for a slice of a larger tensor."""
    return grad if grad.data_ptr() % 16 == 0 else grad.clone()


def _are_even(sizes: Sequence[int]) -> bool:
    return all(size % 16 == 0 for size in sizes)


def _is_transposed(grad: Tensor) -> bool:
    return grad.dim() == 3 and not grad.is_contiguous() and grad.mT.is_contiguous()
