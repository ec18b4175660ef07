"""One file per layer type: the terms of its parameters' per-sample gradients.

A rule is given the module, the input `x` [B, ...] of one call and the gradient `dy` [B, ...] of its
output. It covers the parameters that the module's forward applies itself, and reads the module's
shapes and settings, never its parameters' values, which are elsewhere when a model is sharded.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from dpsgd_track.privacy.layers import (
    channel_layer_norm,
    convolution,
    embedding,
    embedding_bag,
    general_convolution,
    group_norm,
    layer_norm,
    linear,
    rms_norm,
    transposed_linear,
)
from dpsgd_track.privacy.terms import Term


class LayerRule(Protocol):
    """A module of this package: the rule of one layer type."""

    def matches(self, module: nn.Module) -> bool:
        """True if the rule is exact for `module`."""
        ...

    def terms(self, module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
        """Term of each trainable parameter's per-sample gradients, by the parameter's name."""
        ...


RULES: tuple[LayerRule, ...] = (
    linear,
    transposed_linear,
    embedding,
    layer_norm,
    channel_layer_norm,
    rms_norm,
    group_norm,
    convolution,
    general_convolution,
    embedding_bag,
)


def find_rule(module: nn.Module) -> LayerRule | None:
    """The rule that is exact for `module`, or None."""
    if not _applies_its_own(module):
        return None
    return next((rule for rule in RULES if rule.matches(module)), None)


def _applies_its_own(module: nn.Module) -> bool:
    """True if the module's only parameters are a weight and a bias, and its forward is its own.

    A parametrised module computes its weight from other parameters.
    """
    if "forward" in vars(module):
        return False
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    applied = {n for n in ("weight", "bias") if isinstance(getattr(module, n, None), Tensor)}
    return own == applied
