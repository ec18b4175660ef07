"""Per-sample squared norm of a linear layer's weight gradient, without the gradient.

For sample i with inputs x_t (d values) and output gradients g_t (p values), t = 1..T, the weight
gradient is the sum of outer products G_i = sum_t g_t x_t^T, and its squared Frobenius norm is

    ||G_i||^2 = sum_{s,t} (x_s . x_t)(g_s . g_t)        (Gram form, T^2 (d + p) / 2 products)
              = sum_{a,b} (sum_t g_ta x_tb)^2           (outer form, T d p products)

Both are computed tile by tile, so that neither a T x T nor a d x p matrix is materialised.
The Gram form is ghost clipping's (Li et al., 2022, "Large Language Models Can Be Strong
Differentially Private Learners", section 4); the cheaper form is chosen from the shapes.

Shapes: B samples, T positions, D inputs, P outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpsgd_track.kernels.device import uses_tensor_cores
from dpsgd_track.kernels.flash_norm import reference
from dpsgd_track.kernels.flash_norm.reference import outer_norm_sq

__all__ = [
    "flash_norm_sq",
    "gradients_and_norms_sq",
    "gram_norm_sq",
    "gram_norms_sq",
    "outer_norm_sq",
    "tiled_norm_sq",
]


def flash_norm_sq(x_BTD: Tensor, dy_BTP: Tensor) -> Tensor:
    """Squared norm of each sample's weight gradient, tile by tile, in the cheaper form.

    Args:
        x_BTD: the layer's inputs, any floating type.
        dy_BTP: gradients of the layer's outputs.
    Returns:
        [B], float32 (float64 for float64 inputs), accumulated in that type.
    """
    if gram_is_cheaper(x_BTD.shape[1], x_BTD.shape[2], dy_BTP.shape[2]):
        return gram_norm_sq(x_BTD, dy_BTP)
    return tiled_norm_sq(x_BTD, dy_BTP)


def gram_is_cheaper(T: int, D: int, P: int) -> bool:
    """True if the symmetric Gram form needs fewer products than the outer form."""
    return T * (D + P) <= 2 * D * P


def gram_norm_sq(x_BTD: Tensor, dy_BTP: Tensor) -> Tensor:
    """Squared norms [B] in the Gram form."""
    if uses_tensor_cores(x_BTD):
        from dpsgd_track.kernels.flash_norm import triton

        return triton.gram_form(x_BTD, dy_BTP)
    return reference.gram_form(x_BTD, dy_BTP)


def gram_norms_sq(factors: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """`gram_norm_sq` of several layers, with one launch for many on tensor cores."""
    if all(uses_tensor_cores(x_BTD) for x_BTD, _ in factors):
        from dpsgd_track.kernels.flash_norm import triton

        return triton.gram_forms(factors) if factors else []
    return [gram_norm_sq(x_BTD, dy_BTP) for x_BTD, dy_BTP in factors]


def tiled_norm_sq(x_BTD: Tensor, dy_BTP: Tensor) -> Tensor:
    """Squared norms [B] in the outer form, tile by tile."""
    if uses_tensor_cores(x_BTD):
        from dpsgd_track.kernels.flash_norm import triton

        return triton.outer_form(x_BTD, dy_BTP)
    return reference.outer_form(x_BTD, dy_BTP)


def gradients_and_norms_sq(x_BTD: Tensor, dy_BTP: Tensor) -> tuple[Tensor, Tensor]:
    """Per-sample gradients [B, P, D] in the factors' type, and their squared norms [B]."""
    if uses_tensor_cores(x_BTD):
        from dpsgd_track.kernels.flash_norm import triton

        return triton.gradients_and_norms(x_BTD, dy_BTP)
    grad_BPD = torch.bmm(dy_BTP.mT, x_BTD)
    return grad_BPD, grad_BPD.to(reference.accumulation_dtype(grad_BPD)).square().sum(dim=(1, 2))
