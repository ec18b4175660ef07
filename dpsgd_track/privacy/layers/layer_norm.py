"""torch.nn.LayerNorm: weight gradient sum_t dy_t * xhat_t, bias gradient sum_t dy_t."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd_track.kernels.flash_norm.reference import accumulation
from dpsgd_track.privacy.layers.positions import (
    elementwise_norms,
    elementwise_sums,
    flatten_positions,
    is_trainable,
)


def matches(module: nn.Module) -> bool:
    """True for LayerNorm over the last dimension."""
    return (
        isinstance(module, nn.LayerNorm)
        and type(module).forward is nn.LayerNorm.forward
        and len(module.normalized_shape) == 1
    )


def norm_sq(
    module: nn.Module, x: Tensor, dy: Tensor, outer_norm: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Squared norm [B] of each sample's gradient of weight and bias."""
    return elementwise_norms(_gradients(module, x, dy))


def clipped_sum(
    module: nn.Module, x: Tensor, dy: Tensor, clip_factor_B: Tensor
) -> dict[str, Tensor]:
    """sum_i c_i g_i of weight and bias, [P]."""
    return elementwise_sums(_gradients(module, x, dy), clip_factor_B)


def _gradients(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Gradients at each position, [B, T, P]."""
    assert isinstance(module, nn.LayerNorm)
    dy_BTP = accumulation(flatten_positions(dy))
    result = {}
    if is_trainable(module, "weight"):
        shape = list(module.normalized_shape)
        xhat = F.layer_norm(accumulation(flatten_positions(x)), shape, eps=module.eps)
        result["weight"] = dy_BTP * xhat
    if is_trainable(module, "bias"):
        result["bias"] = dy_BTP
    return result
