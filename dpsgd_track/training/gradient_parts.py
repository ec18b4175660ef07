"""Measures samples' gradients and their clipped sums by position, row and column.

Shapes: T positions, G elements of a parameter, R rows, C columns, X squares, M parts, K
projections, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpsgd_track.distributed.ranks import sum_over_ranks
from dpsgd_track.kernels.sketch import NUM_PROJECTIONS, signs_of
from dpsgd_track.record.parts import (
    COLUMN_SQUARES,
    MOST_POSITIONS,
    MOST_ROWS,
    NUM_PAIRS,
    NUM_SQUARES,
    NUM_SUM_PARTS,
    ROW_SQUARES,
    SumParts,
)
from dpsgd_track.training.layer_calls import Share


class GradientParts:
    """Parts of the samples' gradients of one step on this rank."""

    def __init__(self) -> None:
        self._clipped: dict[str, Tensor] = {}
        self._unclipped: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._totals: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        """Sums with clip factors, and without."""
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}
        """Gradient of the last sample, [1, G], and what each position adds to it."""

    def see(self, gradients: Mapping[str, Tensor], shares: Mapping[str, Sequence[Share]]) -> Tensor:
        """[P, X] squares of a sample's gradient by part; NaN where they are too many.

        Args:
            gradients: by parameter.
            shares: of the calls that they are made of; empty where those do not make them up.
        """
        squares = torch.full((len(gradients), NUM_SQUARES), torch.nan, dtype=torch.float64)
        for of_parameter, (name, gradient) in zip(squares, gradients.items(), strict=True):
            self._shapes[name] = gradient.shape
            positions_TG = _by_position(gradient, shares.get(name, ()))
            self._seen[name] = gradient.reshape(1, -1), positions_TG
            if positions_TG.isfinite().all():
                products = torch.zeros(MOST_POSITIONS, MOST_POSITIONS, dtype=torch.float64)
                num = len(positions_TG)
                products[:num, :num] = (positions_TG @ positions_TG.mT).double()
                of_parameter[:NUM_PAIRS] = products[*torch.triu_indices(*products.shape)]
            rows_RC = gradient.reshape(len(gradient), -1)
            for axis, place in ((1, ROW_SQUARES), (0, COLUMN_SQUARES)):
                found = rows_RC.square().sum(dim=axis)
                if len(found) <= MOST_ROWS:
                    of_parameter[place] = 0.0
                    of_parameter[place][: len(found)] = found
        return squares

    def weigh(self, factors: Sequence[float]) -> None:
        """Add the sample that was seen last to the sums, by its factor for each parameter."""
        clipped, unclipped = self._totals
        for (name, (gradient_1G, positions_TG)), factor in zip(
            self._seen.items(), factors, strict=True
        ):
            if factor > 0:
                _add(clipped, name, factor * gradient_1G)
                _add(unclipped, name, gradient_1G)
                _add(self._clipped, name, factor * positions_TG)
                _add(self._unclipped, name, positions_TG)

    def sketches(self, names: Sequence[str], device: torch.device) -> NDArray[np.float64]:
        """[M, P, K] projections of the parts of all ranks' sums; NaN where they are too many."""
        found = torch.zeros(NUM_SUM_PARTS, len(names), NUM_PROJECTIONS, dtype=torch.float64)
        for column, name in enumerate(names):
            if name in self._clipped:
                self._sketch(name, found[:, column])
        found = found.to(device)
        sum_over_ranks(found)
        return found.cpu().numpy()

    def _sketch(self, name: str, found_MK: Tensor) -> None:
        shape = self._shapes[name]
        signs_KG = signs_of(name, shape.numel())
        for positions, totals, of_positions, of_rows in (
            (self._clipped, self._totals[0], SumParts.POSITIONS, SumParts.ROWS),
            (
                self._unclipped,
                self._totals[1],
                SumParts.UNCLIPPED_POSITIONS,
                SumParts.UNCLIPPED_ROWS,
            ),
        ):
            _write(found_MK[of_positions.value], positions[name].double() @ signs_KG.mT)
            signed_KRC = (signs_KG * totals[name].double()).view(len(signs_KG), shape[0], -1)
            _write(found_MK[of_rows.value], signed_KRC.sum(dim=2).mT)
            if of_rows is SumParts.ROWS:
                _write(found_MK[SumParts.COLUMNS.value], signed_KRC.sum(dim=1).mT)


def _add(totals: dict[str, Tensor], name: str, term: Tensor) -> None:
    total = totals.get(name)
    if total is None or len(total) != len(term):
        # Samples of two lengths have no positions in common.
        totals[name] = term.clone() if total is None else torch.full_like(total, torch.nan)
    else:
        total += term


def _write(found: Tensor, values: Tensor) -> None:
    found[: len(values)] = values if len(values) <= len(found) else torch.nan


def _by_position(gradient: Tensor, shares: Sequence[Share]) -> Tensor:
    """[T, G] what each position adds to a gradient; NaN where that is not known."""
    if not shares and not gradient.any():
        return gradient.reshape(1, -1)
    lengths = {len(share.left_TP) for share in shares}
    if len(lengths) != 1 or max(lengths) > MOST_POSITIONS:
        return torch.full_like(gradient, torch.nan).reshape(1, -1)
    total = gradient.new_zeros(lengths.pop(), *gradient.shape)
    for share in shares:
        share.add_by_position(total)
    return total.flatten(1)
