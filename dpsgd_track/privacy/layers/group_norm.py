"""torch.nn.GroupNorm: channel c has weight gradient sum_t dy_ct * xhat_ct, bias sum_t dy_ct."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd_track.kernels.flash_norm.reference import accumulation
from dpsgd_track.privacy.layers.norm_trial import computes_norm
from dpsgd_track.privacy.layers.positions import trainable_terms
from dpsgd_track.privacy.terms import Dense, Term


def matches(module: nn.Module) -> bool:
    """True for GroupNorm, and for subclasses that compute one on a trial input."""
    if not isinstance(module, nn.GroupNorm) or not module.affine:
        return False
    if type(module).forward is nn.GroupNorm.forward:
        return True

    def normalise(x: Tensor) -> Tensor:
        channels_first = accumulation(x).movedim(-1, 1)
        return F.group_norm(channels_first, module.num_groups, eps=module.eps).movedim(1, -1)

    return computes_norm(module, normalise, module.eps, (2, 3, 2), feature_dim=1)


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
