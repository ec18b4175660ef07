"""A value has one serialised form, which is read back whole or refused in a sentence."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from enum import StrEnum

import jsonschema
import pytest

from dpsgd_track.record.codec import Codec


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part of a whole."""

    size: float
    """In metres."""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size={self.size!r}: expected a number >= 0.")


@dataclass(frozen=True, kw_only=True)
class Named:
    """Anything with a name."""

    name: str
    """What it is called."""


@dataclass(frozen=True, kw_only=True)
class Whole(Named):
    """A made-up document."""

    parts: tuple[Part, ...] = ()
    colour: Colour | None = None
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)


CODEC = Codec(Whole, "dpsgd-track/whole", 3)
WHOLE = Whole(name="w", parts=(Part(size=math.inf),), colour=Colour.RED, rows={"a": (1, 2)})


def test_what_was_written_is_read_back() -> None:
    assert CODEC.loads(CODEC.dumps(WHOLE)) == WHOLE
    assert CODEC.loads(CODEC.dumps(WHOLE, indent=1).encode()) == WHOLE
    assert math.isnan(
        CODEC.loads(CODEC.dumps(Whole(name="", parts=(Part(size=math.nan),)))).parts[0].size
    )


def test_the_schema_holds_what_is_written_and_says_what_fields_mean() -> None:
    schema = CODEC.json_schema()
    jsonschema.validate(json.loads(CODEC.dumps(Whole(name="w", parts=(Part(size=1.0),)))), schema)
    assert schema["properties"]["name"]["description"] == "What it is called."
    assert schema["$defs"]["Part"]["properties"]["size"]["description"] == "In metres."
    document = json.loads(CODEC.dumps(Whole(name="w")))
    for key in document:
        less = {name: value for name, value in document.items() if name != key}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(less, schema)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"extra": 1}, "extra"),
        ({"name": 7}, "name='7': Input should be a valid string"),
        ({"parts": [{"size": "1"}]}, r"parts\.0\.size"),
        ({"parts": [{"size": -1}]}, r"size=-1\.0: expected a number >= 0"),
        ({"parts": [{"size": 1, "weight": 2}]}, r"parts\.0\.weight"),
        ({"colour": "blue"}, "colour"),
        ({"schema_version": 2}, "schema_version=2: expected 3"),
        ({"schema": "other"}, "expected a document of schema dpsgd-track/whole"),
    ],
    ids=["key", "type", "inner-type", "value", "inner-key", "enum", "version", "schema"],
)
def test_anything_else_is_refused_by_name(changed: dict[str, object], said: str) -> None:
    document = {**json.loads(CODEC.dumps(Whole(name="w"))), **changed}
    with pytest.raises(ValueError, match=said):
        CODEC.loads(json.dumps(document))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", b"\xff"])
def test_what_is_no_document_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="expected"):
        CODEC.loads(text)
