"""Per-sample gradients of one parameter, in the form in which a layer's backward offers them.

Each use of a parameter in a forward pass gives one term; the per-sample gradient is the sum of
its terms. A parameter that is used several times, in one module or in several, is exact because
its terms are joined before a norm is taken: norms do not add up, gradients do.

- `Outer`: sum_t dy_t x_t^T, of a linear layer. Only the factors are held.
- `Rows`: rows of a table, of an embedding. Only the rows that were looked up are held.
- `Dense`: the per-sample gradients themselves, [B, *parameter].

Elements are in the parameter's order, but its dimensions may be flattened: a convolution's weight
is an `Outer` of [P, everything else].

Shapes: B samples, T positions, D inputs, P outputs, V rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpsgd_track.kernels.embedding_cross import embedding_cross
from dpsgd_track.kernels.embedding_norm import embedding_norm_sq, per_sample_table
from dpsgd_track.kernels.flash_norm.reference import (
    accumulation,
    accumulation_dtype,
    uses_tensor_cores,
)

OuterNorm = Callable[[Tensor, Tensor], Tensor]
"""(x_BTD, dy_BTP) -> [B]: squared norm of sum_t dy_t x_t^T. What norm rules differ in."""


@dataclass(frozen=True)
class Outer:
    """sum_t dy_t x_t^T, [P, D]."""

    x_BTD: Tensor
    dy_BTP: Tensor

    def norm_sq(self, outer_norm: OuterNorm) -> Tensor:
        """Squared norm, [B]."""
        return outer_norm(self.x_BTD, self.dy_BTP)

    def clipped_sum(self, clip_factor_B: Tensor) -> Tensor:
        """sum_i c_i g_i, [P, D], in the clip factors' type.

        The factors meet the gradients in that type. Rounded into bfloat16 factors of the product,
        they would move a whole sample's gradient by up to 0.2 %, and beyond C.
        """
        if uses_tensor_cores(self.x_BTD):
            total = clip_factor_B.new_zeros(self.dy_BTP.shape[2], self.x_BTD.shape[2])
            for factor, dy_TP, x_TD in zip(clip_factor_B, self.dy_BTP, self.x_BTD, strict=True):
                total.addcmul_(factor, torch.mm(dy_TP.T, x_TD, out_dtype=torch.float32))
            return total
        x_BTD, dy_BTP = accumulation(self.x_BTD), accumulation(self.dy_BTP)
        factors = clip_factor_B.view(-1, 1, 1)
        if x_BTD.shape[2] < dy_BTP.shape[2]:
            x_BTD = x_BTD * factors
        else:
            dy_BTP = dy_BTP * factors
        return dy_BTP.flatten(0, 1).T @ x_BTD.flatten(0, 1)

    def materialised(self) -> Dense:
        """The per-sample gradients, [B, P, D], in the factors' type."""
        return Dense(torch.bmm(self.dy_BTP.mT, self.x_BTD))


@dataclass(frozen=True)
class Rows:
    """sum_t row(v_t) dy_t^T, [V, D]."""

    tokens_BT: Tensor
    dy_BTD: Tensor
    """Zero where nothing is to be added, as at a padding index."""
    num_rows: int

    def norm_sq(self, outer_norm: OuterNorm) -> Tensor:
        """Squared norm, [B]."""
        return embedding_norm_sq(self.tokens_BT, self.dy_BTD)

    def clipped_sum(self, clip_factor_B: Tensor) -> Tensor:
        """sum_i c_i g_i, [V, D]."""
        rows = accumulation(self.dy_BTD) * clip_factor_B.view(-1, 1, 1)
        table = rows.new_zeros(self.num_rows, rows.shape[-1])
        return table.index_add_(0, self.tokens_BT.flatten(), rows.flatten(0, 1))

    def materialised(self) -> Dense:
        """The per-sample gradients, [B, V, D]: for tables too small to matter."""
        return Dense(per_sample_table(self.tokens_BT, self.dy_BTD, self.num_rows))


@dataclass(frozen=True)
class Dense:
    """Per-sample gradients."""

    grad_B: Tensor
    """[B, *parameter], or its elements in that order"""

    def norm_sq(self, outer_norm: OuterNorm) -> Tensor:
        """Squared norm of the gradients as they are stored, [B]."""
        flat = self.grad_B.reshape(len(self.grad_B), -1)
        norm = torch.linalg.vector_norm(flat, dim=1, dtype=accumulation_dtype(flat))
        return norm.square()

    def clipped_sum(self, clip_factor_B: Tensor) -> Tensor:
        """sum_i c_i g_i."""
        return torch.tensordot(clip_factor_B, self.grad_B.to(clip_factor_B.dtype), dims=1)

    def materialised(self) -> Dense:
        """Itself."""
        return self


Term = Outer | Rows | Dense


def join(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The same sum in at most one `Outer` and one `Rows`, or in one `Dense`.

    Linear uses become positions of one longer sequence, and so do lookups.
    """
    if len(terms) == 1:
        return tuple(terms)
    outers = [term for term in terms if isinstance(term, Outer)]
    rows = [term for term in terms if isinstance(term, Rows)]
    if len(outers) + len(rows) < len(terms):
        grads = [accumulation(term.materialised().grad_B) for term in terms]
        return (Dense(torch.stack([g.reshape(len(g), -1) for g in grads]).sum(dim=0)),)
    joined: list[Term] = []
    if outers:
        joined.append(
            Outer(
                torch.cat([term.x_BTD for term in outers], dim=1),
                torch.cat([term.dy_BTP for term in outers], dim=1),
            )
        )
    if rows:
        joined.append(
            Rows(
                torch.cat([term.tokens_BT for term in rows], dim=1),
                torch.cat([term.dy_BTD for term in rows], dim=1),
                rows[0].num_rows,
            )
        )
    return tuple(joined)


def norm_sq(joined: Sequence[Term], outer_norm: OuterNorm) -> Tensor:
    """Squared norm [B] of the sum of terms that `join` returned."""
    total_B = torch.stack([term.norm_sq(outer_norm) for term in joined]).sum(dim=0)
    if len(joined) == 1:
        return total_B
    head, lookups = joined
    assert isinstance(head, Outer)
    assert isinstance(lookups, Rows)
    cross_B = embedding_cross(lookups.tokens_BT, lookups.dy_BTD, head.x_BTD, head.dy_BTP)
    # Terms that cancel can round to just below zero.
    return (total_B + 2 * cross_B).clamp_min_(0.0)


def clipped_sum(joined: Sequence[Term], clip_factor_B: Tensor) -> Tensor:
    """sum_i c_i g_i of the sum of terms."""
    total = joined[0].clipped_sum(clip_factor_B)
    for term in joined[1:]:
        total += term.clipped_sum(clip_factor_B)
    return total
