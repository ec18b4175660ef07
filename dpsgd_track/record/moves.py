"""Ways in which the elements of a right gradient end up in wrong places."""

from __future__ import annotations

import enum


class Move(enum.StrEnum):
    """An arrangement of a gradient's elements, in words that follow "it is".

    The reference records the clipped sum in each of them, so that a sum of the right length and a
    wrong direction can be recognised.
    """

    TRANSPOSED = "transposed"
    NEXT_ROW = "shifted down by one row"
    ROW_BEFORE = "shifted up by one row"
    NEXT_COLUMN = "shifted right by one column"
    COLUMN_BEFORE = "shifted left by one column"
    NEXT_SHARD = "rotated, with the rows of each rank at the next"
    SHARD_BEFORE = "rotated, with the rows of each rank at the one before"
    PADDED_IN_FRONT = "shifted down by the rows that pad it to a multiple of the ranks"
    REVERSED = "in reverse order of its rows"
    INTERLEAVED = "dealt out to the ranks row by row rather than in blocks of rows"
