"""Flattening of positions to [B, T, d], and terms that several rules share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dpsgd_track.kernels.flash_norm.reference import accumulation_dtype
from dpsgd_track.privacy.terms import Dense, Outer, Positions, Term


def flatten_positions(tensor: Tensor) -> Tensor:
    """[B, ..., d] as [B, T, d]; [B, d] as [B, 1, d]."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


def outer(x: Tensor, dy: Tensor) -> Outer:
    """sum_t dy_t x_t^T of inputs [B, ..., D] and output gradients [B, ..., P]."""
    # Under autocast the module computes in its output's type.
    return Outer(flatten_positions(x).to(dy.dtype), flatten_positions(dy))


def summed_positions(gradient: Tensor) -> Positions:
    """sum_t g_t of gradients [B, ..., P]."""
    return Positions(flatten_positions(gradient))


def summed_channels(gradient: Tensor) -> Dense:
    """sum_t g_t of gradients [B, P, ...], in their accumulation type."""
    return Dense(gradient.flatten(2).sum(dim=2, dtype=accumulation_dtype(gradient)))


def linear_terms(module: nn.Module, weight: Callable[[], Outer], dy: Tensor) -> dict[str, Term]:
    """Terms of a linear layer's weight, as `weight` gives it, and bias.

    The bias's gradient is summed with those of other layers, from what the weight's term holds
    anyway; at once, if there is no such term.
    """
    terms = trainable_terms(module, weight=weight, bias=lambda: summed_positions(dy))
    if "weight" not in terms:
        return {name: term.materialised() for name, term in terms.items()}
    return terms


def trainable_terms(module: nn.Module, **term_of: Callable[[], Term]) -> dict[str, Term]:
    """Terms of those parameters of `module` that exist and are trainable, by name."""
    own = module._parameters
    terms = {}
    for name, term in term_of.items():
        parameter = own.get(name)
        if parameter is not None and parameter.requires_grad:
            terms[name] = term()
    return terms
