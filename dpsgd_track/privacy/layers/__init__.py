"""One file per layer type: what the per-sample gradients of its parameters are made of.

Every rule sees the module, the input `x` [B, ...] of one call and the gradient of its output `dy`
[B, ...], and owns exactly the parameters that the module's forward applies itself. A rule reads
shapes and settings off the module and never its parameters' values, which are elsewhere when a
model is sharded.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from dpsgd_track.privacy.layers import (
    convolution,
    embedding,
    group_norm,
    layer_norm,
    linear,
    rms_norm,
    transposed_linear,
)
from dpsgd_track.privacy.terms import Term


class LayerRule(Protocol):
    """What a layer type's module provides."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the rule is exact for `module`."""
        ...

    def terms(self, module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
        """Each trainable parameter's per-sample gradients by the parameter's name."""
        ...


RULES: tuple[LayerRule, ...] = (
    linear,
    transposed_linear,
    embedding,
    layer_norm,
    rms_norm,
    group_norm,
    convolution,
)


def find_rule(module: nn.Module) -> LayerRule | None:
    """The rule that is exact for `module`, or None."""
    if not _applies_its_own(module):
        return None
    return next((rule for rule in RULES if rule.matches(module)), None)


def _applies_its_own(module: nn.Module) -> bool:
    """Whether weight and bias, where there are any, are parameters and all that there is.

    A parametrised module computes them from others. Nor is a rule exact for a module whose forward
    somebody has replaced.
    """
    if "forward" in vars(module):
        return False
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    applied = {n for n in ("weight", "bias") if isinstance(getattr(module, n, None), Tensor)}
    return own == applied
