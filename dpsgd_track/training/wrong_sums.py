"""Wrong clipped sums, of gradients that are not the samples' own.

Each is kept as what it adds to the right sum, so that a sample to which a mistake does not apply
adds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpsgd_track.record.alternatives import SumFormula
from dpsgd_track.training.layer_calls import Share, rows_of
from dpsgd_track.training.wrong_gradients import write_rows

_FLUSHED = 2.0**-14
"""Smallest normal number of float16."""
_UNCLIPPED = {
    SumFormula.FIRST_USE_UNCLIPPED: SumFormula.FIRST_USE,
    SumFormula.LAST_USE_UNCLIPPED: SumFormula.LAST_USE,
}
"""Sums to which one use is added without its clip factor, and that use."""
Key = tuple[SumFormula, str]
"""A formula and a parameter."""


@dataclass
class WrongSums:
    """Wrong clipped sums of one rank's samples of one step."""

    batches: list[dict[str, Tensor]] = field(default_factory=list)
    """The right sum of each of this rank's micro-batches, by parameter."""
    added: dict[Key, Tensor] = field(default_factory=dict)
    """Difference of each wrong sum from the right one."""
    _gradients: Mapping[str, Tensor] = field(default_factory=dict)
    _shares: Mapping[str, Sequence[Share]] = field(default_factory=dict)
    _wrong: Mapping[str, Mapping[SumFormula, Tensor]] = field(default_factory=dict)
    _of_batch: dict[str, Tensor] = field(default_factory=dict)
    _written: dict[str, Tensor] = field(default_factory=dict)
    """Rows of embeddings that the micro-batch's samples have written over each other."""

    def own(self) -> dict[str, Tensor]:
        """The right sum of this rank's samples, by parameter."""
        totals: dict[str, Tensor] = {}
        for batch in self.batches:
            for name, term in batch.items():
                self._add(totals, name, term)
        return totals

    def see(
        self,
        gradients: Mapping[str, Tensor],
        shares: Mapping[str, Sequence[Share]],
        wrong: Mapping[str, Mapping[SumFormula, Tensor]],
    ) -> None:
        """Keep a sample until its factors are known.

        Args:
            gradients: by parameter.
            shares: of the calls that they are made of.
            wrong: what `wrong_gradients` has made of them.
        """
        self._gradients, self._shares, self._wrong = gradients, shares, wrong

    def weigh(self, factors: Sequence[float]) -> None:
        """Add the sample that was seen last.

        Args:
            factors: by parameter; 0 of a sample that is left out.
        """
        for (name, right), factor in zip(self._gradients.items(), factors, strict=True):
            if factor <= 0:
                continue
            self._add(self._of_batch, name, factor * right)
            wrong = self._wrong[name]
            for formula, gradient in wrong.items():
                self._add(self.added, (formula, name), factor * (gradient - right))
            for formula, use in _UNCLIPPED.items():
                if use in wrong:
                    self._add(self.added, (formula, name), (1 - factor) * wrong[use])
            is_small = (factor * right).abs() < _FLUSHED
            lost = torch.where(is_small, -factor * right, 0.0)
            self._add(self.added, (SumFormula.LOST_IN_FLOAT16, name), lost)
            if wrong and (rows := rows_of(self._shares.get(name, ()))):
                self._look_up(name, rows, factor)

    def _look_up(self, name: str, rows: Sequence[Share], factor: float) -> None:
        like = self._gradients[name]
        written = self._written.setdefault(name, torch.zeros_like(like))
        key = SumFormula.ROWS_OF_BATCH, name
        for share in rows:
            gradient = share.gradient()
            self._add(self.added, key, torch.zeros_like(like))
            self.added[key][: len(gradient)] -= factor * gradient
            write_rows(written, share, factor)

    def end_batch(self) -> None:
        """Add the rows that the micro-batch has left."""
        self.batches.append(self._of_batch)
        self._of_batch = {}
        for name, written in self._written.items():
            self._add(self.added, (SumFormula.ROWS_OF_BATCH, name), written)
        self._written.clear()

    @staticmethod
    def _add(totals: dict[Any, Tensor], key: object, term: Tensor) -> None:
        total = totals.get(key)
        if total is None:
            totals[key] = term.clone()
        else:
            total += term
