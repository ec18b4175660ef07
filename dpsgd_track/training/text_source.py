"""Labelled text from a .jsonl or .csv file. Imports no torch."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import reprlib
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO, TypeGuard

from dpsgd_track.config import require
from dpsgd_track.text_file import open_text

CORPORA = ("public-domain",)
"""Bundled corpora by name."""

Rows = Iterable[tuple[int, Mapping[str, Any]]]
"""(line in which the row begins, its columns by name)"""

_LARGEST_FLOAT32 = 3.4028234663852886e38
_TRUTH, _NUMBER, _TEXT = "true or false", "a number", "a text"


@dataclass(frozen=True)
class LabelledText:
    """Texts and their classes."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    """Class index of each text."""
    label_names: tuple[str, ...]
    """Names of the classes in the file, sorted."""
    lines: tuple[int, ...] = field(compare=False, repr=False)
    """Line of the file in which each text begins."""
    source: str = field(compare=False)
    """Name of a bundled corpus, or path of the file."""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def numbers(self) -> tuple[float, ...]:
        """Each text's label as a number, or its class index if no label is a number.

        Raises:
            ValueError: only some labels are numbers, or one overflows float32.
        """
        named = [_as_number(name) for name in self.label_names]
        if all(number is None for number in named):
            return tuple(map(float, self.labels))
        numbers = []
        for line, label in zip(self.lines, self.labels, strict=True):
            number = named[label]
            if number is None or abs(number) > _LARGEST_FLOAT32:
                allowed = "a number that float32 holds, as a regression predicts it"
                raise _refused_label(self.source, line, self.label_names[label], allowed)
            numbers.append(number)
        return tuple(numbers)


def read_text(source: str) -> LabelledText:
    """Read `source`: a bundled corpus's name, or a path to a file with `text` and `label`.

    Raises:
        ValueError: the file is missing, malformed, empty, or has a single class.
    """
    if source in CORPORA:
        content = (files("dpsgd_track.training") / "corpora" / f"{source}.jsonl").read_text("utf-8")
        return _labelled(_json_rows(content.splitlines(), source), source)
    path = Path(source).expanduser()
    allowed = f"synthetic, {', '.join(CORPORA)}, or an existing .jsonl or .csv file"
    require(path.suffix in (".jsonl", ".csv") and path.is_file(), "data", source, allowed)
    with open_text("data", path) as file:
        if path.suffix == ".jsonl":
            return _labelled(_json_rows(file, source), source)
        with _fields_of_any_length():
            return _labelled(_csv_rows(file, source), source)


def jsonl_rows(source: str) -> Rows:
    """Rows of a .jsonl file, of any columns.

    Raises:
        ValueError: the file is missing, malformed or empty.
    """
    path = Path(source).expanduser()
    allowed = "synthetic, or an existing .jsonl file"
    require(path.suffix == ".jsonl" and path.is_file(), "data", source, allowed)
    with open_text("data", path) as file:
        rows = list(_json_rows(file, source))
    require(bool(rows), "data", source, "at least one row")
    return rows


def is_text(value: Any) -> TypeGuard[str]:
    """True for text in Unicode that is not empty."""
    return isinstance(value, str) and bool(value.strip()) and _is_unicode(value)


def _json_rows(lines: Iterable[str], source: str) -> Rows:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        # Python also refuses integers of too many digits, and deep nesting.
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"data={source!r}: expected one JSON object a line. Line {number}: {error}"
            ) from None
        require(isinstance(row, dict), "data", source, f"a JSON object in line {number}")
        yield number, row


_LIMIT_OF_FIELDS = threading.Lock()


@contextlib.contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """Lift the process-wide limit on the length of a CSV field, and restore it at the end."""
    # Without the lock, one thread would restore the limit while another reads.
    with _LIMIT_OF_FIELDS:
        before = csv.field_size_limit(sys.maxsize)
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _csv_rows(file: TextIO, source: str) -> Rows:
    is_at_end = False

    def lines() -> Iterator[str]:
        nonlocal is_at_end
        yield from file
        is_at_end = True

    reader = csv.reader(lines())
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            # The reader only asks for a line past the last within quotes. The row would swallow all
            # lines from there on as one text.
            advice = f"The row of line {line} opens a quote that is never closed."
            require(not is_at_end, "data", source, "CSV whose quotes are closed", advice)
            if header and cells:
                yield line, dict(zip(header, cells, strict=False))
            elif cells:
                header = cells
                got = f"The header is {reprlib.repr(header)}. Name the columns text and label."
                has_both = {"text", "label"} <= set(header)
                require(has_both, "data", source, "the columns text and label", got)
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"data={source!r}: expected CSV with a header. Line {line}: {error}"
        ) from None


def _labelled(rows: Rows, source: str) -> LabelledText:
    texts: list[str] = []
    names: list[str] = []
    lines: list[int] = []
    kind = ""
    for line, row in rows:
        text, label = row.get("text"), row.get("label")
        if not is_text(text):
            raise ValueError(
                f"data={source!r}, line {line}, text={reprlib.repr(text)}: expected a text in "
                "Unicode that is not empty. Name the columns text and label."
            )
        kind = kind or _kind(label)
        _check_label(source, line, label, kind, lines[0] if lines else line)
        texts.append(text)
        names.append(_name(label))
        lines.append(line)
    require(bool(texts), "data", source, "at least one row")
    label_names = tuple(sorted(set(names)))
    require(len(label_names) >= 2, "data", source, f"two classes or more, got {label_names}")
    index = {name: i for i, name in enumerate(label_names)}
    labels = tuple(index[name] for name in names)
    return LabelledText(tuple(texts), labels, label_names, tuple(lines), source)


def _check_label(source: str, line: int, label: Any, kind: str, first: int) -> None:
    """Raise unless `label` is valid, and of the same `kind` as the label of line `first`."""
    number = _as_number(label)
    is_finite = number is None or math.isfinite(number)
    is_empty = isinstance(label, str) and not label.strip()
    if not _kind(label) or is_empty or not is_finite:
        allowed = f"{_TEXT} that is not empty, a finite number, or {_TRUTH}, in the column label"
        raise _refused_label(source, line, label, allowed)
    if _kind(label) != kind:
        raise _refused_label(source, line, label, f"{kind}, as in line {first}")


def _refused_label(source: str, line: int, label: Any, allowed: str) -> ValueError:
    # It may be anything, of any length.
    got = reprlib.repr(label)
    return ValueError(
        f"data={source!r}, line {line}, label={got}: expected {allowed}. "
        "Correct the row, or leave it out."
    )


def _kind(label: Any) -> str:
    """Kind of a label; empty if it cannot be a label."""
    if isinstance(label, bool):
        return _TRUTH
    if isinstance(label, int | float):
        return _NUMBER
    return _TEXT if isinstance(label, str) and _is_unicode(label) else ""


def _as_number(label: Any) -> float | None:
    """The number that a label is or spells; None for other labels."""
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    try:
        return float(label)
    except ValueError:
        return None
    except OverflowError:  # an integer
        return math.inf


def _name(label: Any) -> str:
    """Name of a label's class: 1 and 1.0 are the same number, and the same class."""
    is_whole = isinstance(label, float) and label.is_integer()
    return str(int(label) if is_whole else label)


def _is_unicode(text: str) -> bool:
    r"""True without lone surrogates, such as JSON's "\ud83d", which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
