"""Sums over positions of many layers' gradients at once: the per-sample gradients of biases.

    s_i = sum_t g_it

They accumulate in float32 without a copy in another type.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dpsgd_track.kernels.device import runs_triton
from dpsgd_track.kernels.position_sum import reference

__all__ = ["position_sums"]


def position_sums(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Sum over the positions of each of `gradients`.

    Args:
        gradients: [B, T, D] each, any floating type; B is the same for all.
    Returns:
        [B, D] each, float32 (float64 for float64 gradients).
    """
    if gradients and runs_triton(*gradients):
        from dpsgd_track.kernels.position_sum import triton

        return triton.position_sums(gradients)
    return reference.position_sums(gradients)
