"""Choices among positions, rows, columns or elements in a row, and what they are called.

Legend: D of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dpsgd_track.record.trajectory import Floats

_MOST_STEP, _MOST_SKIPPED = 4, 6
_MOST_LISTED = 4


def chosen_places(num: int, kind: str) -> Iterator[tuple[Floats, str]]:
    """Choices of some of `num` places, as [D] of 0 and 1, in words that follow "made".

    Descriptions do not depend on `num` where several tensors of different size can share one.
    """
    place = np.arange(num)
    half_up, half = -(-num // 2), num // 2
    for at in dict.fromkeys((half_up, half)):
        yield (place < at).astype(float), f"of the first half of the {kind}s alone"
        yield (place >= at).astype(float), f"of the second half of the {kind}s alone"
    for step in range(2, _MOST_STEP + 1):
        for first in range(step):
            which = {2: "second", 3: "third", 4: "fourth"}[step]
            said = f"of every {which} {kind} alone, from number {first} on (counted from 0)"
            yield (place % step == first).astype(float), said
    for size in (3, 4, 5, 6, 7, 8, 16, 32, 64):
        if size < num and num % size:
            said = f"without the {kind}s after the last full tile of {size}"
            yield (place < num // size * size).astype(float), said
    for skipped in range(1, min(_MOST_SKIPPED, num - 1) + 1):
        numbers = "" if skipped == 1 else f"{skipped} "
        plural = kind if skipped == 1 else f"{kind}s"
        yield (place >= skipped).astype(float), f"without the first {numbers}{plural}"
        yield (place < num - skipped).astype(float), f"without the last {numbers}{plural}"
        both = ((place >= skipped) & (place < num - skipped)).astype(float)
        if both.any():
            yield both, f"without the first {numbers}and the last {numbers}{plural}"
    for size in range(1, num - 1):
        plural = kind if size == 1 else f"{kind}s"
        yield (place < size).astype(float), f"of the first {size} {plural} alone"
        yield (place >= num - size).astype(float), f"of the last {size} {plural} alone"


def counted(counts: Floats, kind: str) -> str:
    """`rows 0 to 7 missing and row 9 counted twice`, of counts [D] that are not all 1."""
    said = []
    for count in sorted(set(counts.tolist()) - {1.0}):
        chosen = np.flatnonzero(counts == count).tolist()
        shown = _runs(chosen)
        plural = kind if len(chosen) == 1 else f"{kind}s"
        times = (
            "missing" if not count else f"counted {'twice' if count == 2 else f'{count:g} times'}"
        )
        said.append(f"{plural} {shown} {times}")
    return " and ".join(said)


def _runs(places: list[int]) -> str:
    """`0 to 7, 9`."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    said = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    more = f" and {len(said) - _MOST_LISTED} more runs" * (len(said) > _MOST_LISTED)
    return ", ".join(said[:_MOST_LISTED]) + more
