"""Groups of an experiment as comparisons left them: read from the list of runs alone."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from dpsgd_track.config import Settings
from dpsgd_track.record import names
from dpsgd_track.record.judged import JudgedGroup, with_metrics
from dpsgd_track.store.reader import GroupNotFound, groups_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_ALIKE = (
    "suite",
    "regimes",
    "num_ranks",
    "model.name",
    "performance.device",
    "performance.param_dtype",
)
"""Params that are equal in groups whose drifts and costs can be held beside each other."""


def judged_groups(client: MlflowClient, settings: Settings, most: int) -> list[JudgedGroup]:
    """The newest groups that were compared, the oldest of them first.

    Raises:
        GroupNotFound: the experiment does not exist, or holds no such group.
    """
    groups = (run for run in groups_of(client, settings) if names.VERDICT in run.data.tags)
    newest = [_judged(run) for run in islice(groups, most)]
    if not newest:
        raise GroupNotFound(
            f"experiment={settings.experiment!r}: expected a group that was compared. "
            "Compare one first."
        )
    return newest[::-1]


def judged_before(client: MlflowClient, settings: Settings, run_id: str) -> JudgedGroup | None:
    """The newest group that was compared, was launched alike, and is older than a group's run."""
    run = client.get_run(run_id)
    for each in groups_of(client, settings):
        is_older = (each.info.start_time or 0) < (run.info.start_time or 0)
        if is_older and names.VERDICT in each.data.tags and _settings(each) == _settings(run):
            return _judged(each)
    return None


def _settings(run: Run) -> list[str]:
    return [run.data.params.get(name, "") for name in _ALIKE]


def _judged(run: Run) -> JudgedGroup:
    tags = run.data.tags
    group = JudgedGroup(
        name=tags[names.GROUP],
        start_time_ms=run.info.start_time or 0,
        revision=tags.get(names.GIT_COMMIT, ""),
        verdict=tags[names.VERDICT],
    )
    return with_metrics(group, run.data.metrics)
