"""The clipped sum of outer products, in plain torch."""

from __future__ import annotations

from torch import Tensor


def clipped_product(x_BTD: Tensor, dy_BTP: Tensor, factor_B: Tensor) -> Tensor:
    """As the package's: one product, of factors of which the smaller was scaled."""
    x_BTD, dy_BTP = x_BTD.to(factor_B.dtype), dy_BTP.to(factor_B.dtype)
    factors = factor_B.view(-1, 1, 1)
    if x_BTD.shape[2] < dy_BTP.shape[2]:
        x_BTD = x_BTD * factors
    else:
        dy_BTP = dy_BTP * factors
    return dy_BTP.flatten(0, 1).T @ x_BTD.flatten(0, 1)
