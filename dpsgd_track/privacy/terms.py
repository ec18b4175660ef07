"""Per-sample gradients of one parameter, in the form in which a layer's backward delivers them.

Each use of a parameter in a forward pass gives one term; the per-sample gradient is the sum of
its terms. A parameter that is used several times, in one module or in several, is exact because its
terms are joined before a norm is taken: gradients add up, norms do not.

A sample whose clip factor is 0 is left out of every clipped sum: it adds nothing, even if its term
is NaN or infinite.

- `Outer`: sum_t dy_t x_t^T, of a linear layer. Only the factors are held.
- `Rows`: rows of a table, of an embedding. Only the rows that were looked up are held.
- `Positions`: sum_t g_t, of a bias. Only the gradients by position are held.
- `Dense`: the per-sample gradients themselves, [B, *parameter].

Elements are in the parameter's order, but its dimensions may be flattened: a convolution's weight
is an `Outer` of [P, everything else].

Shapes: B samples, T positions, D inputs, P outputs, V rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpsgd_track.kernels.clipped_product import (
    clipped_product,
    clipped_products,
    clipped_products_into,
)
from dpsgd_track.kernels.embedding_cross import embedding_cross
from dpsgd_track.kernels.embedding_norm import embedding_norm_sq, per_sample_table
from dpsgd_track.kernels.flash_norm import gram_norms_sq
from dpsgd_track.kernels.flash_norm.reference import accumulation, accumulation_dtype
from dpsgd_track.kernels.position_sum import position_sums
from dpsgd_track.kernels.tensor_table import write_rows
from dpsgd_track.kernels.weighted_sum import norms_sq, weighted_sums, weighted_sums_into

OuterNorm = Callable[[Tensor, Tensor], Tensor]
"""(x_BTD, dy_BTP) -> [B]: squared norm of sum_t dy_t x_t^T, as a norm rule computes it."""


@dataclass(frozen=True)
class Outer:
    """sum_t dy_t x_t^T, [P, D]."""

    x_BTD: Tensor
    dy_BTP: Tensor

    def norm_sq(self, outer_norm: OuterNorm) -> Tensor:
        """Squared norm, [B]."""
        return outer_norm(self.x_BTD, self.dy_BTP)

    def clipped_sum(self, clip_factor_B: Tensor) -> Tensor:
        """sum_i c_i g_i, [P, D], in the clip factors' type."""
        return clipped_product(self.x_BTD, self.dy_BTP, clip_factor_B)

    def grouped(self, num_samples: int) -> Outer:
        """The sum over the rows of each sample, where these follow one another."""
        return Outer(_grouped(self.x_BTD, num_samples), _grouped(self.dy_BTP, num_samples))

    def materialised(self) -> Dense:
        """The per-sample gradients, [B, P, D], in the factors' type."""
        return Dense(torch.bmm(self.dy_BTP.mT, self.x_BTD))


@dataclass(frozen=True)
class Rows:
    """sum_t row(v_t) dy_t^T, [V, D]."""

    tokens_BT: Tensor
    dy_BTD: Tensor
    """Zero at positions that add nothing, such as a padding index."""
    num_rows: int

    def norm_sq(self, outer_norm: OuterNorm) -> Tensor:
        """Squared norm, [B]."""
        return embedding_norm_sq(self.tokens_BT, self.dy_BTD)

    def clipped_sum(self, clip_factor_B: Tensor) -> Tensor:
        """sum_i c_i g_i, [V, D]."""
        rows = accumulation(self.dy_BTD) * clip_factor_B.view(-1, 1, 1)
        # A sample that is left out may give NaN: its rows go to an extra row that is dropped.
        index_BT = torch.where(clip_factor_B.view(-1, 1) != 0, self.tokens_BT, self.num_rows)
        table = rows.new_zeros(self.num_rows + 1, rows.shape[-1])
        table.index_add_(0, index_BT.flatten(), rows.flatten(0, 1))
        return table[: self.num_rows]

    def grouped(self, num_samples: int) -> Rows:
        """The sum over the rows of each sample, where these follow one another."""
        tokens_BT = self.tokens_BT.reshape(num_samples, -1)
        return Rows(tokens_BT, _grouped(self.dy_BTD, num_samples), self.num_rows)

    def materialised(self) -> Dense:
        """The per-sample gradients, [B, V, D]. Large unless the table is small."""
        return Dense(per_sample_table(self.tokens_BT, self.dy_BTD, self.num_rows))


@dataclass(frozen=True)
class Positions:
    """sum_t g_t, [P]."""

    grad_BTP: Tensor

    def norm_sq(self, outer_norm: OuterNorm) -> Tensor:
        """Squared norm, [B]."""
        return self.materialised().norm_sq(outer_norm)

    def clipped_sum(self, clip_factor_B: Tensor) -> Tensor:
        """sum_i c_i g_i, [P]."""
        return self.materialised().clipped_sum(clip_factor_B)

    def grouped(self, num_samples: int) -> Positions:
        """The sum over the rows of each sample, where these follow one another."""
        return Positions(_grouped(self.grad_BTP, num_samples))

    def materialised(self) -> Dense:
        """The per-sample gradients, [B, P], in their accumulation type."""
        return Dense(position_sums([self.grad_BTP])[0])


@dataclass(frozen=True)
class Dense:
    """Per-sample gradients."""

    grad_B: Tensor
    """[B, *parameter], or the same elements in that order"""

    def norm_sq(self, outer_norm: OuterNorm) -> Tensor:
        """Squared norm of the gradients as they are stored, [B]."""
        return norms_sq([self.grad_B])[0]

    def clipped_sum(self, clip_factor_B: Tensor) -> Tensor:
        """sum_i c_i g_i."""
        return weighted_sums([self.grad_B], [clip_factor_B])[0]

    def grouped(self, num_samples: int) -> Dense:
        """The sum over the rows of each sample, where these follow one another."""
        rows = self.grad_B.unflatten(0, (num_samples, -1))
        return Dense(rows.sum(dim=1, dtype=accumulation_dtype(rows)))

    def materialised(self) -> Dense:
        """Itself."""
        return self


def _grouped(rows: Tensor, num_samples: int) -> Tensor:
    """[B n, T, d] -> [B, n T, d]."""
    return rows.reshape(num_samples, -1, rows.shape[-1])


Term = Outer | Rows | Positions | Dense


def with_sums(joined: Mapping[str, tuple[Term, ...]]) -> dict[str, tuple[Term, ...]]:
    """`joined` with all `Positions` materialised, by one launch."""
    positions = {n: t[0].grad_BTP for n, t in joined.items() if type(t[0]) is Positions}
    sums = map(Dense, position_sums(list(positions.values())))
    return {**joined, **{name: (term,) for name, term in zip(positions, sums, strict=True)}}


def join(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The sum of `terms` as at most one `Outer` and one `Rows`, as one `Dense`, or the only one.

    Uses in linear layers become positions of one longer sequence, and so do lookups.
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


def norms_sq_of(
    joined: Mapping[str, Sequence[Term]],
    outer_norm_of: Callable[[str], OuterNorm],
    takes_gram: Callable[[str, Outer], bool],
) -> dict[str, Tensor]:
    """Squared norms [B] of the sums of terms that `join` returned, by parameter.

    Args:
        takes_gram: True if the norm of a parameter whose only term is this `Outer` is to be taken
            in the Gram form, with others in one launch.
    """
    return _by_parameter(
        joined,
        lambda name: _norm_sq(joined[name], outer_norm_of(name)),
        lambda grads: norms_sq(list(grads.values())),
        lambda outers: gram_norms_sq([(term.x_BTD, term.dy_BTP) for term in outers.values()]),
        takes_gram,
    )


def clipped_sums_of(
    joined: Mapping[str, Sequence[Term]], factors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """sum_i c_i g_i of the sums of terms that `join` returned, by parameter.

    Args:
        factors: c of each parameter, [B].
    """
    return _by_parameter(
        joined,
        lambda name: _clipped_sum(joined[name], factors[name]),
        lambda grads: weighted_sums(list(grads.values()), [factors[name] for name in grads]),
        lambda outers: clipped_products(
            [(term.x_BTD, term.dy_BTP) for term in outers.values()],
            [factors[name] for name in outers],
        ),
        lambda name, term: True,
    )


def clipped_sums_into(
    outs: Mapping[str, Tensor],
    joined: Mapping[str, Sequence[Term]],
    factors: Mapping[str, Tensor],
) -> None:
    """Write the same sums into the rows of `outs`, and zeros for parameters without terms.

    Args:
        outs: [W, elements of one rank's shard] float32, by parameter. What follows a sum's end is
            left as it is.
    """
    single = {name: joined[name][0] for name in outs if len(joined.get(name, ())) == 1}
    dense = {name: term.grad_B for name, term in single.items() if type(term) is Dense}
    outers = {n: (t.x_BTD, t.dy_BTP) for n, t in single.items() if type(t) is Outer}
    if dense:
        weighted_sums_into(
            [outs[name] for name in dense], list(dense.values()), [factors[n] for n in dense]
        )
    if outers:
        clipped_products_into(
            [outs[name] for name in outers], list(outers.values()), [factors[n] for n in outers]
        )
    for name, out in outs.items():
        if name not in joined:
            out.zero_()
        elif name not in dense and name not in outers:
            write_rows(out, _clipped_sum(joined[name], factors[name]).contiguous())


def _by_parameter(
    joined: Mapping[str, Sequence[Term]],
    of_one: Callable[[str], Tensor],
    of_gradients: Callable[[dict[str, Tensor]], Iterable[Tensor]],
    of_outers: Callable[[dict[str, Outer]], Iterable[Tensor]],
    is_of_outers: Callable[[str, Outer], bool],
) -> dict[str, Tensor]:
    """A value for each parameter; those of gradients, and of outer products, in one launch each."""
    # Of exactly these classes: a subclass may define its own norms.
    single = {name: terms[0] for name, terms in joined.items() if len(terms) == 1}
    dense = {name: term.grad_B for name, term in single.items() if type(term) is Dense}
    outers = {n: t for n, t in single.items() if type(t) is Outer and is_of_outers(n, t)}
    values = {name: of_one(name) for name in joined if name not in dense and name not in outers}
    if dense:
        values |= zip(dense, of_gradients(dense), strict=True)
    if outers:
        values |= zip(outers, of_outers(outers), strict=True)
    return {name: values[name] for name in joined}


def _norm_sq(joined: Sequence[Term], outer_norm: OuterNorm) -> Tensor:
    if len(joined) == 1:
        return joined[0].norm_sq(outer_norm)
    head, lookups = joined
    assert isinstance(head, Outer)
    assert isinstance(lookups, Rows)
    total_B = head.norm_sq(outer_norm) + lookups.norm_sq(outer_norm)
    cross_B = embedding_cross(lookups.tokens_BT, lookups.dy_BTD, head.x_BTD, head.dy_BTP)
    # Rounding of terms that cancel can give just below zero.
    return (total_B + 2 * cross_B).clamp_min_(0.0)


def _clipped_sum(joined: Sequence[Term], clip_factor_B: Tensor) -> Tensor:
    total = joined[0].clipped_sum(clip_factor_B)
    for term in joined[1:]:
        total += term.clipped_sum(clip_factor_B)
    return total
