"""torch.nn.GroupNorm: channel c has weight gradient sum_t dy_ct * xhat_ct, bias sum_t dy_ct."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd_track.kernels.flash_norm.reference import accumulation
from dpsgd_track.privacy.layers.positions import trainable_terms
from dpsgd_track.privacy.terms import Dense, Term


def matches(module: nn.Module) -> bool:
    """True for GroupNorm, not for subclasses that compute something else."""
    return isinstance(module, nn.GroupNorm) and type(module).forward is nn.GroupNorm.forward


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight and bias [C], of inputs [B, C, ...]."""
    assert isinstance(module, nn.GroupNorm)
    num_groups, eps = module.num_groups, module.eps
    dy = accumulation(dy)

    def summed(gradient: Tensor) -> Dense:
        return Dense(gradient.reshape(*gradient.shape[:2], -1).sum(dim=2))

    return trainable_terms(
        module,
        weight=lambda: summed(dy * F.group_norm(accumulation(x), num_groups, eps=eps)),
        bias=lambda: summed(dy),
    )
