"""Sums whose micro-batches count by a law of their sizes and of the numbers of ranks.

Legend: S steps, Q wrong parameters, K projections, n micro-batches, E quantities.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts, MicroBatch
from dpsgd_track.comparison.diagnose.hypotheses.hypothesis import Fitted, Prediction
from dpsgd_track.record.trajectory import UNUSED, Floats

_ALIKE = 1e-3
"""Relative error up to which a weight follows a law."""
_MOST_QUANTITIES, _MOST_ALIKE = 3, 2
"""Quantities of a law, and laws that agree equally well and are told."""


@dataclass(frozen=True)
class _Cell:
    """Facts of one micro-batch, and how often it counts."""

    batch: MicroBatch
    weight: float
    of_rank: int
    """Samples of its rank in the step."""
    of_step: int
    active: int
    """Ranks that have samples in the step."""


def law_of_batches(facts: Facts) -> Prediction:
    """The sum with micro-batches weighed as agrees best, by a law of all of them."""
    cells = _cells(facts) if facts.has_sketches else []
    weights = np.array([cell.weight for cell in cells])
    if len(cells) < _MOST_QUANTITIES or not np.isfinite(weights).all() or np.any(weights <= 0):
        return None
    if np.ptp(weights) < _ALIKE * weights.max():
        return None
    laws = _laws(facts, cells)
    if not 0 < len(laws) <= _MOST_ALIKE:
        return None
    factors = facts.factor.copy()
    for cell in cells:
        factors[cell.batch.row, cell.batch.places] *= cell.weight
    return Fitted(facts.weighted(factors), " or by ".join(laws))


def _cells(facts: Facts) -> list[_Cell]:
    ranks, found = facts.theirs.sample_rank, list[_Cell]()
    for row in facts.rows.tolist():
        batches = [b for b in facts.micro_batches if b.row == row]
        if not batches:
            continue
        wanted = facts.recorded_sum[row].ravel()
        table = np.stack([facts.sum_of_batch(batch).ravel() for batch in batches], axis=1)
        if not np.isfinite(table).all() or not np.isfinite(wanted).all():
            return []
        weights, _, rank, _ = np.linalg.lstsq(table, wanted, rcond=1e-6)
        if rank < len(batches):
            return []
        there = ranks[row][ranks[row] != UNUSED]
        found += [
            _Cell(
                batch=batch,
                weight=float(weight),
                of_rank=int((there == batch.rank).sum()),
                of_step=len(there),
                active=len(set(there.tolist())),
            )
            for batch, weight in zip(batches, weights, strict=True)
        ]
    return found


def _quantities(facts: Facts, cells: list[_Cell]) -> Iterator[tuple[Floats, str]]:
    def constant(value: float) -> Floats:
        return np.full(len(cells), float(value))

    yield np.array([float(len(c.batch.places)) for c in cells]), "the samples of the micro-batch"
    yield np.array([float(c.of_rank) for c in cells]), "the rank's samples in the step"
    yield np.array([float(c.of_step) for c in cells]), "the samples of the step"
    yield np.array([float(c.active) for c in cells]), "the ranks that have samples in the step"
    batches = [(c.batch.row, c.batch.rank) for c in cells]
    yield (
        np.array([float(batches.count(each)) for each in batches]),
        "the rank's micro-batches in the step",
    )
    yield constant(facts.full_size), "the samples of a full micro-batch"
    yield constant(facts.divisor), "the expected batch size"
    if facts.run.job:
        yield constant(facts.run.job.num_ranks), "the number of ranks"
    if facts.run.setup:
        yield constant(facts.run.setup.micro_batches), "the number of micro-batches"


def _laws(facts: Facts, cells: list[_Cell]) -> list[str]:
    """The laws of fewest quantities that all weights follow, in words."""
    known = [(np.log(values), text) for values, text in _quantities(facts, cells)]
    wanted = np.log([cell.weight for cell in cells])
    for num in range(1, _MOST_QUANTITIES + 1):
        found = [
            _in_words([(sign, known[i][1]) for sign, i in zip(signs, chosen, strict=True)])
            for chosen in combinations(range(len(known)), num)
            for signs in product((1, -1), repeat=num)
            if np.abs(
                sum(sign * known[i][0] for sign, i in zip(signs, chosen, strict=True)) - wanted
            ).max()
            < _ALIKE
        ]
        if found:
            return found
    return []


def _in_words(terms: list[tuple[int, str]]) -> str:
    above, below = ([text for sign, text in terms if sign == s] for s in (1, -1))
    over = f" over {' and over '.join(below)}" if below else ""
    return f"{' times '.join(above) or '1'}{over}"
