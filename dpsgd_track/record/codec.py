"""Serialisation of dataclasses, generated from their types.

A document is a JSON object: `schema` and `schema_version`, then the fields of a dataclass. pydantic
derives the encoder, the decoder and the JSON schema from the annotations, so that renaming a field
renames it in all three.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Value = TypeVar("Value")

_CONFIG = {
    "extra": "forbid",
    "strict": True,
    # JSON has no literals for NaN and infinities: `NaN`, as Python's own codec writes it.
    "ser_json_inf_nan": "constants",
    "use_attribute_docstrings": True,
    # Every field is written, defaults included.
    "json_schema_serialization_defaults_required": True,
}


class Codec(Generic[Value]):
    """Encodes and decodes one dataclass."""

    def __init__(self, cls: type[Value], schema: str, version: int) -> None:
        """
        Args:
            schema: name of the document, such as `dpsgd-track/plan`.
            version: raised with every change that an older program would misread.
        """
        self._cls = cls
        self.schema, self.version = schema, version

    @cached_property
    def _adapter(self) -> TypeAdapter[Value]:
        # Importing pydantic takes a tenth of a second, which `--help` does without.
        from pydantic import TypeAdapter

        for each in _dataclasses_in(self._cls):
            each.__pydantic_config__ = _CONFIG  # type: ignore[attr-defined]
        return TypeAdapter(self._cls)

    def dumps(self, value: Value, *, indent: int | None = None) -> str:
        """`value` as a JSON document; equal values give equal text."""
        fields = self._adapter.dump_python(value, mode="json")
        document = {"schema": self.schema, "schema_version": self.version, **fields}
        return json.dumps(document, indent=indent)

    def loads(self, text: str | bytes) -> Value:
        """The value that `dumps` encoded.

        Raises:
            ValueError: the text is something else, or of another version; a one-sentence message.
        """
        try:
            document = json.loads(text)
        # RecursionError: nested without end.
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected {self.schema} as JSON. {error}") from None
        if not isinstance(document, dict) or document.get("schema") != self.schema:
            raise ValueError(f"expected a document of schema {self.schema}.")
        version = document.pop("schema_version", None)
        del document["schema"]
        if version != self.version:
            raise ValueError(
                f"schema_version={version!r}: expected {self.version} of {self.schema}. Use the "
                "version of dpsgd-track that wrote it."
            )
        from pydantic import ValidationError

        try:
            return self._adapter.validate_json(json.dumps(document))
        except ValidationError as error:
            raise ValueError(f"{self.schema}: {_first_of(error)}") from None

    def json_schema(self) -> dict[str, Any]:
        """JSON schema (2020-12) of the document."""
        schema = self._adapter.json_schema(mode="serialization")
        _describe_inherited(self._cls, schema)
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        schema["properties"] = {
            "schema": {"const": self.schema},
            "schema_version": {"const": self.version},
            **schema["properties"],
        }
        schema["required"] = ["schema", "schema_version", *schema.get("required", ())]
        return schema


def _dataclasses_in(annotation: Any) -> Iterator[type]:
    """Every dataclass that a value of the type `annotation` may hold, itself included."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        yield annotation
        yield from filter(dataclasses.is_dataclass, annotation.__mro__[1:])
        hints = typing.get_type_hints(annotation)
        for field in dataclasses.fields(annotation):
            yield from _dataclasses_in(hints[field.name])
    for argument in typing.get_args(annotation):
        yield from _dataclasses_in(argument)


def _describe_inherited(cls: type, schema: dict[str, Any]) -> None:
    """Add to `schema` the field docstrings of base classes; pydantic reads each class alone."""
    from pydantic import TypeAdapter

    schemas = {cls.__name__: schema, **schema.get("$defs", {})}
    for each in filter(lambda known: known.__name__ in schemas, _dataclasses_in(cls)):
        for base in filter(dataclasses.is_dataclass, each.__mro__[1:]):
            for name, field in TypeAdapter(base).json_schema()["properties"].items():
                if description := field.get("description"):
                    schemas[each.__name__]["properties"][name].setdefault(
                        "description", description
                    )


def _first_of(error: Any) -> str:
    """The first problem: the field, and its expected value."""
    first, *more = error.errors(include_url=False)
    place = ".".join(map(str, first["loc"])) or "document"
    problem = f"{place}={str(first.get('input'))[:80]!r}: {first['msg']}"
    return problem + (f" (and {len(more)} more)" if more else "") + "."
