"""Clipped sum of a linear layer's per-sample gradients, from their factors.

    S = sum_i c_i sum_t g_it x_it^T

The clip factors meet the products in float32. Rounded into 16-bit factors of the product, they
would move a whole sample's gradient by up to 0.2 %, and beyond C.

A sample whose factor is 0 is left out: it adds nothing, even where x or g is NaN or infinite. On
tensor cores the same goes for a factor below float32's normal range (1.2e-38), which has too few
bits to be divided by; `clip_factors` gives none.

Shapes: B samples, T positions, D inputs, P outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dpsgd_track.kernels.clipped_product import reference
from dpsgd_track.kernels.device import uses_tensor_cores
from dpsgd_track.kernels.tensor_table import write_rows

__all__ = ["clipped_product", "clipped_products", "clipped_products_into"]


def clipped_product(x_BTD: Tensor, dy_BTP: Tensor, factor_B: Tensor) -> Tensor:
    """S, [P, D], in the clip factors' type, float32 or float64."""
    if uses_tensor_cores(x_BTD):
        from dpsgd_track.kernels.clipped_product import triton

        return triton.clipped_product(x_BTD, dy_BTP, factor_B)
    return reference.clipped_product(x_BTD, dy_BTP, factor_B)


def clipped_products(
    layers: Sequence[tuple[Tensor, Tensor]], factors: Sequence[Tensor]
) -> list[Tensor]:
    """S of several layers, with one launch for many on tensor cores.

    Args:
        layers: (x, dy) of each.
        factors: c of each layer, [B] and contiguous, float32 or float64.
    """
    if layers and all(uses_tensor_cores(x_BTD) for x_BTD, _ in layers):
        from dpsgd_track.kernels.clipped_product import triton

        return triton.clipped_products(layers, factors)
    return [
        clipped_product(x_BTD, dy_BTP, factor_B)
        for (x_BTD, dy_BTP), factor_B in zip(layers, factors, strict=True)
    ]


def clipped_products_into(
    outs: Sequence[Tensor], layers: Sequence[tuple[Tensor, Tensor]], factors: Sequence[Tensor]
) -> None:
    """The same sums, written into the rows of `outs`.

    Args:
        outs: [W, width] float32 for each layer, a number of whole rows of its sum in each. What
            follows the last element is left as it is.
        layers: (x, dy) of each.
        factors: c of each layer, [B] and contiguous, float32 or float64.
    """
    if layers and all(uses_tensor_cores(x_BTD) for x_BTD, _ in layers):
        from dpsgd_track.kernels.clipped_product import triton

        triton.clipped_products_into(outs, layers, factors)
    else:
        for out, total in zip(outs, clipped_products(layers, factors), strict=True):
            write_rows(out, total)
