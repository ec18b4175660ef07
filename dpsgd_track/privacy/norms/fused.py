"""The norm inside the backward of a replaced linear layer."""

from torch import Tensor

from dpsgd_track.kernels.flash_norm import flash_norm_sq
from dpsgd_track.privacy.norms.rule import NormRule


def _gradients_are_affordable(x_BTD: Tensor, dy_BTP: Tensor) -> bool:
    """Per-sample gradients save one whole product; worth up to twice the memory of (x, dy)."""
    T, D, P = x_BTD.shape[1], x_BTD.shape[2], dy_BTP.shape[2]
    return P * D <= 2 * T * (P + D)


FUSED = NormRule(
    name="fused",
    outer_norm=flash_norm_sq,
    fuses_linear=True,
    keeps_gradients=_gradients_are_affordable,
)
