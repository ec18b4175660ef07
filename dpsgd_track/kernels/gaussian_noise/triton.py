"""The noise on a GPU: drawn, scaled and added in one launch, in one pass over all shards."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from dpsgd_track.kernels.gaussian_noise.reference import Key
from dpsgd_track.kernels.tensor_table import address_table, ceil_div, programs_of

# Groups of 4 elements that a program draws.
BLOCK_GROUPS = 256


@triton.jit
def _normal_pair(u, v):
    """Two normals from two words of 32 bits."""
    # The smallest u, 1 / 2^32, bounds the normals at 6.66. Rounding may reach 1, not exceed it.
    uniform = (u.to(tl.uint32, bitcast=True).to(tl.float32) + 1.0) * 2.3283064365386963e-10
    radius = tl.sqrt(-2.0 * tl.log(tl.minimum(uniform, 1.0)))
    angle = v.to(tl.uint32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _noise_kernel(
    table_ptr, owner_ptr, first_ptr, std, IS_EVEN: tl.constexpr, BLOCK_GROUPS: tl.constexpr
):
    tensor = tl.load(owner_ptr + tl.program_id(0))
    chunk = tl.program_id(0) - tl.load(first_ptr + tensor)
    row_ptr = table_ptr + tensor * 5
    local_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.float32))
    start = tl.load(row_ptr + 1)
    stop = tl.load(row_ptr + 2)
    key = tl.load(row_ptr + 3).to(tl.uint64, bitcast=True)
    nonce = tl.load(row_ptr + 4).to(tl.uint64, bitcast=True)
    first_group = start // 4 + chunk.to(tl.int64) * BLOCK_GROUPS
    group = (first_group + tl.arange(0, BLOCK_GROUPS)).to(tl.uint64)
    low = group.to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = low * 0
    u0, v0, u1, v1 = tl.philox(
        key, low, high, zero + nonce.to(tl.uint32), zero + (nonce >> 32).to(tl.uint32)
    )
    z0, z1 = _normal_pair(u0, v0)
    z2, z3 = _normal_pair(u1, v1)
    # In the order of the elements.
    z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    index = chunk.to(tl.int64) * (4 * BLOCK_GROUPS) + tl.arange(0, 4 * BLOCK_GROUPS)
    held = stop - start
    if IS_EVEN:
        # A shard begins where a group does: 16 bytes at a time.
        local_ptr = tl.multiple_of(local_ptr, 16)
        held = tl.multiple_of(held, 4)
    else:
        index -= start % 4
    is_held = (index >= 0) & (index < held)
    x = tl.load(local_ptr + index, mask=is_held, other=0.0)
    tl.store(local_ptr + index, x + std * z, mask=is_held)


def add_gaussian(
    locals_: Sequence[Tensor], starts: Sequence[int], keys: Sequence[Key], *, std: float
) -> None:
    """Add noise to contiguous float32 tensors, as `reference.add_gaussian` does."""
    held = [part for part in zip(locals_, starts, keys, strict=True) if part[0].numel()]
    if not held:
        return
    device = held[0][0].device
    rows = [
        (x.data_ptr(), start, start + x.numel(), _signed(key[:2]), _signed(key[2:]))
        for x, start, key in held
    ]
    num_chunks = tuple(
        ceil_div(ceil_div(stop, 4) - start // 4, BLOCK_GROUPS) for _, start, stop, *_ in rows
    )
    owner, first = programs_of(num_chunks, device)
    table = address_table(rows, device)
    is_even = all(
        address % 16 == 0 and start % 4 == 0 and stop % 4 == 0 for address, start, stop, *_ in rows
    )
    _noise_kernel[(len(owner),)](
        table, owner, first, std, IS_EVEN=is_even, BLOCK_GROUPS=BLOCK_GROUPS, num_warps=4
    )


def _signed(words: Sequence[int]) -> int:
    """Two 32-bit words, low word first, as the int64 with the same bits."""
    whole = words[0] | words[1] << 32
    return whole - (1 << 64) if whole >> 63 else whole
