"""The numerical floor: how far a baseline is from its own replay, where only rounding differs.

The replay of `no_dp` has its samples in another order; that of `reference` computes in the type
the modes do, so that it shows the error of plain autograd in that type.

A drift that is no larger cannot be told from rounding, whatever the thresholds say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpsgd_track.comparison.drift import Pair


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Measured in one regime."""

    measured_on: tuple[str, ...]
    """The runs that were replayed."""
    values: Mapping[str, float]
    """Largest drift of a replay, by observable; one that none computes is left out."""

    def of(self, observable: str) -> float | None:
        """None where nothing was measured."""
        return self.values.get(observable)


def floor_of(replays: Sequence[Pair]) -> Floor | None:
    """The floor that replays show together; None when there are none.

    The largest counts: each is one draw of what rounding can do.
    """
    if not replays:
        return None
    values: dict[str, float] = {}
    for replay in replays:
        for name, drift in replay.drifts.items():
            values[name] = max(values.get(name, 0.0), drift.max)
    return Floor(measured_on=tuple(replay.baseline for replay in replays), values=values)
