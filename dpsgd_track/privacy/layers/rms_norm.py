"""RMSNorm: torch's own, and the variants of transformers (w * xhat, Gemma's (1 + w) * xhat).

Either way the weight's gradient is sum_t dy_t * xhat_t with xhat = x / sqrt(mean(x^2) + eps).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dpsgd_track.kernels.flash_norm.reference import accumulation
from dpsgd_track.privacy.layers.positions import (
    elementwise_norms,
    elementwise_sums,
    flatten_positions,
    is_trainable,
)


def matches(module: nn.Module) -> bool:
    """True where the module is called an RMSNorm and a probe shows that it computes one."""
    if not type(module).__name__.endswith("RMSNorm"):
        return False
    weights = dict(module.named_parameters(recurse=False))
    if list(weights) != ["weight"] or weights["weight"].dim() != 1:
        return False
    return _computes_rms_norm(module, weights["weight"])


def norm_sq(
    module: nn.Module, x: Tensor, dy: Tensor, outer_norm: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Squared norm [B] of each sample's gradient of the weight."""
    return elementwise_norms(_gradients(module, x, dy))


def clipped_sum(
    module: nn.Module, x: Tensor, dy: Tensor, clip_factor_B: Tensor
) -> dict[str, Tensor]:
    """sum_i c_i g_i of the weight, [P]."""
    return elementwise_sums(_gradients(module, x, dy), clip_factor_B)


def _gradients(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    if not is_trainable(module, "weight"):
        return {}
    xhat = _normalised(flatten_positions(x), _epsilon(module, x.dtype))
    return {"weight": accumulation(flatten_positions(dy)) * xhat}


def _normalised(x: Tensor, eps: float) -> Tensor:
    x = accumulation(x)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def _epsilon(module: nn.Module, dtype: torch.dtype) -> float:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return torch.finfo(dtype).eps if eps is None else float(eps)


@torch.no_grad()
def _computes_rms_norm(module: nn.Module, weight: Tensor) -> bool:
    """Compare the module with w * xhat and (1 + w) * xhat on a fixed input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, len(weight), generator=generator).to(weight.device, weight.dtype)
    xhat = _normalised(x, _epsilon(module, x.dtype))
    got = accumulation(module(x))
    return any(
        torch.allclose(got, scale * xhat, rtol=1e-2, atol=1e-2) for scale in (weight, 1 + weight)
    )
