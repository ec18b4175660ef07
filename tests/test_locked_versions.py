"""What is installed is locked by hashes: the versions of constraints.txt, all but torch."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from tests.support import ROOT

LOCKS = ("requirements.lock", "requirements-dev.lock")
DOCS = "requirements-docs.lock"
"""Of the site's tools alone, which `constraints.txt` does not name."""
_PIN = re.compile(r"([\w-]+)==(\S+)")
_LOCKED = re.compile(
    r"(?P<name>[\w-]+)==(?P<version>\S+)( ; .*)?(?P<hashes>( \\\n    --hash=sha256:[0-9a-f]{64})+)"
)


def pins() -> dict[str, str]:
    """Versions of constraints.txt by name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(_PIN.fullmatch(line).groups() for line in lines if line and line[0] != "#")


def locked(name: str) -> list[tuple[str, str]]:
    """Names and versions in a lock, each with at least one hash."""
    text = (ROOT / name).read_text(encoding="utf-8")
    rest = _LOCKED.sub("", text)
    assert all(line.startswith("#") for line in rest.splitlines() if line), rest
    return [(each["name"], each["version"]) for each in _LOCKED.finditer(text)]


def test_every_version_but_that_of_torch_is_locked_once() -> None:
    both = [each for name in LOCKS for each in locked(name)]
    assert max(Counter(both).values()) == 1
    # Each index has builds of torch of its own: no list of hashes fits every machine.
    assert dict(both) == {name: pin for name, pin in pins().items() if name != "torch"}


@pytest.mark.parametrize("name", LOCKS)
def test_set_up_installs_the_locked_files_alone_before_anything_else(name: str) -> None:
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "--no-deps --require-hashes" in recipe
    locking = recipe.index(f"$(LOCKED) -r {name}")
    assert recipe.index("$(INSTALL) --no-build-isolation", locking) > locking


def test_the_tools_of_the_site_are_locked_beside_the_others() -> None:
    names = {name for name, _ in locked(DOCS)}
    assert {"mkdocs", "mkdocs-material", "mkdocstrings-python"} <= names
    assert not names & set(pins())
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"$(LOCKED) -r {DOCS}" in recipe
