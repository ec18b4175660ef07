"""The ghost norm, from two materialised T x T Gram matrices.

Source: Li et al., 2022, "Large Language Models Can Be Strong Differentially Private Learners",
section 4.
"""

from torch import Tensor

from dpsgd_track.kernels.flash_norm.reference import product
from dpsgd_track.privacy.norms.rule import NormRule


def _ghost_norm_sq(x_BTD: Tensor, dy_BTP: Tensor) -> Tensor:
    """sum_{s,t} (x_s . x_t)(dy_s . dy_t), [B]."""
    gram_x, gram_dy = product(x_BTD, x_BTD.mT), product(dy_BTP, dy_BTP.mT)
    # A sum of products of either sign can round to just below zero.
    return (gram_x * gram_dy).sum(dim=(1, 2)).clamp_min_(0.0)


GHOST = NormRule(name="ghost", outer_norm=_ghost_norm_sq)
