"""Values that a tracking store cannot hold as they are, kept beside it as an artifact of the run.

SQL stores hold an infinity as the largest float64, every NaN as the same one, and no sign of a
zero. All other float64 values come back bit for bit.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dpsgd_track.store.spool import MetricRow

FILE = "exact_values.json"
SCHEMA_VERSION = 1
LARGEST = 1.7976931348623157e308
_NAN = np.float64(np.nan).view(np.uint64)

Point = tuple[str, int, int]
"""Metric, step, Unix time in ms."""


def inexact(row: MetricRow) -> list[tuple[Point, float]]:
    """Those values of a step that a store would change."""
    values = np.array(row.values, dtype=np.float64)
    is_changed = (
        (np.abs(values) >= LARGEST)
        | ((values == 0) & np.signbit(values))
        | (np.isnan(values) & (values.view(np.uint64) != _NAN))
    )
    return [
        ((row.keys[i], row.step, row.time_ms), row.values[i]) for i in np.flatnonzero(is_changed)
    ]


def as_stored(value: float) -> float | None:
    """What an SQL store makes of a value; None for NaN."""
    if value != value:
        return None
    # Adding 0.0 takes the sign off a zero.
    return max(-LARGEST, min(LARGEST, value)) + 0.0


def to_json(points: Iterable[tuple[Point, float]]) -> str:
    """The artifact: each value as the 16 hexadecimal digits of its big-endian bytes."""
    values = [[*point, struct.pack(">d", value).hex()] for point, value in points]
    return json.dumps({"schema_version": SCHEMA_VERSION, "values": values}, indent=1)


def from_json(text: str) -> dict[tuple[str, int], float]:
    """The newest exact value of each metric and step that the artifact lists.

    Raises:
        ValueError: it is of another version, or none.
    """
    try:
        document: Any = json.loads(text)
        if document["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"{FILE}: expected version {SCHEMA_VERSION}.")
        listed: Sequence[Any] = sorted(document["values"], key=lambda entry: entry[2])
        return {
            (key, step): struct.unpack(">d", bytes.fromhex(bits))[0]
            for key, step, _, bits in listed
        }
    except (KeyError, TypeError, struct.error) as error:
        raise ValueError(f"{FILE}: expected what the launcher wrote. {error}") from error
