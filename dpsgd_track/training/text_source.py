"""Labelled text from a .jsonl or .csv file. Imports no torch."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from dpsgd_track.config import POISSON, DataConfig, require

CORPORA = ("public-domain",)
"""Bundled corpora by name."""


@dataclass(frozen=True)
class LabelledText:
    """Texts and their classes."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    """Class index of each text."""
    label_names: tuple[str, ...]
    """What the file calls each class, sorted."""

    @property
    def numbers(self) -> tuple[float, ...]:
        """Each text's label as a number, or its class index where one of them is none."""
        try:
            named = [float(name) for name in self.label_names]
        except ValueError:
            named = []
        if not named or not all(map(math.isfinite, named)):
            named = [float(index) for index in range(len(self.label_names))]
        return tuple(named[label] for label in self.labels)


def population_of(data: DataConfig) -> int | None:
    """Samples that Poisson sampling draws from; None where nothing is drawn."""
    if data.sampling != POISSON:
        return None
    return data.dataset_size or len(read_text(data.source).texts)


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
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file) if path.suffix == ".csv" else _json_rows(file, source)
            return _labelled(rows, source)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data={source!r}: expected UTF-8 text with a header. {error}") from None


def _json_rows(lines: Iterable[str], source: str) -> Iterable[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"data={source!r}: expected one JSON object a line. Line {number}: {error}"
            ) from None
        require(isinstance(row, dict), "data", source, f"a JSON object in line {number}")
        yield row


def _labelled(rows: Iterable[dict[str, Any]], source: str) -> LabelledText:
    texts: list[str] = []
    names: list[str] = []
    for number, row in enumerate(rows, start=1):
        text, label = row.get("text"), row.get("label")
        require(
            isinstance(text, str) and bool(text.strip()) and label not in (None, ""),
            "data",
            source,
            f"a non-empty text and a label in row {number}",
            "Name the columns text and label.",
        )
        texts.append(str(text))
        names.append(str(label))
    require(bool(texts), "data", source, "at least one row")
    label_names = tuple(sorted(set(names)))
    require(len(label_names) >= 2, "data", source, f"two classes or more, got {label_names}")
    index = {name: i for i, name in enumerate(label_names)}
    return LabelledText(tuple(texts), tuple(index[name] for name in names), label_names)
