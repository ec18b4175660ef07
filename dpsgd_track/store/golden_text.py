"""Golden files as text, a line for each number: a diff says which step of which run changed.

A record becomes JSON: its form (type and shape of each column), what it has once, and its steps. A
row of numbers is one string, in the shortest decimals that give the same bits. Projections, which
nobody reads, are their length and their bytes in base64.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsgd_track.record.trajectory import ALTERNATIVES, BY_STEP

Columns = Mapping[str, NDArray[Any]]

_TIMES = ("step_time_ms", "peak_memory_gib", "tokens_per_second")
"""Columns that differ whenever a group is run, and are no part of a step's lines."""
_PACKED = ("gradient_sketch", "noised_sketch", "weight_sketch", "noise_samples")
_PARAMETER_AXIS = {
    "sample_norm_by_parameter": 1,
    "gradient_sketch": 0,
    "noised_sketch": 0,
    "weight_sketch": 0,
    "noise_samples": 1,
}
"""Axis of a row with one entry for each parameter, which are then named."""
_TYPE = re.compile(r"[<|](f[48]|i8|b1|U[0-9]{1,6})")


def written(columns: Columns) -> dict[str, Any]:
    """The JSON of a record's columns, without those that only name causes.

    Args:
        columns: as in a trajectory file.
    """
    kept = {
        name: values[..., :0] if name in ALTERNATIVES else values
        for name, values in columns.items()
    }
    by_step = [name for name in kept if name in BY_STEP and name not in _TIMES]
    names = kept["parameter_names"].tolist()
    return {
        "form": {name: f"{values.dtype.str} {[*values.shape]}" for name, values in kept.items()},
        "once": {name: _leaf(name, kept[name]) for name in kept if name not in by_step},
        "steps": [
            {name: _row(name, kept[name][row], names) for name in by_step}
            for row in range(len(kept["step"]))
        ],
    }


def columns_of(record: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The columns that `written` wrote.

    Raises:
        ValueError: the JSON is something else.
    """
    try:
        once, steps = record["once"], record["steps"]
        names = once["parameter_names"]
        forms = {name: _form(text) for name, text in record["form"].items()}
        return {
            name: _array(name, once[name], *form)
            if name in once
            else _stacked(name, [step[name] for step in steps], *form, names)
            for name, form in forms.items()
        }
    except (KeyError, TypeError, AttributeError, IndexError, binascii.Error) as error:
        raise ValueError(f"a record: {type(error).__name__}: {error}.") from error


def _row(name: str, row: NDArray[Any], parameters: list[str]) -> Any:
    axis = _PARAMETER_AXIS.get(name)
    if axis is None or not row.size:
        return _leaf(name, row)
    parts = np.moveaxis(row, axis, 0)
    return {p: _leaf(name, part) for p, part in zip(parameters, parts, strict=True)}


def _leaf(name: str, values: NDArray[Any]) -> Any:
    if values.dtype.kind == "U":
        return values.tolist()
    if name in _PACKED and values.size:
        with np.errstate(all="ignore"):
            length = float(np.sqrt(np.nanmean(np.square(values, dtype=np.float64))))
        data = base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
        return f"{length:.4g} {data}"
    return " ".join(map(str, values.ravel().tolist()))


def _form(text: str) -> tuple[str, tuple[int, ...]]:
    dtype, _, shape = text.partition(" ")
    sizes = tuple(int(size) for size in re.findall(r"[0-9]+", shape))
    if not _TYPE.fullmatch(dtype):
        raise ValueError(f"a record: expected the type of a column, got {dtype[:40]!r}.")
    return dtype, sizes


def _array(name: str, leaf: Any, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if dtype[1] == "U":
        values = np.array(leaf, dtype=dtype)
    elif name in _PACKED and leaf:
        values = np.frombuffer(base64.b64decode(leaf.split()[-1], validate=True), dtype)
    elif dtype[1] == "b":
        values = np.array([word == "True" for word in leaf.split()], dtype=dtype)
    else:
        values = np.array(leaf.split(), dtype=dtype)
    if values.size != prod(shape):
        raise ValueError(f"a record: {name}: expected {prod(shape)} values, got {values.size}.")
    return values.reshape(shape)


def _stacked(
    name: str, rows: list[Any], dtype: str, shape: tuple[int, ...], parameters: list[str]
) -> NDArray[Any]:
    """A column from its rows; `shape` is that of the column."""
    axis, of_row = _PARAMETER_AXIS.get(name), shape[1:]
    if len(rows) != shape[0]:
        raise ValueError(f"a record: {name}: expected {shape[0]} steps, got {len(rows)}.")
    if not rows or not prod(of_row):
        return np.empty(shape, dtype=dtype)
    if axis is None:
        return np.stack([_array(name, row, dtype, of_row) for row in rows])
    part = (*of_row[:axis], *of_row[axis + 1 :])
    return np.stack(
        [
            np.stack([_array(name, row[p], dtype, part) for p in parameters], axis=axis)
            for row in rows
        ]
    )
