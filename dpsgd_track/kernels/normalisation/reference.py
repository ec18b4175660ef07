"""Per-sample gradients of normalisation layers, in plain torch.

Shapes: B samples, T positions, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpsgd_track.kernels.flash_norm.reference import accumulation


def normalised(x: Tensor, eps: float, *, is_centred: bool) -> Tensor:
    """xhat over the last dimension, in the accumulation type of `x`."""
    x = accumulation(x)
    if is_centred:
        x = x - x.mean(dim=-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def weight_and_bias_parts(
    x_BTD: Tensor, dy_BTD: Tensor, eps: float, *, is_centred: bool
) -> tuple[Tensor, Tensor]:
    """[B, 1, D] each; see `kernels.normalisation`."""
    dy_BTD = accumulation(dy_BTD)
    xhat_BTD = normalised(x_BTD, eps, is_centred=is_centred)
    weight, bias = dy_BTD * xhat_BTD, dy_BTD
    return weight.sum(dim=1, keepdim=True), bias.sum(dim=1, keepdim=True)
