"""The metric history of a run: by SQL where the store is a database, else through MLflow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpsgd_track.record.trajectory import Floats

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
SELECT step, timestamp, CASE WHEN is_nan THEN NULL ELSE value END
FROM metrics WHERE run_uuid = :run_id AND key = :metric
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
        found = _of_each(client.tracking_uri, _QUERY, run_id, metrics)
        return {metric: dict(map(tuple, rows)) for metric, rows in found}
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
) -> Iterator[tuple[str, list[tuple[int, int, float | None]]]]:
    """(step, Unix time in ms, value) of everything a run logged, of one metric after the other.

    The value is None for NaN.
    """
    if _DATABASE.match(client.tracking_uri):
        for metric, rows in _of_each(client.tracking_uri, _ALL_QUERY, run_id, metrics):
            yield metric, [tuple(row) for row in rows]
        return
    for metric in metrics:
        points = client.get_metric_history(run_id, metric)
        yield (
            metric,
            [(p.step, p.timestamp, None if p.value != p.value else p.value) for p in points],
        )


def _of_each(
    uri: str, query: str, run_id: str, metrics: Iterable[str]
) -> Iterator[tuple[str, Sequence[Any]]]:
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.connect() as connection:
            for metric in metrics:
                named = {"run_id": run_id, "metric": metric}
                yield metric, connection.execute(sqlalchemy.text(query), named).all()
    finally:
        engine.dispose()
