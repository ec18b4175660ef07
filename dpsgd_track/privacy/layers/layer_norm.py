"""torch.nn.LayerNorm: weight gradient sum_t dy_t * xhat_t, bias gradient sum_t dy_t."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dpsgd_track.kernels.flash_norm.reference import accumulation
from dpsgd_track.privacy.layers.positions import is_trainable, summed_positions
from dpsgd_track.privacy.terms import Term


def matches(module: nn.Module) -> bool:
    """True for LayerNorm, not for subclasses that compute something else."""
    return isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight and bias, in the normalised shape."""
    assert isinstance(module, nn.LayerNorm)
    shape = list(module.normalized_shape)
    dy = accumulation(dy)
    found: dict[str, Term] = {}
    if is_trainable(module, "weight"):
        xhat = F.layer_norm(accumulation(x), shape, eps=module.eps)
        found["weight"] = summed_positions(dy * xhat, len(shape))
    if is_trainable(module, "bias"):
        found["bias"] = summed_positions(dy, len(shape))
    return found
