"""Per-sample inner product of an embedding's and a linear layer's gradient of one shared table.

A tied head uses the embedding's table W [V, D] twice: rows are looked up, and logits are formed
as x W^T. With e_t the gradients of the looked-up rows v_t, and (x_s, g_s) the head's inputs and
output gradients, a sample's gradient is E + H with

    E = sum_t row(v_t) e_t^T,    H = sum_s g_s x_s^T,    ||E + H||^2 = ||E||^2 + ||H||^2 + 2 <E, H>
    <E, H> = sum_{s,t} (x_s . e_t) g_s[v_t]

Memory is one tile of [B, S, t] products, never [B, V, D].
"""

from dpsgd_track.kernels.embedding_cross.reference import embedding_cross, per_sample_inner_product

__all__ = ["embedding_cross", "per_sample_inner_product"]
