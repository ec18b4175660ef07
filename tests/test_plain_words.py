"""Nothing opens like a riddle: sentences, headings and docstrings name their subject first."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.documents import OTHERS, PAGES, name_of, prose

_WORDS = "What|Whether|How(?! to)|Why|Which|Who|Whose"
RIDDLE = re.compile(rf"({_WORDS})\b")
_BEGINNING = r"^(?:#+ |\s*[-*] |\s*\d+\. |> )?|[.:!?]\s+|\| "
_OPENING = re.compile(rf"(?m)(?:{_BEGINNING})\**((?:{_WORDS})\b[^.?!|\n]*)([.?!]?)")
"""A sentence, heading, list item or cell that opens in one of these words, and its last sign."""
PROGRAMS = sorted(
    path
    for folder in ("dpsgd_track", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
)


def riddles(text: str) -> list[str]:
    """Openings of prose that are neither plain nor a question."""
    return [found for found, end in _OPENING.findall(text) if end != "?"]


def strings(source: str) -> Iterator[str]:
    """Docstrings of a module, and of what is in it: functions, classes, fields and constants."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield text.strip()


@pytest.mark.parametrize("path", [*PAGES, *OTHERS, ROOT / "CHANGELOG.md"], ids=name_of)
def test_no_sentence_of_a_page_opens_like_a_riddle(path: Path) -> None:
    assert riddles(prose(path)) == []


def test_no_docstring_opens_like_a_riddle() -> None:
    found = {
        f"{name_of(path)}: {text.splitlines()[0]}"
        for path in PROGRAMS
        for text in strings(path.read_text(encoding="utf-8"))
        if RIDDLE.match(text)
    }
    assert found == set()


def test_riddles_are_found() -> None:
    page = "# What is lost\n\nA sum. Whether it fits. Who asks? What is it?\n\n- **How** much\n"
    assert riddles(page) == ["What is lost", "Whether it fits", "How** much"]
    source = 'A = 1\n"""What it is."""\nclass B:\n    """A class."""\n'
    assert [text for text in strings(source) if RIDDLE.match(text)] == ["What it is."]
