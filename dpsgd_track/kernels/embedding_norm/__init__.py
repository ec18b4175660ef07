"""Per-sample squared norm of an embedding's weight gradient.

Sample i adds g_t to row v_t of the table, so its gradient has one row per distinct token:

    ||G_i||^2 = sum_v || sum_{t : v_t = v} g_t ||^2

A token that repeats has its gradients added before the square; the padding row has none.
Memory is [B, T, D], never [B, V, D].
"""

from dpsgd_track.kernels.embedding_norm.reference import (
    embedding_norm_sq,
    per_sample_norm_sq,
    per_sample_table,
)

__all__ = ["embedding_norm_sq", "per_sample_norm_sq", "per_sample_table"]
