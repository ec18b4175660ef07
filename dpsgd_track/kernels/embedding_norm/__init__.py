"""Per-sample squared norm of an embedding's weight gradient.

Sample i adds g_t to row v_t of the table, so its gradient has one row per distinct token:

    ||G_i||^2 = sum_v || sum_{t : v_t = v} g_t ||^2

A token that repeats has its gradients added before the square; the padding row has none.
Memory is [B, T, D], never [B, V, D].
"""

from __future__ import annotations

from torch import Tensor

from dpsgd_track.kernels.device import runs_triton
from dpsgd_track.kernels.embedding_norm import reference
from dpsgd_track.kernels.embedding_norm.reference import per_sample_norm_sq, per_sample_table

__all__ = ["embedding_norm_sq", "per_sample_norm_sq", "per_sample_table"]


def embedding_norm_sq(tokens_BT: Tensor, dy_BTD: Tensor) -> Tensor:
    """Squared norm of each sample's gradient of the table.

    Args:
        tokens_BT: row looked up at each position, integers.
        dy_BTD: gradients of the looked-up rows, zero at padding.
    Returns:
        [B], float32 (float64 for float64 gradients). No host synchronisation.
    """
    if runs_triton(dy_BTD):
        from dpsgd_track.kernels.embedding_norm import triton

        return triton.embedding_norm_sq(tokens_BT, dy_BTD)
    return reference.embedding_norm_sq(tokens_BT, dy_BTD)
