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
    """Choices of some of `num` places, as [D] of 0 and 1, and what they are called.

    Names do not depend on `num` where tensors of several sizes can share one.
    """
    place = np.arange(num)
    for at in dict.fromkeys((-(-num // 2), num // 2)):
        yield (place < at).astype(float), f"the first half of the {kind}s"
        yield (place >= at).astype(float), f"the second half of the {kind}s"
    for step in range(2, _MOST_STEP + 1):
        for first in range(step):
            which = {2: "second", 3: "third", 4: "fourth"}[step]
            said = f"every {which} {kind}, from number {first} on (counted from 0)"
            yield (place % step == first).astype(float), said
    for size in (3, 4, 5, 6, 7, 8, 16, 32, 64):
        if size < num and num % size:
            said = f"the {kind}s in whole tiles of {size}, without the tail"
            yield (place < num // size * size).astype(float), said
    for skipped in range(1, min(_MOST_SKIPPED, (num - 1) // 2) + 1):
        ends = kind if skipped == 1 else f"{skipped} {kind}s"
        yield (place >= skipped).astype(float), f"all but the first {ends}"
        yield (place < num - skipped).astype(float), f"all but the last {ends}"
        both = ((place >= skipped) & (place < num - skipped)).astype(float)
        if both.any():
            yield both, f"all but the first and the last {ends}"
    quarter = num * 3 // 4
    yield (place < quarter).astype(float), f"the first three quarters of the {kind}s"
    for size in range(1, num - 1):
        chosen = kind if size == 1 else f"{size} {kind}s"
        yield (place < size).astype(float), f"the first {chosen}"
        yield (place >= num - size).astype(float), f"the last {chosen}"


def counted(counts: Floats, kind: str) -> str:
    """`rows 0 to 7 missing and row 9 counted twice`, of counts [D] that are not all 1."""
    said = []
    for count in sorted(set(counts.tolist()) - {1.0}):
        chosen = np.flatnonzero(counts == count).tolist()
        shown = _runs(chosen)
        plural = kind if len(chosen) == 1 else f"{kind}s"
        times = "twice" if count == 2 else f"{count:g} times"
        how = f"counted {times}" if count else "missing"
        said.append(f"{plural} {shown} {how}")
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
