"""The interface of norm rules.

Shapes: B samples, T positions, D inputs, P outputs of a linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpsgd_track.privacy.terms import OuterNorm


@dataclass(frozen=True, kw_only=True)
class NormRule:
    """A way to compute the norms of a linear layer's per-sample gradients."""

    name: str
    outer_norm: OuterNorm
    """(x_BTD, dy_BTP) -> [B]: squared norm of sum_t dy_t x_t^T."""
    is_fused: bool = False
    """True if linear layers report from their own backward; otherwise they do from hooks."""
    is_planned: bool = False
    """True if the planner chooses layer by layer. Otherwise all norms are computed by `outer_norm`,
    and a one-pass strategy keeps x and dy."""
