"""The README and the pages, read: blocks of code, and commands in blocks and sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

MADE_BY_PROGRAMS = {
    "coverage.md",
    "detection.md",
    "detection-bf16.md",
    "findings.md",
    "power.md",
    "tracking_faults.md",
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")]
_BLOCK = re.compile("(?ms)^```(\\w*)\n(.*?)^```$")
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_ASSIGNMENTS = re.compile(r"^\s*([A-Z_]+=\S+\s+)*(?=[a-z])")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: str
    number: int
    """Position on the page, from 0."""
    language: str
    text: str

    @property
    def title(self) -> str:
        return f"{self.page}, block {self.number}"

    def lines(self) -> list[str]:
        """Commands, one a line, without comments and without variables set in front."""
        text = self.text.replace("\\\n", " ")
        uncommented = (re.sub(r"(^|\s)#.*", "", line).rstrip() for line in text.splitlines())
        return [_ASSIGNMENTS.sub("", line) for line in uncommented if line]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks_of(page: str, text: str) -> list[Block]:
    """The blocks of a page with the content `text`."""
    found = enumerate(_BLOCK.findall(text))
    return [Block(page, number, language, content) for number, (language, content) in found]


def blocks(path: Path) -> list[Block]:
    return blocks_of(name_of(path), path.read_text(encoding="utf-8"))


def prose(path: Path) -> str:
    """The page without its blocks."""
    return _BLOCK.sub("", path.read_text(encoding="utf-8"))


def spans(path: Path) -> Iterator[str]:
    """Code within sentences, each on one line; pages that programs make quote none to type."""
    if path.name not in MADE_BY_PROGRAMS:
        for span in _SPAN.findall(prose(path)):
            yield _ASSIGNMENTS.sub("", " ".join(span.split()))
