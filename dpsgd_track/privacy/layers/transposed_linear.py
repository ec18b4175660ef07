"""transformers' Conv1D (GPT-2): a linear layer whose weight is stored as [D, P]."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpsgd_track.privacy.layers.positions import is_trainable, outer, summed_positions
from dpsgd_track.privacy.terms import Term


def matches(module: nn.Module) -> bool:
    """True for Conv1D, not for subclasses that compute something else."""
    return isinstance(module, Conv1D) and type(module).forward is Conv1D.forward


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight [D, P] and bias [P]."""
    found: dict[str, Term] = {}
    if is_trainable(module, "weight"):
        found["weight"] = outer(dy, x.to(dy.dtype))
    if is_trainable(module, "bias"):
        found["bias"] = summed_positions(dy)
    return found
