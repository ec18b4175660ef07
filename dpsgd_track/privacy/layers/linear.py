"""torch.nn.Linear: weight gradient sum_t dy_t x_t^T, bias gradient sum_t dy_t."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dpsgd_track.kernels.flash_norm.reference import accumulation, accumulation_dtype
from dpsgd_track.privacy.layers.positions import (
    elementwise_norm_sq,
    flatten_positions,
    is_trainable,
    scaled,
    weighted_sum,
)


def matches(module: nn.Module) -> bool:
    """True for linear layers, not for subclasses that compute something else."""
    return isinstance(module, nn.Linear) and (
        type(module).forward is nn.Linear.forward or getattr(module, "is_fused_linear", False)
    )


def norm_sq(
    module: nn.Module, x: Tensor, dy: Tensor, outer_norm: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Squared norm [B] of each sample's gradient of weight and bias."""
    x_BTD, dy_BTP = flatten_positions(x), flatten_positions(dy)
    result = {}
    if is_trainable(module, "weight"):
        result["weight"] = outer_norm(x_BTD, dy_BTP)
    if is_trainable(module, "bias"):
        result["bias"] = elementwise_norm_sq(dy_BTP)
    return result


def clipped_sum(
    module: nn.Module, x: Tensor, dy: Tensor, clip_factor_B: Tensor
) -> dict[str, Tensor]:
    """sum_i c_i g_i of weight [P, D] and bias [P]."""
    x_BTD, dy_BTP = flatten_positions(x), flatten_positions(dy)
    result = {}
    if is_trainable(module, "weight"):
        result["weight"] = scaled(dy_BTP, clip_factor_B).flatten(0, 1).T @ x_BTD.flatten(0, 1)
    if is_trainable(module, "bias"):
        result["bias"] = weighted_sum(dy_BTP, clip_factor_B)
    return result


def per_sample_gradients(module: nn.Module, x_BTD: Tensor, dy_BTP: Tensor) -> dict[str, Tensor]:
    """Each sample's own gradient of weight [B, P, D] and bias [B, P], in dy's type."""
    result = {}
    if is_trainable(module, "weight"):
        result["weight"] = torch.bmm(dy_BTP.mT, x_BTD)
    if is_trainable(module, "bias"):
        result["bias"] = accumulation(dy_BTP).sum(dim=1)
    return result


def gradient_norm_sq(gradient: Tensor) -> Tensor:
    """Squared norm [B] of per-sample gradients [B, ...] as they are stored."""
    flat = gradient.flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1, dtype=accumulation_dtype(flat))
    return norm.square()


def sum_gradients(gradients: dict[str, Tensor], clip_factor_B: Tensor) -> dict[str, Tensor]:
    """sum_i c_i g_i of stored per-sample gradients, in the clip factors' type."""
    return {
        name: torch.tensordot(clip_factor_B, accumulation(gradient), dims=1)
        for name, gradient in gradients.items()
    }
