"""Faults of the clipped sum: right norms, and a gradient that is wrong or in the wrong place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpsgd_track.mutants.fault import SUM, Site, fault
from dpsgd_track.privacy.terms import Term


def _changed(site: Site, change: Any) -> None:
    """Change this rank's sum of a parameter, in its whole shape, before it goes to the others."""

    def sum_of(original: Any, name: str, terms: Sequence[Term], factors: Tensor) -> Tensor:
        found: Tensor = change(name, original(name, terms, factors))
        return found

    site.wrap("sum_of", sum_of)


def _only(wanted: str, change: Any) -> Any:
    return lambda name, total: change(total) if name == wanted else total


@fault(
    "rows of a gradient shifted by one",
    formula="row p + 1 in place of row p",
    at="sum_of",
    needs="a comparison of directions",
    stage=SUM,
    where="blocks.0.left.weight",
)
def rows_shifted(site: Site) -> None:
    """No norm shows it."""
    _changed(site, _only("blocks.0.left.weight", lambda total: total.roll(1, 0)))


@fault(
    "a square weight's gradient transposed",
    formula="G^T in place of G",
    at="sum_of",
    needs="a comparison of directions, a square weight",
    stage=SUM,
    where="blocks.0.reused.weight",
)
def transposed(site: Site) -> None:
    """No norm shows it."""
    _changed(site, _only("blocks.0.reused.weight", lambda total: total.T.contiguous()))


@fault(
    "two layers of one shape exchanged",
    formula="G of one layer handed to the other",
    at="put",
    needs="two layers of one shape",
    stage=SUM,
    where="blocks.0.*t.weight",
)
def layers_exchanged(site: Site) -> None:
    """Two linear layers whose outputs are added."""
    names = {"blocks.0.left.weight": "blocks.0.right.weight"}
    names |= {other: name for name, other in names.items()}
    site.wrap("put", lambda original, name, total: original(names.get(name, name), total))


@fault(
    "sign of one gradient",
    formula="-G in place of G",
    at="sum_of",
    needs="a comparison of directions",
    stage=SUM,
    where="gate.weight",
)
def sign_flipped(site: Site) -> None:
    """No norm shows it."""
    _changed(site, _only("gate.weight", torch.neg))


@fault(
    "one layer's gradient left out",
    formula="0 in place of G",
    at="sum_of",
    stage=SUM,
    where="blocks.1.down.weight",
)
def layer_left_out(site: Site) -> None:
    """Its norm counts all the same."""
    _changed(site, _only("blocks.1.down.weight", torch.zeros_like))


@fault(
    "embedding rows shifted by one token",
    formula="row v + 1 in place of row v",
    at="rows_sum",
    needs="a comparison of directions",
    stage=SUM,
    where="*.weight",
)
def tokens_shifted(site: Site) -> None:
    """A vocabulary with a token in front."""
    site.wrap("rows_sum", lambda original, rows, factors: original(rows, factors).roll(1, 0))


@fault(
    "tied weight: the embedding's share of the sum lost",
    formula="g_head in place of g_head + g_embedding",
    at="sum_of",
    needs="a tied head",
    stage=SUM,
    where="embedding.weight",
)
def tied_use_lost(site: Site) -> None:
    """Its norm is right."""

    def sum_of(original: Any, name: str, terms: Sequence[Term], factors: Tensor) -> Tensor:
        found: Tensor = original(name, terms[:1], factors)
        return found

    site.wrap("sum_of", sum_of)


@fault(
    "sum of a mean loss",
    source="a research fork",
    formula="sum_i c_i g_i / b, in place of sum_i c_i g_i",
    at="sum_of",
    needs="several samples",
    stage=SUM,
)
def batch_factor_missing(site: Site) -> None:
    """What was kept came from a backward of the batch's mean loss."""

    def sum_of(original: Any, name: str, terms: Sequence[Term], factors: Tensor) -> Tensor:
        found: Tensor = original(name, terms, factors / len(factors))
        return found

    site.wrap("sum_of", sum_of)


@fault(
    "autotuned kernel adds with every trial",
    source="triton.autotune without reset_to_zero",
    formula="2 S of the first micro-batch of each shape, in place of S",
    at="sum_of",
    stage=SUM,
)
def autotuned_without_reset(site: Site) -> None:
    """What adds in place is run on the real sum to be timed. Afterwards all is well."""
    seen: set[tuple[int, ...]] = set()

    def sum_of(original: Any, name: str, terms: Sequence[Term], factors: Tensor) -> Tensor:
        found: Tensor = original(name, terms, factors)
        is_first = found.shape not in seen
        seen.add(tuple(found.shape))
        return 2 * found if is_first else found

    site.wrap("sum_of", sum_of)


@fault(
    "rows of an embedding's gradient written, not added",
    formula="G[v_t] = c dy_t, in place of G[v_t] += c dy_t",
    at="rows_sum",
    needs="tokens that repeat",
    stage=SUM,
    where="embedding.weight, position.weight",
)
def rows_overwritten(site: Site) -> None:
    """The last token of a row wins. Its norm is right."""

    def rows_sum(original: Any, rows: Any, factors: Tensor) -> Tensor:
        found = torch.zeros_like(original(rows, factors))
        scaled_BTD = rows.dy_BTD.to(found) * factors.view(-1, 1, 1)
        for token, scaled in zip(
            rows.tokens_BT.flatten().tolist(), scaled_BTD.flatten(0, 1), strict=True
        ):
            found[token] = scaled
        return found

    site.wrap("rows_sum", rows_sum)
