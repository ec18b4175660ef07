"""Words with a label each, from a .jsonl file. Imports no torch."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

from dpsgd_track.training.text_source import is_text, jsonl_rows


@dataclass(frozen=True)
class TaggedText:
    """Sequences of words, each with a class."""

    words: tuple[tuple[str, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    """Class index of each word."""
    label_names: tuple[str, ...]
    """Names of the classes in the file, sorted."""

    def __len__(self) -> int:
        return len(self.words)


def read_tagged(source: str) -> TaggedText:
    """Read rows `{"tokens": [...], "labels": [...]}`, or `{"text": "...", "labels": [...]}` with a
    label for each word of the text, which spaces separate.

    Raises:
        ValueError: the file is missing, malformed or empty, or has a single class.
    """
    words: list[tuple[str, ...]] = []
    named: list[tuple[str, ...]] = []
    for line, row in jsonl_rows(source):
        words.append(_words(source, line, row))
        named.append(_labels(source, line, row.get("labels"), len(words[-1])))
    label_names = tuple(sorted({name for row in named for name in row}))
    if len(label_names) < 2:
        raise ValueError(f"data={source!r}: expected two classes or more, got {label_names}.")
    index = {name: number for number, name in enumerate(label_names)}
    labels = tuple(tuple(index[name] for name in row) for row in named)
    return TaggedText(tuple(words), labels, label_names)


def _words(source: str, line: int, row: Any) -> tuple[str, ...]:
    tokens = row.get("tokens")
    if tokens is None and isinstance(row.get("text"), str):
        tokens = row["text"].split()
    if not isinstance(tokens, list) or not tokens or not all(map(is_text, tokens)):
        raise ValueError(
            f"data={source!r}, line {line}, tokens={reprlib.repr(tokens)}: expected a list of "
            "words in Unicode, none empty. Name the columns tokens and labels, or text and labels."
        )
    return tuple(tokens)


def _labels(source: str, line: int, labels: Any, num_words: int) -> tuple[str, ...]:
    is_list = isinstance(labels, list) and len(labels) == num_words
    if not is_list or not all(is_text(x) or type(x) is int for x in labels):
        raise ValueError(
            f"data={source!r}, line {line}, labels={reprlib.repr(labels)}: expected {num_words} "
            "labels, a text or an integer for each word. Correct the row, or leave it out."
        )
    return tuple(map(str, labels))
