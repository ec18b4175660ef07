"""Imports point downward only, the comparing half needs no torch, and tests stand alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LONGEST

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dpsgd_track"
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# What each room may import, besides itself.
ALLOWED: dict[str, set[str]] = {
    "text_file": set(),
    "redaction": set(),
    "visible_text": set(),
    "yaml_file": {"text_file"},
    "config": {"redaction", "yaml_file"},
    "program": {"redaction"},
    "demands": {"config"},
    "step_metrics": set(),
    "kernels": set(),
    "distributed": {"config"},
    "privacy": {"config", "distributed", "kernels"},
    "modes": {"config", "demands", "distributed", "privacy"},
    "library": {"config", "distributed", "modes", "privacy", "step_metrics"},
    "trainer": {"config", "distributed", "library", "privacy", "step_metrics"},
    "testing": {"config", "demands", "distributed", "modes", "privacy"},
    "record": {"config", "demands", "program"},
    "store": {"config", "program", "record", "redaction"},
    "training": {
        "config",
        "demands",
        "distributed",
        "kernels",
        "modes",
        "privacy",
        "record",
        "store",
        "text_file",
    },
    "launcher": {
        "config",
        "demands",
        "modes",
        "program",
        "record",
        "redaction",
        "store",
        "training",
        "visible_text",
    },
    "comparison": {"config", "demands", "modes", "record", "store", "yaml_file"},
    "report": {
        "comparison",
        "config",
        "modes",
        "record",
        "step_metrics",
        "store",
        "visible_text",
    },
    "mutants": {
        "comparison",
        "config",
        "demands",
        "distributed",
        "kernels",
        "modes",
        "privacy",
        "program",
        "record",
        "report",
        "store",
        "training",
    },
    "__main__": {"cli", "program"},
    "cli": {
        "comparison",
        "config",
        "launcher",
        "modes",
        "mutants",
        "program",
        "record",
        "redaction",
        "report",
        "store",
        "testing",
        "training",
        "visible_text",
    },
}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _files(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


def test_every_room_has_its_rule() -> None:
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__"} <= set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_downward(room: str) -> None:
    for path in _files(room):
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "dpsgd_track" and len(parts) > 1 and parts[1] in ALLOWED:
                assert parts[1] in ALLOWED[room] | {room}, f"{path.name} imports {name}"
            assert parts[0] not in ("launch", "compare"), f"{path.name} imports an entry point"


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "misc"])
def test_no_module_without_a_subject(name: str) -> None:
    assert not list(PACKAGE.rglob(f"{name}.py"))


LIGHT = (
    "dpsgd_track.comparison",
    "dpsgd_track.report.write",
    "dpsgd_track.store.reader",
    "dpsgd_track.modes.table",
    "dpsgd_track.cli.options",
    "dpsgd_track.training.preflight",
)


def test_the_light_half_imports_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'opacus'}"
    code = f"import sys\nimport {', '.join(LIGHT)}\nassert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_test_files_that_start_first_are_there() -> None:
    names = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    assert set(LONGEST) <= names


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_what_tests_share_is_in_support(path: Path) -> None:
    """No test module imports another one, and none takes a private name of what is shared."""
    for name in _imports(path):
        assert not name.startswith("tests.test_"), f"{path.name} imports {name}"
        is_shared = name.startswith(("tests.", "benchmarks."))
        assert not (is_shared and "._" in name), f"{path.name} imports {name}"


def _patched(path: Path) -> Iterator[str]:
    """Private names that a file sets on what it imports, by `setattr` or by their dotted path."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "patch")):
            texts = [a.value for a in node.args[:2] if isinstance(a, ast.Constant)]
            names = [text.split(".")[-1] for text in texts if isinstance(text, str)]
            yield from (name for name in names if name[0] == "_" and name[:2] != "__")


def test_what_a_test_changes_is_a_parameter_or_has_a_public_name() -> None:
    assert not {(path.name, name) for path in TESTS for name in _patched(path)}


SOURCES = sorted(PACKAGE.rglob("*.py"))
JUDGING = [path for room in ("comparison", "report", "mutants") for path in _files(room)]
"""Of rooms that decide by what a run left."""
WORDS = {"reason", "message", "sentence", "advice", "title", "note"}
"""Names of what is said to people."""
LONGEST_FUNCTION = 60


def _name_of(node: ast.AST) -> str:
    """The last name of `a.b.c`, of `a.b.c()` and of `str(a.b.c)`."""
    if isinstance(node, ast.Call):
        is_text = isinstance(node.func, ast.Name) and node.func.id == "str" and node.args
        return _name_of(node.args[0] if is_text else node.func)
    if isinstance(node, ast.Attribute):
        # What a method makes of words is still words.
        of = _name_of(node.value)
        return of if of in WORDS else node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _decided_by_words(tree: ast.AST) -> Iterator[int]:
    """Lines in which words are looked for in what is said to people."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            looks = (
                (left, right)
                for left, op, right in zip(
                    [node.left, *node.comparators], node.ops, node.comparators, strict=False
                )
                if isinstance(op, ast.In | ast.NotIn)
            )
            if any(
                isinstance(left, ast.Constant | ast.Name | ast.Attribute)
                and _name_of(right) in WORDS
                for left, right in looks
            ):
                yield node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            looked_in = [_name_of(each) for each in node.args]
            if node.func.attr in ("startswith", "endswith", "find", "index"):
                looked_in = [_name_of(node.func.value)]
            elif node.func.attr not in ("search", "match", "fullmatch", "findall"):
                continue
            if WORDS & set(looked_in):
                yield node.lineno


def _dotted_keys(tree: ast.AST) -> Iterator[int]:
    """Lines in which a setting is looked up as `"a.b"` in a flat table."""
    for node in ast.walk(tree):
        key = None
        if isinstance(node, ast.Subscript):
            key = node.slice
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".get", ".pop")):
            key = next(iter(node.args), None)
        text = key.value if isinstance(key, ast.Constant) else None
        if isinstance(text, str) and "." in text and all(map(str.isidentifier, text.split("."))):
            yield node.lineno


@pytest.mark.parametrize(
    "text",
    [
        'found = "oom" in run.reason',
        "found = WORD not in str(failure.message)",
        "found = re.search(PATTERN, finding.sentence)",
        'found = run.reason.lower().startswith("oom")',
    ],
)
def test_a_decision_by_words_is_seen(text: str) -> None:
    assert list(_decided_by_words(ast.parse(text))) == [1]


@pytest.mark.parametrize("text", ['params.get("regime.seed")', 'params["data.batch_size"]'])
def test_a_dotted_key_is_seen(text: str) -> None:
    assert list(_dotted_keys(ast.parse(text))) == [1]


def test_nothing_is_decided_by_what_is_said_to_people() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in JUDGING
        for line in _decided_by_words(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert not found


def test_settings_are_read_as_fields() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in SOURCES
        for line in _dotted_keys(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert not found


def test_parsed_arguments_have_a_type_of_their_own() -> None:
    for path in SOURCES:
        assert "argparse" not in set(_imports(path)), path


def test_functions_fit_a_screen() -> None:
    """Their docstrings apart."""
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    lines -= first.end_lineno - first.lineno + 1
                long[f"{path.relative_to(PACKAGE)}:{node.name}"] = lines
    assert {name: lines for name, lines in long.items() if lines > LONGEST_FUNCTION} == {}
