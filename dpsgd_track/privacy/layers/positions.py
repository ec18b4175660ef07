"""Flattening of positions to [B, T, d], and terms that several rules share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dpsgd_track.kernels.flash_norm.reference import accumulation_dtype
from dpsgd_track.privacy.terms import Dense, Outer, Term


def flatten_positions(tensor: Tensor) -> Tensor:
    """[B, ..., d] as [B, T, d]; [B, d] as [B, 1, d]."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def outer(x: Tensor, dy: Tensor) -> Outer:
    """sum_t dy_t x_t^T of inputs [B, ..., D] and output gradients [B, ..., P]."""
    # Under autocast the module computes in its output's type.
    return Outer(flatten_positions(x).to(dy.dtype), flatten_positions(dy))


def summed_positions(gradient: Tensor, num_feature_dims: int = 1) -> Dense:
    """sum_t g_t of gradients [B, ..., *parameter], in their accumulation type."""
    shape = gradient.shape[gradient.dim() - num_feature_dims :]
    positions = gradient.reshape(len(gradient), -1, *shape)
    return Dense(positions.sum(dim=1, dtype=accumulation_dtype(gradient)))


def trainable_terms(module: nn.Module, **term_of: Callable[[], Term]) -> dict[str, Term]:
    """Terms of those parameters of `module` that exist and are trainable, by name."""
    parameters = ((name, getattr(module, name, None)) for name in term_of)
    return {name: term_of[name]() for name, p in parameters if p is not None and p.requires_grad}
