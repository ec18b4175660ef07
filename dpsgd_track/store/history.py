"""The metric history of a run: by SQL where the store is a database, else through MLflow."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dpsgd_track.record.trajectory import Floats

if TYPE_CHECKING:
    from mlflow import MlflowClient

History = dict[str, dict[int, float | None]]
"""Values by metric and step; None for NaN; the newest of several values of one step."""

Point = tuple[int, int, float | None]
"""Step, Unix time in ms, value."""

_DATABASE = re.compile(r"(sqlite|postgresql|mysql|mssql)(\+\w+)?:")
# SQL stores hold an infinity as the largest float64.
_LARGEST = sys.float_info.max
_STORED_INFINITY = 1.7e308

# MLflow's own table.
_QUERY = """
SELECT step, timestamp, CASE WHEN is_nan THEN NULL ELSE value END
FROM metrics WHERE run_uuid = :run_id AND key = :metric
"""


def as_stored(value: float) -> float | None:
    """`value` as an SQL store keeps it; None for NaN."""
    return None if math.isnan(value) else max(-_LARGEST, min(_LARGEST, value))


def restored(values: Sequence[float | None]) -> Floats:
    """Values from a store, with the largest float64 turned into infinity, and None into NaN."""
    floats = np.array(values, dtype=np.float64)
    floats[floats >= _STORED_INFINITY] = np.inf
    floats[floats <= -_STORED_INFINITY] = -np.inf
    return floats


def metric_history(client: MlflowClient, run_id: str, metrics: Iterable[str]) -> History:
    """The newest value of each of `metrics` in each step of a run.

    Of values with equal times the largest counts, as in MLflow itself.
    """
    return {
        metric: {
            step: value
            for step, _, value in sorted(points, key=lambda p: (p[0], p[1], p[2] or 0.0))
        }
        for metric, points in all_points(client, run_id, metrics)
    }


def all_points(
    client: MlflowClient, run_id: str, metrics: Iterable[str]
) -> Iterator[tuple[str, list[Point]]]:
    """(step, Unix time in ms, value) of all points that a run logged, metric by metric.

    The value is None for NaN. A database is queried in SQL: MLflow's client creates an object for
    each point, which takes ten times as long as the query.
    """
    if _DATABASE.match(client.tracking_uri):
        yield from _queried(client.tracking_uri, run_id, metrics)
        return
    for metric in metrics:
        points = client.get_metric_history(run_id, metric)
        yield (
            metric,
            [(p.step, p.timestamp, None if p.value != p.value else p.value) for p in points],
        )


def _queried(uri: str, run_id: str, metrics: Iterable[str]) -> Iterator[tuple[str, list[Point]]]:
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.connect() as connection:
            for metric in metrics:
                named = {"run_id": run_id, "metric": metric}
                rows = connection.execute(sqlalchemy.text(_QUERY), named)
                yield metric, [tuple(row) for row in rows]
    finally:
        engine.dispose()
