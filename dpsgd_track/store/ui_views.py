"""Pages of the MLflow UI that are ready to read: the trajectories of a group, and the groups.

A page is what the UI calls a shared view: its state, kept as a tag of the experiment, and opened by
the tag's key. `mlflow>=3.5` reads the state as JSON and ignores what it does not know.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from dpsgd_track.config import ACCURACY, PROFILE, TRAIN, Settings
from dpsgd_track.record import names
from dpsgd_track.store.reader import find_group, runs_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""Tags of an experiment, without which the UI guesses, and shows traces of GenAI apps."""
_VIEW_STATE = "mlflow.sharedViewState."
_PREFERRED = (ACCURACY, TRAIN)
"""Regimes in which weights move, and trajectories are worth looking at."""
_COLUMNS = (
    f"tags.`{names.VERDICT}`",
    f"metrics.`{names.DRIFT_OF_LIMIT}`",
    f"metrics.`{names.COST}`",
)
"""Few enough that the verdict, which the UI shows last, is in sight beside MLflow's assistant."""


def group_page(client: MlflowClient, settings: Settings, wanted: str) -> str:
    """Path in the UI to loss and gradient norm of all modes of a group, a chart each.

    Args:
        wanted: a group's name, a run id, or `latest`.

    Raises:
        GroupNotFound: the experiment or the group does not exist.
    """
    run = find_group(client, settings, wanted)
    experiment_id, group = str(run.info.experiment_id), run.data.tags[names.GROUP]
    regimes = [each.data.tags.get(names.REGIME, "") for each in runs_of(client, run)]
    regimes = [name for name in dict.fromkeys(reversed(regimes)) if name not in ("", PROFILE)]
    if not regimes:
        return f"/#/experiments/{experiment_id}/runs/{run.info.run_id}"
    regime = next((name for name in _PREFERRED if name in regimes), regimes[0])
    wanted_tags = {
        names.PARENT_RUN: run.info.run_id,
        names.KIND: names.KIND_MODE,
        names.REGIME: regime,
        names.REPLAY: "",
    }
    section = f"{group}: {regime}"
    state = {
        "searchFilter": " AND ".join(f"tags.`{tag}` = '{v}'" for tag, v in wanted_tags.items()),
        # Sorted by time, runs hide below their parents.
        "orderByKey": "tags.`mlflow.runName`",
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [_line_chart(metric, section) for metric in names.CHARTED],
        "compareRunSections": [_section(section)],
        "isAccordionReordered": True,
    }
    return _page(client, experiment_id, f"dpsgd-{group}", state, compareRunsMode="CHART")


def groups_page(client: MlflowClient, experiment_id: str) -> str:
    """Path in the UI to the list of groups, with the verdict, drift and cost of each."""
    state = {
        "searchFilter": f"tags.`{names.KIND}` = '{names.KIND_GROUP}'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": list(_COLUMNS),
    }
    return _page(client, experiment_id, "dpsgd-groups", state)


def _page(
    client: MlflowClient, experiment_id: str, key: str, state: dict[str, Any], **parameters: str
) -> str:
    tags = {**EXPERIMENT_TAGS, f"{_VIEW_STATE}{key}": json.dumps(state)}
    known = client.get_experiment(experiment_id).tags
    for tag, value in tags.items():
        if known.get(tag) != value:
            client.set_experiment_tag(experiment_id, tag, value)
    query = urlencode({"workflowType": "machine_learning", "viewStateShareKey": key, **parameters})
    return f"/#/experiments/{experiment_id}/runs?{query}"


def _line_chart(metric: str, section: str) -> dict[str, Any]:
    return {
        "uuid": f"dpsgd-{metric}",
        "type": "LINE",
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "lineSmoothness": 0,
        "xAxisKey": "step",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "scaleType": "linear",
        "xAxisScaleType": "linear",
        "range": {},
        "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True,
    }


def _section(name: str) -> dict[str, Any]:
    return {
        "uuid": name,
        "name": name,
        "display": True,
        "isReordered": False,
        "deleted": False,
        "isGenerated": False,
        "columns": 2,
        "cardHeight": 480,
    }
