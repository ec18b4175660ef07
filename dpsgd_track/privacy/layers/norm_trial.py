"""Trial runs of a normalisation layer that has a forward of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dpsgd_track.kernels.flash_norm.reference import accumulation

_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""In a low precision, a default epsilon or a cast may differ."""

Normalise = Callable[[Tensor], Tensor]
"""xhat of inputs [..., D]."""


def computes_norm(
    module: nn.Module,
    normalise: Normalise,
    epsilon: float,
    positions: tuple[int, ...],
    feature_dim: int = -1,
) -> bool:
    """True if `module` computes weight * xhat + bias on inputs [*positions, D].

    The parameters are random: those of a sharded model are elsewhere, and special values say
    little.

    Args:
        epsilon: what is added to the variance; it counts where inputs are as small.
        feature_dim: dimension that the features are moved to.
    """
    return all(
        _agrees(module, normalise, positions, feature_dim, dtype, scale)
        for dtype in _TOLERANCES
        for scale in (1.0, epsilon**0.5)
    )


@torch.no_grad()
def _agrees(
    module: nn.Module,
    normalise: Normalise,
    positions: tuple[int, ...],
    feature_dim: int,
    dtype: torch.dtype,
    scale: float,
) -> bool:
    own = dict(module.named_parameters(recurse=False))
    num_features, device = len(own["weight"]), own["weight"].device
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, num_features, generator=generator).to(device, dtype)

    x, trial = draw(*positions) * scale, {name: draw() for name in own}
    expected = accumulation(trial["weight"]) * normalise(x)
    if "bias" in trial:
        expected = expected + accumulation(trial["bias"])
    try:
        got = torch.func.functional_call(module, trial, (x.movedim(-1, feature_dim),))
        got = accumulation(got).movedim(feature_dim, -1)
        tolerance = _TOLERANCES[dtype]
        return torch.allclose(got, expected, rtol=tolerance, atol=tolerance)
    except Exception:
        # It takes other arguments.
        return False
