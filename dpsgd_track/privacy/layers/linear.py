"""torch.nn.Linear: weight gradient sum_t dy_t x_t^T, bias gradient sum_t dy_t."""

from __future__ import annotations

from torch import Tensor, nn

from dpsgd_track.privacy.layers.positions import linear_terms, outer
from dpsgd_track.privacy.terms import Term


def matches(module: nn.Module) -> bool:
    """True for linear layers, not for subclasses that compute something else."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight [P, D] and bias [P]."""
    return linear_terms(module, lambda: outer(x, dy), dy)
