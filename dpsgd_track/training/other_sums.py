"""Measures the wrong clipped sums of all ranks' samples.

Legend: F formulas, P trainable parameters, K projections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from dpsgd_track.distributed.ranks import sum_over_ranks
from dpsgd_track.distributed.sharding import LocalPart
from dpsgd_track.modes.protocol import Mode
from dpsgd_track.record.alternatives import SumFormula
from dpsgd_track.training.moved_gradient import MOVES, moved
from dpsgd_track.training.observe import measure
from dpsgd_track.training.wrong_sums import WrongSums


def other_sums(mode: Mode, parts: Sequence[LocalPart], own: WrongSums) -> NDArray[np.float64]:
    """[F, P, K] sketch of the wrong clipped sum of each `SumFormula`; NaN where one does not apply.

    Args:
        parts: the right sum of all ranks, whole on each of them.
        own: the wrong sums of this rank's samples.
    """
    totals = own.own()
    wrong = [*_moved(parts), *_tails(parts, totals), *_not_reduced(parts, totals, own.batches)]
    wrong += _of_other_gradients(parts, own)
    measured = measure(mode, [part for _, part in wrong]).sketch
    found = np.full((len(SumFormula), len(parts), measured.shape[1]), np.nan)
    columns = {part.name: column for column, part in enumerate(parts)}
    rows = {formula: row for row, formula in enumerate(SumFormula)}
    for (formula, part), sketch in zip(wrong, measured, strict=True):
        found[rows[formula], columns[part.name]] = sketch
    return found


def _moved(parts: Sequence[LocalPart]) -> Iterator[tuple[SumFormula, LocalPart]]:
    ranks = dist.get_world_size()
    for formula in MOVES:
        for part in parts:
            yield formula, replace(part, local=moved(part.local, formula, ranks))


def _tails(
    parts: Sequence[LocalPart], own: Mapping[str, Tensor]
) -> Iterator[tuple[SumFormula, LocalPart]]:
    """The right sum, with this rank's own one in the elements that are left over."""
    for part in parts:
        rest = part.num_elements % dist.get_world_size()
        if not rest:
            continue
        whole = part.local.clone().reshape(-1)
        total = own.get(part.name)
        whole[-rest:] = 0.0 if total is None else total.to(whole).reshape(-1)[-rest:]
        yield SumFormula.TAIL_NOT_REDUCED, replace(part, local=whole.view_as(part.local))


def _not_reduced(
    parts: Sequence[LocalPart], own: Mapping[str, Tensor], batches: Sequence[Mapping[str, Tensor]]
) -> Iterator[tuple[SumFormula, LocalPart]]:
    """Sums of which some is this rank's own: each rank's slice is measured of its own copy."""
    num_batches = torch.tensor([len(batches)], device=parts[0].local.device)
    dist.all_reduce(num_batches, op=dist.ReduceOp.MAX)
    last = int(num_batches) - 1
    of_last = batches[last] if last < len(batches) else {}
    of_first = batches[0] if batches else {}
    for part in parts:
        zeros = torch.zeros_like(part.local)
        mine, mine_last = (totals.get(part.name, zeros).to(part.local) for totals in (own, of_last))
        yield SumFormula.NOT_REDUCED, replace(part, local=mine)
        on_rank_0 = part.local if dist.get_rank() == 0 else mine
        yield SumFormula.REDUCED_TO_FIRST_RANK, replace(part, local=on_rank_0)
        if last > 0:
            all_last = mine_last.clone()
            sum_over_ranks(all_last)
            reduced_last = mine - mine_last + all_last
            yield SumFormula.ONLY_LAST_REDUCED, replace(part, local=reduced_last)
            mine_first = of_first.get(part.name, zeros).to(part.local)
            all_first = mine_first.clone()
            sum_over_ranks(all_first)
            reduced_first = mine - mine_first + all_first
            yield SumFormula.ONLY_FIRST_REDUCED, replace(part, local=reduced_first)
            not_last = part.local - all_last + mine_last
            yield SumFormula.LAST_NOT_REDUCED, replace(part, local=not_last)


def _of_other_gradients(
    parts: Sequence[LocalPart], own: WrongSums
) -> Iterator[tuple[SumFormula, LocalPart]]:
    """The right sum, and what the samples of all ranks add to it by a mistake."""
    every = [(formula, part) for formula in SumFormula for part in parts]
    device = parts[0].local.device
    known = [float((formula, part.name) in own.added) for formula, part in every]
    num_known = torch.tensor(known, device=device)
    sum_over_ranks(num_known)
    used = [key for key, count in zip(every, num_known.tolist(), strict=True) if count]
    if not used:
        return
    terms = [own.added.get((f, p.name), torch.zeros_like(p.local)).to(p.local) for f, p in used]
    flat = torch.cat([term.reshape(-1) for term in terms])
    sum_over_ranks(flat)
    lengths = [part.local.numel() for _, part in used]
    for (formula, part), term in zip(used, flat.split(lengths), strict=True):
        yield formula, replace(part, local=part.local + term.view_as(part.local))
