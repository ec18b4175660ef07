"""The numerical floor: how far a baseline is from its own replay, where only rounding differs.

The replay of `no_dp` has its samples in another order; that of `reference` computes in the type
the modes do, so that it shows the error of plain autograd in that type.

A drift that is no larger cannot be told from rounding, whatever the thresholds say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dpsgd_track.comparison.drift import Pair


@dataclass(frozen=True, kw_only=True)
class Floor:
    """Measured in one regime."""

    measured_on: str
    """The baseline that was replayed."""
    values: Mapping[str, float]
    """Largest drift of the replay, by observable; one that it does not compute is left out."""

    def of(self, observable: str) -> float | None:
        """None where nothing was measured."""
        return self.values.get(observable)


def floor_of(replay: Pair) -> Floor:
    """The floor that a replay shows."""
    return Floor(
        measured_on=replay.baseline,
        values={name: drift.max for name, drift in replay.drifts.items()},
    )
