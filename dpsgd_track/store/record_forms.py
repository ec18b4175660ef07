"""Forms of the records in a spool file: what a reader expects of what others may have written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpsgd_track.record.run import Status

FILES = "files"
"""Folder beside the spool files that holds files to be uploaded."""
_MOST = 1 << 63
"""Bound of steps and times, which stores keep in 64 bits."""

Event = Mapping[str, Any]
_Form = Mapping[str, Callable[[Any], bool]]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    """True for a whole number that stores can keep."""
    return type(value) is int and -_MOST <= value < _MOST


def _is_count(value: Any) -> bool:
    return _is_number(value) and bool(value >= 0)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_status(value: Any) -> bool:
    return _is_text(value) and value in list(Status)


def _is_inside(value: Any) -> bool:
    """True for a path that leads to nothing outside the folder it is relative to."""
    if not _is_text(value) or "\0" in value:
        return False
    return not Path(value).is_absolute() and ".." not in Path(value).parts


def _is_kept_file(value: Any) -> bool:
    return _is_inside(value) and Path(value).parts[:1] == (FILES,)


_OF_THE_FILE: Mapping[str, _Form] = {
    "open": {"runs": _are_texts},
    "names": {"number": _is_count, "run": _is_text, "keys": _are_texts},
    "close": {"records": _is_count},
}
"""Records about the file itself."""
EVENTS: Mapping[str, _Form] = {
    "run": {"experiment": _is_text, "title": _is_text, "tags": _is_table, "params": _is_table},
    "join": {"experiment": _is_text},
    "reopen": {},
    "params": {"params": _is_table},
    "tags": {"tags": _is_table},
    "input": {"name": _is_text, "digest": _is_text},
    "file": {
        "path": _is_kept_file,
        "folder": _is_inside,
        "bytes": _is_count,
        "crc32": _is_count,
    },
    "end": {"status": _is_status},
    "status": {"status": _is_status},
}
"""The fields of each kind of event, apart from its run and time."""
_OF_EVERY_EVENT: _Form = {"run": _is_text, "time_ms": _is_count}


def has_form(record: Any) -> bool:
    """True for an object with a kind that is known, and all fields of that kind."""
    if not isinstance(record, dict) or not _is_text(record.get("do")):
        return False
    kind = record["do"]
    form = _OF_THE_FILE.get(kind)
    if form is None and kind in EVENTS:
        form = {**_OF_EVERY_EVENT, **EVENTS[kind]}
    if form is None or not _is_flag(record.get("is_resumed", False)):
        return False
    return all(field in record and is_right(record[field]) for field, is_right in form.items())


def is_row(record: list[Any]) -> bool:
    """True for values of a step: number of the names, step, time and packed values."""
    if len(record) != 4:
        return False
    number, step, time_ms, packed = record
    return _is_count(number) and _is_number(step) and _is_count(time_ms) and _is_text(packed)
