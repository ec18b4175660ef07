"""Positions: every rule sees [B, T, d], however many dimensions a layer is used with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpsgd_track.kernels.flash_norm.reference import accumulation


def flatten_positions(tensor: Tensor) -> Tensor:
    """[B, ..., d] as [B, T, d]; [B, d] as [B, 1, d]."""
    if tensor.dim() == 2:
        return tensor.unsqueeze(1)
    return tensor.flatten(1, -2) if tensor.dim() > 3 else tensor


def scaled(dy_BTP: Tensor, clip_factor_B: Tensor) -> Tensor:
    """c_i dy_i in dy's type; the product is formed in the clip factors' type."""
    return (dy_BTP * clip_factor_B.view(-1, 1, 1)).to(dy_BTP.dtype)


def elementwise_norm_sq(grad_BTP: Tensor) -> Tensor:
    """||sum_t g_t||^2 of each sample, [B]."""
    return accumulation(grad_BTP).sum(dim=1).square().sum(dim=-1)


def weighted_sum(grad_BTP: Tensor, clip_factor_B: Tensor) -> Tensor:
    """sum_i c_i sum_t g_t, [P]."""
    return torch.einsum("b,bp->p", clip_factor_B, accumulation(grad_BTP).sum(dim=1))


def elementwise_norms(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """Squared norm [B] of each sample's gradient, from gradients at each position [B, T, P]."""
    return {name: elementwise_norm_sq(gradient) for name, gradient in gradients.items()}


def elementwise_sums(gradients: dict[str, Tensor], clip_factor_B: Tensor) -> dict[str, Tensor]:
    """sum_i c_i g_i [P], from gradients at each position [B, T, P]."""
    return {name: weighted_sum(gradient, clip_factor_B) for name, gradient in gradients.items()}


def is_trainable(module: nn.Module, name: str) -> bool:
    """Whether `module` has a parameter `name` that is trained."""
    parameter = getattr(module, name, None)
    return parameter is not None and parameter.requires_grad
