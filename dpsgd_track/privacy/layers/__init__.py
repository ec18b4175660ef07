"""One file per layer type: squared norms of per-sample gradients, and clipped sums of them.

Every rule sees the module, its inputs `x` [B, ..., d] and the gradients of its outputs `dy`
[B, ..., p], both joined along the positions over all calls of the module in one forward pass.
It owns exactly the parameters that the module's forward applies itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from dpsgd_track.privacy.layers import embedding, layer_norm, linear, rms_norm

OuterNorm = Callable[[Tensor, Tensor], Tensor]
"""(x_BTD, dy_BTP) -> [B]: squared norm of sum_t dy_t x_t^T. What norm rules differ in."""


class LayerRule(Protocol):
    """What a layer type's module provides."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the rule is exact for `module`."""
        ...

    def norm_sq(
        self, module: nn.Module, x: Tensor, dy: Tensor, outer_norm: OuterNorm
    ) -> dict[str, Tensor]:
        """Squared norm [B] of each sample's gradient, for each trainable parameter."""
        ...

    def clipped_sum(
        self, module: nn.Module, x: Tensor, dy: Tensor, clip_factor_B: Tensor
    ) -> dict[str, Tensor]:
        """sum_i c_i g_i in the parameter's shape, for each trainable parameter."""
        ...


RULES: tuple[LayerRule, ...] = (linear, embedding, layer_norm, rms_norm)


def find_rule(module: nn.Module) -> LayerRule | None:
    """The rule that is exact for `module`, or None."""
    return next((rule for rule in RULES if rule.matches(module)), None)
