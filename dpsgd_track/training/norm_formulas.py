"""Wrong formulas for per-sample norms, computed beside the right one by the reference.

Where a mode's norm equals one of them, the comparison can name the mistake.

Shapes: T positions of one sample, D inputs, P outputs, V formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpsgd_track.distributed.sharding import row_range
from dpsgd_track.record.alternatives import NormFormula, SumFormula
from dpsgd_track.training.layer_calls import Share, padding_of, rows_of
from dpsgd_track.training.wrong_gradients import NORMS

_TILES = (
    (4, NormFormula.TAIL_OF_4_LOST, NormFormula.TILES_OF_4_ONCE, NormFormula.TILES_OF_4_APART),
    (8, NormFormula.TAIL_OF_8_LOST, NormFormula.TILES_OF_8_ONCE, NormFormula.TILES_OF_8_APART),
    (16, NormFormula.TAIL_OF_16_LOST, NormFormula.TILES_OF_16_ONCE, NormFormula.TILES_OF_16_APART),
    (32, NormFormula.TAIL_OF_32_LOST, NormFormula.TILES_OF_32_ONCE, NormFormula.TILES_OF_32_APART),
)
"""Positions of a tile, and the mistakes with such tiles."""


def formulas(
    gradient: Tensor, shares: Sequence[Share], wrong: Mapping[SumFormula, Tensor]
) -> Tensor:
    """[V] value of each `NormFormula`, float64; NaN where it does not apply.

    Args:
        gradient: one sample's gradient of one parameter.
        shares: of the calls that it is made of; empty if they are not known.
        wrong: what `wrong_gradients` has made of them.
    """
    norm = gradient.norm()
    values = _of_gradient(gradient)
    if wrong:
        values |= _of_shares(norm, shares)
        # Of several uses, a tail may be that of each use or that of all.
        found_so_far = values.keys()
        values |= {
            NORMS[f]: g.norm()
            for f, g in wrong.items()
            if f in NORMS and NORMS[f] not in found_so_far
        }
    found = torch.full((len(NormFormula),), torch.nan, dtype=torch.float64)
    found[[NORM_PLACES[formula] for formula in values]] = torch.stack(
        list(values.values())
    ).double()
    return found


NORM_PLACES = {formula: place for place, formula in enumerate(NormFormula)}
"""Place of each formula in what `formulas` returns."""


def _of_gradient(gradient: Tensor) -> dict[NormFormula, Tensor]:
    rows = gradient.reshape(len(gradient), -1)
    first, last = row_range(len(rows), dist.get_rank(), dist.get_world_size())
    return {
        NormFormula.OWN_ROWS: rows[first:last].norm(),
        NormFormula.LAST_ROW_LOST: rows[:-1].norm(),
        NormFormula.LAST_COLUMN_LOST: rows[:, :-1].norm(),
        NormFormula.SUM_OF_ABSOLUTES: rows.abs().sum(),
        NormFormula.FIRST_ROW_LOST: rows[1:].norm(),
        NormFormula.HALVES_ADDED: sum_of_halves(rows),
        NormFormula.LARGEST_ELEMENT: rows.abs().max(),
        NormFormula.ROOT_MEAN_SQUARE: rows.square().mean().sqrt(),
        NormFormula.SQUARES_IN_FLOAT16: rows.half().square().to(rows.dtype).sum().sqrt(),
    }


def sum_of_halves(rows: Tensor) -> Tensor:
    """Norms of the two halves of the rows, added."""
    half = -(-len(rows) // 2)
    return rows[:half].norm() + rows[half:].norm()


def _of_shares(norm: Tensor, shares: Sequence[Share]) -> dict[NormFormula, Tensor]:
    squares = torch.stack([share.position_squares().sum() for share in shares]).sum()
    values = {
        NormFormula.POSITIONS_APART: squares.sqrt(),
        NormFormula.POSITIONS_APART_AND_TOGETHER: (norm.square() + squares).sqrt(),
        NormFormula.LAST_TWO_POSITIONS_LOST: _joined(shares, lambda s: s.gradient(slice(0, -2))),
    }
    if len(shares) > 1:
        apart = torch.stack([share.gradient().square().sum() for share in shares]).sum()
        values |= {
            NormFormula.USES_APART: apart.sqrt(),
            NormFormula.USES_ADDED: torch.stack([s.gradient().norm() for s in shares]).sum(),
            NormFormula.CROSS_TERM_ONCE: ((norm.square() + apart) / 2).clamp_min(0).sqrt(),
            NormFormula.LAST_USE_TWICE: (
                norm.square() + shares[-1].gradient().square().sum()
            ).sqrt(),
        }
    if all(s.right_TD is None and s.row_T is None for s in shares):
        summed = [s.left_TP.sum(dim=1).square().sum() for s in shares]
        values[NormFormula.FEATURES_SUMMED] = torch.stack(summed).sum().sqrt()
    (only,) = shares if len(shares) == 1 else (None,)
    if only is None:
        left_TP = torch.cat([s.left_TP for s in shares]) if _are_alike(shares) else None
        right = [s.right_TD for s in shares if s.right_TD is not None]
        right_TD = torch.cat(right) if left_TP is not None and right else None
    else:
        left_TP, right_TD = only.left_TP, only.right_TD
    if left_TP is not None:
        row_T = only.row_T if only is not None else None
        joined = Share(left_TP, right_TD, row_T)
        values |= _of_tiles(joined)
        positive = joined.products().clamp_min(0).sum()
        values[NormFormula.NEGATIVE_LOST] = positive.sqrt()
    if left_TP is not None and right_TD is not None:
        values[NormFormula.SUMMED_FIRST] = left_TP.sum(dim=0).norm() * right_TD.sum(dim=0).norm()
        values[NormFormula.FACTORS_APART] = left_TP.norm() * right_TD.norm()
    elif left_TP is not None:
        gram = (left_TP @ left_TP.mT).norm()
        values |= {NormFormula.GRAM: gram, NormFormula.ROOT_OF_GRAM: gram.sqrt()}
    if rows := rows_of(shares):
        values |= _of_rows(norm, rows)
    return values


def _of_tiles(share: Share) -> dict[NormFormula, Tensor]:
    """Formulas that take the products of positions tile by tile."""
    gram_TT = share.products()
    place_T = torch.arange(len(gram_TT))
    values: dict[NormFormula, Tensor] = {}
    for size, tail_lost, once, apart in _TILES:
        if size >= len(gram_TT):
            break
        whole = len(gram_TT) // size * size
        of_one_tile = (place_T[:, None] // size == place_T // size).to(gram_TT)
        within, total = (gram_TT * of_one_tile).sum(), gram_TT.sum()
        squares = {tail_lost: gram_TT[:whole, :whole].sum(), once: (within + total) / 2}
        squares[apart] = within
        values |= {formula: square.clamp_min(0).sqrt() for formula, square in squares.items()}
    return values


def _of_rows(norm: Tensor, rows: Sequence[Share]) -> dict[NormFormula, Tensor]:
    """Formulas for an embedding, whose weight other layers may use as well."""
    squares = torch.stack([share.position_squares().sum() for share in rows]).sum()
    added = torch.stack([share.gradient().square().sum() for share in rows]).sum()
    values = {NormFormula.TOKENS_APART: (norm.square() - added + squares).clamp_min(0).sqrt()}
    in_runs = torch.stack([_square_of_runs(share) for share in rows]).sum()
    values[NormFormula.CONSECUTIVE_TOKENS] = (norm.square() - added + in_runs).clamp_min(0).sqrt()
    if padding := padding_of(rows):
        of_padding = _joined(padding, Share.gradient).square()
        values[NormFormula.PADDING_APART] = (norm.square() + of_padding).sqrt()
    return values


def _square_of_runs(share: Share) -> Tensor:
    """Squared norm of an embedding's gradients, added over runs of equal tokens alone."""
    assert share.row_T is not None, "only an embedding has rows"
    _, run_T = share.row_T.unique_consecutive(return_inverse=True)
    runs = share.left_TP.new_zeros(int(run_T.max()) + 1, share.left_TP.shape[1])
    return runs.index_add_(0, run_T, share.left_TP).square().sum()


def _are_alike(shares: Sequence[Share]) -> bool:
    """True if all shares are of one kind, so that their positions can be concatenated."""
    kinds = {(s.right_TD is None, s.row_T is None, s.left_TP.shape[1]) for s in shares}
    return len(kinds) == 1


def _joined(shares: Sequence[Share], gradient_of: Callable[[Share], Tensor]) -> Tensor:
    """Norm of the sum of the shares' gradients, whose rows may end early."""
    gradients = [gradient_of(share) for share in shares]
    if gradients[0].ndim == 1:
        return torch.stack(gradients).sum(dim=0).norm()
    rows = max(len(g) for g in gradients)
    padded = [nn.functional.pad(g, (0, 0, 0, rows - len(g))) for g in gradients]
    return torch.stack(padded).sum(dim=0).norm()
