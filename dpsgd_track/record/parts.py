"""Layout of what the reference records of gradients by position, row and column.

Of gradients that are too large for it, nothing is recorded.

Legend: T positions, D rows or columns, X values of a sample and parameter, M parts of a sum.
"""

from __future__ import annotations

import enum

import numpy as np
from numpy.typing import NDArray

MOST_POSITIONS, MOST_ROWS = 20, 66
"""Largest T, and largest number of rows or columns."""
NUM_PAIRS = MOST_POSITIONS * (MOST_POSITIONS + 1) // 2
NUM_SQUARES = NUM_PAIRS + 2 * MOST_ROWS
"""X: products of positions <g_s, g_t>, s <= t, then squares of rows, then of columns."""
ROW_SQUARES = slice(NUM_PAIRS, NUM_PAIRS + MOST_ROWS)
COLUMN_SQUARES = slice(NUM_PAIRS + MOST_ROWS, NUM_SQUARES)


class SumParts(enum.Enum):
    """Parts of a clipped sum, by their place among the M that are recorded."""

    POSITIONS = slice(0, MOST_POSITIONS)
    UNCLIPPED_POSITIONS = slice(MOST_POSITIONS, 2 * MOST_POSITIONS)
    ROWS = slice(2 * MOST_POSITIONS, 2 * MOST_POSITIONS + MOST_ROWS)
    UNCLIPPED_ROWS = slice(2 * MOST_POSITIONS + MOST_ROWS, 2 * (MOST_POSITIONS + MOST_ROWS))
    COLUMNS = slice(2 * (MOST_POSITIONS + MOST_ROWS), 2 * MOST_POSITIONS + 3 * MOST_ROWS)


NUM_SUM_PARTS = 2 * MOST_POSITIONS + 3 * MOST_ROWS
"""M."""
TOKENS, TARGETS = 0, 1
"""Places of a sample's numbers of tokens and of targets among its sizes."""
NUM_SIZES = 2


def products_of(pairs: NDArray[np.float32]) -> NDArray[np.float64]:
    """[..., T, T] products of positions, zero beyond the last one.

    Args:
        pairs: [..., X].
    """
    first, second = np.triu_indices(MOST_POSITIONS)
    found = np.zeros((*pairs.shape[:-1], MOST_POSITIONS, MOST_POSITIONS))
    found[..., first, second] = found[..., second, first] = pairs[..., :NUM_PAIRS]
    return found
