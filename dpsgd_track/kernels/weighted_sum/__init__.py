"""Norms and clipped sums of materialised per-sample gradients g_i, of many parameters at once.

    ||g_i||^2 = sum_n g_in^2,    S_n = sum_i c_i g_in

Both read the gradients once, in the type they are stored in, and accumulate in float32 without a
copy in another type.

A sample whose factor is 0 is left out of a sum: it adds nothing, even where its gradient is NaN or
infinite.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dpsgd_track.kernels.device import runs_triton
from dpsgd_track.kernels.weighted_sum import reference

__all__ = ["norms_sq", "weighted_sums", "weighted_sums_into"]


def norms_sq(grads: Sequence[Tensor]) -> Tensor:
    """Squared norm of each sample's gradient of each parameter.

    Args:
        grads: [B, *parameter] each, any floating type.
    Returns:
        [parameters, B], float32 (float64 for float64 gradients).
    """
    if runs_triton(*grads):
        from dpsgd_track.kernels.weighted_sum import triton

        return triton.norms_sq(grads)
    return reference.norms_sq(grads)


def weighted_sums(grads: Sequence[Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """sum_i c_i g_i of each parameter, contiguous, in the factors' type.

    Args:
        grads: [B, *parameter] each, any floating type; at least one.
        factors: c of each parameter, [B] and contiguous, float32 or float64.
    """
    if runs_triton(factors[0], *grads):
        from dpsgd_track.kernels.weighted_sum import triton

        return triton.weighted_sums(grads, factors)
    return reference.weighted_sums(grads, factors)


def weighted_sums_into(
    outs: Sequence[Tensor], grads: Sequence[Tensor], factors: Sequence[Tensor]
) -> None:
    """The same sums, written into the rows of `outs`.

    Args:
        outs: [W, width] float32 for each parameter, its elements in order, `width` a row. What
            follows the last element is left as it is.
        grads: [B, *parameter] each.
        factors: c of each parameter, [B] and contiguous, float32 or float64.
    """
    if runs_triton(factors[0], *grads):
        from dpsgd_track.kernels.weighted_sum import triton

        triton.weighted_sums_into(outs, grads, factors)
    else:
        reference.weighted_sums_into(outs, grads, factors)
