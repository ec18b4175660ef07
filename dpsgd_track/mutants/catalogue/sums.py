"""Faults of the clipped sum: right norms, and a gradient that is wrong or in the wrong place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpsgd_track.mutants.mutant import mutant, on_site
from dpsgd_track.mutants.needs import Need
from dpsgd_track.mutants.seams import Seam
from dpsgd_track.mutants.site import Original, Site
from dpsgd_track.privacy.terms import Rows, Term
from dpsgd_track.record.stages import Stage

_Change = Callable[[Tensor], Tensor]

_mutant = partial(mutant, stage=Stage.SUM)


def _sum_of(parameter: str, title: str, formula: str, *needs: Need) -> Callable[[_Change], _Change]:
    """Change this rank's sum of one parameter, in its full shape, before the reduction."""

    def by(site: Site, change: _Change) -> None:
        def sum_of(original: Original, name: str, terms: Sequence[Term], factor_B: Tensor) -> Any:
            total = original(name, terms, factor_B)
            return change(total) if name == parameter else total

        site.wrap(Seam.SUM_OF, sum_of)

    return _mutant(title, formula, *needs, at=Seam.SUM_OF, by=by, where=(parameter,))


@_sum_of(
    "blocks.0.left.weight",
    "rows of a gradient shifted by one",
    "row p + 1 in place of row p",
    Need.DIRECTIONS,
)
def rows_shifted(total: Tensor) -> Tensor:
    """No norm shows it."""
    return total.roll(1, 0)


@_sum_of(
    "blocks.0.reused.weight",
    "a square weight's gradient transposed",
    "G^T in place of G",
    Need.DIRECTIONS,
    Need.SQUARE_WEIGHT,
)
def transposed(total: Tensor) -> Tensor:
    """No norm shows it."""
    return total.T.contiguous()


@_mutant(
    "two layers of one shape exchanged",
    "G of one layer handed to the other",
    Need.LAYERS_OF_ONE_SHAPE,
    at=Seam.PUT,
    where=("blocks.0.*t.weight",),
)
def layers_exchanged(original: Original, name: str, total: Tensor) -> None:
    """The two are linear layers whose outputs are added."""
    names = {"blocks.0.left.weight": "blocks.0.right.weight"}
    names |= {other: name for name, other in names.items()}
    original(names.get(name, name), total)


@_sum_of("gate.weight", "sign of one gradient", "-G in place of G", Need.DIRECTIONS)
def sign_flipped(total: Tensor) -> Tensor:
    """No norm shows it."""
    return -total


@_sum_of("blocks.1.down.weight", "one layer's gradient left out", "0 in place of G")
def layer_left_out(total: Tensor) -> Tensor:
    """Its norm counts all the same."""
    return torch.zeros_like(total)


@_mutant(
    "embedding rows shifted by one token",
    "row v + 1 in place of row v",
    Need.DIRECTIONS,
    at=Seam.ROWS_SUM,
    where=("*.weight",),
)
def tokens_shifted(original: Original, rows: Rows, factor_B: Tensor) -> Any:
    """The vocabulary has an extra token in front."""
    return original(rows, factor_B).roll(1, 0)


@_mutant(
    "tied weight: the embedding's share of the sum lost",
    "g_head in place of g_head + g_embedding",
    Need.TIED_HEAD,
    at=Seam.SUM_OF,
    where=("embedding.weight",),
)
def tied_use_lost(original: Original, name: str, terms: Sequence[Term], factor_B: Tensor) -> Any:
    """The norm is right."""
    return original(name, terms[:1], factor_B)


@_mutant(
    "sum of a mean loss",
    "sum_i c_i g_i / b, in place of sum_i c_i g_i",
    Need.SAMPLES,
    at=Seam.SUM_OF,
    source="a research fork",
)
def batch_factor_missing(
    original: Original, name: str, terms: Sequence[Term], factor_B: Tensor
) -> Any:
    """The stored factors come from a backward of the mean loss of the batch."""
    return original(name, terms, factor_B / len(factor_B))


@_mutant(
    "autotuned kernel adds with every trial",
    "2 S of the first micro-batch of each shape, in place of S",
    at=Seam.SUM_OF,
    by=on_site,
    source="triton.autotune without reset_to_zero",
)
def autotuned_without_reset(site: Site) -> None:
    """A kernel that adds in place is timed on the real sum. Later calls are right."""
    seen: set[tuple[int, ...]] = set()

    def sum_of(original: Original, name: str, terms: Sequence[Term], factor_B: Tensor) -> Any:
        total = original(name, terms, factor_B)
        is_first = total.shape not in seen
        seen.add(tuple(total.shape))
        return 2 * total if is_first else total

    site.wrap(Seam.SUM_OF, sum_of)


@_mutant(
    "rows of an embedding's gradient written, not added",
    "G[v_t] = c dy_t, in place of G[v_t] += c dy_t",
    Need.REPEATED_TOKENS,
    at=Seam.ROWS_SUM,
    where=("embedding.weight", "position.weight"),
)
def rows_overwritten(original: Original, rows: Rows, factor_B: Tensor) -> Tensor:
    """The last token of a row wins. The norm is right."""
    total = torch.zeros_like(original(rows, factor_B))
    scaled_BTD = rows.dy_BTD.to(total) * factor_B.view(-1, 1, 1)
    tokens = rows.tokens_BT.flatten().tolist()
    for token, scaled in zip(tokens, scaled_BTD.flatten(0, 1), strict=True):
        total[token] = scaled
    return total
