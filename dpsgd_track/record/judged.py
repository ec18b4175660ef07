"""A group as the list of runs tells it: verdict, drifts and costs, without trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dpsgd_track.record import names


@dataclass(frozen=True, kw_only=True)
class JudgedGroup:
    """One point of the history of an experiment."""

    name: str
    start_time_ms: int
    """Unix time."""
    revision: str = ""
    """Commit that it was launched from; empty outside of a repository."""
    verdict: str = ""
    """PASS, DRIFT, BUG or INCONCLUSIVE; empty if it was not compared."""
    drifts: Mapping[str, float] = field(default_factory=dict)
    """Largest drift of any mode as a share of its limit, by stage; finite ones."""
    costs: Mapping[str, float] = field(default_factory=dict)
    """Step time over that of ordinary training, by mode."""

    @property
    def shown_revision(self) -> str:
        """The commit as it is shown, or the group's name."""
        return self.revision[:7] or self.name


def with_metrics(group: JudgedGroup, metrics: Mapping[str, float]) -> JudgedGroup:
    """`group` with drifts and costs from the metrics of its run."""
    drifts, costs = (
        {
            name.removeprefix(f"{prefix}/"): value
            for name, value in metrics.items()
            if name.startswith(f"{prefix}/")
        }
        for prefix in (names.DRIFT_OF_LIMIT, names.COST)
    )
    return replace(group, drifts=drifts, costs=costs)
