"""transformers' Conv1D (GPT-2): a linear layer whose weight is stored as [D, P]."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dpsgd_track.privacy.layers.positions import linear_terms, outer
from dpsgd_track.privacy.terms import Term


def matches(module: nn.Module) -> bool:
    """True for Conv1D, not for subclasses that compute something else."""
    return isinstance(module, Conv1D) and type(module).forward is Conv1D.forward


def terms(module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Term]:
    """weight [D, P] and bias [P]."""
    return linear_terms(module, lambda: outer(dy, x.to(dy.dtype)), dy)
