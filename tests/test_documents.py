"""The README and the pages: every block runs or is read by what reads it, and links hold."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cyclopts import CycloptsError

from dpsgd_track.cli.options import parser_of
from dpsgd_track.cli.verbs import VERBS
from dpsgd_track.comparison.waivers import load_waivers
from dpsgd_track.mutants.catalogue import KINDS
from dpsgd_track.mutants.mutant import MUTANTS
from tests.support import ROOT, document_commands
from tests.support.document_names import GIVEN
from tests.support.documents import (
    MADE_BY_PROGRAMS,
    OTHERS,
    PAGES,
    Block,
    blocks,
    blocks_of,
    name_of,
    prose,
    spans,
)

NOT_RUN = {
    "dpsgd-track ui": "serves until it is stopped",
    ". .venv/bin/activate": "changes the shell it is typed in",
    "python -m pytest": "runs these tests",
    "dpsgd-track sync GROUP --tracking-uri http://host:5000": "needs a server of that address",
    "dpsgd-track full --model-name org/model --data mine.csv": "needs a model of the hub",
}
"""Lines that are not run, and why; those of this program are parsed all the same."""
_PROGRAMS = {
    ("dpsgd-track",): None,
    ("python", "launch.py"): None,
    ("python", "-m", "dpsgd_track"): None,
    ("python", "compare.py"): "compare",
}
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
BLOCKS = [block for path in PAGES for block in blocks(path)]


def of_language(language: str) -> dict[str, list[Block]]:
    """The pages that have blocks in `language`, each with its own in their order."""
    by_page: dict[str, list[Block]] = {}
    for block in BLOCKS:
        if block.language == language:
            by_page.setdefault(block.page, []).append(block)
    return by_page


PYTHON, COMMANDS = of_language("python"), of_language("")


def in_program(line: str) -> list[str] | None:
    """Verb and options of a line that calls the program, else None."""
    for program, verb in _PROGRAMS.items():
        if tuple(line.split()[: len(program)]) == program:
            words = shlex.split(line, comments=True)
            return ([verb] if verb else []) + words[len(program) :]
    return None


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


def lines_of_code(path: Path) -> Iterator[str]:
    """Lines of blocks in no language, and code within sentences, where pages give commands too."""
    for block in COMMANDS.get(name_of(path), []):
        yield from block.lines()
    for line in spans(path):
        # A sentence may name a verb without what it takes.
        yield f"{line} --help" if re.fullmatch(r"dpsgd-track \S+", line) else line


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_command_is_one_that_the_program_takes(path: Path) -> None:
    commands = filter(None, map(in_program, lines_of_code(path)))
    refused = {" ".join(words): why for words in commands if (why := refusal(words))}
    assert refused == {}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with groups, and with the mode that a page tells to save there."""
    (mode,) = PYTHON["docs/write.md"]
    (waivers,) = of_language("yaml")["docs/results.md"]
    here = document_commands.furnish(tmp_path_factory.mktemp("pages"), mode.text, waivers.text)
    with document_commands.in_folder(here):
        # Pages compare the file that others make.
        assert document_commands.run("dpsgd-track compare june --export golden.dpsgd", here) == ""
        (here / "golden.dpsgd").rename(here / "made.dpsgd")
        yield here


_has_run: set[str] = set()


def wrong_lines(block: Block, here: Path) -> dict[str, str]:
    """Lines of a block that fail, and why; each line is run once."""
    wrong = {}
    for line in block.lines():
        if line in NOT_RUN or line in _has_run:
            continue
        if "--export" not in line and not (here / "golden.dpsgd").exists():
            (here / "golden.dpsgd").write_bytes((here / "made.dpsgd").read_bytes())
        if "--export" in line:
            (here / "golden.dpsgd").unlink(missing_ok=True)
        _has_run.add(line)
        if problem := document_commands.run(line, here):
            wrong[line] = problem
    return wrong


@pytest.mark.parametrize("page", COMMANDS)
def test_every_line_of_a_block_runs(page: str, workspace: Path) -> None:
    assert {b.title: w for b in COMMANDS[page] if (w := wrong_lines(b, workspace))} == {}


def failure(block: Block, names: dict[str, Any]) -> str:
    """Sentence on the exception that a block of Python raises; empty if it runs."""
    context: Any = names.pop("context", contextlib.nullcontext())
    tests = {name for name in names if name.startswith("test_")}
    try:
        with context:
            exec(compile(block.text, block.title, "exec"), names)
            for name in [n for n in names if n.startswith("test_") and n not in tests]:
                names[name]()
    except Exception as error:
        return f"{block.title}: {type(error).__name__}: {error}"
    return ""


@pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:Secure RNG turned off")
@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha", "ignore:Full backward")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("page", PYTHON)
def test_code_runs_block_after_block(page: str, workspace: Path) -> None:
    names: dict[str, Any] = {"__name__": page}
    with mock.patch.dict(MUTANTS, clear=True):
        for number, block in enumerate(PYTHON[page]):
            names |= GIVEN.get((page, number), lambda _folder: {})(workspace)
            assert failure(block, names) == ""


def _waivers(_block: Block, here: Path) -> str:
    return "" if load_waivers(here / "waivers.yaml") else "has no waiver"


def _golden_lines(block: Block, here: Path) -> str:
    """Error unless the golden file in text has such lines, with any numbers."""
    text = here / "golden.dpsgd.json"
    if not text.exists():
        document_commands.run(f"dpsgd-track compare june --export {text.name}", here)
    there = {re.sub(r"[\d.]+", "N", line.strip()) for line in text.read_text().splitlines()}
    shown = {re.sub(r"[\d.]+", "N", line[1:].strip()) for line in block.text.splitlines()}
    return "" if shown <= there else f"{shown - there} is not in a golden file"


def _coverage(block: Block, _here: Path) -> str:
    """Error unless each class of faults has as many as the output says."""
    said = dict(re.findall(r"(?m)^(\w+): \d+ of (\d+) would be found", block.text))
    kinds = [mutant.kind for mutant in MUTANTS.values()]
    wrong = {kind for kind, number in said.items() if kinds.count(kind) != int(number)}
    assert set(said) <= set(KINDS)
    return "" if said and not wrong else f"{wrong} have other numbers of faults"


READERS: dict[tuple[str, str], Callable[[Block, Path], str]] = {
    ("docs/results.md", "diff"): _golden_lines,
    ("docs/results.md", "yaml"): _waivers,
    ("docs/write.md", "text"): _coverage,
}
"""By page and language: readers of blocks that are neither Python nor commands."""


def read_by_its_reader(block: Block, here: Path) -> str:
    """Error of a block of another language; empty if its reader takes it."""
    reader = READERS.get((block.page, block.language))
    return reader(block, here) if reader else f"nothing reads {block.language}"


def test_blocks_in_other_languages_are_what_their_readers_take(workspace: Path) -> None:
    others = [block for block in BLOCKS if block.language not in ("", "python")]
    wrong = {b.title: w for b in others if (w := read_by_its_reader(b, workspace))}
    assert wrong == {}
    assert {(block.page, block.language) for block in others} == set(READERS)


def test_what_is_not_run_is_on_a_page() -> None:
    lines = {line for page in COMMANDS.values() for block in page for line in block.lines()}
    assert set(NOT_RUN) <= lines
    numbers = {(page, number) for page, found in PYTHON.items() for number in range(len(found))}
    assert set(GIVEN) <= numbers


def test_broken_blocks_are_found(workspace: Path) -> None:
    text = (
        "```python\nx = 1\nassert x == 2\n```\n\n```\ndpsgd-track compare none\nls\n"
        "dpsgd-track quick --mode no_such_mode\nmake no-such-target\n"
        "python benchmarks/tracking_scale.py\n"
        "tags.x ='\nexport MLFLOW_NO_SUCH=1\nmlflow server --no-such\n```\n\n```json\n{}\n```\n"
    )
    python, commands, json = blocks_of("docs/new.md", text)
    assert "AssertionError" in failure(python, {})
    assert set(wrong_lines(commands, workspace)) == set(commands.lines())
    assert read_by_its_reader(json, workspace) == "nothing reads json"
    assert "verb" in refusal(["compar", "latest"])
    assert "no-such-option" in refusal(["quick", "--no-such-option"])


def anchors(path: Path) -> set[str]:
    """Anchors that GitHub and the site give the headings of a page, and those in the text."""
    headings = re.findall(r"(?m)^#+ (.*)$", prose(path))
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)"', path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", [*PAGES, *OTHERS], ids=name_of)
def test_links_hold(path: Path) -> None:
    broken = []
    for link, picture in _LINK.findall(prose(path)):
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
