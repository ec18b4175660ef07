"""The metric history of a run: by SQL where the store is a database, else through MLflow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpsgd_track.tracking.trajectory import Floats

if TYPE_CHECKING:
    from mlflow import MlflowClient

History = dict[str, dict[int, float | None]]
"""By metric, then by step; None for NaN; of several values of one step the newest."""

_DATABASE = re.compile(r"(sqlite|postgresql|mysql|mssql)(\+\w+)?:")
# SQL stores hold an infinity as the largest float64.
_STORED_INFINITY = 1.7e308

# MLflow's own table; the order is that of its index and decides which of several values is last.
_QUERY = """
SELECT step, CASE WHEN is_nan THEN NULL ELSE value END
FROM metrics WHERE run_uuid = :run_id AND key = :metric ORDER BY step, timestamp, value
"""

_ALL_QUERY = """
SELECT key, step, timestamp, CASE WHEN is_nan THEN NULL ELSE value END
FROM metrics WHERE run_uuid = :run_id
"""


def restored(values: Sequence[float | None]) -> Floats:
    """Values as they were logged: a store keeps an infinity as the largest float64."""
    known = np.array(values, dtype=np.float64)
    known[known >= _STORED_INFINITY] = np.inf
    known[known <= -_STORED_INFINITY] = -np.inf
    return known


def metric_history(client: MlflowClient, run_id: str, metrics: Iterable[str]) -> History:
    """Everything a run logged of `metrics`.

    MLflow's client makes an object of each point, which takes ten times as long as the query.
    """
    if _DATABASE.match(client.tracking_uri):
        return _from_database(client.tracking_uri, run_id, metrics)
    return {
        metric: {
            point.step: point.value
            for point in sorted(
                client.get_metric_history(run_id, metric), key=lambda p: (p.timestamp, p.value)
            )
        }
        for metric in metrics
    }


def all_points(
    client: MlflowClient, run_id: str, metrics: Iterable[str]
) -> dict[str, list[tuple[int, int, float | None]]]:
    """(step, Unix time in ms, value) of everything a run logged of `metrics`; None for NaN."""
    if _DATABASE.match(client.tracking_uri):
        found: dict[str, list[tuple[int, int, float | None]]] = {metric: [] for metric in metrics}
        for metric, *point in _query(client.tracking_uri, _ALL_QUERY, run_id=run_id):
            if metric in found:
                found[metric].append(tuple(point))
        return found
    return {
        metric: [
            (point.step, point.timestamp, None if point.value != point.value else point.value)
            for point in client.get_metric_history(run_id, metric)
        ]
        for metric in metrics
    }


def _query(uri: str, query: str, **parameters: str) -> list[Any]:
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.connect() as connection:
            return list(connection.execute(sqlalchemy.text(query), parameters).all())
    finally:
        engine.dispose()


def _from_database(uri: str, run_id: str, metrics: Iterable[str]) -> History:
    import sqlalchemy

    query = sqlalchemy.text(_QUERY)
    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.connect() as connection:
            rows: dict[str, Any] = {
                metric: connection.execute(query, {"run_id": run_id, "metric": metric}).all()
                for metric in metrics
            }
            return {metric: dict(points) for metric, points in rows.items()}
    finally:
        engine.dispose()
