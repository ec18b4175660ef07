"""The page of findings is made of commands that can be run, and of nothing that was not said."""

from __future__ import annotations

import re
import shlex

import pytest

from benchmarks.findings import ADAPTERS, FINDINGS, Finding, Reproduced, page
from dpsgd_track.launcher.suites import split_names
from tests.support.planned import parsed


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda f: f"{f.library}-{f.what[:40]}")
def test_every_command_is_one_and_its_words_are_a_pattern(finding: Finding) -> None:
    verb, *words = shlex.split(finding.command)
    options = parsed(verb, *words)["options"]
    for mode in split_names(options.what.mode):
        module, colon, factory = mode.partition(":")
        if colon and module != "opacus":
            code = (ADAPTERS / f"{module}.py").read_text(encoding="utf-8")
            assert re.search(rf"^class {factory}\b", code, re.MULTILINE)
    re.compile(finding.said)


def test_what_was_not_said_is_not_on_the_page() -> None:
    defect, other, *_ = (f for f in FINDINGS if not f.is_healthy)
    healthy = next(f for f in FINDINGS if f.is_healthy)
    results = [
        Reproduced(defect, "ghost  | wrong norms"),
        Reproduced(other, ""),
        Reproduced(healthy, "PASS: all"),
    ]
    text = page(results, {})
    assert "1 defects of 1 libraries." in text
    assert (
        f"| defect | {defect.what} | ghost wrong norms | `dpsgd-track {defect.command}` |" in text
    )
    assert f"| {other.what} |" not in text
    assert "| healthy |" in text
