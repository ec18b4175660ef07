"""Per-sample gradients of normalisation layers on a GPU, in one pass.

Shapes: B samples, T positions, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpsgd_track.kernels.tensor_table import ceil_div, next_power_of_2

# Positions that a program adds up, at least, and programs that fill a GPU.
MIN_POSITIONS, NUM_PROGRAMS = 16, 512


@triton.jit
def _gradients_kernel(
    x_ptr, dy_ptr, weight_ptr, bias_ptr,
    T, D, x_stride_b, x_stride_t, dy_stride_b, dy_stride_t, eps,
    num_positions, IS_CENTRED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * num_positions
    d = tl.arange(0, BLOCK_D)
    x_ptr += sample * x_stride_b + first.to(tl.int64) * x_stride_t
    dy_ptr += sample * dy_stride_b + first.to(tl.int64) * dy_stride_t
    weight = tl.zeros((BLOCK_D,), dtype=tl.float32)
    bias = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for _ in range(tl.minimum(num_positions, T - first)):
        x = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + d, mask=d < D, other=0.0).to(tl.float32)
        x_ptr += x_stride_t
        dy_ptr += dy_stride_t
        if IS_CENTRED:
            x = tl.where(d < D, x - tl.sum(x) / D, 0.0)
        weight += dy * (x * tl.rsqrt(tl.sum(x * x) / D + eps))
        bias += dy
    place = (sample * tl.num_programs(0) + tl.program_id(0)) * D + d
    tl.store(weight_ptr + place, weight, mask=d < D)
    tl.store(bias_ptr + place, bias, mask=d < D)


def weight_and_bias_parts(
    x_BTD: Tensor, dy_BTD: Tensor, eps: float, *, is_centred: bool
) -> tuple[Tensor, Tensor]:
    """[B, parts, D] float32 each, of inputs of at most 32 bits; see `kernels.normalisation`."""
    x_BTD, dy_BTD = x_BTD.contiguous(), dy_BTD.contiguous()
    B, T, D = x_BTD.shape
    num_positions = max(T * B // NUM_PROGRAMS, MIN_POSITIONS)
    num_parts = ceil_div(T, num_positions)
    parts = x_BTD.new_empty(2, B, num_parts, D, dtype=torch.float32)
    weight, bias = parts.unbind()
    block_d = next_power_of_2(D)
    _gradients_kernel[(num_parts, B)](
        x_BTD, dy_BTD, weight, bias,
        T, D, x_BTD.stride(0), x_BTD.stride(1), dy_BTD.stride(0), dy_BTD.stride(1), eps,
        num_positions, IS_CENTRED=is_centred, BLOCK_D=block_d,
        num_warps=min(max(block_d // 512, 1), 16),
    )  # fmt: skip
    return weight, bias
