"""Pairs of a source and a target text, from a .jsonl file. Imports no torch."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

from dpsgd_track.training.text_source import is_text, jsonl_rows


@dataclass(frozen=True)
class TextPairs:
    """Source texts, and the texts that a model shall write for them."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sources)


def read_pairs(source: str) -> TextPairs:
    """Read rows `{"source": "...", "target": "..."}`.

    Raises:
        ValueError: the file is missing, malformed or empty.
    """
    sources: list[str] = []
    targets: list[str] = []
    for line, row in jsonl_rows(source):
        for name, texts in (("source", sources), ("target", targets)):
            text = row.get(name)
            if not is_text(text):
                raise ValueError(
                    f"data={source!r}, line {line}, {name}={reprlib.repr(text)}: expected a text "
                    "in Unicode that is not empty. Name the columns source and target."
                )
            texts.append(text)
    return TextPairs(tuple(sources), tuple(targets))
