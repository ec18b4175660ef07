"""The README and the pages: their commands parse, their code runs, their links hold."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import CycloptsError

from dpsgd_track.cli.options import parser_of
from dpsgd_track.cli.verbs import VERBS
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
RUN = ("README.md", "docs/train.md", "docs/write.md", "docs/library.md")
"""Pages whose code is run, block after block."""
_BLOCK = re.compile(r"(?ms)^```(\w*)\n(.*?)^```$")
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_PROGRAMS = {
    ("dpsgd-track",): None,
    ("python", "launch.py"): None,
    ("python", "-m", "dpsgd_track"): None,
    ("python", "compare.py"): "compare",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> Iterator[str]:
    for found, text in _BLOCK.findall(path.read_text(encoding="utf-8")):
        if found == language:
            yield text


def lines_of_code(path: Path) -> Iterator[str]:
    """Lines of blocks in no language, and code within sentences, where pages give commands too."""
    for text in blocks(path, ""):
        yield from text.replace("\\\n", " ").splitlines()
    if path.name not in MADE_BY_PROGRAMS:
        for span in _SPAN.findall(_BLOCK.sub("", path.read_text(encoding="utf-8"))):
            line = " ".join(span.split())
            # A sentence may name a verb without what it takes.
            yield f"{line} --help" if re.fullmatch(r"dpsgd-track \S+", line) else line


def commands(path: Path) -> Iterator[list[str]]:
    """Verb and options of each line of code that calls the program."""
    for line in lines_of_code(path):
        line = re.sub(r"^\s*([A-Z_]+=\S+\s+)*", "", line)
        for program, verb in _PROGRAMS.items():
            if tuple(line.split()[: len(program)]) == program:
                words = shlex.split(line, comments=True)
                yield ([verb] if verb else []) + words[len(program) :]


def refusal(words: list[str]) -> str:
    """Sentence of the parser on a command; empty if it takes it."""
    if not words or words[0].startswith("-") or words[0] == "VERB":
        return ""
    if words[0] not in VERBS:
        return f"{words[0]} is no verb"
    if words[1:] in (["--help"], ["--help-all"]):
        return ""
    # A page may leave out what it has said before.
    given = [word for word in words[1:] if word != "..."]
    try:
        parser_of(VERBS[words[0]].run).parse_args(
            given, print_error=False, exit_on_error=False, help_on_error=False
        )
    except CycloptsError as error:
        return str(error)
    return ""


def anchors(path: Path) -> set[str]:
    """Anchors that GitHub and the site give the headings of a page, and those in the text."""
    text = path.read_text(encoding="utf-8")
    prose = _BLOCK.sub("", text)
    headings = re.findall(r"(?m)^#+ (.*)$", prose)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_command_is_one_that_the_program_takes(path: Path) -> None:
    refused = {" ".join(words): why for words in commands(path) if (why := refusal(words))}
    assert refused == {}


def test_commands_that_the_program_does_not_take_are_found() -> None:
    assert "verb" in refusal(["compar", "latest"])
    assert "no-such-option" in refusal(["quick", "--no-such-option"])
    assert len(list(commands(ROOT / "docs/write.md"))) > 5


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_all_python_parses(path: Path) -> None:
    for text in blocks(path, "python"):
        ast.parse(text)


def context_of(name: str) -> dict[str, object]:
    """What the code of a page takes as given."""
    names: dict[str, object] = {"__name__": name}
    if name == "docs/library.md":
        tutorial = next(blocks(ROOT / "docs/train.md", "python"))
        exec(tutorial, names)
        names |= {"x": names["batch_x"], "y": names["batch_y"]}
    return names


@pytest.mark.parametrize("name", RUN)
def test_code_runs_block_after_block(name: str) -> None:
    names = context_of(name)
    # `test_trainer` runs what takes transformers' Trainer.
    texts = [text for text in blocks(ROOT / name, "python") if "PrivateTrainer" not in text]
    assert texts
    for index, text in enumerate(texts):
        exec(compile(text, f"{name}, block {index + 1}", "exec"), names)


@pytest.mark.parametrize("path", [*PAGES, *OTHERS], ids=name_of)
def test_links_hold(path: Path) -> None:
    broken = []
    for link, picture in _LINK.findall(_BLOCK.sub("", path.read_text(encoding="utf-8"))):
        target, _, anchor = (link or picture).partition("#")
        if re.match(r"\w+:", target):
            continue
        file = (path.parent / target).resolve() if target else path
        is_there = file.exists()
        if not is_there or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(link or picture)
    assert broken == []


def test_the_readme_and_the_pages_are_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900
    sizes = {path.name: path.stat().st_size for path in PAGES if path.name not in MADE_BY_PROGRAMS}
    assert {name: size for name, size in sizes.items() if size > 12_000} == {}


def test_the_site_has_every_page() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [p.name for p in PAGES if p.parent.name == "docs" and f": {p.name}\n" not in nav]
    assert missing == []
