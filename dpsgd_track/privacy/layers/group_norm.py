"""torch.nn.GroupNorm: channel c has weight gradient sum_t dy_ct * xhat_ct, bias sum_t dy_ct."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd_track.kernels.flash_norm.reference import accumulation
from dpsgd_track.privacy.layers.positions import is_trainable
from dpsgd_track.privacy.terms import Dense, Term


def matches(module: nn.Module) -> bool:
    """True for GroupNorm, not for subclasses that compute something else."""
    return isinstance(module, nn.GroupNorm) and type(module).forward is nn.GroupNorm.forward


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight and bias [C], of inputs [B, C, ...]."""
    assert isinstance(module, nn.GroupNorm)
    dy = accumulation(dy)
    found: dict[str, Term] = {}
    if is_trainable(module, "weight"):
        xhat = F.group_norm(accumulation(x), module.num_groups, eps=module.eps)
        found["weight"] = Dense(_summed_places(dy * xhat))
    if is_trainable(module, "bias"):
        found["bias"] = Dense(_summed_places(dy))
    return found


def _summed_places(gradient: Tensor) -> Tensor:
    """[B, C, ...] -> [B, C]."""
    return gradient.reshape(*gradient.shape[:2], -1).sum(dim=2)
