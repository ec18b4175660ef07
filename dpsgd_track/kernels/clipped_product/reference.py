"""The clipped sum of outer products, in plain torch."""

from __future__ import annotations

from torch import Tensor

from dpsgd_track.kernels.left_out import kept_samples, only_kept


def clipped_product(x_BTD: Tensor, dy_BTP: Tensor, factor_B: Tensor) -> Tensor:
    """One matrix product; the clip factors scale the smaller of its two operands."""
    is_kept_B = kept_samples(factor_B)
    factor_B = only_kept(factor_B, is_kept_B)
    x_BTD = only_kept(x_BTD, is_kept_B).to(factor_B.dtype)
    dy_BTP = only_kept(dy_BTP, is_kept_B).to(factor_B.dtype)
    factors = factor_B.view(-1, 1, 1)
    if x_BTD.shape[2] < dy_BTP.shape[2]:
        x_BTD = x_BTD * factors
    else:
        dy_BTP = dy_BTP * factors
    return dy_BTP.flatten(0, 1).T @ x_BTD.flatten(0, 1)
