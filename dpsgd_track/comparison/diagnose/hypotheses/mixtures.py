"""Numbers that are the right ones mixed with others: fitted linear combinations.

Legend: S steps, N samples, n terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np

from dpsgd_track.comparison.diagnose.hypotheses.facts import Facts
from dpsgd_track.record.trajectory import Floats

FITS = 1e-4
"""Relative error up to which fitted numbers are the recorded ones."""
_NONE = 2e-3
"""Size from which on a coefficient is one."""
_ENOUGH = 4
"""Numbers beyond those of the terms, and times the number of terms, that a fit is made of."""
_MOST_TERMS = 2


@dataclass(frozen=True)
class Term:
    """Numbers that may be mixed with the right ones."""

    values: Floats
    text: str
    """Name of the numbers, to follow "of"."""


def coefficients(terms: Sequence[Floats], wanted: Floats, unit: Floats) -> Floats | None:
    """[n] coefficients of the terms that make up what is wanted; None where none do.

    Args:
        terms: flat, as `wanted`; where any is not finite, nothing is asked of them.
        unit: of an error.
    """
    table = np.stack(terms, axis=-1)
    is_known = np.isfinite(table).all(axis=-1) & np.isfinite(wanted) & (unit > 0)
    if is_known.sum() < max(len(terms) + _ENOUGH, _ENOUGH * len(terms)):
        return None
    scaled, aim = table[is_known] / unit[is_known, None], wanted[is_known] / unit[is_known]
    # Terms of one kind are as good as each other only where they differ.
    found, _, rank, _ = np.linalg.lstsq(scaled, aim, rcond=1e-8)
    if rank < len(terms) or np.abs(scaled @ found - aim).max() > FITS:
        return None
    return np.asarray(found, dtype=np.float64)


def mixture(
    right: Floats, others: Sequence[Term], observed: Floats, unit: Floats
) -> tuple[Floats, list[tuple[float, str]], float] | None:
    """The fewest of `others` that make up the recorded numbers with a share of the right ones.

    Args:
        right, observed: flat, over all numbers that are wrong.
        unit: of an error.
    Returns:
        [n + 1] coefficients of the right numbers and of all others, the terms used in words with
        their coefficients, and the coefficient of the right numbers.
    """
    for num in range(1, _MOST_TERMS + 1):
        for chosen in combinations(range(len(others)), num):
            found = coefficients([right, *(others[i].values for i in chosen)], observed, unit)
            if found is None or np.abs(found[1:]).min() < _NONE:
                continue
            every = np.zeros(len(others) + 1)
            every[[0, *(i + 1 for i in chosen)]] = found
            told = [(float(found[k + 1]), others[i].text) for k, i in enumerate(chosen)]
            return every, told, float(found[0])
    return None


def mixed(every: Floats, right: Floats, others: Sequence[Term]) -> Floats:
    """The numbers that `mixture` has found, where all that they are made of are known.

    Args:
        every: [n + 1] coefficients of the right numbers and of all others.
    """
    total: Floats = every[0] * right
    for share, term in zip(every[1:], others, strict=True):
        # 0 times what is not known is not known.
        total = total + (share * term.values if share else 0.0)
    return total


def in_words(own: float, told: Sequence[tuple[float, str]], right: str) -> str:
    """`0.7 times the right ones plus 0.3 times those of the next sample`."""
    parts = [(own, right)] if abs(own) > _NONE else []
    said = ""
    for share, text in (*parts, *told):
        times = "" if abs(abs(share) - 1) < _NONE else f"{abs(share):.3g} times "
        sign = ("minus " if share < 0 else "plus ") if said or share < 0 else ""
        said += f"{' ' * bool(said)}{sign}{times}{text}"
    return said


def _rolled(own: Floats, by: int) -> Floats:
    return np.roll(own, by, axis=0)


def of_neighbours(facts: Facts, values: Floats) -> list[Term]:
    """Numbers [S, N, ...] of other samples, at the places of the samples themselves."""
    found: list[Term] = []
    for by, text in ((-1, "those of the next sample"), (1, "those of the sample before")):
        rolled = facts.by_batch(values, partial(_rolled, by=by))
        if rolled is not None:
            found.append(Term(rolled, f"{text} in the micro-batch"))
    mean = facts.by_batch(values, lambda own: np.broadcast_to(own.mean(axis=0), own.shape))
    if mean is None:
        return found
    found.append(Term(mean, "the mean of the micro-batch"))
    before, last = np.full_like(values, np.nan), dict[int, Floats]()
    batch_mean = np.full_like(values, np.nan)
    other_ranks = np.full_like(values, np.nan)
    by_number: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}
    for batch in facts.micro_batches:
        own = values[batch.row, batch.places]
        if (kept := last.get(batch.rank)) is not None:
            length = min(len(kept), len(own))
            before[batch.row, batch.places[:length]] = kept[:length]
            batch_mean[batch.row, batch.places] = kept.mean(axis=0)
        last[batch.rank] = own
        by_number.setdefault((batch.row, batch.number), []).append((batch.rank, batch.places))
    for (row, _), pair in by_number.items():
        if len(pair) == 2:
            (_, one), (_, other) = pair
            length = min(len(one), len(other))
            other_ranks[row, one[:length]] = values[row, other[:length]]
            other_ranks[row, other[:length]] = values[row, one[:length]]
    step_before = np.concatenate([np.full_like(values[:1], np.nan), values[:-1]])
    at = "those of the samples at the same places"
    return [
        *found,
        Term(before, f"{at} of the micro-batch before"),
        Term(batch_mean, "the mean of the micro-batch before"),
        Term(other_ranks, f"{at} of the other rank's micro-batch"),
        Term(step_before, f"{at} in the step before"),
    ]
