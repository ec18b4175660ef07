"""Per-sample squared norm of a linear layer's weight gradient, without the gradient.

For sample i with inputs x_t (d values) and output gradients g_t (p values), t = 1..T, the weight
gradient is the sum of outer products G_i = sum_t g_t x_t^T, and its squared Frobenius norm is

    ||G_i||^2 = sum_{s,t} (x_s . x_t)(g_s . g_t)        (Gram form, T^2 (d + p) / 2 products)
              = sum_{a,b} (sum_t g_ta x_tb)^2           (outer form, T d p products)

Both are computed tile by tile, so that neither a T x T nor a d x p matrix is ever whole.
The Gram form is ghost clipping's (Li et al., 2022, "Large Language Models Can Be Strong
Differentially Private Learners", section 4); the cheaper form is chosen from the shapes.

Shapes: B samples, T positions, D inputs, P outputs.
"""

from dpsgd_track.kernels.flash_norm.reference import flash_norm_sq, outer_norm_sq

__all__ = ["flash_norm_sq", "outer_norm_sq"]
