"""What norm rules differ in.

Shapes: B samples, T positions, D inputs, P outputs of a linear layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpsgd_track.privacy.terms import OuterNorm


@dataclass(frozen=True, kw_only=True)
class NormRule:
    """How the norm of a linear layer's per-sample gradient is found."""

    name: str
    outer_norm: OuterNorm
    """(x_BTD, dy_BTP) -> [B]: squared norm of sum_t dy_t x_t^T."""
    is_fused: bool = False
    """Linear layers report from inside the graph; else from hooks."""
    is_planned: bool = False
    """The planner chooses layer by layer; else norms are all found in the rule's one way, and a
    one-pass strategy keeps x and dy."""
