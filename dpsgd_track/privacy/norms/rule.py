"""What norm rules differ in.

Shapes: B samples, T positions, D inputs, P outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dpsgd_track.privacy.terms import OuterNorm


def _never(x_BTD: Tensor, dy_BTP: Tensor) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class NormRule:
    """How the norm of a linear layer's per-sample gradient is found."""

    name: str
    outer_norm: OuterNorm
    """(x_BTD, dy_BTP) -> [B]: squared norm of sum_t dy_t x_t^T."""
    fuses_linear: bool = False
    """Linear layers report from a backward of their own; else from hooks."""
    keeps_gradients: Callable[[Tensor, Tensor], bool] = _never
    """(x_BTD, dy_BTP) -> whether a one-pass strategy keeps the per-sample gradients [B, P, D]
    themselves rather than x and dy: the norm is then a by-product, and the clipped sum needs no
    second product."""
